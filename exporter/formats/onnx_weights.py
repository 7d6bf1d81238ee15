"""Read weights back out of an exported ONNX file, as the integers that were put in."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.formats.onnx_graph import read_layout
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor
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
        return Scheme(place["bits"], place["group"], place["activations"])

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix with its integers and scales."""
        place, scheme = self._layout[name], self.scheme(name)
        rows, inputs, bits, group = place["rows"], place["inputs"], scheme.bits, scheme.group
        if not scheme.is_integer:
            kind = np.float16 if bits == 16 else np.float32
            return QuantizedTensor(name, scheme, (rows, inputs), self._rows(place, "", kind, inputs))
        data = self._rows(place, "", np.uint8, inputs * bits // 8)
        if self._initializers[place["initializer"]].data_type == onnx.TensorProto.INT8:
            data ^= 0x80  # per channel: stored as it is, not as q + 128
        scales = self._rows(place, ".scales", np.float32, inputs // group if group else 1)
        return QuantizedTensor(name, scheme, (rows, inputs), data, scales)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        return self._rows(self._layout[name], "", np.float32, 1)[:, 0]

    def _rows(self, place: dict[str, Any], suffix: str, kind: Any, columns: int) -> NDArray[Any]:
        """`place`'s rows of an initializer, seen as [rows, columns] of `kind`."""
        tensor = self._initializers[place["initializer"] + suffix]
        start, count = place["row"] * columns, place["rows"] * columns
        if not tensor.external_data:
            whole = onnx.numpy_helper.to_array(tensor).reshape(-1)
            return whole[start : start + count].reshape(-1, columns)
        where = {entry.key: entry.value for entry in tensor.external_data}
        width = np.dtype(kind).itemsize
        offset = int(where["offset"]) + start * width
        with open(self._folder / where["location"], "rb") as file:
            file.seek(offset)
            values = np.fromfile(file, kind, count)
        if len(values) != count:
            raise BundleError(f"{self._folder / where['location']} is cut off; export the bundle again")
        return values.reshape(-1, columns)
