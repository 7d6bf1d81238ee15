"""Targets are where a bundle is measured. Each is a module with the verb

    measure(bundle, workload, *, ...) -> list[Measurement]

whose further parameters are the options that it knows, of plain types: the command line gives it those, and no others.
Several have the same names for the same things: variant, device, threads, context, progress (told in words what is
being done), allow_fallback (take figures of another processor than the one asked for). A target that others must
prepare for has `setup(progress) -> Path` too, and one that can tell beforehand that it will not work here a `check()`,
which raises the error that says why. The first line of its docstring says what it is. None imports another. A hyphen
in a name is an underscore in its module. A package adds its own by an entry point in the group `gochu.targets`:

    [project.entry-points."gochu.targets"]
    kettle = "kettle.gochu"
"""

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from pydantic import TypeAdapter, ValidationError

from runtimes.bundle import Strict
from runtimes.errors import GochuError, TargetError, UsageError
from runtimes.measurement import Measurement
from runtimes.workload import Workload

BUILT_IN = tuple(
    "host arm64-emulator htp-simulator adb mac iphone qai-hub aws-device-farm firebase-test-lab browserstack".split()
)
GROUP = "gochu.targets"


class Target(Protocol):
    """What a target's module has."""

    def measure(self, bundle_path: Any, workload: Workload | str, **options: Any) -> list[Measurement]: ...


def find(name: str) -> Target:
    """The target by that name. UsageError if there is none, TargetError if another package's cannot be used."""
    if name in BUILT_IN:
        module: Any = importlib.import_module(f"runtimes.targets.{name.replace('-', '_')}")
        return module
    found = [entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == name]
    if not found:
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no target {name!r}; there are {', '.join(known())}{hint}")
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


def known() -> list[str]:
    """The names of all targets, those of other packages last."""
    others = importlib.metadata.entry_points(group=GROUP)
    return list(dict.fromkeys([*BUILT_IN, *(entry.name for entry in others)]))


class About(Strict):
    """What is known of a target before it measures. `ready` is None where only measuring shows it; `hindrance` says
    what is missing, and what to do; `options` as on the command line."""

    name: str
    what: str
    ready: bool | None
    hindrance: str = ""
    options: tuple[str, ...] = ()
    has_setup: bool = False


def about(name: str) -> About:
    """What is known of the target by that name; UsageError if there is none."""
    try:
        target = find(name)
    except TargetError as error:
        return About(name=name, what="a target of another package", ready=False, hindrance=str(error))
    check, hindrance = getattr(target, "check", None), ""
    try:
        if check:
            check()
    except GochuError as error:
        hindrance = str(error)
    return About(
        name=name,
        what=(inspect.getdoc(target) or "").partition("\n")[0],
        ready=not hindrance if check else None,
        hindrance=hindrance,
        options=tuple(flag(option) for option in _options(target) if option not in OFFERED),
        has_setup=callable(getattr(target, "setup", None)),
    )


def setup(name: str, progress: Callable[[str], None] = lambda what: None) -> Path:
    """Prepare what the target by that name needs, and return where that is; UsageError if it needs nothing."""
    prepare = getattr(find(name), "setup", None)
    if prepare is None:
        those = ", ".join(each.name for each in map(about, known()) if each.has_setup)
        raise UsageError(f"target {name} needs no set-up; those that do are {those}")
    folder: Path = prepare(progress)
    return folder


# Options that have a flag of their own on the command line; all others are given as --option name=value.
FLAGS = ("variant", "device", "threads", "context", "allow_fallback")
OFFERED = ("progress", "allow_fallback")  # given to the targets that know them, and missed by no other


def names(listed: str) -> list[str]:
    """The targets of a comma-separated list, each once; UsageError if a name is missing."""
    wanted = list(dict.fromkeys(name.strip() for name in listed.split(",")))
    if "" in wanted:
        raise UsageError(f"{listed!r} names no target where it should; say for example --on host,mac")
    return wanted


def choose(listed: str, options: Mapping[str, Any]) -> list[tuple[Target, dict[str, Any]]]:
    """The targets of a comma-separated list, each with those of the options that it knows; None is not given.

    A text becomes what the target's parameter says it is. UsageError if an option is given that none of them knows, or
    with a value that it cannot have.
    """
    wanted = names(listed)
    given = {key: value for key, value in options.items() if value is not None}
    targets = [find(name) for name in wanted]
    known = [_options(target) for target in targets]
    for key in given:
        if key not in OFFERED and not any(key in each for each in known):
            said = [o for o in dict.fromkeys(o for each in known for o in each) if o not in OFFERED]
            raise UsageError(
                f"{flag(key)} means nothing to target {' or '.join(wanted)}; "
                f"what can be said there is {', '.join(map(flag, said))}"
            )
    return [
        (target, {key: _typed(target, key, value) for key, value in given.items() if key in options})
        for target, options in zip(targets, known, strict=True)
    ]


def _options(target: Target) -> Sequence[str]:
    """The parameters of a target's `measure` after the bundle and the workload."""
    parameters = list(inspect.signature(target.measure).parameters.values())[2:]
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _typed(target: Target, option: str, value: Any) -> Any:
    """A text as what the option is; UsageError if it cannot be that."""
    wanted = get_type_hints(target.measure).get(option)
    if not isinstance(value, str) or wanted is None:
        return value
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"{flag(option)} cannot be {value!r}: {error.errors()[0]['msg']}") from None


def flag(option: str) -> str:
    """How an option is said on the command line.

    >>> flag("threads"), flag("compute_units")
    ('--threads', '--option compute_units=...')
    """
    return f"--{option.replace('_', '-')}" if option in FLAGS else f"--option {option}=..."
