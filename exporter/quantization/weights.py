"""Where the verbs of the decoder find their weights, by canonical name."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.checkpoint import Matrix, Source
from exporter.errors import RecipeError
from exporter.quantization.algorithms import find_algorithm
from exporter.quantization.recipe import Decision
from exporter.quantization.rtn import Quantized, not_finite
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor, vector_digest
from exporter.quantization.threads import threads
from exporter.safetensors import to_float32
from runtimes.bundle import TensorReport

# Relative squared error above which a weight is not quantized but lost. Rounding alone stays below: 128 weights
# under one 4-bit scale can lose 0.4 at the very worst, and 0.01 is usual. 1 is a matrix of zeros.
LARGEST_ERROR = 0.5


class Weights(Protocol):
    """Quantized matrices [outputs, inputs] and float32 vectors (norms, biases) under canonical names."""

    def scheme(self, name: str) -> Scheme:
        """What a weight matrix is or becomes."""

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""


def refuse_lost(name: str, scheme: Scheme, error: float) -> None:
    """RecipeError if so much of a weight is lost that it is not quantized; `error` is relative and squared."""
    if not error <= LARGEST_ERROR:  # so that a NaN is refused
        raise RecipeError(
            f"{name} would not survive {scheme.name} (relative squared error {error:.2g}, at most "
            f"{LARGEST_ERROR} is allowed): most of its weights are too small for that and become zero; keep it "
            f'exact with a recipe whose first rule is match = "{name}", scheme = "fp32"'
        )


Found = Callable[[str], tuple[Quantized, str]]  # what was found for a weight before, and a note on it


def not_found(name: str) -> tuple[Quantized, str]:
    """`Found` where nothing was."""
    raise RecipeError(
        f"the algorithm for {name} needs a calibration run, which this use of the weights has none of: export the "
        "model, or use rtn"
    )


class QuantizedWeights:
    """A source's weights, quantized when asked for; `reports` tells of all that were.

    `found`: the weights whose algorithm needs a calibration text (see `quantization.streaming`).
    """

    def __init__(
        self,
        source: Source,
        decisions: Mapping[str, Decision],
        progress: Callable[[str, int], None] = lambda name, weights: None,
        found: Found = not_found,
    ) -> None:
        self._source, self._decisions, self._progress = source, decisions, progress
        self._found = found
        self._reports: dict[str, Future[TensorReport]] = {}  # digests, found while the next weight is made

    @property
    def reports(self) -> list[TensorReport]:
        """One report for each weight, in the order in which they were first asked for."""
        return [report.result() for report in self._reports.values()]

    def scheme(self, name: str) -> Scheme:
        """What a weight matrix becomes."""
        return self._decisions[name].scheme

    def matrix(self, name: str) -> QuantizedTensor:
        """Read, quantize and report one weight matrix; RecipeError if its scheme loses most of it."""
        decision = self._decisions[name]
        algorithm, note = find_algorithm(decision.algorithm, decision.scheme), ""
        if algorithm.from_weights:
            quantized = algorithm.from_weights(self._source.matrix(name), decision.scheme)
        else:
            quantized, note = self._found(name)
        tensor, error, worst = quantized
        refuse_lost(name, decision.scheme, error)

        def report() -> TensorReport:
            return TensorReport(
                name=name,
                scheme=decision.scheme.name,
                algorithm="convert" if decision.scheme.is_float else decision.algorithm,
                shape=tensor.shape,
                bytes=tensor.nbytes,
                error=error,
                max_error=worst,
                digest=tensor.digest(),
                note="; ".join(filter(None, (decision.note, note))),
            )

        self._reports[name] = threads().submit(report)
        self._progress(name, tensor.shape[0] * tensor.shape[1])
        return tensor

    def vector(self, name: str) -> NDArray[np.float32]:
        """Read and report one norm's weight or bias, which stays float32."""
        values = self._source.vector(name)

        def report() -> TensorReport:
            return TensorReport(
                name=name,
                scheme="fp32",
                algorithm="convert",
                shape=values.shape,
                bytes=values.nbytes,
                error=0.0,
                max_error=0.0,
                digest=vector_digest(values),
            )

        self._reports[name] = threads().submit(report)
        return values


class SourceWeights:
    """A source's weights as they are, in float32, read when asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def scheme(self, name: str) -> Scheme:
        """Float32."""
        return Scheme(32)

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix, float32; CheckpointError for values that are no numbers."""
        matrix = self._source.matrix(name)
        values = to_float32(matrix.rows(0, matrix.shape[0]))
        if not np.isfinite(values).all():
            raise not_finite(name)
        return QuantizedTensor(name, Scheme(32), matrix.shape, values)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        return self._source.vector(name)


class WeightsSource:
    """What weights stand for as a source (a `checkpoint.Source`), of which the matrices and rows that `architecture`
    has are read."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._weights, self.architecture = weights, architecture
        self._shapes = dict(architecture.matrices())

    def matrix(self, name: str) -> Matrix:
        """A weight matrix, dequantized a block of rows at a time."""
        return Matrix(name, self._shapes[name], self._weights.matrix(name).dequantize)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        return self._weights.vector(name)


class FloatWeights(SourceWeights):
    """What other weights stand for, in float32, cut to the matrices and rows that `arch` has."""

    def __init__(self, weights: Weights, arch: Architecture) -> None:
        super().__init__(WeightsSource(weights, arch))


class Remembered:
    """Other weights, each asked for once."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._matrices: dict[str, QuantizedTensor] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def scheme(self, name: str) -> Scheme:
        """As theirs."""
        return self._weights.scheme(name)

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix."""
        if name not in self._matrices:
            self._matrices[name] = self._weights.matrix(name)
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        if name not in self._vectors:
            self._vectors[name] = self._weights.vector(name)
        return self._vectors[name]


class OneLayer(Remembered):
    """Other weights, of which those of one layer are remembered."""

    _layer = ""

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix."""
        self._enter(name)
        return super().matrix(name)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        self._enter(name)
        return super().vector(name)

    def _enter(self, name: str) -> None:
        layer = name.split(".")[1] if "." in name else "head"
        if layer != self._layer:
            self._layer = layer
            self._matrices.clear()
            self._vectors.clear()
