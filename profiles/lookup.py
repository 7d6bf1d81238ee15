"""From a name to the one device that is meant. Nothing is guessed: two answers are a question to the user."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator

from profiles.errors import AmbiguousDevice, UnknownDevice
from profiles.model import Chip, Device

_IGNORED = {"Zs", "Zl", "Zp", "Pd", "Pc", "Cc", "Cf"}  # spaces, hyphens, underscores, what is not seen
_ENDING = "[0-9a-z]{0,3}"  # what a * of a model code stands for: the U1 of SM-S928U1, or nothing
_LONGEST = 60  # of a name that a message repeats or that is compared letter by letter


def find(name: str, devices: tuple[Device, ...], chips: tuple[Chip, ...]) -> Device:
    """See `profiles.find`."""
    key = normalized(name)
    if not key:
        raise UnknownDevice(
            "The name of the device is empty; give one such as 'Galaxy S24 Ultra' or 'SM-S928N'."
        )
    if named := _by_model_code(key, devices) or [d for d in devices if key in map(normalized, _names(d))]:
        return _only(name, named)
    if with_chip := [device for device in devices if key in map(normalized, _chip_names(device.soc))]:
        if len(with_chip) == 1:
            return with_chip[0]
        listed = ", ".join(f"{device.name} ({device.id})" for device in with_chip)
        raise AmbiguousDevice(f"{_quoted(name)} is the chip of several devices: {listed}; name one of them.")
    if any(key in map(normalized, _chip_names(chip)) for chip in chips):
        raise UnknownDevice(f"{_quoted(name)} is a chip that no device profile has; name a device.")
    raise UnknownDevice(_unknown(name, devices))


def search(
    query: str, devices: tuple[Device, ...], chips: tuple[Chip, ...], chip: str, npu: str, ram_gib: float
) -> tuple[Device, ...]:
    """See `profiles.search`."""
    key, wanted = normalized(query), _chips(chip, chips) if chip else chips
    named = [device for device in devices if any(key in normalized(label) for label in _labels(device))]
    found = [
        device
        for device in named or [find(query, devices, chips)]
        if device.soc in wanted
        and (not npu or _has_npu(device.soc, npu))
        and device.memory.ram_gib >= ram_gib
    ]
    if found:
        return tuple(found)
    asked = [
        f"{what} {_quoted(value)}" for what, value in (("name", query), ("chip", chip), ("NPU", npu)) if value
    ]
    if ram_gib:
        asked.append(f"at least {ram_gib:g} GB of RAM")
    raise UnknownDevice(f"No device profile has {' and '.join(asked)}; leave out one of the conditions.")


def _chips(name: str, chips: tuple[Chip, ...]) -> tuple[Chip, ...]:
    """The chips of that name, or else those in whose names it occurs: "Snapdragon 8 Elite" is not its Gen 5."""
    key = normalized(name)
    if same := [chip for chip in chips if key in map(normalized, _chip_names(chip))]:
        return tuple(same)
    if part := [chip for chip in chips if any(key in normalized(label) for label in _chip_names(chip))]:
        return tuple(part)
    known = {label: chip.name for chip in chips for label in (normalized(chip.name), chip.id)}
    near = difflib.get_close_matches(key[:_LONGEST], known, n=3)
    hint = f"Did you mean {_either(dict.fromkeys(known[label] for label in near))}?" if near else ""
    raise UnknownDevice(f"No chip profile answers to {_quoted(name)}. {hint or 'Name another chip.'}")


def _has_npu(chip: Chip, name: str) -> bool:
    if chip.npu is None:
        return False
    key, npu = normalized(name), chip.npu
    exact = (npu.kind, npu.family, npu.family.removeprefix(f"{npu.kind}-"))
    return key in map(normalized, exact) or key in normalized(npu.name)


def _labels(device: Device) -> Iterator[str]:
    yield from _names(device)
    yield from (code.removesuffix("*") for code in device.model_codes)
    yield from _chip_names(device.soc)


def normalized(name: str) -> str:
    """`name` without case, spaces, hyphens and underscores, its letters composed in one way (NFKC)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(letter for letter in folded if unicodedata.category(letter) not in _IGNORED)


