"""Read weights back out of the graphs for Hexagon, as the integers that were put in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from exporter.formats.onnx_qdq import unpack
from exporter.formats.onnx_weights import OnnxWeights
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor, pack4


class QdqWeights:
    """`Weights` over several graphs beside one data file; each is read when asked for, nothing is kept.

    Matrices come back exactly. A norm's weight or a bias is what its 16-bit integers stand for: its digest is not
    the quantizer's.
    """

    def __init__(self, graphs: Sequence[Path]) -> None:
        self._places = {name: graph for graph in map(_Graph, graphs) for name in graph.all_names()}

    def names(self) -> list[str]:
        """Canonical names of all matrices."""
        return [name for name, graph in self._places.items() if name in graph.names()]

    def scheme(self, name: str) -> Scheme:
        """What a weight matrix was quantized to."""
        return self._places[name].scheme(name)

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix with its integers and scales."""
        return self._places[name].matrix(name)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias, within half a step of the 16 bits it is stored in."""
        return self._places[name].vector(name)


class _Graph(OnnxWeights):
    """One graph's weights: [inputs, outputs] in the file, vectors in 16 bits."""

    def all_names(self) -> list[str]:
        return list(self._layout)

    def matrix(self, name: str) -> QuantizedTensor:
        place, scheme = self._layout[name], self.scheme(name)
        outputs, inputs, group = place["rows"], place["inputs"], scheme.group
        count = inputs * outputs
        if scheme.bits == 4:
            across = unpack(self._values(name, np.uint8, 0, (count + 1) // 2), count)
        else:
            across = self._values(name, np.int8, 0, count)
        numbers = (across.view(np.uint8) + np.uint8(2 ** (scheme.bits - 1))).reshape(inputs, outputs).T
        data = pack4(numbers) if scheme.bits == 4 else np.ascontiguousarray(numbers)
        groups = inputs // group if group else 1
        scales = self._values(f"{name}.scales", np.float32, 0, groups * outputs).reshape(groups, outputs).T
        return QuantizedTensor(name, scheme, (outputs, inputs), data, np.ascontiguousarray(scales))

    def vector(self, name: str) -> NDArray[np.float32]:
        integers = self._values(name, np.uint16, 0, self._layout[name]["rows"]).astype(np.float32)
        scale, zero_point = (
            onnx.numpy_helper.to_array(self._initializers[f"{name}.{part}"])
            for part in ("scale", "zero_point")
        )
        return (integers - np.float32(zero_point)) * np.float32(scale)
