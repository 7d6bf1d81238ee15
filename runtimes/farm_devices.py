"""From a device's name to what a farm calls it: by its profile, and by the farm's own list of devices."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import profiles
from profiles import lookup
from profiles.lookup import normalized
from profiles.model import Chip, Device
from runtimes.bundle import Variant
from runtimes.errors import TargetError, UsageError

Farm = Literal["device_farm", "firebase", "browserstack"]  # the keys of a profile's [farms]


@dataclass(frozen=True)
class Offered:
    """A device that a farm has: the id to ask for it by, what the farm shows, and all names it goes by there."""

    id: str
    label: str
    names: tuple[str, ...]
    os: str  # android or ios
    version: str  # of the system
    available: bool = True


@dataclass(frozen=True)
class Chosen:
    """A device of a farm, and its profile if there is one."""

    offered: Offered
    profile: Device | None

    @property
    def name(self) -> str:
        return self.profile.name if self.profile else self.offered.label

    @property
    def id(self) -> str:
        """A name that no other device has."""
        return self.profile.id if self.profile else self.offered.label


def names(listed: str | None) -> list[str]:
    """The devices of a comma-separated list, each once; UsageError if there is none."""
    found = list(dict.fromkeys(filter(None, (name.strip() for name in (listed or "").split(",")))))
    if not found:
        raise UsageError(
            "a farm has many devices: say which with --device, for example --device 'Galaxy S24 Ultra', "
            "several with commas"
        )
    return found


def choose(wanted: Sequence[str], farm: Farm, offered: Sequence[Offered], variant: Variant) -> list[Chosen]:
    """The farm's devices of those names: a profile's name, alias or model code, or the farm's own name.

    Of several with different systems, the one that the profile names, else the newest. UsageError if the farm has
    none (it names near ones), if the variant was made for other chips, or if they have different systems; TargetError
    if it has one, but not now.
    """
    found = [_choose(name, farm, offered) for name in wanted]
    found = list({each.offered.id: each for each in found}.values())
    if len(systems := {each.offered.os for each in found}) > 1:
        raise UsageError(
            f"one run has one app, and these devices run {' and '.join(sorted(systems))}: split them"
        )
    for each in found:
        if not each.offered.available:
            raise TargetError(
                f"the farm has {each.offered.label}, but not now: try later, or name another device"
            )
        if variant.chips and each.profile and each.profile.chip not in variant.chips:
            raise UsageError(
                f"variant {variant.name} was made for {', '.join(variant.chips)}, and {each.profile.name} has "
                f"{each.profile.chip}: export for that chip, or name another --variant"
            )
    return found


def known(offered: Offered) -> Chosen:
    """A device of the farm's, with the one profile that answers to its names."""
    found = (_find(name) for name in offered.names)
    return Chosen(offered, next((each for each in found if each and _same(each, offered)), None))


def is_chip(name: str, chip: Chip) -> bool:
    """Whether a phone, which may say what Android's ro.soc.model holds, means that chip."""
    system = chip.ro_soc_model.names if chip.ro_soc_model else ()
    return normalized(name) in map(normalized, (chip.id, chip.name, *system))


def _choose(name: str, farm: Farm, offered: Sequence[Offered]) -> Chosen:
    key = normalized(name)
    own = [each for each in offered if key in map(normalized, (each.id, each.label))]
    if own:
        return known(max(own, key=_newness))
    profile = profiles.find(name)
    there = [each for each in offered if _same(profile, each)]
    if not there:
        labels = dict.fromkeys(each.label for each in offered)
        near = difflib.get_close_matches(profile.name, labels, n=3, cutoff=0.4)
        hint = f"it has {', '.join(near)}" if near else "it has nothing like it"
        raise UsageError(f"the farm has no {profile.name} for this account; {hint}: name another device")
    by_farm = {normalized(known) for known in getattr(profile.farms, farm)} if profile.farms else set()
    named = [each for each in there if by_farm & set(map(normalized, (each.id, each.label)))]
    return Chosen(max(named or there, key=_newness), profile)


def _newness(offered: Offered) -> tuple[bool, tuple[int, ...]]:
    return offered.available, tuple(map(int, re.findall(r"\d+", offered.version)))


def _same(profile: Device, offered: Offered) -> bool:
    """Whether the farm's device is the profile's: a phone that is sold with two chips is told by its model code."""
    if not any(_find(name, (profile,)) for name in offered.names):
        return False
    owners = {found.id for name in offered.names if (found := _find(name))}
    return owners <= {profile.id}


def _find(name: str, among: tuple[Device, ...] | None = None) -> Device | None:
    """The one profile of that name or model code, or None."""
    try:
        return lookup.find(name, profiles.devices() if among is None else among, ())
    except (profiles.UnknownDevice, profiles.AmbiguousDevice):
        return None
