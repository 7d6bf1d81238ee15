"""Read weights back out of Core ML packages, as the integers, tables and scales that were put in."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.formats import NEURAL_ENGINE
from exporter.formats.coreml_ane import norm_scale
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor, pack4
from runtimes.bundle import Bundle, Variant
from runtimes.errors import BundleError
from runtimes.mil.package import Operation, open_package

_CODES = {"int4": 4, "int8": 8}


class CoreMLWeights:
    """`Weights` over the packages that a model is split into; each is read when asked for, nothing is kept.

    Operations bear the names of the weights; a matrix that is used in pieces has a piece's first row in its name.
    `norm_scale`: what the layout multiplied norms' weights by (`coreml_ane.norm_scale`).
    """

    def __init__(self, packages: Iterable[Path], arch: Architecture, norm_scale: float = 1.0) -> None:
        self._shapes, self._lengths = dict(arch.matrices()), dict(arch.vectors())
        self._norm_scale = norm_scale
        self._operations: dict[str, Operation] = {}
        self._where = ""
        for path in packages:
            self._where = str(path)
            for function in open_package(path).functions.values():
                for operation in function.operations:
                    if operation.type == "const" or operation.type.startswith("constexpr_"):
                        self._operations.setdefault(operation.name, operation)

    def scheme(self, name: str) -> Scheme:
        """What a weight matrix was quantized to."""
        first, rows = next(iter(self._pieces(name)))
        if first.type == "const":
            return Scheme(16)
        if first.type == "constexpr_lut_to_dense":
            tables = _value(first, "lut")
            bits = (tables.shape[-2] - 1).bit_length()
            groups = tables.shape[0] * self._shapes[name][0] // rows
            group = None if groups == 1 else self._shapes[name][0] // groups
            return Scheme(bits, group, table=True)
        scales = _value(first, "scale")
        groups = scales.shape[1]
        bits = _CODES[_constant(first, "data").dtype.name]
        return Scheme(bits, None if groups == 1 else self._shapes[name][1] // groups)  # type: ignore[arg-type]

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix with its integers and scales, or indices and tables."""
        scheme, shape = self.scheme(name), self._shapes[name]
        pieces = [piece for piece, _ in self._pieces(name)]

        def joined(parameter: str) -> NDArray[Any]:
            values = [_value(piece, parameter) for piece in pieces]
            if scheme.table and scheme.group is None and parameter == "lut":
                values = values[:1]  # one table for all pieces
            return np.concatenate([value.reshape(len(value), -1) for value in values])

        if scheme.is_float:
            return QuantizedTensor(name, scheme, shape, joined("val"))
        if scheme.table:
            indices: NDArray[np.uint8] = joined("indices")
            data = pack4(indices) if scheme.bits == 4 else indices
            return QuantizedTensor(name, scheme, shape, data, tables=joined("lut").astype(np.float32))
        biased: NDArray[np.uint8] = joined("data").view(np.uint8) + np.uint8(2 ** (scheme.bits - 1))
        data = pack4(biased & np.uint8(15)) if scheme.bits == 4 else biased
        return QuantizedTensor(name, scheme, shape, data, joined("scale").astype(np.float32))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias, as it is stored; in the Neural Engine's layout a norm's weight is filled up."""
        values = _value(self._operation(name), "val").astype(np.float32)[: self._lengths[name]]
        return values / np.float32(self._norm_scale) if name.endswith("_norm") else values

    def _pieces(self, name: str) -> Iterator[tuple[Operation, int]]:
        """The operations that hold a matrix, in order, with how many rows each has."""
        row = 0
        while row < self._shapes[name][0]:
            operation = self._operation(name if row == 0 and self._has(name) else f"{name}.{row}")
            rows = operation.outputs[0][1].shape[0]
            assert rows is not None
            yield operation, rows
            row += rows

    def _has(self, name: str) -> bool:
        return name.replace(".", "_") in self._operations

    def _operation(self, name: str) -> Operation:
        found = self._operations.get(name.replace(".", "_"))
        if found is None:
            raise BundleError(f"{self._where} has no weights {name!r}: it was not made by Gochu")
        return found


def read_weights(bundle: Bundle, variant: Variant, arch: Architecture) -> CoreMLWeights:
    """The weights of a bundle's variant, in whichever layout it is."""
    packages = dict.fromkeys(bundle.file(entry.file) for entry in variant.entry_points)
    return CoreMLWeights(packages, arch, norm_scale(arch) if variant.delegate == NEURAL_ENGINE else 1.0)


def _constant(operation: Operation, parameter: str) -> Any:
    return operation.inputs[parameter][0]


def _value(operation: Operation, parameter: str) -> NDArray[Any]:
    return np.asarray(_constant(operation, parameter).read())
