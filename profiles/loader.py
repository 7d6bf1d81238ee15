"""Reads the profiles: socs/<id>.toml one per chip, devices/<id>.toml one per device, observations/<source>.toml
with what others measured on them; memory.toml, the memory rule of each operating system, and npus.toml, the
number types of each NPU, all beside this file.

The environment variable GOCHU_PROFILES may name a folder with further socs/, devices/ and observations/ under
the same rules.
"""

import os
import re
import tomllib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from profiles import lookup
from profiles.errors import ProfileError
from profiles.model import Chip, ChipProfile, Device, DeviceProfile, MemoryRule, NumberTypes
from profiles.observation import Observation, Publication

FOLDER_VARIABLE = "GOCHU_PROFILES"
SOCS, DEVICES, OBSERVATIONS = "socs", "devices", "observations"

Model = TypeVar("Model", bound=BaseModel)


def find(name: str) -> Device:
    """The one device that `name` means: its name or an alias in English or Korean, its model code
    ("SM-S928N", "iPhone17,1"), its profile's id, or a chip that only one device has.

    Case, spaces, hyphens and underscores do not count, nor how Unicode composes the letters.

    Raises:
        UnknownDevice: nothing by that name; the message offers up to three near misses.
        AmbiguousDevice: several devices answer, as to "Galaxy S24", which has one chip in Europe and another
            in the United States; the message says what would decide.
        ProfileError: a file in the folder that GOCHU_PROFILES names breaks the rules.
    """
    return lookup.find(name, devices(), chips())


def devices() -> tuple[Device, ...]:
    """All devices, by id, those of the user's folder included. Raises ProfileError as `find` does."""
    return tuple(device for _, device in sorted(_catalogue().devices.items()))


def chips() -> tuple[Chip, ...]:
    """All chips, by id, those of the user's folder included. Raises ProfileError as `find` does."""
    return tuple(chip for _, chip in sorted(_catalogue().chips.items()))


def search(
    query: str = "", *, chip: str = "", npu: str = "", ram_at_least_gib: float = 0
) -> tuple[Device, ...]:
    """The devices, by id, that have all that is asked: `query` in a name, alias, model code, farm's name or chip;
    `chip` by name or id, or by a part of it; `npu` by kind ("ane"), family ("hexagon-v75", "v75") or name.

    Raises:
        UnknownDevice: there is none; the message says what is near, or which of the conditions nothing meets.
        ProfileError: as `find`.
    """
    return lookup.search(query, devices(), chips(), chip, npu, ram_at_least_gib)


def observations() -> tuple[Observation, ...]:
    """What others measured and published, a figure each, in the order of the files; those of the user's folder
    included. Raises ProfileError as `find` does."""
    catalogue, found = _catalogue(), list(_shipped_observations())
    if folder := _user_folder():
        found += _observations(folder, catalogue)
    return tuple(found)


@dataclass(frozen=True)
class Catalogue:
    rules: dict[str, MemoryRule]
    number_types: dict[str, NumberTypes]
    chips: dict[str, Chip] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)

    def extended(self, folder: Traversable) -> "Catalogue":
        """This catalogue and the profiles in `folder`."""
        chips, devices = dict(self.chips), dict(self.devices)
        for identity, file in _profiles(folder, SOCS, known=self.chips):
            chip = validate(ChipProfile, read(file), file)
            types = self.number_types.get(chip.npu.family) if chip.npu else None
            chips[identity] = Chip(id=identity, number_types=types, **dict(chip))
        for identity, file in _profiles(folder, DEVICES, known=self.devices):
            device = validate(DeviceProfile, read(file), file)
            if device.chip not in chips:
                raise ProfileError(
                    f"{file}: the chip {device.chip!r} has no profile; write {SOCS}/{device.chip}.toml "
                    f"or name one of {', '.join(sorted(chips))}."
                )
            devices[identity] = Device(
                id=identity, soc=chips[device.chip], memory_rule=self.rules[device.os], **dict(device)
            )
        return Catalogue(self.rules, self.number_types, chips, devices)


@lru_cache(maxsize=1)
def _shipped() -> Catalogue:
    home = files("profiles")
    file = home / "memory.toml"
    rules = {system: validate(MemoryRule, rule, file) for system, rule in read(file).items()}
    file = home / "npus.toml"
    types = [validate(NumberTypes, entry, file) for entry in read(file)["types"]]
    return Catalogue(rules, {npu: entry for entry in types for npu in entry.npus}).extended(home)


@lru_cache(maxsize=1)
def _shipped_observations() -> tuple[Observation, ...]:
    return tuple(_observations(files("profiles"), _shipped()))


def _observations(folder: Traversable, catalogue: Catalogue) -> Iterator[Observation]:
    for _, file in _profiles(folder, OBSERVATIONS):
        try:
            yield from validate(Publication, read(file), file).observations(
                catalogue.devices, catalogue.chips
            )
        except KeyError as error:
            raise ProfileError(
                f"{file}: {error} has no profile; name a device or chip that `gochu devices` lists."
            ) from error


def _catalogue() -> Catalogue:
    """The shipped profiles, and the user's, which are read anew each time: they may be under edit."""
    folder = _user_folder()
    return _shipped().extended(folder) if folder else _shipped()


def _user_folder() -> Path | None:
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ProfileError(
            f"{FOLDER_VARIABLE} names {named!r}, which is not a folder; name one, or unset it."
        )
    for stray in sorted([*folder.glob("*.toml"), *folder.glob("*/*.toml")]):
        if stray.parent.name not in (SOCS, DEVICES, OBSERVATIONS) or stray.parent == folder:
            raise ProfileError(
                f"{stray}: no profile is read from there; move it to {folder / DEVICES} or {folder / SOCS}."
            )
    return folder


def _profiles(
    folder: Traversable, kind: str, known: Container[str] = ()
) -> Iterator[tuple[str, Traversable]]:
    """The id and file of each profile in folder/kind."""
    home = folder / kind
    if not home.is_dir():
        return
    for file in sorted(home.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".toml") or file.name.startswith("."):
            continue
        identity = file.name.removesuffix(".toml")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", identity):
            raise ProfileError(
                f"{file}: the file's name is the profile's id: small letters a-z, digits and single hyphens "
                "between them; rename the file."
            )
        if identity in known:
            raise ProfileError(f"{file}: Gochu ships a profile with the id {identity!r}; rename your file.")
        yield identity, file


def read(file: Traversable) -> dict[str, Any]:
    """A TOML file; ProfileError if it is none."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ProfileError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{file}: this is not TOML: {error}; correct it there.") from error
    except OSError as error:
        raise ProfileError(f"{file}: cannot be read ({error.strerror}); make it a readable file.") from error


def validate(model: type[Model], values: object, file: Traversable) -> Model:
    """What a file says, as a model; ProfileError names the first fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        more = f" ({len(others)} further faults in this file)" if others else ""
        raise ProfileError(f"{file}: {_fault(first, model)}{more}.") from error


def _fault(error: ErrorDetails, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden" if len(error["loc"]) == 1:
            return f"the key {key!r} is unknown; remove it or use one of {', '.join(model.model_fields)}"
        case "extra_forbidden":
            return f"the key {key!r} is unknown; remove it or correct its spelling"
        case "missing":
            return f"the key {key!r} is missing; add it"
        case _:
            return (
                f"the value of {key!r} is refused: {error['msg']}, but it is {error['input']!r}; correct it"
            )
