"""The Hexagon NPU's program (npu/hexagon_ops.py) in floats, by the portable integers: for attention that the HTP's
GroupQueryAttention does not compute right.

It leaves a sliding window and a softcap to the CPU, and rotates whole heads where a part is meant, without a word
(onnxruntime-qnn 2.7.0, tried). Written out, all of it is on the NPU. The weights are those of the CPU's graph.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from exporter.architecture import Architecture
from exporter.formats.onnx import OnnxOps
from exporter.quantization.ranges import Range
from runtimes.bundle import TensorSpec

OPSET, IR = 23, 11


def is_fused(arch: Architecture, context: int) -> bool:
    """Whether the HTP's GroupQueryAttention computes this architecture's attention."""
    windows = any(0 < window < context for window in arch.windows)
    return not windows and not arch.attention_softcap and arch.rope.dim == arch.head_dim


class SpelledGraph:
    """`hexagon_ops.Graph` that writes float nodes with `ops`' weights; ranges are of no concern to it."""

    def __init__(self, ops: OnnxOps) -> None:
        self._ops, self._g = ops, ops.g
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self._values: dict[str, str] = {}  # what each output is called until the program ends

    def input(self, name: str, shape: Sequence[int], step: str, bits: int = 16) -> str:
        self.inputs[name] = TensorSpec(name=name, dtype="float32", shape=tuple(shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int]) -> None:
        self.outputs[name] = TensorSpec(name=name, dtype="float32", shape=tuple(shape))
        self._values[name] = value

    def op(self, kind: str, *inputs: str, step: str, within: Range | None = None, **attributes: Any) -> str:
        return self._g.emit(kind, inputs, **attributes)

    def product(self, x: str, weight: str, step: str) -> str:
        return self._ops.product(x, [weight])

    def narrow(self, x: str, step: str, bits: int) -> str:
        return self._g.emit("Identity", [x])  # a value of its own: it becomes an output

    def vector(self, name: str) -> str:
        return self._ops.vector([name])

    def number(self, value: float) -> str:
        return self._g.scalar(value)

    def rope_rows(self, table: str, factor: float, shape: Sequence[int]) -> str:
        """The CPU's tables have each angle once; here the halves of a head lie side by side, times a factor."""
        self.inputs["positions"] = TensorSpec(name="positions", dtype="int32", shape=(shape[2],))
        rows = self._g.emit("Gather", [self._ops.rope_table(table), "positions"], axis=0)
        if factor != 1:
            rows = self._g.emit("Mul", [rows, self._g.scalar(factor)])
        first = rows if table == "cos" else self._g.emit("Neg", [rows])
        return self.reshape(self._g.emit("Concat", [first, rows], axis=-1), shape)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self._g.emit("Reshape", [x, self._numbers(*shape)])

    def transpose(self, x: str, order: Sequence[int]) -> str:
        return self._g.emit("Transpose", [x], perm=list(order))

    def slice(self, x: str, start: int, stop: int, axis: int = 3) -> str:
        return self._g.emit("Slice", [x, self._numbers(start), self._numbers(stop), self._numbers(axis)])

    def concat(self, values: Sequence[str], axis: int) -> str:
        return self._g.emit("Concat", values, axis=axis)

    def model(self, name: str) -> Any:
        """The finished model; what no output needs is left out, inputs too."""
        for output, value in self._values.items():
            self._g.rename(value, output)
        self._g.prune(self.outputs)
        used = {value for node in self._g.nodes for value in node.input}
        self.inputs = {name: spec for name, spec in self.inputs.items() if name in used}
        return self._g.model(name, [*self.inputs.values()], [*self.outputs.values()], OPSET, IR)

    def _numbers(self, *values: int) -> str:
        return self._g.data.constant(f"numbers.{'.'.join(map(str, values))}", np.array(values, np.int64))
