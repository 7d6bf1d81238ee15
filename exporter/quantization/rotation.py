"""Weights of a model that computes the same in a turned basis, where no channel has outliers.

QuaRot (Ashkboos et al. 2024, arxiv.org/abs/2404.00456) and SpinQuant (Liu et al. 2024, arxiv.org/abs/2405.16406), whose
names these are; the matrices are random Hadamard ones (`quantization.hadamard`), none is learned.

R1 turns the residual stream: an RMSNorm whose weight is 1 does not change under it, so the norms' weights first go into
the linears after them. The embedding's rows and what `o` and `down` give are turned, and all that read the stream turn
back. R2 turns each head of `v` and is undone in `o`: attention takes means of values, the same for all their channels.

The final norm's weight goes into the head, which is then another matrix than the embedding. A family that normalises
what attention and MLP give (Gemma 2) has weights there that nothing after can take in: it gets R2 alone.
"""

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.checkpoint import Matrix, Source
from exporter.quantization.folding import before
from exporter.quantization.hadamard import Hadamard
from exporter.safetensors import to_float32

_STREAM = ("attention.o", "mlp.down")  # what they give is added to the residual stream


def turns_stream(arch: Architecture) -> bool:
    """Whether R1 leaves this family what it is."""
    return not arch.post_norms


def rotated_architecture(arch: Architecture) -> Architecture:
    """Of the turned model: under R1 no head is the embedding."""
    return replace(arch, tied=False) if turns_stream(arch) else arch


class Rotated:
    """A source's weights, turned (a `checkpoint.Source`).

    Weights are read some rows at a time, but those whose outputs are turned, `o`, `down` and `v`, as a whole.
    """

    def __init__(self, source: Source) -> None:
        self._source, arch = source, source.architecture
        self._stream = Hadamard(arch.hidden) if turns_stream(arch) else None
        self._head = Hadamard(arch.head_dim)
        self._tied = arch.tied
        self.architecture = rotated_architecture(arch)

    def matrix(self, name: str) -> Matrix:
        """A weight matrix, float32, what feeds it and what it feeds turned."""
        matrix = self._source.matrix("embedding" if name == "head" and self._tied else name)
        norm, kind = "final_norm" if name == "head" else before(name), _kind(name)
        reads = norm.endswith("_norm")
        gain = self._source.vector(norm) if reads and self._stream else None
        inner = (
            self._head if kind == "attention.o" else self._stream if reads or name == "embedding" else None
        )

        def rows(start: int, stop: int) -> NDArray[Any]:
            w = to_float32(matrix.rows(start, stop))
            if gain is not None:
                w = w * gain
            return inner.columns(w) if inner else w

        outer = self._outer(kind)
        return Matrix(name, matrix.shape, _Whole(partial(rows, 0, matrix.shape[0]), outer) if outer else rows)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight, which R1 makes 1, or a bias, turned where what it is added to is."""
        values = self._source.vector(name)
        if name.endswith("_norm"):
            return np.ones_like(values) if self._stream else values
        outer = self._outer(_kind(name.removesuffix(".bias")))
        return outer.rows(values[:, None])[:, 0] if outer else values

    def _outer(self, kind: str) -> Hadamard | None:
        """What turns the outputs of a linear."""
        return self._head if kind == "attention.v" else self._stream if kind in _STREAM else None


class _Whole:
    """Rows of a weight whose rows are sums of many: all of it is made when some are first asked for."""

    def __init__(self, read: partial[NDArray[Any]], outer: Hadamard) -> None:
        self._read, self._outer = read, outer
        self._made: NDArray[np.float32] | None = None
        self._lock = threading.Lock()

    def __call__(self, start: int, stop: int) -> NDArray[np.float32]:
        with self._lock:
            if self._made is None:
                self._made = self._outer.rows(self._read())
        return self._made[start:stop]


def _kind(weight: str) -> str:
    """A weight's canonical name without its layer."""
    return weight.split(".", 2)[-1]
