"""What Qualcomm's compiler is told, and why: for which chips, in how many graphs, by which route."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import profiles
from exporter.architecture import Architecture
from exporter.errors import PlanRefused, UsageError
from exporter.npu import hexagon
from exporter.quantization.calibration import text_kind, text_name
from exporter.quantization.scheme import Scheme
from exporter.routes import choice
from profiles import Chip, Device
from runtimes.bundle import Choice
from runtimes.report import amount

Schemes = Mapping[str, Scheme]  # by the canonical name of a matrix


@dataclass(frozen=True)
class Wishes:
    """What the user may ask for. `chips`: ids, or "all" alone (none: the device's); `split`: into several graphs
    where one is too large; `allow_cpu_ops`: accept operations that the NPU does not take."""

    chips: tuple[str, ...] = ()
    split: bool = True
    allow_cpu_ops: bool = False


@dataclass(frozen=True)
class Compilation:
    """What is compiled: a variant for each of `chips`; `parts` are the layers of each graph, `route` how weights
    reach the NPU (see `hexagon.route`); `calibration` is the text on which ranges of activations are found (None: the
    one that is shipped)."""

    chips: tuple[Chip, ...]
    parts: tuple[range, ...]
    route: str
    wishes: Wishes
    calibration: Path | None = None

    def fingerprint(self) -> dict[str, Any]:
        """All that determines the compiled files beside the calibration text, as JSON."""
        return {
            "chips": [chip.id for chip in self.chips],
            "parts": [[part.start, part.stop] for part in self.parts],
            "route": self.route,
            "allow_cpu_ops": self.wishes.allow_cpu_ops,
        }

    def choices(self, arch: Architecture, schemes: Schemes) -> Iterator[Choice]:
        """The decisions with their reasons."""
        named = [f"{chip.id} ({hexagon.npu(chip).arch})" for chip in self.chips]
        why = "a binary is for one chip; other phones take the CPU's variant"
        yield choice("chips", ", ".join(named), "hexagon-chip", reason=why)
        sizes = [hexagon.binary_bytes(arch, schemes, part, part.stop == arch.layers) for part in self.parts]
        limit = amount(hexagon.table()["limits"]["graph_bytes"], "bytes")
        memory = amount(hexagon.compile_bytes(max(sizes), self.route), "bytes")
        why = f"the NPU addresses {limit} for a graph, and compiling the largest takes about {memory} here; "
        why += f"predicted sizes: {', '.join(amount(s, 'bytes') for s in sizes)}"
        if len(self.parts) > 1:
            why += f"; layers {', '.join(f'{part.start}-{part.stop - 1}' for part in self.parts)}"
        value = f"{len(self.parts)} for each entry point"
        yield choice("graphs", value, "hexagon-graph-bytes", reason=why)
        if self.route == hexagon.QUANTIZED:
            why = f"the range of each activation is found on it before: {text_kind(self.calibration)}; "
            why += "the KV cache has 8 bits"
            yield choice("calibration", text_name(self.calibration), "calibration", reason=why)
        if self.wishes.allow_cpu_ops:
            why = "as asked for: operations that the NPU does not take may run on the CPU"
            yield choice("CPU operations", "allowed", "asked", reason=why)


def compilation(
    arch: Architecture,
    schemes: Schemes,
    device: Device | None,
    wishes: Wishes,
    calibration: Path | None = None,
) -> Compilation:
    """What to compile. PlanRefused if a chip cannot have it or no chip is named, UsageError for an unknown chip."""
    chips = _chips(device, wishes.chips, schemes)
    parts = hexagon.split(arch, schemes, forbidden=not wishes.split)
    return Compilation(chips, parts, hexagon.common_route(schemes.values()), wishes, calibration)


def _chips(device: Device | None, asked: Sequence[str], schemes: Schemes) -> tuple[Chip, ...]:
    """The chips asked for, "all" that take the schemes, or the device's."""
    known = {chip.id: chip for chip in profiles.chips()}
    if list(asked) == ["all"]:
        return tuple(chip for chip in known.values() if _takes(chip, schemes))
    if not asked and device is None:
        raise PlanRefused("delegate hexagon is compiled for a chip: say for which with --device or --chips")
    for name in asked:
        if name.lower() not in known:
            hexagons = ", ".join(id for id, chip in known.items() if _takes(chip, {}))
            raise UsageError(f"there is no chip {name!r}: use all, or some of {hexagons}")
    found = [known[name.lower()] for name in asked] or ([device.soc] if device else [])
    for chip in found:
        _require(chip, schemes)
    return tuple(dict.fromkeys(found))


def _takes(chip: Chip, schemes: Schemes) -> bool:
    try:
        _require(chip, schemes)
    except PlanRefused:
        return False
    return True


def _require(chip: Chip, schemes: Schemes) -> None:
    hexagon.npu(chip)
    for scheme in set(schemes.values()):
        hexagon.npu(chip, scheme)
