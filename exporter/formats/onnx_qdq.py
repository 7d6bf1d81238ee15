"""ONNX for the Hexagon NPU at its fastest: static shapes, and every value an integer with a range found before.

Each operator stands between DequantizeLinear and QuantizeLinear, which onnxruntime-qnn turns into one operator on
integers. Weights are the quantizer's own integers, [inputs, outputs] as the NPU multiplies: per channel, or in blocks
of inputs. Prefill and decode, whole or in parts, lie beside one data file, each weight stored once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.architecture import Architecture
from exporter.errors import RecipeError
from exporter.formats.onnx_graph import DataFile, GraphBuilder, save
from exporter.npu.hexagon_ops import HexagonOps
from exporter.quantization.ranges import Quantization, Range, Ranges
from exporter.quantization.tensor import QuantizedTensor, pack4
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, TensorSpec
from runtimes.qnn import LOW_POWER

DATA = "hexagon.onnx.data"
OPSET, IR = 23, 11
_PIECE = 1 << 24  # integers that are packed at a time
_INTEGERS = {8: np.uint8, 16: np.uint16}


class Value(NamedTuple):
    """A number in a graph: the name of its integers, of the float they stand for, and what they mean."""

    integers: str
    real: str
    quantization: Quantization
    bits: int


class QdqGraph:
    """`hexagon_ops.Graph` that writes nodes. `inputs`, `outputs`: as an entry point lists them."""

    def __init__(
        self, arch: Architecture, weights: Weights, ranges: Ranges, context: int, data: DataFile
    ) -> None:
        self.arch, self.weights, self.ranges, self.context = arch, weights, ranges, context
        self.builder = GraphBuilder(data)
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self._integers: dict[str, str] = {}
        self._blocks: dict[bool, str] = {}  # whether weights in blocks are low-power ones, and one that is
        self._data = data

    # hexagon_ops.Graph

    def input(self, name: str, shape: Sequence[int], step: str, bits: int = 16) -> Value:
        quantization = self.ranges[step].quantization(bits)
        self.inputs[name] = _spec(name, shape, quantization, bits)
        return self._dequantized(name, quantization, bits)

    def output(self, name: str, value: Value, shape: Sequence[int]) -> None:
        self.outputs[name] = _spec(name, shape, value.quantization, value.bits)
        self._integers[name] = value.integers

    def op(
        self, kind: str, *inputs: Value, step: str, within: Range | None = None, **attributes: Any
    ) -> Value:
        result = self.builder.emit(kind, [value.real for value in inputs], **attributes)
        return self._quantized(result, (within or self.ranges[step]).quantization(16), 16)

    def product(self, x: Value, weight: str, step: str) -> Value:
        result = self.builder.emit("MatMul", [x.real, self._weight(weight)])
        return self._quantized(result, self.ranges[step].quantization(16), 16)

    def narrow(self, x: Value, step: str, bits: int) -> Value:
        return self._quantized(x.real, self.ranges[step].quantization(bits), bits)

    def vector(self, name: str) -> Value:
        if name not in self._data.layout:
            self._data.layout[name] = {"initializer": name, "rows": self.weights.vector(name).size}
        return self._constant(name, self.weights.vector(name))

    def number(self, value: float) -> Value:
        return self._constant(f"number.{value!r}", np.array(value, np.float32))

    def rope_rows(self, table: str, factor: float, shape: Sequence[int]) -> Value:
        self.inputs["positions"] = TensorSpec(name="positions", dtype="int32", shape=(shape[2],))
        values = self.arch.rope.whole_tables(self.context)[table] * np.float32(factor)
        rows = self._constant(f"rope.{table}.{factor!r}", values)
        return self.reshape(self._moved("Gather", [rows], "positions", axis=0), shape)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        return self._moved("Reshape", [x], self._numbers(*shape))

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        return self._moved("Transpose", [x], perm=list(order))

    def slice(self, x: Value, start: int, stop: int, axis: int = 3) -> Value:
        return self._moved("Slice", [x], self._numbers(start), self._numbers(stop), self._numbers(axis))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        return self._moved("Concat", values, axis=axis)

    # nodes

    def _moved(self, kind: str, values: Sequence[Value], *more: str, **attributes: Any) -> Value:
        """The same integers, elsewhere."""
        result = self.builder.emit(kind, [*(value.real for value in values), *more], **attributes)
        return self._quantized(result, values[0].quantization, values[0].bits)

    def _quantized(self, real: str, quantization: Quantization, bits: int) -> Value:
        integers = self.builder.emit("QuantizeLinear", [real, *self._parameters(quantization, bits)])
        return self._dequantized(integers, quantization, bits)

    def _dequantized(self, integers: str, quantization: Quantization, bits: int) -> Value:
        real = self.builder.emit("DequantizeLinear", [integers, *self._parameters(quantization, bits)])
        return Value(integers, real, quantization, bits)

    def _parameters(self, quantization: Quantization, bits: int) -> tuple[str, str]:
        scale, zero_point = quantization
        zero = self._data.constant(f"zero.{bits}.{zero_point}", np.array(zero_point, _INTEGERS[bits]))
        return self.builder.scalar(scale), zero

    def _numbers(self, *values: int) -> str:
        return self._data.constant(f"numbers.{'.'.join(map(str, values))}", np.array(values, np.int64))

    # constants and weights

    def _constant(self, name: str, values: NDArray[np.float32]) -> Value:
        """A constant in 16 bits."""
        quantization = Range(float(values.min()), float(values.max())).quantization(16)
        integers = quantize(values, quantization, 16)
        self._data.constant(name, integers)
        self._data.constant(f"{name}.scale", np.array(quantization.scale, np.float32))
        self._data.constant(f"{name}.zero_point", np.array(quantization.zero_point, np.uint16))
        real = self.builder.emit("DequantizeLinear", [name, f"{name}.scale", f"{name}.zero_point"])
        return Value(name, real, quantization, 16)

    def _weight(self, name: str) -> str:
        """[inputs, outputs], dequantized; written when the first graph asks for it."""
        if name not in self._data.layout:
            self._store(self.weights.matrix(name))
        place = self._data.layout[name]
        if place["group"]:
            self._blocks.setdefault(place["low_power"], name)
        blocks = {"axis": 0, "block_size": place["group"]} if place["group"] else {"axis": 1}
        return self.builder.emit("DequantizeLinear", [name, f"{name}.scales", f"{name}.zeros"], **blocks)

    def _store(self, tensor: QuantizedTensor) -> None:
        name, scheme, (outputs, inputs) = tensor.name, tensor.scheme, tensor.shape
        if not scheme.is_integer or tensor.scales is None:
            raise RecipeError(
                f"{name} is {scheme.name}: a graph of integers needs integers, use w8a16 or w4a16"
            )
        kind = TensorProto.INT4 if scheme.bits == 4 else TensorProto.INT8
        across = transposed(tensor)
        self._data.append(name, kind, [inputs, outputs], list(pack(across)) if scheme.bits == 4 else [across])
        scales = np.ascontiguousarray(tensor.scales.T) if scheme.group else tensor.scales[:, 0]
        self._data.append(f"{name}.scales", TensorProto.FLOAT, scales.shape, [scales])
        zeros = np.zeros((scales.size + 1) // 2 if scheme.bits == 4 else scales.size, np.uint8)
        self._data.append(f"{name}.zeros", kind, scales.shape, [zeros])
        self._data.layout[name] = {
            "initializer": name,
            "rows": outputs,
            "inputs": inputs,
            "bits": scheme.bits,
            "group": scheme.group,
            "activations": scheme.activations,
            "low_power": scheme.low_power,
        }

    def model(self, name: str) -> Any:
        """The finished model. What no output needs is left out, inputs too."""
        for output, integers in self._integers.items():
            self.builder.rename(integers, output)
        self.builder.prune(self.outputs.keys())
        used = {value for node in self.builder.nodes for value in node.input}
        self.inputs = {name: spec for name, spec in self.inputs.items() if name in used}
        if len(self._blocks) > 1:
            raise RecipeError(
                f"{self._blocks[True]} has low-power blocks and {self._blocks[False]} others, and QNN takes all blocks "
                "of a graph as the one or the other: use one of both in the recipe"
            )
        model = self.builder.model(name, [*self.inputs.values()], [*self.outputs.values()], OPSET, IR)
        if True in self._blocks:
            model.metadata_props.add(key=LOW_POWER, value="1")
        return model


def write_qdq(
    arch: Architecture,
    weights: Weights,
    ranges: Ranges,
    context: int,
    folder: Path,
    chunk: int = 128,
    parts: Sequence[range] | None = None,
) -> tuple[EntryPoint, ...]:
    """Write hexagon-prefill.onnx (`chunk` tokens, no head), hexagon-decode.onnx (one token) and hexagon.onnx.data.

    `parts`: of the layers, for graphs of less than the NPU can address; their files and entry points are numbered.
    Memory is bounded by the largest weight. RecipeError for a weight or a value that has no integers.
    """
    parts = parts or (range(arch.layers),)
    entries = []
    with open(folder / DATA, "wb") as file:
        data = DataFile(file, DATA)
        for kind, length in (("prefill", chunk), ("decode", 1)):
            for i, layers in enumerate(parts):
                graph = QdqGraph(arch, weights, ranges, context, data)
                head = kind == "decode" and layers.stop == arch.layers
                HexagonOps(graph, arch, length=length, context=context).run(layers, head)
                split = len(parts) > 1
                path = f"hexagon-{kind}-{i}.onnx" if split else f"hexagon-{kind}.onnx"
                save(graph.model(kind), folder / path)
                entries.append(
                    EntryPoint(
                        name=f"{kind}.{i}" if split else kind,
                        file=path,
                        inputs=tuple(graph.inputs.values()),
                        outputs=tuple(graph.outputs.values()),
                    )
                )
    return tuple(entries)


def _spec(name: str, shape: Sequence[int], quantization: Quantization, bits: int) -> TensorSpec:
    scale, zero_point = quantization
    return TensorSpec(name=name, dtype=f"uint{bits}", shape=tuple(shape), scale=scale, zero_point=zero_point)


def quantize(values: NDArray[np.float32], quantization: Quantization, bits: int) -> NDArray[Any]:
    """Numbers as integers."""
    scale, zero_point = quantization
    integers = np.rint(values / np.float32(scale)) + zero_point
    return np.clip(integers, 0, 2**bits - 1).astype(_INTEGERS[bits])


def transposed(tensor: QuantizedTensor) -> NDArray[np.int8]:
    """A weight's integers as [inputs, outputs]."""
    outputs, inputs = tensor.shape
    across = np.empty((inputs, outputs), np.int8)
    step = max(1, _PIECE // inputs)
    for start in range(0, outputs, step):
        across[:, start : start + step] = tensor.integers(start, start + step).T
    return across


def pack(integers: NDArray[np.int8]) -> Iterator[NDArray[np.uint8]]:
    """INT4 as ONNX stores it: two's complement, two in a byte, the first in the lower half, rows not padded."""
    flat = integers.reshape(1, -1)
    for start in range(0, flat.shape[1], _PIECE):
        yield pack4(flat[:, start : start + _PIECE].view(np.uint8) & np.uint8(0xF))[0]


def unpack(packed: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    """`pack`'s counterpart: int8 [count]."""
    out = np.empty(2 * packed.size, np.uint8)
    out[0::2], out[1::2] = packed & 0xF, packed >> 4
    return ((out[:count] ^ 8).view(np.int8) - np.int8(8)).astype(np.int8)
