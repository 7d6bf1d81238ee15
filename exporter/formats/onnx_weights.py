"""Read weights back out of an exported ONNX file, as the integers that were put in."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.formats.onnx_graph import read_layout
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor, pack4
from runtimes.errors import BundleError


class OnnxWeights:
    """`Weights` over graphs and the data file beside them; each is read when asked for, nothing is kept."""

    def __init__(self, *graphs: Path) -> None:
        self._folder = graphs[0].parent
        self._layout: dict[str, dict[str, Any]] = {}
        self._initializers: dict[str, Any] = {}
        for graph in graphs:
            model = onnx.load(graph, load_external_data=False)
            self._layout = read_layout(model, graph) | self._layout
            self._initializers |= {tensor.name: tensor for tensor in model.graph.initializer}

    def names(self) -> list[str]:
        """Canonical names of all matrices."""
        return [name for name, place in self._layout.items() if "bits" in place]

    def scheme(self, name: str) -> Scheme:
        """What a weight matrix was quantized to."""
        place = self._layout[name]
        low_power = place.get("low_power", False)  # which older bundles do not know
        return Scheme(place["bits"], place["group"], place["activations"], low_power=low_power)

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix with its integers and scales."""
        place, scheme = self._layout[name], self.scheme(name)
        rows, inputs, bits, group = place["rows"], place["inputs"], scheme.bits, scheme.group
        if not scheme.is_integer:
            kind = np.float16 if bits == 16 else np.float32
            return QuantizedTensor(name, scheme, (rows, inputs), self._rows(place, "", kind, inputs))
        if self._initializers[place["initializer"]].data_type == onnx.TensorProto.INT8:
            data = self._rows(place, "", np.uint8, inputs)  # a byte for each, as it is, not q + 2^(bits-1)
            data += np.uint8(2 ** (bits - 1))
            data = pack4(data) if bits == 4 else data
        else:
            data = self._rows(place, "", np.uint8, inputs * bits // 8)
        block = place.get("block", group)
        scales = self._rows(place, ".scales", np.float32, inputs // block if block else 1)
        if not group and (scales != scales[:, :1]).any():
            raise BundleError(
                f"{self._folder}: {name} has several scales for an output; export the bundle again"
            )
        scales = scales if group else np.ascontiguousarray(scales[:, :1])
        return QuantizedTensor(name, scheme, (rows, inputs), data, scales)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        return self._rows(self._layout[name], "", np.float32, 1)[:, 0]

    def _rows(self, place: dict[str, Any], suffix: str, kind: Any, columns: int) -> NDArray[Any]:
        """`place`'s rows of an initializer, seen as [rows, columns] of `kind`."""
        start, count = place["row"] * columns, place["rows"] * columns
        return self._values(place["initializer"] + suffix, kind, start, count).reshape(-1, columns)

    def _values(self, initializer: str, kind: Any, start: int, count: int) -> NDArray[Any]:
        """`count` values of an initializer from the `start`th on, read as `kind`."""
        tensor = self._initializers[initializer]
        if not tensor.external_data:
            return onnx.numpy_helper.to_array(tensor).reshape(-1)[start : start + count]
        where = {entry.key: entry.value for entry in tensor.external_data}
        width = np.dtype(kind).itemsize
        with open(self._folder / where["location"], "rb") as file:
            file.seek(int(where["offset"]) + start * width)
            values = np.fromfile(file, kind, count)
        if len(values) != count:
            raise BundleError(f"{self._folder / where['location']} is cut off; export the bundle again")
        return values
