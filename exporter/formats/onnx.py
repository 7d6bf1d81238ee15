"""ONNX for phone CPUs: the decoder as fused operators, its weights streamed to one file beside the graph.

What is fused, and why (onnxruntime's contrib operators, github.com/microsoft/onnxruntime/blob/main/docs/
ContribOperators.md): GroupQueryAttention holds rotary embedding, cache update, mask, softcap and softmax;
MatMulNBits multiplies by integers as they are stored; SkipSimplifiedLayerNormalization adds the residual
while it normalises. Inputs and outputs have the names that onnxruntime-genai expects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from exporter import decoder
from exporter.architecture import Architecture
from exporter.formats.onnx_graph import CONTRIB, DataFile, GraphBuilder, joined, save
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, TensorSpec

GRAPH, DATA = "model.onnx", "model.onnx.data"
OPSET, IR = 21, 10


@dataclass
class Sum:
    """x + y, not emitted yet: a norm that follows takes the addition in."""

    left: "Value"
    right: "Value"
    name: str | None = None


@dataclass
class Linear:
    """x @ Wᵀ, not emitted yet: attention takes q, k and v as one product."""

    x: "Value"
    weight: str


Value = str | Sum | Linear


class OnnxOps:
    """The verbs of `decoder.Ops` on names of ONNX values; weights go to `data` as they are met.

    `rounds`: products by integers round activations to 8 bits where the scheme says so.
    """

    rounds = True

    def __init__(
        self, arch: Architecture, weights: Weights, context: int, data: DataFile, last_only: bool
    ) -> None:
        self.arch, self.weights, self.last_only = arch, weights, last_only
        self.g = GraphBuilder(data)
        self._data = data
        self._context = context

    @cached_property
    def _rotary(self) -> list[str]:
        """What attention needs besides the cache: tokens so far, less one and as a length; cosines and sines."""
        tables = [self.rope_table("cos"), self.rope_table("sin")]
        one = self._data.constant("one", np.array([1], np.int64))
        length = self.g.emit("ReduceSum", ["attention_mask", one], keepdims=0)
        last = self.g.emit(
            "Cast", [self.g.emit("Sub", [length, one])], name="sequence_lengths", to=TensorProto.INT32
        )
        total = self.g.emit("Squeeze", [self.g.emit("Shape", ["attention_mask"], start=1, end=2)])
        return [last, self.g.emit("Cast", [total], name="total_length", to=TensorProto.INT32), *tables]

    # the verbs

    def embed(self, tokens: Value, weight: str) -> Value:
        scheme, ids = self.weights.scheme(weight), self.name(tokens)
        place = self._place([weight])
        stored, rows_, inputs = place["initializer"], place["rows"], place["inputs"]
        if not scheme.is_integer:
            rows = self.g.emit("Gather", [stored, ids])
            return rows if scheme.bits == 32 else self.g.emit("Cast", [rows], to=TensorProto.FLOAT)
        block = place["block"]
        if block is None:
            q = self.g.emit("Cast", [self.g.emit("Gather", [stored, ids])], to=TensorProto.FLOAT)
            scales = self._data.alias(f"{stored}.scales", "embedding.table.scales", [rows_, 1])
            return self.g.emit("Mul", [q, self.g.emit("Gather", [scales, ids])])
        table = self._data.alias(stored, "embedding.table", [rows_, inputs * scheme.bits // 8])
        scales = self._data.alias(f"{stored}.scales", "embedding.table.scales", [rows_, inputs // block])
        return self.g.emit(
            "GatherBlockQuantized",
            [table, ids, scales],
            domain=CONTRIB,
            bits=scheme.bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )

    def scale(self, x: Value, factor: float) -> Value:
        return self.g.emit("Mul", [self.name(x), self.g.scalar(factor)])

    def add(self, x: Value, y: Value) -> Value:
        return Sum(x, y)

    def rms_norm(self, x: Value, weight: str) -> Value:
        gamma = self.vector([weight])
        if isinstance(x, Sum) and x.name is None:
            normed, x.name = self.g.fresh(), self.g.fresh()
            self.g.node(
                "SkipSimplifiedLayerNormalization",
                [self.name(x.left), self.name(x.right), gamma],
                [normed, "", "", x.name],
                domain=CONTRIB,
                epsilon=self.arch.norm_eps,
            )
            return normed
        return self.g.emit(
            "SimplifiedLayerNormalization", [self.name(x), gamma], epsilon=self.arch.norm_eps, axis=-1
        )

    def linear(self, x: Value, weight: str) -> Value:
        return self._matmul(x, [weight])

    def linears(self, x: Value, weights: Sequence[str]) -> Sequence[Value]:
        return [Linear(x, weight) for weight in weights]

    def attention(self, q: Value, k: Value, v: Value, layer: int) -> Value:
        packed = self._packed([q, k, v])
        qkv = [packed, "", ""] if packed else [self.name(q), self.name(k), self.name(v)]
        out = self.g.fresh()
        self.g.node(
            "GroupQueryAttention",
            [
                *qkv,
                *cache_names("past_key_values", layer),
                *self._rotary,
            ],
            [out, *cache_names("present", layer)],
            domain=CONTRIB,
            num_heads=self.arch.heads,
            kv_num_heads=self.arch.kv_heads,
            scale=self.arch.attention_scale,
            softcap=self.arch.attention_softcap,
            local_window_size=self.arch.windows[layer] or -1,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return out

    def gated(self, gate: Value, up: Value) -> Value:
        g, u = self.name(gate), self.name(up)
        if self.arch.activation == "silu":
            active = self.g.emit("QuickGelu", [g], domain=CONTRIB, alpha=1.0)
        else:
            active = self.g.emit("Gelu", [g], approximate="tanh")
        return self.g.emit("Mul", [active, u])

    def last(self, x: Value) -> Value:
        if not self.last_only:
            return x
        if isinstance(x, Sum) and x.name is None:
            return Sum(self.last(x.left), self.last(x.right))
        index = self._data.constant("last", np.array([-1], np.int64))
        return self.g.emit("Gather", [self.name(x), index], axis=1)

    def softcap(self, x: Value, cap: float) -> Value:
        factor = self.g.scalar(cap)
        return self.g.emit("Mul", [self.g.emit("Tanh", [self.g.emit("Div", [self.name(x), factor])]), factor])

    # products

    def _packed(self, values: Sequence[Value]) -> str | None:
        """One product for linears of one input, side by side; None if they are not that, or differ in scheme."""
        linears = [value for value in values if isinstance(value, Linear)]
        if len(linears) != len(values) or any(linear.x is not linears[0].x for linear in linears):
            return None
        if len({self.weights.scheme(linear.weight) for linear in linears}) > 1:
            return None
        return self._matmul(linears[0].x, [linear.weight for linear in linears])

    def _matmul(self, x: Value, names: Sequence[str]) -> str:
        """x @ Wᵀ (+ bias) for weights that lie below each other if they are several."""
        y = self.product(x, names)
        if self.arch.has_bias(names[0]):
            y = self.g.emit("Add", [y, self.vector([f"{name}.bias" for name in names])])
        return y

    def product(self, x: Value, names: Sequence[str]) -> str:
        """x @ Wᵀ for weights that lie below each other if they are several."""
        layout = self._place(names)
        stored, inputs = self._initializer(names), layout["inputs"]
        outputs = self._data.tensors[stored].dims[0]
        bits, block = layout["bits"], layout["block"]
        if bits <= 8 and block:
            y = self.g.emit(
                "MatMulNBits",
                [self.name(x), stored, f"{stored}.scales"],
                domain=CONTRIB,
                K=inputs,
                N=outputs,
                bits=bits,
                block_size=block,
                accuracy_level=4 if layout["activations"] == "int8" and self.rounds else 1,
            )
        else:
            y = self._unpacked(x, stored, bits)
            if bits <= 8:
                y = self.g.emit("Mul", [y, f"{stored}.scales"])
        return y

    def _unpacked(self, x: Value, stored: str, bits: int) -> str:
        """A product by plain floats, or by integers whose scales are applied to the result."""
        # A Cast of a constant is done once, as the model is loaded; DequantizeLinear would be for each token
        weight = stored if bits == 32 else self.g.emit("Cast", [stored], to=TensorProto.FLOAT)
        return self.g.emit("FusedMatMul", [self.name(x), weight], domain=CONTRIB, transB=1)

    # weights

    def _place(self, names: Sequence[str]) -> dict[str, Any]:
        """Where the first of some weights lies; they are written now, unless they were (a tied head, another graph)."""
        if names[0] not in self._data.layout:
            self._store([self.weights.matrix(name) for name in names])
        return self._data.layout[names[0]]

    def _initializer(self, names: Sequence[str]) -> str:
        """The tensor of weights that lie below each other: all of a stored one, or a part of it."""
        places = [self._data.layout[name] for name in names]
        stored, start = places[0]["initializer"], places[0]["row"]
        rows = sum(place["rows"] for place in places)
        if stored != joined(names):
            for suffix in ("", ".scales"):
                if stored + suffix in self._data.tensors:
                    self._data.part(stored + suffix, joined(names) + suffix, start, rows)
        return joined(names)

    def _store(self, tensors: Sequence[QuantizedTensor]) -> None:
        """Write tensors of one scheme below each other."""
        name = joined([tensor.name for tensor in tensors])
        scheme, inputs = tensors[0].scheme, tensors[0].shape[1]
        outputs, block = sum(tensor.shape[0] for tensor in tensors), _block(scheme, inputs)
        data = [tensor.data for tensor in tensors]
        scales = [tensor.scales for tensor in tensors if tensor.scales is not None]
        if block:
            dims = [outputs, inputs // block, block * scheme.bits // 8]
            self._data.append(name, TensorProto.UINT8, dims, data)
            if not scheme.group:
                scales = [np.repeat(column, inputs // block, axis=1) for column in scales]
        elif scheme.is_integer:
            # int8, which Cast makes the integers themselves of
            signed = [tensor.integers() for tensor in tensors]
            self._data.append(name, TensorProto.INT8, [outputs, inputs], signed)
        else:
            kind = TensorProto.FLOAT16 if scheme.bits == 16 else TensorProto.FLOAT
            self._data.append(name, kind, [outputs, inputs], data)
        if scales:
            self._data.append(
                f"{name}.scales", TensorProto.FLOAT, [outputs * (inputs // block if block else 1)], scales
            )
        row = 0
        for tensor in tensors:
            self._data.layout[tensor.name] = {
                "initializer": name,
                "row": row,
                "rows": tensor.shape[0],
                "inputs": inputs,
                "bits": scheme.bits,
                "group": scheme.group,
                "block": block,
                "activations": scheme.activations,
                "low_power": scheme.low_power,
            }
            row += tensor.shape[0]

    def vector(self, names: Sequence[str]) -> str:
        """Norm weights or biases, joined."""
        if names[0] in self._data.layout:
            return self._initializer(names)
        vectors = [self.weights.vector(name) for name in names]
        row = 0
        for name, vector in zip(names, vectors, strict=True):
            self._data.layout[name] = {"initializer": joined(names), "row": row, "rows": len(vector)}
            row += len(vector)
        return self._data.constant(joined(names), np.concatenate(vectors))

    def output(self, value: Value, name: str) -> None:
        """A value that the graph gives, under this name."""
        self.g.rename(self.name(value), name)

    def rope_table(self, name: str) -> str:
        """Cosines ("cos") or sines of the rotary embedding's angles, [context, dim/2]."""
        cos, sin = self.arch.rope.tables(self._context)
        return self._data.constant(f"rope.{name}", cos if name == "cos" else sin)

    # values put off

    def name(self, value: Value) -> str:
        """The name of a value, emitting what was put off."""
        if isinstance(value, Sum):
            if value.name is None:
                value.name = self.g.emit("Add", [self.name(value.left), self.name(value.right)])
            return value.name
        if isinstance(value, Linear):
            return self.name(self.linear(value.x, value.weight))
        return value


