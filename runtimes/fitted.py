"""Speeds and memory by constants that were fitted from published measurements: `prediction.toml`, by `runtimes.fit`.

A figure is a sum of what goes with a model's size and of what does not:

    seconds per token = units x overhead + size x rate

For `decode`, size is the seconds that reading a token's bytes takes at the memory's peak bandwidth, so the rate is
1 / (the share of it that is reached), and units are layers: each is a handful of calls, however small. For `prefill`,
size is multiplications over bandwidth, a stand-in for how wide a chip is, and nothing is overhead. For `memory`, in
bytes, size is the weights' file, and units are the bytes of workspace: cache, activations, the process.

Rate and overhead are products of effects, from the general to the special: the backend's, the engine's, the kernel's
(float, or integers), the chip's, and the kernel's on that chip, which may have instructions for it. What was never
measured has no effect of its own, and a wider interval instead (Gelman and Hill, Data Analysis Using Regression and
Multilevel Models, chapter 12).
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

Quantity = Literal["decode", "prefill", "memory"]
DATA = "prediction.toml"
COVERAGE = 0.8  # of the runs that were left out are within an interval
PROCESS = 100e6  # bytes of workspace that do not depend on the model
CONTEXT = 2048  # tokens of the cache in it


@dataclass(frozen=True)
class Setting:
    """Where and how a decoder runs. `kernel`: see observed.toml; `chip`: a profile's id, None if it is none of them."""

    engine: str
    backend: str
    kernel: str
    chip: str | None = None


@dataclass(frozen=True)
class Guess:
    """A figure with the interval that `COVERAGE` of such figures are in; `rate` and `overhead`: of the model above.
    `known`: the effects that were fitted, the others being the average."""

    value: float
    low: float
    high: float
    rate: float
    overhead: float
    known: tuple[str, ...]


def effects(quantity: Quantity, at: Setting) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the effects on the rate and on the overhead, the most general first."""
    engine = f"{at.backend} {at.engine}"
    if quantity == "memory":
        return (at.backend, engine), ("any", engine)
    kernel = f"{engine} {at.kernel}"
    rate = (at.backend, engine, kernel, f"{engine} on {at.chip}", f"{kernel} on {at.chip}")
    return rate, ((at.backend, engine) if quantity == "decode" else ())


def down_to(names: tuple[str, ...], effect: str) -> tuple[str, ...]:
    """The effects of `effects` that are summed down to one of them: kernel and chip branch from the engine."""
    at = names.index(effect)
    return names[:2] + names[at : at + 1] if at in (2, 3) else names[: at + 1]


def kind(effect: str) -> str:
    """What an effect belongs to, as `spread` in prediction.toml calls it."""
    name, _, chip = effect.partition(" on ")
    return (
        ("group", "engine", "kernel")[name.count(" ")] if not chip else ("chip", "pair")[name.count(" ") - 1]
    )


def guess(
    quantity: Quantity, at: Setting, size: float, units: float, data: Mapping[str, Any] | None = None
) -> Guess | None:
    """The figure for that size and those units; None if nothing like it was measured.

    Decoding needs another engine on that backend; the memory, this engine with models of about that size; reading
    a prompt, this engine on that chip: between chips it differs by a factor of ten, which bandwidth does not tell.
    `data`: constants in place of those that are shipped.
    """
    fitted = (data or shipped())[quantity]
    on_rate, on_overhead = effects(quantity, at)
    engine = f"{at.backend} {at.engine}"
    needed = {"decode": at.backend, "prefill": f"{engine} on {at.chip}", "memory": engine}[quantity]
    smallest, largest = fitted["sizes"].get(engine, (0.0, math.inf))
    if needed not in fitted["rate"] or not smallest <= size <= largest:
        return None
    rate, on_size, known = _product(on_rate, fitted["rate"], fitted["spread"])
    overhead, on_units, more = _product(on_overhead, fitted["overhead"], fitted["overhead_spread"])
    value = size * rate + units * overhead
    share = size * rate / value
    deviation = math.sqrt(fitted["noise"] ** 2 + share**2 * on_size + (1 - share) ** 2 * on_units)
    factor = math.exp(fitted["width"] * deviation)
    return Guess(value, value / factor, value * factor, rate, overhead, known + more)


def workspace(cache_values: int, hidden: int, ffn: int, prompt: int) -> float:
    """Bytes beside the weights, the units of `memory`: the process, a float16 cache with so many numbers for each
    of CONTEXT tokens, and the float32 activations of a prompt of so many tokens in one layer."""
    return PROCESS + 2 * CONTEXT * cache_values + 4 * prompt * (2 * hidden + 3 * ffn)


def _product(
    names: tuple[str, ...], fitted: Mapping[str, list[float]], spread: Mapping[str, float]
) -> tuple[float, float, tuple[str, ...]]:
    """exp of the sum of the effects (0 of none), its variance, and which of them were fitted.

    What is fitted has the deviation of the sum down to it, since effects that were fitted together are not
    independent: kernel and chip each change the variance of backend and engine, which they share. What was never
    measured adds that of its kind.
    """
    if not names:
        return 0.0, 0.0, ()
    found = {name: fitted[name] for name in names if name in fitted}
    total = math.exp(sum(effect for effect, _ in found.values()))
    if len(names) == 5 and names[4] in found:
        return total, found[names[4]][1] ** 2, tuple(found)
    trunk, *branches = names[1:]
    if trunk not in found:
        return (
            total,
            found[names[0]][1] ** 2 + sum(spread[kind(name)] ** 2 for name in names[1:]),
            tuple(found),
        )
    shared = found[trunk][1] ** 2
    measured = [found[name][1] ** 2 for name in branches if name in found]
    variance = max(shared + sum(each - shared for each in measured), min([shared, *measured]))
    variance += sum(spread[kind(name)] ** 2 for name in branches if name not in found)
    return total, variance, tuple(found)


@lru_cache(maxsize=1)
def shipped() -> dict[str, Any]:
    """The constants of `prediction.toml`."""
    return tomllib.loads((files("runtimes") / DATA).read_text(encoding="utf-8"))
