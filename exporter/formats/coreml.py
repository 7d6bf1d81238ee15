"""Core ML: the decoder as an ML Program for iOS 18 and macOS 15, functions `prefill` and `decode` in one package.

Linear layers, for the GPU (and the CPU): integers in groups along the inputs, which the Neural Engine does not
take. All is float16; a norm scales its input first, so that squares stay in range. The KV cache is two states that
both functions share, [layers, kv_heads, context, head_dim] each.

Operations: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.formats.coreml_program import Blob, Kind, MilFunction, Package, Var
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, KVCache, TensorSpec

PACKAGE = "model.mlpackage"
CHUNK = 64  # tokens that `prefill` takes at once
_MASKED = np.float16(-1e4)  # added to a score that must not count: exp makes 0 of it
_FLOOR = 1e-5  # the least that a norm divides by: what lies below it all is 0 in float16


class MilOps:
    """The verbs of `decoder.Ops` as operations of one function, for `length` tokens at a time."""

    def __init__(
        self, arch: Architecture, weights: Weights, function: MilFunction, length: int, context: int
    ) -> None:
        self.arch, self.weights, self.f = arch, weights, function
        self.length, self.context = length, context
        self._shapes = dict(arch.matrices())
        self._held: dict[str, Var] = {}  # what each state holds now
        self.tokens = function.input("input_ids", "int32", (1, length))
        self.position = function.input("position", "int32", (1,))
        self.row = function.input("last", "int32", (1,)) if length > 1 else None
        shape = (arch.layers, arch.kv_heads, context, arch.head_dim)
        self._states = {part: function.state(f"{part}_cache", shape) for part in ("key", "value")}
        self._end = function.op("add", "int32", (1,), x=self.position, y=np.array([length], np.int32))
        self._cos, self._sin = self._rope_rows()
        self._masks: dict[int, Var] = {}

    # the verbs

    def embed(self, tokens: Var, weight: str) -> Var:
        shape = (1, self.length, self.arch.hidden)
        table = self._matrix(weight)
        return self.f.op(
            "gather",
            "fp16",
            shape,
            x=table,
            indices=tokens,
            axis=0,
            batch_dims=0,
            validate_indices=False,
        )

    def scale(self, x: Var, factor: float) -> Var:
        return self._binary("mul", x, np.float16(factor))

    def add(self, x: Var, y: Var) -> Var:
        return self._binary("add", x, y)

    def rms_norm(self, x: Var, weight: str) -> Var:
        """With m = max |x|: y = x / m, and y / sqrt(mean(y²) + eps / m²) * weight; y² is at most 1."""
        reduced = (*x.shape[:-1], 1)
        last: dict[str, Any] = {"axes": np.array([-1], np.int32), "keep_dims": True}
        largest = self.f.op("reduce_max", "fp16", reduced, x=self._unary("abs", x), **last)
        largest = self._binary("maximum", largest, np.float16(_FLOOR))
        y = self._binary("real_div", x, largest)
        power = self.f.op("reduce_mean", "fp16", reduced, x=self._binary("mul", y, y), **last)
        eps = self._binary("real_div", np.float16(math.sqrt(self.arch.norm_eps)), largest)
        power = self._binary("add", power, self._binary("mul", eps, eps))
        normed = self._binary("mul", y, self.f.op("rsqrt", "fp16", reduced, x=power, epsilon=np.float16(0)))
        return self._binary("mul", normed, self.weights.vector(weight).astype(np.float16))

    def linear(self, x: Var, weight: str) -> Var:
        out = (*x.shape[:-1], self._shapes[weight][0])
        bias: dict[str, Any] = {}
        if self.arch.has_bias(weight):
            bias["bias"] = self.weights.vector(f"{weight}.bias").astype(np.float16)
        return self.f.op("linear", "fp16", out, x=x, weight=self._matrix(weight), **bias)

    def linears(self, x: Var, weights: Sequence[str]) -> list[Var]:
        return [self.linear(x, weight) for weight in weights]

    def gated(self, gate: Var, up: Var) -> Var:
        if self.arch.activation == "silu":
            return self._binary("mul", self._unary("silu", gate), up)
        active = self.f.op("gelu", "fp16", gate.shape, x=gate, mode="TANH_APPROXIMATION")
        return self._binary("mul", active, up)

    def last(self, x: Var) -> Var:
        if self.row is None:
            return x
        shape = (1, 1, x.shape[-1])
        return self.f.op(
            "gather", "fp16", shape, x=x, indices=self.row, axis=1, batch_dims=0, validate_indices=False
        )

    def softcap(self, x: Var, cap: float) -> Var:
        return self.scale(self._unary("tanh", self.scale(x, 1 / cap)), cap)

    def attention(self, q: Var, k: Var, v: Var, layer: int) -> Var:
        arch, length, context = self.arch, self.length, self.context
        shared = arch.heads // arch.kv_heads
        q = self.scale(self._rotate(self._heads(q, arch.heads)), arch.attention_scale)
        keys = self._remember("key", self._rotate(self._heads(k, arch.kv_heads)), layer)
        values = self._remember("value", self._heads(v, arch.kv_heads), layer)
        # Heads that share a key are rows of one product.
        rows = (1, arch.kv_heads, shared * length)
        q = self._reshape(q, (*rows, arch.head_dim))
        scores = self._matmul(q, keys, (*rows, context), transpose_y=True)
        scores = self._reshape(scores, (1, arch.heads, length, context))
        if arch.attention_softcap:
            scores = self.softcap(scores, arch.attention_softcap)
        scores = self._binary("add", scores, self._mask(arch.windows[layer]))
        shares = self.f.op("softmax", "fp16", scores.shape, x=scores, axis=-1)
        mixed = self._matmul(self._reshape(shares, (*rows, context)), values, (*rows, arch.head_dim))
        mixed = self._reshape(mixed, (1, arch.heads, length, arch.head_dim))
        mixed = self._transpose(mixed, (0, 2, 1, 3))
        return self._reshape(mixed, (1, length, arch.heads * arch.head_dim))

    # parts of attention

    def _remember(self, part: str, new: Var, layer: int) -> Var:
        """Put [1, kv_heads, length, head_dim] into a state's layer; returns all of that layer."""
        arch, state = self.arch, self._states[part]
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
                begin=self._concat_ints([layer, 0], self.position, [0]),
                end=self._concat_ints([layer + 1, arch.kv_heads], self._end, [arch.head_dim]),
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

    def _rotate(self, x: Var) -> Var:
        """Rotary embedding of [1, heads, length, head_dim]: (a, b) -> (a cos - b sin, b cos + a sin)."""
        dim, size = self.arch.rope.dim, self.arch.head_dim
        half = dim // 2
        turned = x if dim == size else self._slice(x, 0, dim)
        swapped = self._concat([self._slice(x, half, dim), self._slice(x, 0, half)])
        rotated = self._binary(
            "add", self._binary("mul", turned, self._cos), self._binary("mul", swapped, self._sin)
        )
        return rotated if dim == size else self._concat([rotated, self._slice(x, dim, size)])

    def _rope_rows(self) -> tuple[Var, Var]:
        """(cos, cos) and (-sin, sin) at this run's positions, [length, dim] each."""
        cos, sin = self.arch.rope.tables(self.context)
        begin = self._concat_ints([], self.position, [0])

        def rows(table: NDArray[np.float32]) -> Var:
            shape = (self.length, table.shape[1])
            return self.f.op(
                "slice_by_size",
                "fp16",
                shape,
                x=self.f.const(table.astype(np.float16)),
                begin=begin,
                size=np.array(shape, np.int32),
            )

        return rows(np.concatenate((cos, cos), -1)), rows(np.concatenate((-sin, sin), -1))

    def _mask(self, window: int) -> Var:
        """What is added to scores, [length, context]: 0 where a query sees a key."""
        if window >= self.context:
            window = 0
        if window not in self._masks:
            shape = (self.length, self.context)
            steps = np.arange(self.length, dtype=np.int32)[:, None]
            queries = self.f.op("add", "int32", (self.length, 1), x=steps, y=self.position)
            keys = np.arange(self.context, dtype=np.int32)[None]
            seen = self.f.op("less_equal", "bool", shape, x=keys, y=queries)
            if window:
                first = self.f.op("sub", "int32", (self.length, 1), x=queries, y=np.array([window], np.int32))
                near = self.f.op("greater", "bool", shape, x=keys, y=first)
                seen = self.f.op("logical_and", "bool", shape, x=seen, y=near)
            counts = self.f.op("cast", "fp16", shape, x=seen, dtype="fp16")
            self._masks[window] = self._binary("mul", self._binary("sub", np.float16(1), counts), _MASKED)
        return self._masks[window]

    def _heads(self, x: Var, heads: int) -> Var:
        """[1, length, heads * dim] -> [1, heads, length, dim]."""
        split = self._reshape(x, (1, self.length, heads, self.arch.head_dim))
        return self._transpose(split, (0, 2, 1, 3))

    # weights

    def _matrix(self, name: str) -> Var:
        """A weight matrix [outputs, inputs] as float16, whatever it is stored as."""
        shape, kept = self._shapes[name], _Once(self.weights, name)
        scheme = self.weights.scheme(name)
        if not scheme.is_integer:
            return self.f.const(self._blob(name, "fp16", shape, lambda: kept.tensor.data.astype(np.float16)))
        kind: Kind = "int4" if scheme.bits == 4 else "int8"
        groups = shape[1] // scheme.group if scheme.group else 1
        data = self._blob(name, kind, shape, lambda: kept.tensor.integers())
        scale = self._blob(f"{name}.scales", "fp16", (shape[0], groups), lambda: _scales(kept.tensor))
        kept.forget()
        return self.f.constexpr(
            "constexpr_blockwise_shift_scale", "fp16", shape, name=name, data=data, scale=scale
        )

    def _blob(self, key: str, kind: Kind, shape: Sequence[int], fetch: Any) -> Blob:
        return self.f.package.blob(key, kind, shape, fetch)

    # operations

    def _unary(self, type: str, x: Var) -> Var:
        return self.f.op(type, x.kind, x.shape, x=x)

    def _binary(self, type: str, x: Any, y: Any) -> Var:
        shape = np.broadcast_shapes(*(value.shape for value in (x, y)))
        return self.f.op(type, "fp16", shape, x=x, y=y)

    def _matmul(self, x: Var, y: Var, shape: Sequence[int], transpose_y: bool = False) -> Var:
        return self.f.op("matmul", "fp16", shape, x=x, y=y, transpose_x=False, transpose_y=transpose_y)

    def _reshape(self, x: Var, shape: Sequence[int]) -> Var:
        return self.f.op("reshape", x.kind, shape, x=x, shape=np.array(shape, np.int32))

    def _transpose(self, x: Var, order: Sequence[int]) -> Var:
        shape = tuple(x.shape[i] for i in order)
        return self.f.op("transpose", x.kind, shape, x=x, perm=np.array(order, np.int32))

    def _slice(self, x: Var, start: int, stop: int) -> Var:
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

    def _concat(self, values: Sequence[Var], axis: int = -1) -> Var:
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.f.op("concat", values[0].kind, shape, values=list(values), axis=axis, interleave=False)

    def _concat_ints(self, before: Sequence[int], middle: Var, after: Sequence[int]) -> Var:
        """A vector of int32 with one value that is only known as it runs."""
        parts = [self.f.const(np.array(part, np.int32)) for part in (before, after)]
        values = [part for part in (parts[0], middle, parts[1]) if part.shape != (0,)]
        return self._concat(values, axis=0)


