"""Where the verbs of the decoder find their weights, by canonical name."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint
from exporter.errors import RecipeError
from exporter.quantization.algorithms import find_algorithm
from exporter.quantization.recipe import Decision
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor, vector_digest
from exporter.quantization.threads import threads
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


class QuantizedWeights:
    """A checkpoint's weights, quantized when asked for; `reports` tells of all that were."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decisions: Mapping[str, Decision],
        progress: Callable[[str, int], None] = lambda name, weights: None,
    ) -> None:
        self._checkpoint, self._decisions, self._progress = checkpoint, decisions, progress
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
        source = self._checkpoint.matrix(name)
        tensor, error, worst = find_algorithm(decision.algorithm, decision.scheme)(source, decision.scheme)
        if not error <= LARGEST_ERROR:  # so that a NaN is refused
            raise RecipeError(
                f"{name} would not survive {decision.scheme.name} (relative squared error {error:.2g}, at most "
                f"{LARGEST_ERROR} is allowed): most of its weights are too small for that and become zero; keep it "
                f'exact with a recipe whose first rule is match = "{name}", scheme = "fp32"'
            )

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
                note=decision.note,
            )

        self._reports[name] = threads().submit(report)
        self._progress(name, tensor.shape[0] * tensor.shape[1])
        return tensor

    def vector(self, name: str) -> NDArray[np.float32]:
        """Read and report one norm's weight or bias, which stays float32."""
        values = self._checkpoint.vector(name)

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


class FloatWeights:
    """What other weights stand for, in float32, cut to the matrices and rows that `arch` has."""

    def __init__(self, weights: Weights, arch: Architecture) -> None:
        self._weights, self._shapes = weights, dict(arch.matrices())

    def scheme(self, name: str) -> Scheme:
        """Float32."""
        return Scheme(32)

    def matrix(self, name: str) -> QuantizedTensor:
        """A weight matrix, dequantized."""
        shape = self._shapes[name]
        return QuantizedTensor(name, Scheme(32), shape, self._weights.matrix(name).dequantize(0, shape[0]))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        return self._weights.vector(name)
