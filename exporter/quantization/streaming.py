"""Algorithms that need to know a weight's inputs: one decoder layer in memory at a time, resumable after each.

All sequences of the calibration text go through a layer twice. First with its weights as they are, when the Hessian of
each linear's input is summed up, once where several share an input; then, its matrices quantized, with what was found
for them, which gives the next layer's input. So a layer is quantized for the inputs that the quantized layers before it
give, as in the GPTQ paper: it can make up for their errors. Within a layer the inputs are those of the layer as it was;
to quantize it matrix by matrix would take four runs instead of one, for no less error.

Hidden states lie in a file, of which those of about `_TOKENS` tokens are in memory. At the peak memory holds a layer in
float32, its Hessians, four more of the size of the widest one while that is factored, and about 0.5 GB for torch and
the values on their way, however many layers there are (benchmarks/quantization.py --large).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter import decoder
from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint
from exporter.errors import RecipeError
from exporter.quantization.algorithms import find_algorithm
from exporter.quantization.recipe import Decision, calibrated
from exporter.quantization.rtn import Quantized
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import QuantizedWeights, Weights, refuse_lost
from exporter.safetensors import to_float32
from exporter.staging import Staging
from exporter.torch_ops import TorchOps, embedded

FEWEST = 128  # tokens of a calibration text
_TOKENS = 1024  # that go through a layer together, where their sequences are of one length
_COLUMNS = 1024  # of a Hessian that are summed up together: what lies below its diagonal is copied
_LAYER, _STATES, _FOUND = "layer {}", "states.{}.f32", "layer.{}.npz"

Progress = Callable[[str, int, int], None]


class FoundWeights:
    """The weights that `quantize_layers` found, read from their files when asked for (a `weights.Found`)."""

    def __init__(
        self, folder: Path, decisions: Mapping[str, Decision], figures: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._folder, self._decisions, self._figures = folder, decisions, figures

    def __call__(self, name: str) -> tuple[Quantized, str]:
        figures = self._figures[name]
        with np.load(self._folder / figures["file"], allow_pickle=False) as arrays:
            data, scales = arrays[f"{name}.data"], arrays[f"{name}.scales"]
        outputs, inputs = figures["shape"]
        tensor = QuantizedTensor(name, self._decisions[name].scheme, (outputs, inputs), data, scales)
        return (tensor, figures["error"], figures["worst"]), figures["note"]


@torch.no_grad()
def quantize_layers(
    source: Checkpoint,
    decisions: Mapping[str, Decision],
    sequences: Iterable[Sequence[int]],
    context: int,
    work: Staging,
    progress: Progress = lambda what, done, total: None,
) -> FoundWeights:
    """Quantize the weights whose algorithm needs their inputs, on token sequences, each cut to `context` tokens.

    Layers that are finished in `work` are not done again. RecipeError if there are too few tokens, for activations
    that became NaN, and for what an algorithm refuses.
    """
    arch = source.architecture
    sequences = usable(sequences, context)
    lengths = list(map(len, sequences))
    layers = 1 + max(int(name.split(".")[1]) for name in calibrated(decisions))  # those behind need no inputs
    total = (2 * layers - 1) * sum(lengths)
    figures: dict[str, Any] = {}
    if not _resumes(work, layers):
        table = QuantizedWeights(source, decisions).matrix("embedding")
        work.step("embedding", lambda folder: _write(folder, 0, embedded(arch, table, sequences, context)))
    for i in range(layers):

        def make(folder: Path, i: int = i) -> Any:
            done = 2 * i * sum(lengths)

            def batches() -> Iterator[Tensor]:
                nonlocal done
                for x in _read(folder / _STATES.format(i), arch.hidden, lengths):
                    yield x
                    done += x.shape[0] * x.shape[1]
                    progress(f"quantize layer {i + 1} of {arch.layers}", done, total)

            layer = _Layer(source, decisions, i)
            hessians = _hessians(arch, layer, context, i, batches())
            found = _quantize(source, layer, hessians, folder / _FOUND.format(i))
            del hessians
            if i + 1 < layers:
                ops = TorchOps(arch, layer, context, rounded=0)
                _write(folder, i + 1, (_through(ops, i, x) for x in batches()))
            return found

        figures |= work.step(_LAYER.format(i), make, spent=[_STATES.format(i)])
    return FoundWeights(work.folder, decisions, figures)


def usable(sequences: Iterable[Sequence[int]], context: int) -> list[Sequence[int]]:
    """Those of the sequences that are not empty, cut to `context` tokens; RecipeError if they are too few tokens."""
    cut = [sequence[:context] for sequence in sequences if sequence]
    if (tokens := sum(map(len, cut))) < FEWEST:
        raise RecipeError(
            f"the calibration text has {tokens} tokens, and {FEWEST} are the fewest that say anything: give a "
            "longer one"
        )
    return cut


def _resumes(work: Staging, layers: int) -> bool:
    """Whether an earlier run left what the first unfinished layer needs; if not, all begins anew."""
    first = next((i for i in range(layers) if not work.is_done(_LAYER.format(i))), layers)
    if first == layers or (first and (work.folder / _STATES.format(first)).is_file()):
        return True
    work.clear()
    return False


class _Layer:
    """`Weights` of one layer in float32: those of the checkpoint, until `matrices` is given others."""

    def __init__(self, source: Checkpoint, decisions: Mapping[str, Decision], i: int) -> None:
        self._source = source
        self.decisions = {name: made for name, made in decisions.items() if name.startswith(f"layers.{i}.")}
        self.matrices: dict[str, QuantizedTensor] = {}
        for name in self.decisions:
            matrix = source.matrix(name)
            self.put(name, to_float32(matrix.rows(0, matrix.shape[0])))

    def put(self, name: str, values: NDArray[np.float32]) -> None:
        outputs, inputs = values.shape
        self.matrices[name] = QuantizedTensor(name, Scheme(32), (outputs, inputs), values)

    def scheme(self, name: str) -> Scheme:
        return self.matrices[name].scheme

    def matrix(self, name: str) -> QuantizedTensor:
        return self.matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._source.vector(name)


class _Recorder(TorchOps):
    """`TorchOps` that shows what linears are given, with the names of all that share it."""

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        context: int,
        see: Callable[[tuple[str, ...], Tensor], None],
    ) -> None:
        super().__init__(arch, weights, context, rounded=0)
        self._see = see

    def linear(self, x: Tensor, weight: str) -> Tensor:
        self._see((weight,), x)
        return super().linear(x, weight)

    def linears(self, x: Tensor, weights: Sequence[str]) -> list[Tensor]:
        self._see(tuple(weights), x)
        return [super(_Recorder, self).linear(x, weight) for weight in weights]


def _hessians(
    arch: Architecture, layer: _Layer, context: int, i: int, batches: Iterable[Tensor]
) -> dict[tuple[str, ...], Tensor]:
    """The mean of x xᵀ over all inputs x of a layer's linears, by the names of those that share them; only of those
    that need it."""
    needed, sums, tokens = set(calibrated(layer.decisions)), dict[tuple[str, ...], Tensor](), 0

    def see(names: tuple[str, ...], x: Tensor) -> None:
        if not needed.isdisjoint(names):
            size = x.shape[-1]
            _add_squares(sums.setdefault(names, torch.zeros(size, size)), x.reshape(-1, size))

    ops = _Recorder(arch, layer, context, see)
    for x in batches:
        _through(ops, i, x)
        tokens += x.shape[0] * x.shape[1]
    for hessian in sums.values():
        hessian /= tokens
        for start in range(0, len(hessian), _COLUMNS):
            stop = start + _COLUMNS
            hessian[stop:, start:stop] = hessian[start:stop, stop:].T
    return sums


def _add_squares(hessian: Tensor, x: Tensor) -> None:
    """Add xᵀx of x [tokens, inputs], the blocks of columns on the diagonal and above it."""
    for start in range(0, len(hessian), _COLUMNS):
        stop = start + _COLUMNS
        hessian[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _through(ops: TorchOps, i: int, x: Tensor) -> Tensor:
    """Sequences of one length through a layer, each from its beginning."""
    x = decoder.layer(ops, ops.arch, i, x)
    ops.forget(i)
    return x


def _quantize(
    source: Checkpoint, layer: _Layer, hessians: dict[tuple[str, ...], Tensor], file: Path
) -> dict[str, Any]:
    """Quantize a layer's matrices, write those that needed Hessians, and leave in `layer` what all stand for."""
    found, arrays = dict[str, Any](), dict[str, Any]()
    others = QuantizedWeights(source, layer.decisions)
    shared = {name: hessian for names, hessian in hessians.items() for name in names}
    for name, made in layer.decisions.items():
        quantize = find_algorithm(made.algorithm, made.scheme).from_hessian
        if quantize is None:
            layer.put(name, others.matrix(name).dequantize())
            continue
        (tensor, error, worst), note = quantize(source.matrix(name), made.scheme, shared[name])
        refuse_lost(name, made.scheme, error)
        layer.put(name, tensor.dequantize())
        arrays |= {f"{name}.data": tensor.data, f"{name}.scales": tensor.scales}
        found[name] = {"file": file.name, "shape": tensor.shape, "error": error, "worst": worst, "note": note}
    np.savez(file, **arrays)
    return found


def _write(folder: Path, i: int, states: Iterable[Tensor]) -> None:
    """The input of layer `i`, all tokens behind each other, float32 [tokens, hidden]."""
    with open(folder / _STATES.format(i), "wb") as file:
        for x in states:
            file.write(x.numpy().tobytes())


def _read(file: Path, hidden: int, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Batches [sequences, length, hidden] of what `_write` wrote: sequences in a row that are of one length."""
    states, row = np.memmap(file, np.float32, "r").reshape(-1, hidden), 0
    for length, same in groupby(lengths):
        left, most = len(list(same)), max(1, _TOKENS // length)
        while left:
            count = min(left, most)
            part = states[row : row + count * length].reshape(count, length, hidden)
            yield torch.from_numpy(part.copy())
            left, row = left - count, row + count * length