class _Once:
    """A weight that is quantized when it is first asked for, and then kept for its second part."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name
        self._tensor: QuantizedTensor | None = None

    @property
    def tensor(self) -> QuantizedTensor:
        if self._tensor is None:
            self._tensor = self._weights.matrix(self._name)
        return self._tensor

    def forget(self) -> None:
        self._tensor = None


def _scales(tensor: QuantizedTensor) -> NDArray[np.float16]:
    assert tensor.scales is not None
    return tensor.scales.astype(np.float16)


def write_coreml(
    arch: Architecture, weights: Weights, context: int, folder: Path, name: str = PACKAGE
) -> tuple[EntryPoint, ...]:
    """Write a package into `folder`; returns its entry points. Memory is bounded by the largest weight."""
    package = Package(folder / name)
    lengths = {"prefill": min(CHUNK, context), "decode": 1}
    entries = []
    for entry, length in lengths.items():
        function = package.function(entry)
        ops = MilOps(arch, weights, function, length, context)
        function.output("logits", decoder(ops, arch, ops.tokens))
        entries.append(_entry_point(entry, name, length, arch))
    package.finish({"gochu.family": arch.family, "gochu.context": str(context)})
    return tuple(entries)


def kv_cache(arch: Architecture) -> KVCache:
    """The cache's layout: float16 states of the package."""
    return KVCache(
        layers=arch.layers,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        dtype="float16",
        shared_buffer=True,
        held_by="program",
    )


def _entry_point(name: str, file: str, length: int, arch: Architecture) -> EntryPoint:
    inputs = [
        TensorSpec(name="input_ids", dtype="int32", shape=(1, length)),
        TensorSpec(name="position", dtype="int32", shape=(1,)),
    ]
    if length > 1:
        inputs.append(TensorSpec(name="last", dtype="int32", shape=(1,)))
    logits = TensorSpec(name="logits", dtype="float16", shape=(1, 1, arch.vocab))
    return EntryPoint(name=name, file=file, inputs=tuple(inputs), outputs=(logits,))
