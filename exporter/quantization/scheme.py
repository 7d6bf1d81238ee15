"""What a weight becomes: a `Scheme` says bits, group and activations, and nothing of how or in which format."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from exporter.errors import RecipeError

_INTEGERS = re.compile(r"int([348])(?:-g(\d+)|-(channel))?")
_STATIC = re.compile(r"w([48])a16(?:-(g|lpbq)(\d+))?")
_TABLE = re.compile(r"pal(\d)(?:-g(\d+))?")
GROUPS = (16, 32, 64, 128, 256)
STATIC_GROUPS = (32, 64, 128)
TABLE_GROUPS = (4, 8, 16, 32, 64)
_INTEGER_BITS: dict[str, Literal[3, 4, 8]] = {"3": 3, "4": 4, "8": 8}
_TABLE_BITS: dict[str, Literal[2, 3, 4, 6, 8]] = {"2": 2, "3": 3, "4": 4, "6": 6, "8": 8}


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers in [-2^(bits-1), 2^(bits-1) - 1] times a scale, indices into a table, or plain floats.

    `group`: of integers, inputs that share a scale, None is one scale per output channel; of a table, output
    channels that share one, None is one table for the whole weight; floats have none.
    Scales lie on the portable grid (see `quantization.tensor.round_scales`), so that float32, float16 and
    bfloat16 hold them exactly and every format stores the same numbers.
    `activations`: how the values that meet this weight are rounded; "int8" is one scale per token and group,
    found as the model runs; "uint16" is one scale and zero point for each value of the graph, found before, on a
    calibration text (`quantization.ranges`).
    3 bits: no format takes such integers yet; the quantization stage tells what they would lose.
    `low_power`: the scales of an output's groups are small multiples of one number (`quantization.lattice`), and only
    that lies on the grid.
    `table`: the weight is a lookup table's entry, one of 2^bits float16 numbers. A field and not a class of its
    own: what carries schemes about (recipes, decisions, manifests) need not know, and a format that has no tables
    refuses them once, where it fits schemes.
    """

    bits: Literal[2, 3, 4, 6, 8, 16, 32]
    group: int | None = None
    activations: Literal["float32", "int8", "uint16"] = "float32"
    table: bool = False
    low_power: bool = False

    @property
    def name(self) -> str:
        """fp32, fp16, int8, int4, int4-g128, int3, int8-channel, w8a16, w4a16, w4a16-lpbq64, pal4, pal4-g16, ..."""
        if self.table:
            return f"pal{self.bits}" if self.group is None else f"pal{self.bits}-g{self.group}"
        if self.is_float:
            return f"fp{self.bits}"
        if self.is_static:
            kind = "lpbq" if self.low_power else "g"
            return f"w{self.bits}a16" + (f"-{kind}{self.group}" if self.group else "")
        if self.group is None:
            return f"int{self.bits}-channel"
        return f"int{self.bits}" if self.group == PORTABLE_GROUP else f"int{self.bits}-g{self.group}"

    @property
    def is_float(self) -> bool:
        """Whether weights are plain floats."""
        return self.bits > 8

    @property
    def is_integer(self) -> bool:
        """Whether weights are integers with scales."""
        return not self.is_float and not self.table

    @property
    def is_static(self) -> bool:
        """Whether the graph's values are integers too, whose ranges have to be known before."""
        return self.activations == "uint16"

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight [outputs, inputs], its float32 scales or float16 tables included."""
        outputs, inputs = shape
        numbers = (outputs * inputs * self.bits + 7) // 8
        if self.table:
            return numbers + (outputs // self.group if self.group else 1) * 2**self.bits * 2
        scales = 0 if self.is_float else outputs * (inputs // self.group if self.group else 1) * 4
        return numbers + scales


PORTABLE_GROUP = 32
SCHEMES = ("fp32", "fp16", "int8", "int4", "int4-g128")  # what is offered; other groups parse too
STATIC_SCHEMES = (
    "w8a16",
    "w4a16",
    *(f"w4a16-{kind}{group}" for kind in ("g", "lpbq") for group in STATIC_GROUPS),
)


def parse_scheme(name: str) -> Scheme:
    """A scheme by its name; RecipeError names those there are.

    >>> parse_scheme("int4-g128").group
    128
    """
    if name in ("fp16", "fp32"):
        return Scheme(16 if name == "fp16" else 32)
    if match := _TABLE.fullmatch(name):
        bits, group = match.groups()
        if bits in _TABLE_BITS and (group is None or int(group) in TABLE_GROUPS):
            return Scheme(_TABLE_BITS[bits], int(group) if group else None, table=True)
    if match := _INTEGERS.fullmatch(name):
        bits, group, channel = match.groups()
        if channel and bits != "4":
            return Scheme(_INTEGER_BITS[bits])
        if not channel and (group is None or int(group) in GROUPS):
            return Scheme(_INTEGER_BITS[bits], int(group or PORTABLE_GROUP), "int8")
    if (match := _STATIC.fullmatch(name)) and name in STATIC_SCHEMES:
        bits, kind, group = match.groups()
        number = int(group) if group else None
        return Scheme(4 if bits == "4" else 8, number, "uint16", low_power=kind == "lpbq")
    raise RecipeError(
        f"there is no scheme {name!r}: use one of {', '.join(SCHEMES)} (groups of {', '.join(map(str, GROUPS))}), "
        f"for an NPU with static ranges {', '.join(STATIC_SCHEMES)}, or "
        f"for lookup tables pal4 or pal4-g16 (2, 3, 4, 6 or 8 bits, groups of {', '.join(map(str, TABLE_GROUPS))})"
    )


def fit_scheme(scheme: Scheme, shape: tuple[int, int]) -> tuple[Scheme, str]:
    """The nearest scheme whose group divides a weight [outputs, inputs], and why it differs ("" if it does not).

    A smaller group first (never coarser than asked), else 8 bits per channel, or one table for all.
    """
    divided, what = (shape[0], "outputs") if scheme.table else (shape[1], "inputs")
    if scheme.group is None or divided % scheme.group == 0:
        return scheme, ""
    why = f"{divided} {what} are no multiple of {scheme.group}"
    for group in reversed(TABLE_GROUPS if scheme.table else GROUPS):
        if group < scheme.group and divided % group == 0:
            return replace(scheme, group=group), f"{why}: groups of {group}"
    if scheme.table:
        return replace(scheme, group=None), f"{why}, nor of a smaller group: one table for all"
    activations: Literal["float32", "uint16"] = "uint16" if scheme.is_static else "float32"
    return Scheme(8, None, activations), f"{why}, nor of a smaller group: 8 bits per channel"
