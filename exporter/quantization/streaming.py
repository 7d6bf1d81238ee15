"""Algorithms that need to know a weight's inputs: one decoder layer in memory at a time, resumable after each.

All sequences of the calibration text go through a layer twice. First with its weights as they are, when the Hessian of
each linear's input is summed up, once where several share an input; then, its matrices quantized, with what was found
for them, which gives the next layer's input. So a layer is quantized for the inputs that the quantized layers before it
give, as in the GPTQ paper: it can make up for their errors. Within a layer the inputs are those of the layer as it was;
to quantize it matrix by matrix would take four runs instead of one, for no less error.

A preparation that finds scales (`quantization.preparation`) does so between the two, from what the first saw, and the
layer is quantized with them folded in.

The head comes last, for the outputs of the final norm. Where it is the embedding too, its rows are what a token is as
well as what its logit is: the Hessian of the products is then given a share of the identity, of which each weight is
as important, so that neither use pays for the other. The layers before are given the embedding as it was.

Hidden states lie in a file, of which a batch is in memory (`quantization.states`). At the peak memory holds a layer in
float32, its Hessians, four more of the size of the widest one while that is factored, and about 0.5 GB for torch and
the values on their way, however many layers there are; or the integers of the head, whose floats are made some rows at
a time (benchmarks/quantization.py --large).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter import decoder
from exporter.architecture import Architecture
from exporter.checkpoint import Matrix, Source
from exporter.quantization import states
from exporter.quantization.algorithms import find_algorithm
from exporter.quantization.calibration import require_tokens
from exporter.quantization.folding import Linears, Scaled, before
from exporter.quantization.hessian import add_squares, make_mean
from exporter.quantization.preparation import Preparation
from exporter.quantization.recipe import Decision, calibrated
from exporter.quantization.rtn import Quantized
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import QuantizedWeights, Weights, refuse_lost
from exporter.safetensors import to_float32
from exporter.staging import Staging
from exporter.torch_ops import TorchOps, embedded

LOOKED_UP = (
    0.3  # of the head's mean squared inputs, added to each where its rows are looked up too (measured)
)
_LAYER, _STATES, _FOUND, _SCALES = "layer {}", "states.{}.f32", "layer.{}.npz", "scales.{}.npz"
_HEAD, _FOUND_HEAD = "head", "head.npz"
_PARTS = ("data", "scales", "tables")  # of a quantized weight, those that it has

Progress = Callable[[str, int, int], None]


class FoundWeights:
    """The weights that `quantize_layers` found, read from their files when asked for (a `weights.Found`).

    `scales`: those that a preparation found, by what they are folded into (see `folding.Scaled`).
    """

    def __init__(
        self, folder: Path, decisions: Mapping[str, Decision], figures: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._folder, self._decisions, self._figures = folder, decisions, figures
        self.scales: dict[str, NDArray[np.float32]] = {}
        for file in folder.glob(_SCALES.format("*")):
            with np.load(file, allow_pickle=False) as arrays:
                self.scales |= arrays

    def __call__(self, name: str) -> tuple[Quantized, str]:
        figures = self._figures[name]
        with np.load(self._folder / figures["file"], allow_pickle=False) as arrays:
            parts = {part: arrays[key] for part in _PARTS if (key := f"{name}.{part}") in arrays}
        outputs, inputs = figures["shape"]
        tensor = QuantizedTensor(name, self._decisions[name].scheme, (outputs, inputs), **parts)
        return (tensor, figures["error"], figures["worst"]), figures["note"]


@torch.no_grad()
def quantize_layers(
    source: Source,
    decisions: Mapping[str, Decision],
    sequences: Iterable[Sequence[int]],
    context: int,
    work: Staging,
    progress: Progress = lambda what, done, total: None,
    preparation: Preparation | None = None,
) -> FoundWeights:
    """Quantize the weights whose algorithm needs their inputs, on token sequences, each cut to `context` tokens.

    `preparation`: one that finds scales, in all layers; what is found is of the weights with those folded in. Layers
    that are finished in `work` are not done again. RecipeError if there are too few tokens, for activations that became
    NaN, and for what an algorithm refuses.
    """
    arch = source.architecture
    sequences = usable(sequences, context)
    lengths = list(map(len, sequences))
    needed = calibrated(decisions)
    head = next((name for name in needed if not name.startswith("layers.")), "")
    layers = arch.layers  # or fewer: those behind the last that needs its inputs are not run
    if preparation is None and not head:
        layers = 1 + max(int(name.split(".")[1]) for name in needed)
    total = (2 * layers + (1 if head else -1)) * sum(lengths)
    figures: dict[str, Any] = {}
    if not _resumes(work, [*map(_LAYER.format, range(layers)), *([_HEAD] if head else [])]):
        table = (
            _Stored(source.matrix(head))
            if head == "embedding"
            else QuantizedWeights(source, decisions).matrix("embedding")
        )
        given = embedded(arch, table, sequences, context)
        work.step("embedding", lambda folder: states.write(folder / _STATES.format(0), given))

    def inputs(folder: Path, i: int, what: str, again: bool = False) -> Iterator[Tensor]:
        """What layer `i`, or the head behind all layers, is given."""
        done = (2 * i + again) * sum(lengths)
        for x in states.read(folder / _STATES.format(i), arch.hidden, lengths):
            yield x
            done += x.shape[0] * x.shape[1]
            progress(f"quantize {what}", done, total)

    for i in range(layers):

        def make(folder: Path, i: int = i) -> Any:
            layer, what = _Layer(source, decisions, i, preparation), f"layer {i + 1} of {arch.layers}"
            hessians = _hessians(arch, layer, context, i, inputs(folder, i, what))
            if preparation:
                _scale(layer, hessians, preparation, folder / _SCALES.format(i))
            found = _quantize(layer.source, layer, hessians, folder / _FOUND.format(i))
            del hessians
            if head or i + 1 < layers:
                ops = TorchOps(arch, layer, context, rounded=0)
                outputs = (_through(ops, i, x) for x in inputs(folder, i, what, again=True))
                states.write(folder / _STATES.format(i + 1), outputs)
            return found

        figures |= work.step(_LAYER.format(i), make, spent=[_STATES.format(i)])
    if head:

        def make_head(folder: Path) -> Any:
            hessian = _head_hessian(source, context, inputs(folder, layers, "the head"))
            tensor, found = _find(source, head, decisions[head], hessian)
            _save(folder / _FOUND_HEAD, [tensor])
            return {head: {"file": _FOUND_HEAD, **found}}

        figures |= work.step(_HEAD, make_head, spent=[_STATES.format(layers)])
    return FoundWeights(work.folder, decisions, figures)


def usable(sequences: Iterable[Sequence[int]], context: int) -> list[Sequence[int]]:
    """Those of the sequences that are not empty, cut to `context` tokens; RecipeError if they are too few tokens."""
    cut = [sequence[:context] for sequence in sequences if sequence]
    require_tokens(map(len, cut))
    return cut


def _resumes(work: Staging, steps: Sequence[str]) -> bool:
    """Whether an earlier run left what the first unfinished step needs; if not, all begins anew."""
    first = next((i for i, step in enumerate(steps) if not work.is_done(step)), len(steps))
    if first == len(steps) or (first and (work.folder / _STATES.format(first)).is_file()):
        return True
    work.clear()
    return False


class _Stored:
    """A matrix as the checkpoint has it, for looking up."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        return to_float32(self._matrix.rows(start, stop))


