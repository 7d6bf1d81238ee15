"""The verbs of the decoder, spelled out in elementary operations.

Where a target has no fused operator for a norm, an activation or a rotary embedding, those are composed of what
every target has: add, multiply, rsqrt, sigmoid, concat, ... They are composed here, once; a format that needs
them derives from `PrimitiveOps` and implements the elementary operations on its own values. Two formats that do
so compute the same operations in the same order, so their results can be compared bit for bit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.quantization.weights import Weights

V = TypeVar("V")

REST = -1  # in a shape: the dimension that takes what the others leave
_FORBIDDEN = 1e9  # what a score loses for each token that its key lies outside of what may be seen


class PrimitiveOps(ABC, Generic[V]):
    """`decoder.Ops` over elementary operations on values of type `V`; all tensors are float32.

    Left to the format: `embed`, `linear`, `last`, `remember` (the KV cache), and the operations below.
    Values are [1, length, ...]; the length may differ from run to run.
    """

    def __init__(self, arch: Architecture, weights: Weights) -> None:
        self.arch, self.weights = arch, weights
        self._masks: dict[int, V] = {}

    # elementary operations, on float32 values with numpy's broadcasting

    @abstractmethod
    def constant(self, name: str, values: NDArray[np.float32]) -> V:
        """A constant tensor; the same name stands for the same values."""

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """x + y."""

    @abstractmethod
    def subtract(self, x: V, y: V) -> V:
        """x - y."""

    @abstractmethod
    def multiply(self, x: V, y: V) -> V:
        """x * y."""

    @abstractmethod
    def minimum(self, x: V, y: V) -> V:
        """The smaller of the two."""

    @abstractmethod
    def rsqrt(self, x: V) -> V:
        """1 / sqrt(x)."""

    @abstractmethod
    def sigmoid(self, x: V) -> V:
        """1 / (1 + exp(-x))."""

    @abstractmethod
    def tanh(self, x: V) -> V:
        """Hyperbolic tangent."""

    @abstractmethod
    def softmax(self, x: V) -> V:
        """exp(x) / sum(exp(x)) over the last dimension."""

    @abstractmethod
    def mean(self, x: V) -> V:
        """Mean over the last dimension, which stays with size 1."""

    @abstractmethod
    def matmul(self, x: V, y: V) -> V:
        """x @ y over the last two dimensions; those before them broadcast."""

    @abstractmethod
    def concat(self, values: Sequence[V]) -> V:
        """Side by side in the last dimension."""

    @abstractmethod
    def slice(self, x: V, start: int, stop: int) -> V:
        """Elements [start, stop) of the last dimension."""

    @abstractmethod
    def reshape(self, x: V, shape: Sequence[int]) -> V:
        """The same elements in another shape; one dimension may be REST."""

    @abstractmethod
    def transpose(self, x: V, order: Sequence[int]) -> V:
        """Dimension `order[i]` of x becomes dimension i."""

    # what the format knows about positions and the cache

    @abstractmethod
    def rope_table(self, name: str, table: NDArray[np.float32]) -> V:
        """Rows of `table` [context, n] at the positions of this run's tokens: [1, length, 1, n]."""

    @abstractmethod
    def positions(self, of: str) -> V:
        """Positions as float32: `of` is "queries" (this run's tokens), [length, 1], or "keys" (all tokens so
        far), [1, total]."""

    @abstractmethod
    def attend(self, q: V, k: V, v: V, layer: int) -> V:
        """Remember k and v, and attend: [1, length, heads, dim] and twice [1, length, kv_heads, dim], rotated
        already -> [1, length, heads * dim]."""

    # the verbs

    def scale(self, x: V, factor: float) -> V:
        """x * factor."""
        return self.multiply(x, self._scalar(factor))

    def rms_norm(self, x: V, weight: str) -> V:
        """x / sqrt(mean(x²) + eps) * weight."""
        power = self.add(self.mean(self.multiply(x, x)), self._scalar(self.arch.norm_eps))
        normed = self.multiply(x, self.rsqrt(power))
        return self.multiply(normed, self.constant(weight, self.weights.vector(weight)))

    @abstractmethod
    def linear(self, x: V, weight: str) -> V:
        """x @ Wᵀ, plus a bias if the architecture has one there."""

    def linears(self, x: V, weights: Sequence[str]) -> list[V]:
        """Several linears of one input."""
        return [self.linear(x, weight) for weight in weights]

    def gated(self, gate: V, up: V) -> V:
        """activation(gate) * up."""
        active = self._silu(gate) if self.arch.activation == "silu" else self._gelu(gate)
        return self.multiply(active, up)

    def softcap(self, x: V, cap: float) -> V:
        """cap * tanh(x / cap)."""
        return self.scale(self.tanh(self.scale(x, 1 / cap)), cap)

    def attention(self, q: V, k: V, v: V, layer: int) -> V:
        """Rotate, remember, attend."""
        arch = self.arch
        q = self._rotate(self.reshape(q, [1, REST, arch.heads, arch.head_dim]))
        k = self._rotate(self.reshape(k, [1, REST, arch.kv_heads, arch.head_dim]))
        return self.attend(q, k, self.reshape(v, [1, REST, arch.kv_heads, arch.head_dim]), layer)

    # for `attend`

    def capped_attention(self, q: V, keys: V, values: V, layer: int) -> V:
        """Attention with the scores written out, for architectures that cap them.

        q [1, length, heads, dim]; keys and values [1, total, kv_heads, dim] -> [1, length, heads * dim]. Heads
        that share a key lie in a dimension of their own, over which the key broadcasts.
        """
        arch = self.arch
        shared = arch.heads // arch.kv_heads
        q = self.reshape(q, [1, REST, arch.kv_heads, shared, arch.head_dim])
        q = self.scale(self.transpose(q, [0, 2, 3, 1, 4]), arch.attention_scale)
        keys = self.reshape(self.transpose(keys, [0, 2, 3, 1]), [1, arch.kv_heads, 1, arch.head_dim, REST])
        values = self.reshape(
            self.transpose(values, [0, 2, 1, 3]), [1, arch.kv_heads, 1, REST, arch.head_dim]
        )
        scores = self.matmul(q, keys)
        if arch.attention_softcap:
            scores = self.softcap(scores, arch.attention_softcap)
        scores = self.add(scores, self.mask(arch.windows[layer]))
        mixed = self.transpose(self.matmul(self.softmax(scores), values), [0, 3, 1, 2, 4])
        return self.reshape(mixed, [1, REST, arch.heads * arch.head_dim])

    def mask(self, window: int) -> V:
        """What is added to scores, [length, total]: 0 where a query sees a key, else at most -1e9.

        A key is seen that is no later than the query, and within the last `window` tokens unless that is 0.
        """
        if window not in self._masks:
            behind = self.subtract(self.positions("queries"), self.positions("keys"))
            outside = self.minimum(behind, self._scalar(0.0))
            if window:
                left = self.subtract(self._scalar(window - 1.0), behind)
                outside = self.add(outside, self.minimum(left, self._scalar(0.0)))
            self._masks[window] = self.scale(outside, _FORBIDDEN)
        return self._masks[window]

    def _rotate(self, x: V) -> V:
        """Rotary embedding of [1, length, heads, head_dim]: (a, b) -> (a cos - b sin, b cos + a sin)."""
        dim = self.arch.rope.dim
        half, size = dim // 2, self.arch.head_dim
        cos, sin = self._rope_tables()
        first, second = self.slice(x, 0, half), self.slice(x, half, dim)
        turned = x if dim == size else self.slice(x, 0, dim)
        swapped = self.concat([second, first])
        rotated = self.add(self.multiply(turned, cos), self.multiply(swapped, sin))
        return rotated if dim == size else self.concat([rotated, self.slice(x, dim, size)])

    def _rope_tables(self) -> tuple[V, V]:
        """(cos, cos) and (-sin, sin), [1, length, 1, dim] each."""
        cos, sin = self.tables
        return (
            self.rope_table("rope.cos", np.concatenate((cos, cos), -1)),
            self.rope_table("rope.sin", np.concatenate((-sin, sin), -1)),
        )

    @property
    @abstractmethod
    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of the rotary embedding, [context, dim/2] each."""

    def _silu(self, x: V) -> V:
        return self.multiply(x, self.sigmoid(x))

    def _gelu(self, x: V) -> V:
        """GELU with tanh: x/2 * (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv:1606.08415)."""
        cubed = self.multiply(self.multiply(x, x), x)
        inner = self.scale(self.add(x, self.scale(cubed, 0.044715)), math.sqrt(2 / math.pi))
        return self.multiply(self.scale(x, 0.5), self.add(self.tanh(inner), self._scalar(1.0)))

    def _scalar(self, value: float) -> V:
        return self.constant(f"number.{value!r}", np.array([value], np.float32))


def shape_after(shape: Sequence[int], of: Sequence[int]) -> list[int]:
    """`shape` with REST replaced, for a value of shape `of`.

    >>> shape_after([1, REST, 4], [1, 6, 8])
    [1, 12, 4]
    """
    known = math.prod(size for size in shape if size != REST)
    return [math.prod(of) // known if size == REST else size for size in shape]