def _by_model_code(key: str, devices: tuple[Device, ...]) -> list[Device]:
    """Devices with that model code; one that is spelt out goes before a pattern. The box of a phone with two
    SIM cards says SM-S928B/DS where the phone says SM-S928B."""
    code = key.removesuffix("/ds")
    exact, by_pattern = [], []
    for device in devices:
        patterns = [normalized(pattern) for pattern in device.model_codes]
        if code in patterns:
            exact.append(device)
        elif any(re.fullmatch(re.escape(p[:-1]) + _ENDING, code) for p in patterns if p.endswith("*")):
            by_pattern.append(device)
    return exact or by_pattern


def _names(device: Device) -> Iterator[str]:
    """All that the device is called: with the maker's name before it and without, and on each farm."""
    yield device.id
    for name in (device.name, *device.aliases):
        yield name
        yield from (f"{brand} {name}" for brand in device.brand)
    if device.farms:
        yield from device.farms.names


def _chip_names(chip: Chip) -> tuple[str, ...]:
    system = chip.ro_soc_model.names if chip.ro_soc_model else ()
    return (chip.id, chip.name, f"{chip.vendor} {chip.name}", *system)


def _only(name: str, found: list[Device]) -> Device:
    if len(found) == 1:
        return found[0]
    choices = "; ".join(_choice(device) for device in found)
    ids = " or ".join(repr(device.id) for device in found)
    if len({device.soc.id for device in found}) == 1:
        raise AmbiguousDevice(f"{_quoted(name)} names several profiles: {choices}; name one: {ids}.")
    raise AmbiguousDevice(
        f"{_quoted(name)} was sold with more than one chip: {choices}; look up the model code on the phone "
        f"(Settings > About phone, or `adb shell getprop ro.product.model`) and name it, or name {ids}."
    )


def _choice(device: Device) -> str:
    codes = ", ".join(device.model_codes) or device.id
    market = f" ({device.market})" if device.market else ""
    return f"{codes} -> {device.soc.name}{market}"


def _unknown(name: str, devices: tuple[Device, ...]) -> str:
    if near := _near_misses(name, devices):
        return f"No device profile answers to {_quoted(name)}. Did you mean {_either(near)}?"
    return (
        f"No device profile answers to {_quoted(name)}, nor to anything like it; name another device, or write "
        "a profile of your own and let GOCHU_PROFILES name its folder."
    )


def _near_misses(name: str, devices: tuple[Device, ...]) -> list[str]:
    """Up to three names like `name`, best first, of different devices. To what has the shape of a model code
    codes are offered first: iPhone17,1 is an iPhone 16 Pro, and no iPhone 17."""
    names = [(label, device) for device in devices for label in (device.name, *device.aliases)]
    codes = [(code.removesuffix("*"), device) for device in devices for code in device.model_codes]
    alike = [(code, device) for code, device in codes if _shape(code) == _shape(name)]
    return _nearest(name, alike) or _nearest(name, names) or _nearest(name, codes)


def _shape(name: str) -> str:
    """Which letters, figures and signs follow each other: "a0,0" of iPhone17,1 and "a0a" of SM-S928N."""
    return re.sub(r"[^\W\d]+", "a", re.sub(r"\d+", "0", normalized(name)))


def _nearest(name: str, labels: Iterable[tuple[str, Device]]) -> list[str]:
    """Letters are compared decomposed (NFKD), so that one wrong vowel in a Korean syllable is one wrong
    letter of three, not a wrong syllable."""
    shown: dict[str, str] = {}
    owners: dict[str, set[str]] = {}
    for label, device in labels:
        letters = unicodedata.normalize("NFKD", normalized(label))
        shown.setdefault(letters, label)
        owners.setdefault(letters, set()).add(device.id)
    asked = unicodedata.normalize("NFKD", normalized(name))[:_LONGEST]
    offered: dict[frozenset[str], str] = {}
    for letters in difflib.get_close_matches(asked, shown, n=12, cutoff=0.6):
        offered.setdefault(frozenset(owners[letters]), shown[letters])
    return list(offered.values())[:3]


def _either(labels: Iterable[str]) -> str:
    *first, last = map(repr, labels)
    return f"{', '.join(first)} or {last}" if first else last


def _quoted(name: str) -> str:
    return repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...")
