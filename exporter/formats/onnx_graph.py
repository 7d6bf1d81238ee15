"""What every ONNX graph of ours is built from: nodes with names made up on the way, and weights in a file beside it.

Several graphs can lie beside one data file: a weight is written when the first of them asks for it, and the others
point to the same bytes.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtimes.bundle import TensorSpec
from runtimes.errors import BundleError

LAYOUT = "gochu.weights"  # metadata key: canonical name -> where it lies in the file's initializers
CONTRIB = "com.microsoft"
_INLINE = 1024  # bytes up to which a constant stays in the graph
_KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint16": TensorProto.UINT16,
    "uint8": TensorProto.UINT8,
}


class DataFile:
    """A file of weights. `tensors`: what lies where, by name; `layout`: how canonical names are found in them."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location
        self.tensors: dict[str, Any] = {}
        self.layout: dict[str, dict[str, Any]] = {}
        self._aliases: dict[str, str] = {}

    @classmethod
    def of(cls, graph: Path) -> "DataFile":
        """The file that a graph has written, for more graphs over the same tensors; nothing more can be written."""
        model = onnx.load(graph, load_external_data=False)
        data = cls(_Full(), "")
        data.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        data.layout = read_layout(model, graph)
        return data

    def append(self, name: str, kind: int, dims: Sequence[int], blocks: Sequence[NDArray[Any]]) -> str:
        """Write a tensor's bytes; only their place stays in memory. Returns the name."""
        size = sum(block.nbytes for block in blocks)
        align = 4096 if size >= 1 << 16 else 64  # whole pages can be mapped
        self._file.write(b"\0" * (-self._file.tell() % align))
        tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        place = {"location": self._location, "offset": self._file.tell(), "length": size}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        self.tensors[name] = tensor
        return name

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Numbers, which stay in the graph if they are few; the same name stands for the same values."""
        if name not in self.tensors:
            if values.nbytes > _INLINE:
                self.append(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, [values])
            else:
                self.tensors[name] = onnx.numpy_helper.from_array(values, name)
        return name

    def alias(self, stored: str, name: str, dims: Sequence[int]) -> str:
        """The same bytes in another shape, under another name."""
        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[stored])
        tensor.name = name
        tensor.dims[:] = dims
        self.tensors[name] = tensor
        self._aliases[name] = stored
        return name

    def part(self, stored: str, name: str, start: int, count: int) -> str:
        """Rows [start, start + count) of weights that lie below each other, or their scales."""
        rows = sum(
            place["rows"]
            for place in self.layout.values()
            if place["initializer"] == stored.removesuffix(".scales")
        )
        whole, tensor = self.tensors[stored], TensorProto()
        tensor.CopyFrom(whole)
        tensor.name, tensor.dims[0] = name, whole.dims[0] // rows * count
        if whole.external_data:
            place = {entry.key: int(entry.value) for entry in whole.external_data if entry.key != "location"}
            width = place["length"] // rows
            for entry in tensor.external_data:
                if entry.key != "location":
                    entry.value = str(
                        place["offset"] + width * start if entry.key == "offset" else width * count
                    )
        else:
            width = len(whole.raw_data) // rows
            tensor.raw_data = whole.raw_data[width * start : width * (start + count)]
        self.tensors[name] = tensor
        self._aliases[name] = stored
        return name

    def behind(self, names: Iterable[str]) -> set[str]:
        """Names, and those of the tensors that they are other shapes of."""
        return {other for name in names for other in (name, self._aliases.get(name, name))}


class _Full(io.BytesIO):
    """Takes no bytes: what would go here is a weight that the first graph does not have."""

    def write(self, data: Any) -> int:
        raise ValueError("a graph over the tensors of another one has a tensor of its own")


class GraphBuilder:
    """Nodes in order, over the tensors of a data file."""

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.nodes: list[Any] = []
        self._values = 0

    def emit(
        self, op: str, inputs: Sequence[str], name: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output; returns the output's name."""
        output = name or self.fresh()
        self.node(op, inputs, [output], domain, **attributes)
        return output

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        """Add a node."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))

    def fresh(self) -> str:
        """A name that no value has."""
        self._values += 1
        return f"v{self._values}"

    def scalar(self, value: float) -> str:
        """A float32 number."""
        return self.data.constant(f"scalar.{value!r}", np.array(value, np.float32))

    def rename(self, old: str, new: str) -> None:
        """Give a node's result the name of an output."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    def prune(self, outputs: Iterable[str]) -> None:
        """Drop the nodes that none of these outputs needs."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]

    def model(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        opset: int,
        ir: int,
        whole: bool = False,
    ) -> Any:
        """The finished ModelProto. It names the tensors that its nodes use, or the `whole` file's."""
        tensors = self.data.tensors
        used = tensors.keys() if whole else self.data.behind(v for node in self.nodes for v in node.input)
        layout = {weight: place for weight, place in self.data.layout.items() if place["initializer"] in used}
        graph = helper.make_graph(
            self.nodes,
            name,
            [value_info(spec) for spec in inputs],
            [value_info(spec) for spec in outputs],
            [tensor for key, tensor in tensors.items() if key in used],
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir, producer_name="gochu")
        helper.set_model_props(model, {LAYOUT: json.dumps(layout)})
        return model


def read_layout(model: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Where a graph's weights are; BundleError if it is not one of ours."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if LAYOUT not in properties:
        raise BundleError(f"{path} does not say where its weights are: it was not made by Gochu")
    layout: dict[str, dict[str, Any]] = json.loads(properties[LAYOUT])
    return layout


def value_info(spec: TensorSpec) -> Any:
    """An input or output as ONNX says it."""
    return helper.make_tensor_value_info(spec.name, _KINDS[spec.dtype], list(spec.shape))


def save(model: Any, path: Path) -> None:
    """Write a graph beside its data."""
    path.write_bytes(model.SerializeToString())


def joined(names: Sequence[str]) -> str:
    """layers.0.attention.q + .k + .v -> layers.0.attention.q+k+v; a bias likewise."""
    if len(names) == 1:
        return names[0]
    bias = names[0].endswith(".bias")
    bare = [name.removesuffix(".bias") for name in names]
    prefix = bare[0].rpartition(".")[0]
    return f"{prefix}.{'+'.join(name.rpartition('.')[2] for name in bare)}" + (".bias" if bias else "")
