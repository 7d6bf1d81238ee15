"""Targets are where a bundle is measured. Each is a module with the verb

    measure(bundle, workload, *, ...) -> list[Measurement]

whose further parameters are the options that it knows: the command line gives it those, and no others. None imports
another. A package adds its own by an entry point in the group `gochu.targets`:

    [project.entry-points."gochu.targets"]
    kettle = "kettle.gochu"
"""

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from runtimes.errors import TargetError, UsageError
from runtimes.measurement import Measurement

BUILT_IN = ("host", "mac", "iphone")
GROUP = "gochu.targets"


class Target(Protocol):
    """What a target's module has."""

    def measure(self, bundle_path: Any, workload: str, **options: Any) -> list[Measurement]: ...


def find(name: str) -> Target:
    """The target by that name. UsageError if there is none, TargetError if another package's cannot be used."""
    if name in BUILT_IN:
        module: Any = importlib.import_module(f"runtimes.targets.{name}")
        return module
    others = importlib.metadata.entry_points(group=GROUP)
    found = [entry for entry in others if entry.name == name]
    if not found:
        known = list(dict.fromkeys([*BUILT_IN, *(entry.name for entry in others)]))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no target {name!r}; there are {', '.join(known)}{hint}")
    entry = found[0]
    whose = f"target {name} of {entry.dist.name if entry.dist else entry.value}"
    if len(found) > 1:
        packages = ", ".join(sorted(each.dist.name if each.dist else each.value for each in found))
        raise TargetError(f"target {name} is in several packages ({packages}): uninstall all but one")
    try:
        target: Any = entry.load()
    except Exception as error:  # of another package: it may raise anything while it is imported
        raise TargetError(
            f"{whose} cannot be imported ({type(error).__name__}: {error}): install that package again"
        ) from None
    if not callable(getattr(target, "measure", None)):
        raise TargetError(f"{whose} has no function measure, so it measures nothing: update that package")
    return target


def choose(names: str, options: Mapping[str, Any]) -> list[tuple[Target, dict[str, Any]]]:
    """The targets of a comma-separated list, each with those of the options that it knows; None is not given.

    UsageError if an option is given that none of them knows.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    if "" in wanted:
        raise UsageError(f"{names!r} names no target where it should; say for example --on host,mac")
    given = {key: value for key, value in options.items() if value is not None}
    targets = [find(name) for name in wanted]
    known = [_options(target) for target in targets]
    for key in given:
        if not any(key in each for each in known):
            raise UsageError(
                f"{_flag(key)} means nothing to target {' or '.join(wanted)}; "
                f"what can be said there is {', '.join(map(_flag, dict.fromkeys(o for each in known for o in each)))}"
            )
    return [
        (target, {key: value for key, value in given.items() if key in options})
        for target, options in zip(targets, known, strict=True)
    ]


def _options(target: Target) -> Sequence[str]:
    """The parameters of a target's `measure` after the bundle and the workload."""
    parameters = list(inspect.signature(target.measure).parameters.values())[2:]
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
