"""A matrix: bundles x variants x targets with their options x workloads; each combination is a cell.

    bundles = ["out/pepper-*"]        # folders or patterns, from the folder of this file
    workloads = ["smoke", "pp64+tg32"]

    [[targets]]
    name = "host"
    threads = [1, 2]                  # a list: a cell for each

    [[targets]]
    name = "adb"
    device = ["R5CX1234567", "R3CN7654321"]
    limit = 2                         # so many cells at once

    [[exclude]]
    target = "adb"
    bundle = "*-fp16"

A target with a `limit` has so many places for itself. All without one share a single place, since two measurements at
once on one machine disturb each other: a limit is for what computes elsewhere, as phones and farms do.
"""

import glob
import hashlib
import itertools
import json
import os
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtimes import targets
from runtimes.bundle import MANIFEST, Bundle, Strict, file_sha256
from runtimes.errors import BundleError, TargetError, UsageError
from runtimes.workload import Count, Workload, preset

Scalar = bool | int | float | str
MACHINE = "machine"  # where all targets without a limit are, and exports
_ELSEWHERE = {"variant": "variants at the top of the file", "progress": "nothing: the table shows it"}
_KEYS = ("bundle", "variant", "target", "workload")  # of an exclusion, beside options


class Entry(BaseModel):
    """A target. All other keys are its options; `limit`: how many of its cells are measured at once."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Scalar | list[Scalar]]

    name: str
    limit: Count | None = None

    @property
    def pool(self) -> str:
        """What its cells take a place of."""
        return self.name if self.limit else MACHINE

    def options(self) -> Iterator[dict[str, Scalar]]:
        """Each combination of its options; UsageError if a list is empty or an option has its place elsewhere."""
        given = self.__pydantic_extra__
        for key, value in given.items():
            if key in _ELSEWHERE:
                raise UsageError(f"{key} is not said there; say {_ELSEWHERE[key]}")
            if value == []:
                raise UsageError(f"{key} has no value: give one, or leave it out")
        lists = [value if isinstance(value, list) else [value] for value in given.values()]
        for values in itertools.product(*lists):
            yield dict(zip(given, values, strict=True))


class Matrix(Strict):
    """What a matrix file says. `variants`: patterns of names (default: each target's own choice); `ask`: prompts that
    every cell answers; `retries`: how often a cell is tried again after its target or its process failed; `exclude`:
    cells that are left out, by patterns; `exports`: what is exported first, in the words of who exports."""

    bundles: tuple[str, ...] = ()
    targets: Annotated[tuple[Entry, ...], Field(min_length=1)]
    workloads: Annotated[tuple[str, ...], Field(min_length=1)] = ("smoke",)
    variants: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    retries: Annotated[int, Field(ge=0)] = 1
    exclude: tuple[dict[str, Scalar | list[Scalar]], ...] = ()
    exports: tuple[dict[str, Any], ...] = ()

    def limits(self) -> dict[str, int]:
        """How many tasks of each pool run at once on one machine."""
        return {MACHINE: 1} | {entry.pool: entry.limit for entry in self.targets if entry.limit}


class Cell(Strict):
    """One bundle on one target, with the options of its verb, for all cases of one workload."""

    bundle: str  # its folder
    label: str  # the same from the matrix file's folder
    digest: str  # SHA-256 of its manifest
    variant: str | None
    target: str
    options: dict[str, Scalar]
    workload: Workload
    pool: str

    @cached_property
    def id(self) -> str:
        """The same for the same files and the same options, wherever they lie: 16 digits of a SHA-256."""
        parts = self.model_dump(mode="json", include={"digest", "variant", "target", "options", "workload"})
        text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

    def __str__(self) -> str:
        words = [self.target, self.label, self.variant or "", self.workload.name]
        return " ".join([*filter(None, words), *(f"{key}={value}" for key, value in self.options.items())])


def read(path: Path) -> Matrix:
    """The matrix of a TOML file, its targets and workloads looked up; UsageError names the first thing that is wrong,
    TargetError a target of another package that cannot be used."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        matrix = Matrix.model_validate(data)
    except OSError as error:
        raise UsageError(f"matrix {path} cannot be read: {error.strerror}; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"matrix {path} is not TOML: {error}") from None
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a typo first
        raise UsageError(f"matrix {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    try:
        _check(matrix)
    except (UsageError, TargetError) as error:
        raise type(error)(f"matrix {path}: {error}") from None
    return matrix


def _check(matrix: Matrix) -> None:
    if not matrix.bundles and not matrix.exports:
        raise UsageError("it names no bundles and no exports; say for example bundles = ['out']")
    for name in matrix.workloads:
        preset(name)
    known = {*_KEYS}
    for entry in matrix.targets:
        if len({other.limit for other in matrix.targets if other.name == entry.name}) > 1:
            raise UsageError(f"target {entry.name} has two limits; say the same one wherever it is named")
        known.update(option for options in _typed(entry, matrix.variants) for option in options)
    for exclusion in matrix.exclude:
        if not exclusion or (unknown := sorted(exclusion.keys() - known)):
            raise UsageError(
                f"exclude cannot go by {unknown[0] if exclusion else 'nothing'}; it goes by "
                f"{', '.join(sorted(known))}"
            )


def _typed(entry: Entry, variants: Sequence[str] = ()) -> list[dict[str, Scalar]]:
    """Each combination of a target's options as its verb takes them; UsageError if there is no such target, or if it
    does not know an option (or variants, if any are asked for)."""
    targets.find(entry.name)
    found = []
    for options in entry.options():
        given = {key: str(value) for key, value in options.items()}
        ((_, known),) = targets.choose(entry.name, given | ({"variant": variants[0]} if variants else {}))
        found.append({key: known[key] for key in given if key in known})
    return found


def find_bundles(matrix: Matrix, folder: Path, coming: Sequence[Path] = ()) -> dict[str, Bundle]:
    """The bundles of a matrix by their paths from `folder`, each once. What is not there but among those `coming` from
    exports is left out; BundleError if anything else is missing, or is none."""
    found: dict[Path, tuple[str, Bundle]] = {}
    expected = [_label(path, folder) for path in coming]
    for said in matrix.bundles:
        for path in _matches(os.path.normpath(os.path.expanduser(said)), folder, expected):
            found.setdefault(path.resolve(), (_label(path, folder), Bundle.open(path)))
    return dict(found.values())


def _matches(said: str, folder: Path, expected: Sequence[str]) -> list[Path]:
    """The folders that a path or a pattern names; of a pattern, those that hold a manifest."""
    path = folder / said
    if path.exists() or not any(sign in said for sign in "*?["):
        return [] if _label(path, folder) in expected and not path.exists() else [path]
    found = [folder / each for each in sorted(glob.glob(said, root_dir=folder))]
    bundles = [each for each in found if (each / MANIFEST).is_file()]
    if not bundles and not any(_like(each, said) for each in expected):
        raise BundleError(f"no folder that matches {said!r} is a bundle; make one with `gochu export`")
    return bundles


def _label(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def cells(matrix: Matrix, bundles: Mapping[str, Bundle], whole: bool = True) -> list[Cell]:
    """All cells but the excluded, each once, in the order of the file. `whole`: these are all the bundles that there
    will be, so that UsageError is raised if a variant or an exclusion fits nothing, or if no cell is left."""
    every = list(_product(matrix, bundles))
    kept = [cell for cell in every if not any(_excluded(cell, each) for each in matrix.exclude)]
    if whole:
        names = [variant.name for bundle in bundles.values() for variant in bundle.manifest.variants]
        for pattern in matrix.variants:
            if not any(_like(name, pattern) for name in names):
                raise UsageError(
                    f"no bundle of the matrix has a variant {pattern!r}; there are {', '.join(dict.fromkeys(names))}"
                )
        for exclusion in matrix.exclude:
            if not any(_excluded(cell, exclusion) for cell in every):
                said = ", ".join(f"{key} = {value!r}" for key, value in exclusion.items())
                raise UsageError(f"exclude with {said} fits no cell of the matrix: correct it, or remove it")
        if not kept:
            raise UsageError("the matrix has no cells: all are excluded; exclude fewer")
    return list({cell.id: cell for cell in reversed(kept)}.values())[::-1]


def _product(matrix: Matrix, bundles: Mapping[str, Bundle]) -> Iterator[Cell]:
    workloads = [preset(name).model_copy(update={"prompts": matrix.ask}) for name in matrix.workloads]
    places = [(entry, options) for entry in matrix.targets for options in _typed(entry)]
    for label, bundle in bundles.items():
        digest = file_sha256(bundle.path / MANIFEST)
        for variant, (entry, options), workload in itertools.product(
            _variants(matrix, bundle), places, workloads
        ):
            yield Cell(
                bundle=str(bundle.path.resolve()),
                label=label,
                digest=digest,
                variant=variant,
                target=entry.name,
                options=options,
                workload=workload,
                pool=entry.pool,
            )


def _variants(matrix: Matrix, bundle: Bundle) -> list[str | None]:
    """The variants of a bundle that are asked for; None is the target's own choice."""
    if not matrix.variants:
        return [None]
    names = [variant.name for variant in bundle.manifest.variants]
    return [name for name in names if any(_like(name, pattern) for pattern in matrix.variants)]


def _excluded(cell: Cell, exclusion: Mapping[str, Scalar | list[Scalar]]) -> bool:
    """Whether every key of an exclusion fits a cell."""
    own = {
        "bundle": cell.label,
        "variant": cell.variant or "",
        "target": cell.target,
        "workload": cell.workload.name,
    }
    values = {**cell.options, **own}
    return all(
        key in values and any(_like(str(values[key]), str(each)) for each in _listed(wanted))
        for key, wanted in exclusion.items()
    )


def _listed(value: Scalar | list[Scalar]) -> list[Scalar]:
    return value if isinstance(value, list) else [value]


def _like(text: str, pattern: str) -> bool:
    """Whether a text fits a pattern; Korean is compared composed, however a file system writes it."""
    return fnmatchcase(unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", pattern))
