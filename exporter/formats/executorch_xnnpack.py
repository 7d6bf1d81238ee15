"""One XNNPACK delegate of an ExecuTorch program: a graph of XNNPACK's own nodes.

Written with executorch's schema classes and serializer (backends/xnnpack/serialization), from which its runtime
builds the subgraph again. Constants are not in the delegate: they are named, and lie in the program's segments.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)

from exporter.quantization.scheme import Scheme

BACKEND = "XnnpackBackend"
BLOCK = 32  # inputs that share a scale come in multiples of this (XNN_MIN_BLOCKSIZE)
_FLOAT, _DYNAMIC = schema.XNNDatatype.xnn_datatype_fp32, schema.XNNDatatype.xnn_datatype_qdint8


class XnnGraph:
    """A graph being built; values are numbers, shapes are those for the longest input.

    `arguments`: the list that the program's call of the delegate takes its arguments from.
    """

    def __init__(self, arguments: list[int]) -> None:
        self.shapes: list[tuple[int, ...]] = []  # of each value
        self.weights: list[tuple[int, int]] = []  # shape of each matrix that is multiplied by
        self._arguments = arguments
        self._nodes: list[Any] = []
        self._values: list[Any] = []
        self._data = [schema.ConstantDataOffset(0, 0)]  # 0 stands for none
        self._inputs: dict[int, int] = {}  # tensor of the program -> value
        self._outputs: dict[int, int] = {}  # value -> tensor of the program
        self._constants: dict[str, int] = {}
        self._rounded: dict[int, int] = {}

    def value(self, shape: Sequence[int]) -> int:
        """A float32 value that a node computes."""
        return self._define(shape, _FLOAT)

    def input(self, tensor: int, shape: Sequence[int]) -> int:
        """The value that the program's tensor is here."""
        if tensor not in self._inputs:
            self._inputs[tensor] = self._define(shape, _FLOAT)
        return self._inputs[tensor]

    def output(self, value: int, tensor: int) -> None:
        """Let the program's tensor be a value of this graph."""
        self._outputs[value] = tensor

    def constant(self, key: str, shape: Sequence[int]) -> int:
        """Named float32 data."""
        if key not in self._constants:
            self._constants[key] = self._define(shape, _FLOAT, data=self._named(key, 4 * math.prod(shape)))
        return self._constants[key]

    def weight(self, key: str, shape: tuple[int, int], scheme: Scheme) -> int:
        """A named weight matrix (outputs, inputs), its scales under `key`.scales."""
        outputs, inputs = shape
        if not scheme.is_integer:
            return self.constant(key, shape)
        data = self._named(key, outputs * inputs * scheme.bits // 8)
        if scheme.group is None:
            scales = self._named(f"{key}.scales", 4 * outputs)
            kind = schema.XNNDatatype.xnn_datatype_qcint8
            quant: Any = schema.PerChannelQuant(
                scale=[], channel_dim=0, scale_buffer_idx=scales, num_scales=outputs
            )
        else:
            count = outputs * (inputs // scheme.group)
            scales = self._named(f"{key}.scales", 2 * count)
            kind = schema.XNNDatatype.xnn_datatype_qbint4
            quant = schema.PerChannelGroupQuant(
                scale=[], channel_dim=0, group_size=scheme.group, scale_buffer_idx=scales, num_scales=count
            )
        return self._define(shape, kind, data=data, quant=quant)

    def rounded(self, x: int) -> int:
        """x in 8 bits, with a scale and a zero point for each token, found as it runs."""
        if x not in self._rounded:
            y = self._define(self.shapes[x], _DYNAMIC, quant=schema.PerTokenDynamicQuant(num_nonbatch_dims=1))
            self.node(schema.XNNConvert, input_id=x, output_id=y)
            self._rounded[x] = y
        return self._rounded[x]

    def unary(self, kind: Any, x: int, shape: Sequence[int], **attributes: Any) -> int:
        """A node with one input."""
        y = self.value(shape)
        self.node(kind, input_id=x, output_id=y, **attributes)
        return y

    def binary(self, kind: Any, x: int, y: int, shape: Sequence[int]) -> int:
        """A node with two inputs."""
        z = self.value(shape)
        self.node(kind, input1_id=x, input2_id=y, output_id=z)
        return z

    def linear(self, x: int, weight: int, bias: int | None, shape: Sequence[int]) -> int:
        """x @ weightᵀ (+ bias)."""
        y = self.value(shape)
        self.node(
            schema.XNNFullyConnected,
            input1_id=x,
            filter_id=weight,
            bias_id=XNN_INVALID_VALUE_ID if bias is None else bias,
            output_id=y,
        )
        return y

    def concat(self, values: Sequence[int], shape: Sequence[int]) -> int:
        """Two values side by side in the last dimension."""
        first, second = values
        y = self.value(shape)
        unused = dict.fromkeys(("input3_id", "input4_id", "input5_id"), XNN_INVALID_VALUE_ID)
        axis = len(shape) - 1
        self.node(schema.XNNConcatenate2, axis=axis, input1_id=first, input2_id=second, output_id=y, **unused)
        return y

    def node(self, kind: Any, **arguments: Any) -> None:
        """Append a node; its place is its debug handle."""
        node = kind(flags=0, **arguments)
        self._nodes.append(schema.XNode(xnode_union=node, debug_handle=len(self._nodes)))

    def connect(self) -> None:
        """Fill in the call's arguments, when the graph is complete: inputs, then outputs."""
        self._arguments[:] = [*self._inputs, *self._outputs.values()]
        for number, value in enumerate((*self._inputs.values(), *self._outputs)):
            tensor = self._values[value]
            tensor.external_id = number
            is_input = number < len(self._inputs)
            tensor.flags = XNN_VALUE_FLAG_EXTERNAL_INPUT if is_input else XNN_VALUE_FLAG_EXTERNAL_OUTPUT

    def rename(self, names: Mapping[str, str]) -> None:
        """Give named data its final keys."""
        for place in self._data:
            place.named_key = names.get(place.named_key, place.named_key)

    def serialize(self) -> bytes:
        """The delegate's payload."""
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=[schema.XValue(value) for value in self._values],
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=list(self._inputs.values()),
            output_ids=list(self._outputs),
            constant_data=self._data,
        )
        return serialize_xnnpack_binary(graph, bytearray())

    def _define(self, shape: Sequence[int], kind: Any, data: int = 0, quant: Any = None) -> int:
        tensor = schema.XNNTensorValue(
            datatype=kind,
            num_dims=len(shape),
            dims=list(shape),
            constant_buffer_idx=data,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=len(self._values),
        )
        self._values.append(tensor if quant is None else schema.XNNQuantizedTensorValue(tensor, quant))
        self.shapes.append(tuple(shape))
        return tensor.id_out

    def _named(self, key: str, size: int) -> int:
        self._data.append(schema.ConstantDataOffset(offset=UINT64_MAX, size=size, named_key=key))
        return len(self._data) - 1
