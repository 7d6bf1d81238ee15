"""What Core ML's two layouts share: the decoder's verbs as operations of an ML Program, whichever way values lie.

Products of matrices and the KV cache are float16; what is between them is a layout's `wide` kind, and each value is
rounded as seldom as that allows. The KV cache is two states, [layers, kv_heads, context, head_dim] each. Left to a
layout: how values lie, and so the embedding, norms, linears and masks.

Operations: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.formats.coreml_program import Blob, Kind, MilFunction, Var
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights

CHUNK = 64  # tokens that `prefill` takes at once
MASKED = -1e4  # added to a score that must not count: exp makes 0 of it


class ProgramOps(ABC):
    """The verbs of `decoder.Ops` for `length` tokens at a time, in the layers `layers` of the decoder."""

    wide: Kind  # what the residual stream, activations and softmax are computed in

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        function: MilFunction,
        length: int,
        context: int,
        layers: range,
    ) -> None:
        self.arch, self.weights, self.f = arch, weights, function
        self.length, self.context = length, context
        self._layers = layers
        self._shapes = dict(arch.matrices())
        self._held: dict[str, Var] = {}  # what each state holds now
        self.position = function.input("position", "int32", (1,))
        shape = (len(layers), arch.kv_heads, context, arch.head_dim)
        self._states = {part: function.state(f"{part}_cache", shape) for part in ("key", "value")}
        self._end = function.op("add", "int32", (1,), x=self.position, y=np.array([length], np.int32))
        # What scores are multiplied by, and divided by before tanh, queries already are: no score is rounded for it.
        self._query_scale = arch.attention_scale / (arch.attention_softcap or 1)
        self._rope = {factor: self._rope_rows(factor) for factor in (self._query_scale, 1.0)}
        self._places: dict[int, tuple[Var, Var]] = {}
        self._masks: dict[int, Var] = {}
        self._kept = _Once(weights, "")

    # what differs between the layouts

    @abstractmethod
    def rms_norm(self, x: Var, weight: str) -> Var:
        """x / sqrt(mean(x²) + eps) * weight over the channels, whose squares must stay in range."""

    @abstractmethod
    def linear(self, x: Var, weight: str) -> Var:
        """x @ Wᵀ, plus a bias if the architecture has one there."""

    @abstractmethod
    def heads(self, x: Var, count: int) -> Var:
        """A linear's result -> [1, count, length, head_dim]."""

    @abstractmethod
    def merged(self, x: Var) -> Var:
        """[1, heads, length, head_dim] -> what a linear takes."""

    @abstractmethod
    def mask(self, window: int) -> Var:
        """What is added to scores, [..., length, context]: 0 where a query sees a key; no window is 0."""

    # the verbs

    def scale(self, x: Var, factor: float) -> Var:
        x = self.widened(x)
        return self.binary("mul", x, self.number(factor, x.kind))

    def add(self, x: Var, y: Var) -> Var:
        return self.binary("add", self.widened(x), self.widened(y))

    def linears(self, x: Var, weights: Sequence[str]) -> list[Var]:
        x = self.halved(x)  # once for all
        return [self.linear(x, weight) for weight in weights]

    def gated(self, gate: Var, up: Var) -> Var:
        gate, up = self.widened(gate), self.widened(up)
        if self.arch.activation == "silu":
            return self.binary("mul", self.unary("silu", gate), up)
        active = self.f.op("gelu", gate.kind, gate.shape, x=gate, mode="TANH_APPROXIMATION")
        return self.binary("mul", active, up)

    def softcap(self, x: Var, cap: float) -> Var:
        return self.scale(self.unary("tanh", self.scale(x, 1 / cap)), cap)

    def attention(self, q: Var, k: Var, v: Var, layer: int) -> Var:
        arch, length, context = self.arch, self.length, self.context
        shared, cap = arch.heads // arch.kv_heads, arch.attention_softcap
        q = self._rotate(self.heads(q, arch.heads), self._query_scale)
        keys = self._remember("key", self._rotate(self.heads(k, arch.kv_heads), 1), layer)
        values = self._remember("value", self.heads(v, arch.kv_heads), layer)
        # Heads that share a key are rows of one product.
        rows = (1, arch.kv_heads, shared * length)
        q = self.reshape(q, (*rows, arch.head_dim))
        scores = self._matmul(q, keys, (*rows, context), transpose_y=True)
        scores = self.widened(self.reshape(scores, (1, arch.heads, length, context)))
        if cap:
            scores = self.scale(self.unary("tanh", scores), cap)
        scores = self.binary("add", scores, self._mask(arch.windows[layer]))
        shares = self.halved(self.f.op("softmax", scores.kind, scores.shape, x=scores, axis=-1))
        mixed = self._matmul(self.reshape(shares, (*rows, context)), values, (*rows, arch.head_dim))
        return self.merged(self.reshape(mixed, (1, arch.heads, length, arch.head_dim)))

    # parts of attention

    def _mask(self, window: int) -> Var:
        """`mask`, made once; a window that holds the whole context is none."""
        window = window if window < self.context else 0
        if window not in self._masks:
            self._masks[window] = self.mask(window)
        return self._masks[window]

    def _remember(self, part: str, new: Var, layer: int) -> Var:
        """Put [1, kv_heads, length, head_dim] into a state's layer; returns all of that layer."""
        state, layer = self._states[part], self._layers.index(layer)
        begin, end = self._place(layer)
        held = self._held.get(part) or self.f.read(state)
        # What the next layer reads is what this one wrote: reading the state anew could be moved before it.
        self._held[part] = self.f.write(
            state,
            self.f.op(
                "slice_update",
                "fp16",
                state.shape,
                x=held,
                update=new,
                begin=begin,
                end=end,
            ),
        )
        return self.f.op(
            "slice_by_index",
            "fp16",
            (1, *state.shape[1:]),
            x=self._held[part],
            begin=np.array([layer, 0, 0, 0], np.int32),
            end=np.array([layer + 1, *state.shape[1:]], np.int32),
        )

    def _place(self, layer: int) -> tuple[Var, Var]:
        """Where this run's keys and values begin and end in a state: the same in both."""
        if layer not in self._places:
            self._places[layer] = (
                self.concat_ints([layer, 0], self.position, [0]),
                self.concat_ints([layer + 1, self.arch.kv_heads], self._end, [self.arch.head_dim]),
            )
        return self._places[layer]

    def _rotate(self, x: Var, factor: float) -> Var:
        """Rotary embedding of [1, heads, length, head_dim] times `factor`: (a, b) -> (a cos - b sin, b cos + a sin)."""
        x, (cos, sin) = self.widened(x), self._rope[factor]
        dim, size = self.arch.rope.dim, self.arch.head_dim
        half = dim // 2
        turned = x if dim == size else self.slice(x, 0, dim)
        swapped = self.concat([self.slice(x, half, dim), self.slice(x, 0, half)])
        rotated = self.binary("add", self.binary("mul", turned, cos), self.binary("mul", swapped, sin))
        if dim < size:
            rest = self.slice(x, dim, size)
            rotated = self.concat([rotated, rest if factor == 1 else self.scale(rest, factor)])
        return self.halved(rotated)

    def _rope_rows(self, factor: float) -> tuple[Var, Var]:
        """(cos, cos) and (-sin, sin) at this run's positions, times `factor`, [length, dim] each."""
        begin = self.concat_ints([], self.position, [0])

        def rows(table: NDArray[np.float32]) -> Var:
            table = table * np.float32(factor)
            return self.window(table.astype(_NUMPY[self.wide]), begin, (self.length, table.shape[1]))

        cos, sin = map(rows, self.arch.rope.tables(self.context))
        return self.concat([cos, cos]), self.concat([self.scale(sin, -1), sin])

    # weights

    def matrix(self, name: str, rows: range | None = None, tail: tuple[int, ...] = ()) -> Var:
        """Rows of a weight matrix, [outputs, inputs, *tail] with a tail of ones, as float16 whatever is stored.

        `rows` must begin and end where tables of a palettized weight do.
        """
        outputs, inputs = self._shapes[name]
        rows = range(outputs) if rows is None else rows
        shape, kept, part = (len(rows), inputs, *tail), self._once(name), slice(rows.start, rows.stop)
        key = name if len(rows) == outputs else f"{name}.{rows.start}"
        scheme = self.weights.scheme(name)
        if scheme.is_float:
            return self.f.const(
                self._blob(key, "fp16", shape, lambda: kept.tensor.data[part].astype(np.float16))
            )
        if scheme.table:
            group = scheme.group or outputs
            kind, tables = _UNSIGNED[scheme.bits], slice(rows.start // group, -(-rows.stop // group))
            numbers = {
                "indices": self._blob(key, kind, shape, lambda: kept.tensor.indices(part.start, part.stop)),
                "lut": self._blob(
                    f"{key}.tables",
                    "fp16",
                    (tables.stop - tables.start, 1, *tail, 2**scheme.bits, 1),
                    lambda: _exact(kept.tensor.tables, tables),
                ),
            }
            type = "constexpr_lut_to_dense"
        else:
            kind = "int4" if scheme.bits == 4 else "int8"
            groups = inputs // scheme.group if scheme.group else 1
            numbers = {
                "data": self._blob(key, kind, shape, lambda: kept.tensor.integers(part.start, part.stop)),
                "scale": self._blob(
                    f"{key}.scales",
                    "fp16",
                    (len(rows), groups, *tail),
                    lambda: _exact(kept.tensor.scales, part),
                ),
            }
            type = "constexpr_blockwise_shift_scale"
        return self.f.constexpr(type, "fp16", shape, name=key, **numbers)

    def vector(self, name: str, kind: Kind = "fp16") -> Var:
        """A norm's weight or a bias."""
        values = self.weights.vector(name).astype(_NUMPY[kind])
        return self.f.const(self._blob(name, kind, values.shape, lambda: values))

    def _once(self, name: str) -> "_Once":
        """The weight asked for last is kept for its other parts, and no other."""
        if self._kept.name != name:
            self._kept = _Once(self.weights, name)
        return self._kept

    def _blob(self, key: str, kind: Kind, shape: Sequence[int], fetch: Callable[[], NDArray[Any]]) -> Blob:
        return self.f.package.blob(key, kind, shape, fetch)

    # operations

    def widened(self, x: Var) -> Var:
        """As the layout's `wide` kind."""
        return self._cast(x, self.wide)

    def halved(self, x: Var) -> Var:
        """As float16, which products of matrices take."""
        return self._cast(x, "fp16")

    def _cast(self, x: Var, kind: Kind) -> Var:
        return x if x.kind == kind else self.f.op("cast", kind, x.shape, x=x, dtype=kind)

    def number(self, value: float, kind: Kind) -> np.generic:
        """A constant to compute with a value of that kind."""
        return _NUMPY[kind](value)

    def unary(self, type: str, x: Var) -> Var:
        return self.f.op(type, x.kind, x.shape, x=x)

    def binary(self, type: str, x: Any, y: Any) -> Var:
        """Of two values of one kind, either of them a constant."""
        shape = np.broadcast_shapes(*(value.shape for value in (x, y)))
        kind = next(value.kind for value in (x, y) if isinstance(value, Var))
        return self.f.op(type, kind, shape, x=x, y=y)

    def reduce(self, type: str, x: Var, axis: int) -> Var:
        """Over one axis, which stays with size 1."""
        shape = list(x.shape)
        shape[axis] = 1
        return self.f.op(type, x.kind, shape, x=x, axes=np.array([axis], np.int32), keep_dims=True)

    def reshape(self, x: Var, shape: Sequence[int]) -> Var:
        return self.f.op("reshape", x.kind, shape, x=x, shape=np.array(shape, np.int32))

    def transpose(self, x: Var, order: Sequence[int]) -> Var:
        shape = tuple(x.shape[i] for i in order)
        return self.f.op("transpose", x.kind, shape, x=x, perm=np.array(order, np.int32))

    def window(self, table: NDArray[Any], begin: Var, shape: Sequence[int]) -> Var:
        """`shape` elements of a constant from `begin` on, which is only known as it runs."""
        size, held = np.array(shape, np.int32), self.f.const(table)
        return self.f.op("slice_by_size", held.kind, shape, x=held, begin=begin, size=size)

    def slice(self, x: Var, start: int, stop: int) -> Var:
        """Elements [start, stop) of the last dimension."""
        begin = [0] * (len(x.shape) - 1) + [start]
        end = [*x.shape[:-1], stop]
        return self.f.op(
            "slice_by_index",
            x.kind,
            (*x.shape[:-1], stop - start),
            x=x,
            begin=np.array(begin, np.int32),
            end=np.array(end, np.int32),
        )

    def concat(self, values: Sequence[Var], axis: int = -1) -> Var:
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.f.op("concat", values[0].kind, shape, values=list(values), axis=axis, interleave=False)

    def concat_ints(self, before: Sequence[int], middle: Var, after: Sequence[int]) -> Var:
        """A vector of int32 with one value that is only known as it runs."""
        parts = [self.f.const(np.array(part, np.int32)) for part in (before, after)]
        values = [part for part in (parts[0], middle, parts[1]) if part.shape != (0,)]
        return self.concat(values, axis=0)

    def _matmul(self, x: Var, y: Var, shape: Sequence[int], transpose_y: bool = False) -> Var:
        return self.f.op("matmul", "fp16", shape, x=x, y=y, transpose_x=False, transpose_y=transpose_y)


_NUMPY: dict[Kind, type[np.floating[Any]]] = {"fp16": np.float16, "fp32": np.float32}
_UNSIGNED: dict[int, Kind] = {2: "uint2", 3: "uint3", 4: "uint4", 6: "uint6", 8: "uint8"}


class _Once:
    """A weight that is quantized when it is first asked for, and then kept for its other parts."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.name = name
        self._weights = weights
        self._tensor: QuantizedTensor | None = None

    @property
    def tensor(self) -> QuantizedTensor:
        if self._tensor is None:
            self._tensor = self._weights.matrix(self.name)
        return self._tensor


def _exact(numbers: NDArray[np.float32] | None, rows: slice) -> NDArray[np.float16]:
    """Scales or tables, which the quantizer made numbers that float16 holds exactly."""
    assert numbers is not None
    return numbers[rows].astype(np.float16)