def _block(scheme: Scheme, inputs: int) -> int | None:
    """Inputs that share a scale in the file. MatMulNBits has no scale for a whole channel: where a 4-bit weight has
    one, it is repeated for blocks as large as can be."""
    if not scheme.is_integer or scheme.group or scheme.bits == 8:
        return scheme.group
    return next((block for block in (128, 64, 32, 16) if inputs % block == 0), None)


def write_onnx(
    arch: Architecture, weights: Weights, context: int, folder: Path, last_only: bool = True
) -> EntryPoint:
    """Write model.onnx and model.onnx.data into `folder`; returns the graph's one entry point.

    Memory is bounded by the largest weight (quantized), time by reading the checkpoint once.
    """
    entry = _entry_point(arch, last_only)
    with open(folder / DATA, "wb") as file:
        ops = OnnxOps(arch, weights, context, DataFile(file, DATA), last_only)
        ops.output(decoder.decoder(ops, arch, "input_ids"), "logits")
        save(ops.g.model("decoder", entry.inputs, entry.outputs, OPSET, IR, whole=True), folder / GRAPH)
    return entry


def _entry_point(arch: Architecture, last_only: bool) -> EntryPoint:
    def cache(prefix: str, length: str) -> list[TensorSpec]:
        shape = ("batch", arch.kv_heads, length, arch.head_dim)
        names = [name for i in range(arch.layers) for name in cache_names(prefix, i)]
        return [TensorSpec(name=name, dtype="float32", shape=shape) for name in names]

    logits = TensorSpec(
        name="logits", dtype="float32", shape=("batch", 1 if last_only else "length", arch.vocab)
    )
    return EntryPoint(
        name="decode",
        file=GRAPH,
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length")),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total")),
            *cache("past_key_values", "past"),
        ),
        outputs=(logits, *cache("present", "present")),
    )


def cache_names(prefix: str, layer: int) -> list[str]:
    return [f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"]
