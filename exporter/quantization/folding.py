"""Scales of activations that are undone by the weights on either side: the model computes what it did.

What feeds a linear can be made smaller, channel by channel, where that linear's weights are made larger: x / s meets
W · s. The division costs nothing, for it goes into the weights of what x comes from (`BEFORE`): a norm's weight, the
rows of `up`, by which the gated product is a multiple, or those of `v`, of which attention takes means. Heads that
share keys and values share scales.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.checkpoint import Matrix, Source
from exporter.safetensors import to_float32

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.quantization.recipe import Decision

Scales = Mapping[str, NDArray[np.float32]]  # by the canonical name of what is divided by them

_WIDEST = math.log(1e4)  # how far from their mean scales go: weights still are well within float16 then

# What feeds each of a layer's linears, and scales each channel of its input.
BEFORE = {
    "attention.q": "attention_norm",
    "attention.k": "attention_norm",
    "attention.v": "attention_norm",
    "attention.o": "attention.v",
    "mlp.gate": "mlp_norm",
    "mlp.up": "mlp_norm",
    "mlp.down": "mlp.up",
}


def before(weight: str) -> str:
    """The canonical name of what feeds a linear; the weight's own where nothing that scales does.

    >>> before("layers.3.mlp.down"), before("layers.3.attention_norm")
    ('layers.3.mlp.up', 'layers.3.attention_norm')
    """
    top, _, rest = weight.partition(".")
    i, _, kind = rest.partition(".")
    return f"{top}.{i}.{BEFORE[kind]}" if kind in BEFORE else weight


def spread(arch: Architecture, linear: str, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales of the channels of what feeds a linear as those of its inputs [inputs]."""
    if not linear.endswith("attention.o"):
        return scales
    heads = scales.reshape(arch.kv_heads, arch.head_dim).repeat(arch.heads // arch.kv_heads, axis=0)
    return heads.reshape(-1)


class Scaled:
    """A source's weights with scales folded in (a `checkpoint.Source`).

    `scales`: float32 [channels], positive, such as those of "layers.0.mlp_norm". Nothing is held but those.
    """

    def __init__(self, source: Source, scales: Scales) -> None:
        self._source, self.scales = source, scales
        self.architecture = source.architecture

    def matrix(self, name: str) -> Matrix:
        """A weight matrix: its columns times the scales of what feeds it, its rows divided by its own."""
        matrix, feeding = self._source.matrix(name), before(name)
        wide = self.scales.get(feeding) if feeding != name else None
        own = self.scales.get(name)
        if wide is None and own is None:
            return matrix
        factors = None if wide is None else spread(self.architecture, name, wide)

        def rows(start: int, stop: int) -> NDArray[Any]:
            w = to_float32(matrix.rows(start, stop))
            if factors is not None:
                w = w * factors
            return w / own[start:stop, None] if own is not None else w

        return Matrix(name, matrix.shape, rows)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias, divided by the scales of what it belongs to."""
        values, scales = self._source.vector(name), self.scales.get(name.removesuffix(".bias"))
        return values if scales is None else values / scales


def folded(source: Source) -> Scales | None:
    """The scales that were folded into a source's weights last, None where there are none."""
    return source.scales if isinstance(source, Scaled) else None


def balanced(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales whose geometric mean is 1, so that no values grow or shrink as a whole; 1 where there is none, of channels
    that were never active or whose weights are all zero, and nowhere beyond what weights can take."""
    known = np.isfinite(scales) & (scales > 0)
    out = np.ones(scales.shape, np.float32)
    if known.any():
        logs = np.log(scales[known].astype(np.float64))
        out[known] = np.exp(np.clip(logs - logs.mean(), -_WIDEST, _WIDEST))
    return out


@dataclass(frozen=True)
class Linears:
    """Those that share an input, with what each becomes, and what is known of that input on a calibration text.

    `hessian`: the mean of x xᵀ over all inputs x, float32 [inputs, inputs]; `peaks`: the largest |x| of each input,
    float32 [inputs]; None where it is not asked for.
    """

    arch: Architecture
    matrices: tuple[Matrix, ...]
    decisions: "tuple[Decision, ...]"
    hessian: "Tensor | None" = None
    peaks: NDArray[np.float32] | None = None

    def channels(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest of each channel of what feeds them, of numbers that the inputs have: an input of `o` is a query
        head's, and those that share a head of `v` are one channel."""
        if not self.matrices[0].name.endswith("attention.o"):
            return inputs
        shared = inputs.reshape(self.arch.kv_heads, -1, self.arch.head_dim)
        return np.ascontiguousarray(shared.max(1).reshape(-1))

    def spread(self, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scales of the channels as those of the inputs."""
        return spread(self.arch, self.matrices[0].name, scales)
