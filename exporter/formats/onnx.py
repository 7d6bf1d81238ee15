"""ONNX for phone CPUs: the decoder as fused operators, its weights streamed to one file beside the graph.

What is fused, and why (onnxruntime's contrib operators, github.com/microsoft/onnxruntime/blob/main/docs/
ContribOperators.md): GroupQueryAttention holds rotary embedding, cache update, mask, softcap and softmax;
MatMulNBits multiplies by integers as they are stored; SkipSimplifiedLayerNormalization adds the residual
while it normalises. Inputs and outputs have the names that onnxruntime-genai expects.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, KVCache, TensorSpec

GRAPH, DATA = "model.onnx", "model.onnx.data"
LAYOUT = "gochu.weights"  # metadata key: canonical name -> where it lies in the file's initializers
_CONTRIB = "com.microsoft"
_OPSET, _IR = 21, 10
_INLINE = 1024  # bytes up to which a constant stays in the graph


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
    """The verbs of `decoder.Ops` on names of ONNX values; weights go to `data` as they are met."""

    def __init__(
        self, arch: Architecture, weights: Weights, context: int, data: BinaryIO, last_only: bool
    ) -> None:
        self.arch, self.weights, self.last_only = arch, weights, last_only
        self._data = data
        self._nodes: list[Any] = []
        self._values = 0
        self._initializers: dict[str, Any] = {}
        self._layout: dict[str, dict[str, Any]] = {}
        cos, sin = arch.rope.tables(context)
        self._constant("rope.cos", cos)
        self._constant("rope.sin", sin)
        one = self._constant("one", np.array([1], np.int64))
        length = self._emit("ReduceSum", ["attention_mask", one], keepdims=0)
        self._last_index = self._emit(
            "Cast", [self._emit("Sub", [length, one])], name="sequence_lengths", to=TensorProto.INT32
        )
        total = self._emit("Squeeze", [self._emit("Shape", ["attention_mask"], start=1, end=2)])
        self._total = self._emit("Cast", [total], name="total_length", to=TensorProto.INT32)

    # the verbs

    def embed(self, tokens: Value, weight: str) -> Value:
        tensor = self.weights.matrix(weight)
        ids = self._name(tokens)
        if not tensor.scheme.is_integer:
            rows = self._emit("Gather", [self._store([tensor]), ids])
            return rows if tensor.scheme.bits == 32 else self._emit("Cast", [rows], to=TensorProto.FLOAT)
        stored = self._store([tensor])
        rows_, inputs = tensor.shape
        if tensor.scheme.group is None:
            q = self._emit("Cast", [self._emit("Gather", [stored, ids])], to=TensorProto.FLOAT)
            scales = self._alias(f"{stored}.scales", "embedding.table.scales", [rows_, 1])
            return self._emit("Mul", [q, self._emit("Gather", [scales, ids])])
        table = self._alias(stored, "embedding.table", [rows_, inputs * tensor.scheme.bits // 8])
        scales = self._alias(
            f"{stored}.scales", "embedding.table.scales", [rows_, inputs // tensor.scheme.group]
        )
        return self._emit(
            "GatherBlockQuantized",
            [table, ids, scales],
            domain=_CONTRIB,
            bits=tensor.scheme.bits,
            block_size=tensor.scheme.group,
            gather_axis=0,
            quantize_axis=1,
        )

    def scale(self, x: Value, factor: float) -> Value:
        return self._emit("Mul", [self._name(x), self._scalar(factor)])

    def add(self, x: Value, y: Value) -> Value:
        return Sum(x, y)

    def rms_norm(self, x: Value, weight: str) -> Value:
        gamma = self._vector([weight])
        if isinstance(x, Sum) and x.name is None:
            normed, x.name = self._fresh(), self._fresh()
            self._node(
                "SkipSimplifiedLayerNormalization",
                [self._name(x.left), self._name(x.right), gamma],
                [normed, "", "", x.name],
                domain=_CONTRIB,
                epsilon=self.arch.norm_eps,
            )
            return normed
        return self._emit(
            "SimplifiedLayerNormalization", [self._name(x), gamma], epsilon=self.arch.norm_eps, axis=-1
        )

    def linear(self, x: Value, weight: str) -> Value:
        if weight in self._layout:  # the tied head: the embedding's bytes once more
            return self._matmul(x, [weight])
        return self._product(x, [self.weights.matrix(weight)])

    def linears(self, x: Value, weights: Sequence[str]) -> Sequence[Value]:
        return [Linear(x, weight) for weight in weights]

    def attention(self, q: Value, k: Value, v: Value, layer: int) -> Value:
        packed = self._packed([q, k, v])
        qkv = [packed, "", ""] if packed else [self._name(q), self._name(k), self._name(v)]
        out = self._fresh()
        self._node(
            "GroupQueryAttention",
            [
                *qkv,
                *_cache_names("past_key_values", layer),
                self._last_index,
                self._total,
                "rope.cos",
                "rope.sin",
            ],
            [out, *_cache_names("present", layer)],
            domain=_CONTRIB,
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
        g, u = self._name(gate), self._name(up)
        if self.arch.activation == "silu":
            active = self._emit("QuickGelu", [g], domain=_CONTRIB, alpha=1.0)
        else:
            active = self._emit("Gelu", [g], approximate="tanh")
        return self._emit("Mul", [active, u])

    def last(self, x: Value) -> Value:
        if not self.last_only:
            return x
        if isinstance(x, Sum) and x.name is None:
            return Sum(self.last(x.left), self.last(x.right))
        index = self._constant("last", np.array([-1], np.int64))
        return self._emit("Gather", [self._name(x), index], axis=1)

    def softcap(self, x: Value, cap: float) -> Value:
        factor = self._scalar(cap)
        return self._emit("Mul", [self._emit("Tanh", [self._emit("Div", [self._name(x), factor])]), factor])

    # products

    def _packed(self, values: Sequence[Value]) -> str | None:
        """One product for linears of one input, side by side; None if they are not that, or differ in scheme."""
        linears = [value for value in values if isinstance(value, Linear)]
        if len(linears) != len(values) or any(linear.x is not linears[0].x for linear in linears):
            return None
        if len({self.weights.scheme(linear.weight) for linear in linears}) > 1:
            return None
        return self._product(linears[0].x, [self.weights.matrix(linear.weight) for linear in linears])

    def _product(self, x: Value, tensors: Sequence[QuantizedTensor]) -> str:
        self._store(tensors)
        return self._matmul(x, [tensor.name for tensor in tensors])

    def _matmul(self, x: Value, names: Sequence[str]) -> str:
        """x @ Wᵀ (+ bias) for weights that are stored, below each other if they are several."""
        layout = self._layout[names[0]]
        stored, inputs = layout["initializer"], layout["inputs"]
        outputs = self._initializers[stored].dims[0]
        bits, group = layout["bits"], layout["group"]
        if bits <= 8 and group:
            y = self._emit(
                "MatMulNBits",
                [self._name(x), stored, f"{stored}.scales"],
                domain=_CONTRIB,
                K=inputs,
                N=outputs,
                bits=bits,
                block_size=group,
                accuracy_level=4 if layout["activations"] == "int8" else 1,
            )
        else:
            # A Cast of a constant is done once, as the model is loaded; DequantizeLinear would be for each token
            weight = stored if bits == 32 else self._emit("Cast", [stored], to=TensorProto.FLOAT)
            y = self._emit("FusedMatMul", [self._name(x), weight], domain=_CONTRIB, transB=1)
            if bits <= 8:
                y = self._emit("Mul", [y, f"{stored}.scales"])
        if names[0].partition(".")[2].partition(".")[2] in self.arch.biases:
            y = self._emit("Add", [y, self._vector([f"{name}.bias" for name in names])])
        return y

    # weights

    def _store(self, tensors: Sequence[QuantizedTensor]) -> str:
        """Write tensors of one scheme below each other; returns the initializer's name."""
        name = _joined([tensor.name for tensor in tensors])
        scheme, inputs = tensors[0].scheme, tensors[0].shape[1]
        outputs = sum(tensor.shape[0] for tensor in tensors)
        data = [tensor.data for tensor in tensors]
        if scheme.is_integer and scheme.group:
            self._external(
                name,
                TensorProto.UINT8,
                [outputs, inputs // scheme.group, scheme.group * scheme.bits // 8],
                data,
            )
            scales_shape = [outputs * (inputs // scheme.group)]
        elif scheme.is_integer:
            signed = [block ^ 0x80 for block in data]  # int8, which Cast makes the integers themselves of
            self._external(name, TensorProto.INT8, [outputs, inputs], signed)
            scales_shape = [outputs]
        else:
            kind = TensorProto.FLOAT16 if scheme.bits == 16 else TensorProto.FLOAT
            self._external(name, kind, [outputs, inputs], data)
        if scheme.is_integer:
            scales = [tensor.scales for tensor in tensors if tensor.scales is not None]
            self._external(f"{name}.scales", TensorProto.FLOAT, scales_shape, scales)
        row = 0
        for tensor in tensors:
            self._layout[tensor.name] = {
                "initializer": name,
                "row": row,
                "rows": tensor.shape[0],
                "inputs": inputs,
                "bits": scheme.bits,
                "group": scheme.group,
                "activations": scheme.activations,
            }
            row += tensor.shape[0]
        return name

    def _vector(self, names: Sequence[str]) -> str:
        """Norm weights or biases, joined."""
        vectors = [self.weights.vector(name) for name in names]
        row = 0
        for name, vector in zip(names, vectors, strict=True):
            self._layout[name] = {"initializer": _joined(names), "row": row, "rows": len(vector)}
            row += len(vector)
        return self._constant(_joined(names), np.concatenate(vectors))

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in self._initializers:
            if values.nbytes > _INLINE:
                self._external(
                    name, helper.np_dtype_to_tensor_dtype(values.dtype), list(values.shape), [values]
                )
            else:
                self._initializers[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def _scalar(self, value: float) -> str:
        return self._constant(f"scalar.{value!r}", np.array(value, np.float32))

    def _external(self, name: str, kind: int, dims: Sequence[int], blocks: Sequence[NDArray[Any]]) -> None:
        """Append bytes to the data file; only their place stays in memory."""
        size = sum(block.nbytes for block in blocks)
        align = 4096 if size >= 1 << 16 else 64  # whole pages can be mapped
        self._data.write(b"\0" * (-self._data.tell() % align))
        offset = self._data.tell()
        for block in blocks:
            self._data.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self._initializers[name] = _external_tensor(name, kind, dims, offset, size)

    def _alias(self, stored: str, name: str, dims: Sequence[int]) -> str:
        """The same bytes in another shape, under another name."""
        tensor = TensorProto()
        tensor.CopyFrom(self._initializers[stored])
        tensor.name = name
        tensor.dims[:] = dims
        self._initializers[name] = tensor
        return name

    # nodes

    def _name(self, value: Value) -> str:
        """The name of a value, emitting what was put off."""
        if isinstance(value, Sum):
            if value.name is None:
                value.name = self._emit("Add", [self._name(value.left), self._name(value.right)])
            return value.name
        if isinstance(value, Linear):
            return self._name(self.linear(value.x, value.weight))
        return value

    def _emit(
        self, op: str, inputs: Sequence[str], name: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output; returns the output's name."""
        output = name or self._fresh()
        self._node(op, inputs, [output], domain, **attributes)
        return output

    def _node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))

    def _fresh(self) -> str:
        self._values += 1
        return f"v{self._values}"

    def model(self, logits: Value, entry: EntryPoint) -> Any:
        """The finished ModelProto, weights outside."""
        renamed = self._name(logits)
        producer = next(node for node in reversed(self._nodes) if renamed in node.output)
        producer.output[list(producer.output).index(renamed)] = "logits"
        graph = helper.make_graph(
            self._nodes,
            "decoder",
            [_value_info(spec) for spec in entry.inputs],
            [_value_info(spec) for spec in entry.outputs],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR, producer_name="gochu")
        helper.set_model_props(model, {LAYOUT: json.dumps(self._layout)})
        return model


def write_onnx(
    arch: Architecture, weights: Weights, context: int, folder: Path, last_only: bool = True
) -> EntryPoint:
    """Write model.onnx and model.onnx.data into `folder`; returns the graph's one entry point.

    Memory is bounded by the largest weight (quantized), time by reading the checkpoint once.
    """
    entry = _entry_point(arch, last_only)
    with open(folder / DATA, "wb") as data:
        ops = OnnxOps(arch, weights, context, data, last_only)
        model = ops.model(decoder(ops, arch, "input_ids"), entry)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return entry


def kv_cache(arch: Architecture) -> KVCache:
    """The cache's layout: float32, one buffer serves as past and present."""
    return KVCache(
        layers=arch.layers,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        dtype="float32",
        shared_buffer=True,
    )


def _entry_point(arch: Architecture, last_only: bool) -> EntryPoint:
    def cache(prefix: str, length: str) -> list[TensorSpec]:
        shape = ("batch", arch.kv_heads, length, arch.head_dim)
        names = [name for i in range(arch.layers) for name in _cache_names(prefix, i)]
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


def _cache_names(prefix: str, layer: int) -> list[str]:
    return [f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"]


def _value_info(spec: TensorSpec) -> Any:
    kind = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[spec.dtype]
    return helper.make_tensor_value_info(spec.name, kind, list(spec.shape))


def _external_tensor(name: str, kind: int, dims: Sequence[int], offset: int, size: int) -> Any:
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": DATA, "offset": offset, "length": size}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _joined(names: Sequence[str]) -> str:
    """layers.0.attention.q + .k + .v -> layers.0.attention.q+k+v; a bias likewise."""
    if len(names) == 1:
        return names[0]
    bias = names[0].endswith(".bias")
    bare = [name.removesuffix(".bias") for name in names]
    prefix = bare[0].rpartition(".")[0]
    return f"{prefix}.{'+'.join(name.rpartition('.')[2] for name in bare)}" + (".bias" if bias else "")
