"""Read weights back out of an ExecuTorch program, as the integers that were put in."""

from pathlib import Path
from typing import Any

import numpy as np
from executorch.exir import schema
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.formats.executorch_pte import PteReader
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor
from runtimes.errors import BundleError


class ExecuTorchWeights:
    """`Weights` over a .pte that `formats.executorch` wrote; each is read when asked for, nothing is kept.

    Names come from the keys of its data, schemes from the sizes, the embedding from the kernel that looks it up.
    """

    def __init__(self, path: Path, arch: Architecture) -> None:
        self._reader = PteReader(path)
        self._shapes, self._lengths = dict(arch.matrices()), dict(arch.vectors())
        self._keys = {key.partition(":")[0] + _suffix(key): key for key in self._reader.names()}
        self._table = self._embedding()

    def scheme(self, name: str) -> Scheme:
        """What a weight matrix was quantized to."""
        rows, columns = self._shapes[name]
        if name == "embedding":
            bits = self._table[0].sizes[1] * _BITS[self._table[0].scalar_type] // columns
            groups = self._table[1].sizes[1] if self._table[1] else 1
        else:
            bits = self._size(name) * 8 // (rows * columns)
            groups = self._size(f"{name}.scales") // (2 * rows) if bits == 4 else 1
        if bits == 32:
            return Scheme(32)
        return Scheme(bits, columns // groups if bits == 4 else None, "int8")

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix with its integers and scales."""
        scheme, shape = self.scheme(name), self._shapes[name]
        rows, columns = shape
        if scheme.bits == 32:
            return QuantizedTensor(name, scheme, shape, self._data(name, np.float32).reshape(shape))
        data = self._data(name).reshape(rows, columns * scheme.bits // 8)
        if scheme.bits == 8:
            data = data ^ 0x80
        elif name == "embedding":
            data = (data << 4) | (data >> 4)
        return QuantizedTensor(name, scheme, shape, data, self._scales(name, scheme).reshape(rows, -1))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        return self._named(name, np.float32)

    def _data(self, name: str, kind: Any = np.uint8) -> NDArray[Any]:
        if name != "embedding":
            return self._named(name, kind)
        return self._constant(self._table[0], kind)

    def _scales(self, name: str, scheme: Scheme) -> NDArray[np.float32]:
        if name == "embedding":
            return self._constant(self._table[1], np.float32)
        if scheme.bits == 8:
            return self._named(f"{name}.scales", np.float32)
        halves = self._named(f"{name}.scales", np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32)

    def _embedding(self) -> tuple[Any, Any]:
        """The tensors of the embedding's integers (or floats) and scales."""
        plan = self._reader.program.execution_plan[0]
        for instruction in plan.chains[0].instructions:
            call = instruction.instr_args
            if isinstance(call, schema.KernelCall):
                name = plan.operators[call.op_index].name
                values = [plan.values[index].val for index in call.args[:2]]
                if name == "aten::embedding":
                    return values[0], None
                if name.startswith("quantized_decomposed::embedding"):
                    return values[0], values[1]
        raise BundleError(f"{self._reader.path} looks up no embedding: it was not made by Gochu")

    def _constant(self, tensor: Any, kind: Any) -> NDArray[Any]:
        size = int(np.prod(tensor.sizes)) * _BITS[tensor.scalar_type] // 8
        return self._reader.constant(tensor.data_buffer_idx, size, kind)

    def _named(self, name: str, kind: Any = np.uint8) -> NDArray[Any]:
        return self._reader.named(self._key(name), kind)

    def _size(self, name: str) -> int:
        return self._reader.size(self._key(name))

    def _key(self, name: str) -> str:
        if name not in self._keys:
            raise BundleError(f"{self._reader.path} has no weights {name!r}: it was not made by Gochu")
        return self._keys[name]


_BITS = {0: 8, 1: 8, 6: 32}  # of executorch's ScalarType BYTE, CHAR and FLOAT


def _suffix(key: str) -> str:
    return ".scales" if key.endswith(".scales") else ""
