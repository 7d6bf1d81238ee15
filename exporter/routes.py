"""Ways to a device's compute, and the rules that stand against them: `rules.toml` as data, and how it is read.

A route is a format and what computes for it. Rules compare facts about a device, a model and this computer (`describe`)
with what the table asks for; no rule is code, and none knows a device by its name.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from exporter.architecture import Architecture
from exporter.errors import UsageError
from exporter.npu import ane, exynos, hexagon
from profiles import Chip, Device
from runtimes import extras
from runtimes.bundle import Choice
from runtimes.engines import ENGINES

Facts = Mapping[str, Any]
_STATES = {"ios": 18, "macos": 15}  # the first version of the system with states in Core ML


@dataclass(frozen=True)
class Entry:
    """A row of `rules.toml`: what it says, and who says so."""

    id: str
    says: str
    source: str


@dataclass(frozen=True)
class Rule(Entry):
    """What stands against some routes, and what comes of it."""

    routes: tuple[str, ...]
    effect: Literal["forbids", "slower", "absent", "later"]
    unless: Mapping[str, Any] | None

    def stands(self, facts: Facts) -> bool:
        """Whether it stands against its routes where these are the facts; one that is not known lets it fall."""
        if self.unless is None:
            return True
        return not all(name not in facts or _met(facts[name], asked) for name, asked in self.unless.items())

    def reason(self, facts: Facts) -> str:
        """What it says of these facts; what is not known of a chip is called so."""
        return self.says.format_map(_Named(facts))


@dataclass(frozen=True)
class Planned(Entry):
    """A scheme, or a shipped `recipe`, that is planned when none is asked for."""

    scheme: str
    recipe: bool = False


@dataclass(frozen=True)
class Route(Entry):
    """A format and its delegate ("" for a format that has none; both "" where nothing is exported).

    `npu`, `os`: the kind of NPU and the systems that a device must have for the route to concern it, "" and () concern
    all. `asked`: taken only if it is asked for. `small`, `large`: what is planned by the model's size, in order.
    `takes`: the schemes that are offered on it, () for all that the delegate has; `static`: whether its values between
    products are integers with ranges that are known before, None where that does not matter.
    """

    title: str
    format: str = ""
    delegate: str = ""
    npu: str = ""
    os: tuple[str, ...] = ()
    asked: bool = False
    small: tuple[Planned, ...] = ()
    large: tuple[Planned, ...] = ()
    takes: tuple[str, ...] = ()
    static: bool | None = None

    def concerns(self, facts: Facts) -> bool:
        """Whether the device has what the route is for."""
        return (not self.npu or facts.get("npu") == self.npu) and (not self.os or facts.get("os") in self.os)


class _Named(dict[str, Any]):
    """Facts for a sentence."""

    def __missing__(self, name: str) -> str:
        return f"({name} not known)"


def _met(value: Any, asked: Any) -> bool:
    """Whether a fact is as asked for.

    >>> _met(75, {"from": 73}), _met("ios", ["ios", "macos"]), _met(40, {"multiple_of": 16})
    (True, True, False)
    """
    if isinstance(asked, dict):
        ((how, wanted),) = asked.items()
        return bool(_TESTS[how](value, wanted))
    return value in asked if isinstance(asked, list) else value == asked


_TESTS = {
    "from": lambda value, wanted: value >= wanted,
    "multiple_of": lambda value, wanted: value % wanted == 0,
    "has": lambda value, wanted: wanted in value,
}


@lru_cache(maxsize=1)
def _tables() -> tuple[dict[str, Entry], tuple[Route, ...], tuple[Rule, ...]]:
    data = tomllib.loads((files("exporter") / "rules.toml").read_text(encoding="utf-8"))
    sources = data["sources"]

    def row(values: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()} | {
            "source": sources[values["source"]]
        }

    planned = {each["scheme"]: Planned(**row(each)) for each in data["schemes"]}
    rules = tuple(Rule(**{"unless": None} | row(each)) for each in data["rules"])
    routes = []
    for each in data["routes"]:
        ladders = {size: tuple(planned[name] for name in each.get(size, ())) for size in ("small", "large")}
        routes.append(Route(**row(each) | ladders))
    facts = [Entry(**row(each)) for each in data["facts"]]
    entries: dict[str, Entry] = {e.id: e for e in (*facts, *planned.values(), *rules, *routes)}
    return entries, tuple(routes), rules


def entry(id: str) -> Entry:
    """The row of that id (KeyError if there is none)."""
    return _tables()[0][id]


def entries() -> Mapping[str, Entry]:
    """All rows by their ids."""
    return _tables()[0]


def routes() -> tuple[Route, ...]:
    """All routes, the one that is wanted most first."""
    return _tables()[1]


def against(route: Route, facts: Facts) -> tuple[Rule, ...]:
    """The rules that stand against a route, in the order of the table."""
    return tuple(rule for rule in _tables()[2] if route.id in rule.routes and rule.stands(facts))


def compilers() -> frozenset[str]:
    """Delegates whose compiler is a library of its own that is installed here."""
    return frozenset({"hexagon"} if extras.installed(ENGINES["qnn"].library) else ())


EVERY_COMPILER = frozenset({"hexagon"})


def describe(
    device: Device | None, arch: Architecture, compilers: frozenset[str], chips: tuple[Chip, ...] = ()
) -> dict[str, Any]:
    """The facts that rules ask for, of a device, a model and this computer; what is not known is left out.

    `chips`: those that are compiled for in the device's place; the oldest of them counts.
    """
    facts: dict[str, Any] = {
        "parameters": arch.parameters,
        "count": f"{arch.parameters / 1e6:.0f} M",
        "head_dim": arch.head_dim,
        "compilers": compilers,
        "named": device is not None,
    }
    if device:
        last = device.versions.last if device.versions else None
        facts |= {"device": device.name, "os": device.os}
        if last and device.os in _STATES:
            facts |= {"last": f"{device.os} {last}"}
            facts["states"] = int(last.partition(".")[0]) >= _STATES[device.os]
    served = chips or ((device.soc,) if device else ())
    if served:
        oldest: dict[str, Any] = min(map(_of_chip, served), key=lambda found: found.get("generation", 0))
        facts |= oldest
    return facts


def _of_chip(chip: Chip) -> dict[str, Any]:
    """What a chip's NPU is and takes, by the tables of its kind."""
    npu, found = chip.npu, {"chip": chip.name}
    if npu is None:
        return {**found, "npu": "none"}
    known: dict[str, Any] = {**found, "npu": npu.kind, "npu_name": npu.name}
    if npu.kind == "hexagon":
        known |= {
            "arch": npu.arch,
            "generation": int(npu.arch.removeprefix("v")),
            "fp16": hexagon.takes(npu.arch, "routes", hexagon.PORTABLE),
            "soc_model": npu.soc_model is not None,
        }
    if npu.kind == "exynos":
        known |= {
            "enn": npu.enn_chip in exynos.table()["chips"]["names"],
            "enn_chip": f"the {chip.name} ({npu.enn_chip})",
        }
    if npu.kind == "ane":
        known["layout"] = ane.route(chip).value
    return known


def choice(topic: str, value: str, *ids: str, reason: str | None = None, **more: Any) -> Choice:
    """A decision that rests on rows of the table: their reason, unless it is told more closely, and their sources."""
    rows = [entry(id) for id in ids]
    if not rows:
        raise UsageError(f"the decision on {topic} names no rule")
    return Choice(
        topic=topic,
        value=value,
        reason="; ".join(row.says for row in rows) if reason is None else reason,
        rules=ids,
        source="; ".join(dict.fromkeys(row.source for row in rows)),
        **more,
    )