class _Layer:
    """`Weights` of one layer in float32: those of the source, until `matrices` is given others.

    `needed`: the weights whose inputs' Hessian is needed; `peaked`: those whose inputs' largest values are, which
    `peaks` gets, by the names of all that share the input.
    """

    def __init__(
        self, source: Source, decisions: Mapping[str, Decision], i: int, preparation: Preparation | None
    ) -> None:
        self.source = source
        self.decisions = {name: made for name, made in decisions.items() if name.startswith(f"layers.{i}.")}
        self.needed, self.peaked = set(calibrated(self.decisions)), set[str]()
        self.peaks: dict[tuple[str, ...], Tensor] = {}
        if preparation:
            concerned = {name for name, made in self.decisions.items() if preparation.of(made.scheme)}
            wanted = self.needed if preparation.by_hessian else self.peaked
            wanted |= concerned
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
        return self.source.vector(name)


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

    def product(self, x: Tensor, weight: str) -> Tensor:
        if weight.endswith(".mlp.down"):  # gives the layer's output, which nobody reads while it is seen
            return x.new_zeros(1).expand(*x.shape[:-1], self.arch.hidden)
        return super().product(x, weight)


def _hessians(
    arch: Architecture, layer: _Layer, context: int, i: int, batches: Iterable[Tensor]
) -> dict[tuple[str, ...], Tensor]:
    """The mean of x xᵀ over all inputs x of a layer's linears, by the names of those that share them; only of those
    that need it. Peaks go to `layer.peaks`."""
    sums, tokens = dict[tuple[str, ...], Tensor](), 0

    def see(names: tuple[str, ...], x: Tensor) -> None:
        size = x.shape[-1]
        if not layer.peaked.isdisjoint(names):
            peaks = x.reshape(-1, size).abs().amax(0)
            layer.peaks[names] = torch.maximum(layer.peaks.get(names, peaks), peaks)
        if not layer.needed.isdisjoint(names):
            if names not in sums:
                sums[names] = torch.zeros(size, size)
            add_squares(sums[names], x.reshape(-1, size))

    ops = _Recorder(arch, layer, context, see)
    for x in batches:
        _through(ops, i, x)
        tokens += x.shape[0] * x.shape[1]
    for hessian in sums.values():
        make_mean(hessian, tokens)
    return sums


