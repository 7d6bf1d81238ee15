"""What a weight becomes: a `Scheme` says bits, group and activations, and nothing of how or in which format."""

import re
from dataclasses import dataclass
from typing import Literal

from exporter.errors import RecipeError

_NAME = re.compile(r"int([48])(?:-g(\d+)|-(channel))?")
GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers in [-2^(bits-1), 2^(bits-1) - 1] times a scale, or plain floats.

    `group`: inputs that share a scale; None is one scale per output channel (and for floats, none at all).
    Scales lie on the portable grid (see `quantization.tensor.round_scales`), so that float32, float16 and
    bfloat16 hold them exactly and every format stores the same numbers.
    `activations`: how the values that meet this weight are rounded; "int8" is one scale per token and group,
    found as the model runs.
    """

    bits: Literal[4, 8, 16, 32]
    group: int | None = None
    activations: Literal["float32", "int8"] = "float32"

    @property
    def name(self) -> str:
        """fp32, fp16, int8, int4, int4-g128, int8-channel, ..."""
        if not self.is_integer:
            return f"fp{self.bits}"
        if self.group is None:
            return f"int{self.bits}-channel"
        return f"int{self.bits}" if self.group == PORTABLE_GROUP else f"int{self.bits}-g{self.group}"

    @property
    def is_integer(self) -> bool:
        """Whether weights are integers with scales."""
        return self.bits <= 8

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a weight [outputs, inputs], float32 scales included."""
        outputs, inputs = shape
        scales = 0 if not self.is_integer else outputs * (inputs // self.group if self.group else 1) * 4
        return outputs * inputs * self.bits // 8 + scales


PORTABLE_GROUP = 32
SCHEMES = ("fp32", "fp16", "int8", "int4", "int4-g128")  # what is offered; other groups parse too


def parse_scheme(name: str) -> Scheme:
    """A scheme by its name; RecipeError names those there are.

    >>> parse_scheme("int4-g128").group
    128
    """
    if name in ("fp16", "fp32"):
        return Scheme(16 if name == "fp16" else 32)
    if match := _NAME.fullmatch(name):
        bits, group, channel = match.groups()
        if channel and bits == "8":
            return Scheme(8)
        if not channel and (group is None or int(group) in GROUPS):
            return Scheme(4 if bits == "4" else 8, int(group or PORTABLE_GROUP), "int8")
    raise RecipeError(
        f"there is no scheme {name!r}: use one of {', '.join(SCHEMES)} (groups of {', '.join(map(str, GROUPS))})"
    )


def fit_scheme(scheme: Scheme, inputs: int) -> tuple[Scheme, str]:
    """The nearest scheme whose group divides `inputs`, and why it differs ("" if it does not).

    A smaller group first (never coarser than asked), else 8 bits per channel.
    """
    if scheme.group is None or inputs % scheme.group == 0:
        return scheme, ""
    why = f"{inputs} inputs are no multiple of {scheme.group}"
    for group in reversed(GROUPS):
        if group < scheme.group and inputs % group == 0:
            return Scheme(scheme.bits, group, scheme.activations), f"{why}: groups of {group}"
    return Scheme(8), f"{why}, nor of a smaller group: 8 bits per channel"