def _head_hessian(source: Source, context: int, batches: Iterable[Tensor]) -> Tensor:
    """As `_hessians`, of the head's inputs; of those that are looked up too see the module's text."""
    arch, tokens = source.architecture, 0
    ops = TorchOps(arch, QuantizedWeights(source, {}), context, rounded=0)
    hessian = torch.zeros(arch.hidden, arch.hidden)
    for x in batches:
        normed = ops.rms_norm(x, "final_norm").reshape(-1, arch.hidden)
        add_squares(hessian, normed)
        tokens += len(normed)
    make_mean(hessian, tokens)
    if arch.tied:
        hessian.diagonal().add_(LOOKED_UP * hessian.diagonal().mean())
    return hessian


def _through(ops: TorchOps, i: int, x: Tensor) -> Tensor:
    """Sequences of one length through a layer, each from its beginning."""
    x = decoder.layer(ops, ops.arch, i, x)
    ops.forget(i)
    return x


def _scale(
    layer: _Layer, hessians: dict[tuple[str, ...], Tensor], preparation: Preparation, file: Path
) -> None:
    """Find a layer's scales and write them; the layer and its Hessians become what they are with those folded in."""
    assert preparation.find
    scales, source = dict[str, NDArray[np.float32]](), layer.source
    for names in hessians if preparation.by_hessian else layer.peaks:
        hessian, peaks = hessians.get(names), layer.peaks.get(names)
        linears = Linears(
            source.architecture,
            tuple(map(source.matrix, names)),
            tuple(layer.decisions[name] for name in names),
            hessian,
            None if peaks is None else peaks.numpy(),
        )
        found = (
            preparation.find(linears) if any(preparation.of(d.scheme) for d in linears.decisions) else None
        )
        if found is None:
            continue
        scales[before(names[0])] = found
        if hessian is not None:
            smaller = 1 / torch.from_numpy(linears.spread(found))
            hessian.mul_(smaller).mul_(smaller[:, None])
    np.savez(file, **scales)  # type: ignore[arg-type]
    layer.source = Scaled(source, scales)


def _quantize(
    source: Source, layer: _Layer, hessians: dict[tuple[str, ...], Tensor], file: Path
) -> dict[str, Any]:
    """Quantize a layer's matrices, write those that needed Hessians, and leave in `layer` what all stand for."""
    found, tensors = dict[str, Any](), list[QuantizedTensor]()
    others = QuantizedWeights(source, layer.decisions)
    shared = {name: hessian for names, hessian in hessians.items() for name in names}
    for name, made in layer.decisions.items():
        if find_algorithm(made.algorithm, made.scheme).from_hessian is None:
            layer.put(name, others.matrix(name).dequantize())
            continue
        tensor, figures = _find(source, name, made, shared[name])
        layer.put(name, tensor.dequantize())
        tensors.append(tensor)
        found[name] = {"file": file.name, **figures}
    _save(file, tensors)
    return found


def _find(
    source: Source, name: str, made: Decision, hessian: Tensor
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Quantize one weight, and its figures for `FoundWeights`."""
    quantize = find_algorithm(made.algorithm, made.scheme).from_hessian
    assert quantize, "one that is calibrated"
    (tensor, error, worst), note = quantize(source.matrix(name), made.scheme, hessian)
    refuse_lost(name, made.scheme, error)
    return tensor, {"shape": tensor.shape, "error": error, "worst": worst, "note": note}


def _save(file: Path, tensors: Sequence[QuantizedTensor]) -> None:
    parts = {f"{tensor.name}.{part}": getattr(tensor, part) for tensor in tensors for part in _PARTS}
    np.savez(file, **{key: values for key, values in parts.items() if values is not None})
