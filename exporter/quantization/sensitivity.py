"""What quantizing one weight alone costs the model: KL divergence from the float model's next tokens, in nats a token.

`kl` measures just that, a run of the float model for each weight with only that weight quantized. `hessian` finds all
of them in one run forward and one backward, one decoder layer in memory at a time. To second order the divergence is
half the error weighted by the Fisher information, which is its Hessian where nothing is quantized: with δ the error of
a linear's outputs on a token, and g the gradient of log p(y) there for a next token y that the model itself draws, it
is ½ E[(g·δ)²] (Martens, New insights and perspectives on the natural gradient method, 2014, arxiv.org/abs/1412.1193).
The outputs' errors are taken as independent, ½ E[Σ g²δ²], which one drawn token estimates well enough: an
output's error e on the weights costs e H eᵀ, H = ½ E[g² x xᵀ], where GPTQ's Hessian has only E[x xᵀ]. That difference
matters: without g errors count as if all layers and kinds of weights were alike, and on pepper the order of the weights
by that is no better than chance, while by this one it is nearly that of `kl`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter import decoder
from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint
from exporter.errors import RecipeError, UsageError
from exporter.quantization import states
from exporter.quantization.calibration import require_tokens
from exporter.quantization.recipe import Decision, calibrated, starting
from exporter.quantization.scheme import Scheme
from exporter.quantization.streaming import quantize_layers
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import (
    OneLayer,
    QuantizedWeights,
    Remembered,
    SourceWeights,
    Weights,
    not_found,
)
from exporter.staging import Staging
from exporter.torch_ops import TorchOps, look_up

MEASURES = ("hessian", "kl")
TOKENS = 4096  # of the calibration text at most
LARGEST_KL = 200_000_000  # parameters of a model that `kl` holds in memory, and runs for each of its weights
_LOGITS = 1 << 25  # at a time, of which a handful of copies are made
_SEED = 0
_STATES, _GRADIENTS = "states.{}.f32", "gradients.{}.f32"

Progress = Callable[[str, int, int], None]
Decisions = Mapping[str, Decision]
# A step's name, the files that it needs, what makes its files and result, and the files that are then spent.
_Step = tuple[str, tuple[str, ...], Callable[[Path], Any], tuple[str, ...]]
Effects = dict[str, tuple[float, ...]]  # by name, one for each of the ways that were given


@torch.no_grad()
def measure_effects(
    source: Checkpoint,
    ways: Sequence[Decisions],
    sequences: Sequence[Sequence[int]],
    work: Staging,
    measure: str = "hessian",
    progress: Progress = lambda what, done, total: None,
) -> Effects:
    """Nats of KL divergence a token that each weight costs alone, for each of several ways to quantize it.

    `sequences`: token ids. What is finished in `work` is not done again. Weights whose algorithm needs their inputs
    are first found as for an export. UsageError for a measure that there is not or a model too large for `kl`;
    RecipeError for a text that is too short, and for values that became NaN.
    """
    if measure not in MEASURES:
        raise UsageError(f"there is no measure {measure!r}: use one of {', '.join(MEASURES)}")
    arch = source.architecture
    if measure == "kl" and arch.parameters > LARGEST_KL:
        raise UsageError(
            f"the model has {arch.parameters / 1e6:.0f} M parameters, and --measure kl, which runs it for each of its "
            f"weights, is for up to {LARGEST_KL // 1_000_000} M: use --measure hessian"
        )
    require_tokens(map(len, sequences))
    context = max(map(len, sequences))
    ways = [starting(way) for way in ways]  # of a trained weight what it starts from
    found = [
        quantize_layers(source, way, sequences, context, work.workspace(str(i)), progress)
        if calibrated(way)
        else not_found
        for i, way in enumerate(ways)
    ]
    exact = SourceWeights(source)
    others = [QuantizedWeights(source, way, found=each) for way, each in zip(ways, found, strict=True)]
    sizes = list(states.batches(map(len, sequences)))
    if measure == "kl":
        effects = _divergences(arch, exact, others, sizes, sequences, work, progress)
    else:
        effects = _Passes(arch, exact, others, sizes, sequences, work, progress).effects()
    for name, costs in effects.items():
        if not all(map(math.isfinite, costs)):
            raise RecipeError(
                f"what {name} costs became NaN or infinite on the calibration text: the float model does not work "
                "there; check the checkpoint or give another text"
            )
    return effects


class _Passes:
    """Forward and backward through the float model; what crosses between layers lies in files."""

    def __init__(
        self,
        arch: Architecture,
        exact: Weights,
        others: Sequence[Weights],
        batches: Sequence[slice],
        sequences: Sequence[Sequence[int]],
        work: Staging,
        progress: Progress,
    ) -> None:
        self.arch, self.work, self.progress = arch, work, progress
        self.exact, self.others = OneLayer(exact), [OneLayer(weights) for weights in others]
        self.batches = [torch.tensor(sequences[some]) for some in batches]
        self.lengths = list(map(len, sequences))
        self.tokens = sum(self.lengths)
        self.context = max(self.lengths)
        self.say: Callable[[int], None] = lambda done: None  # of the step at work, how many tokens are done

    def effects(self) -> Effects:
        layers = range(self.arch.layers)
        last = _STATES.format(self.arch.layers)
        steps: list[_Step] = [("embed", (), self._embed, ())]
        for i in layers:
            steps.append((f"forward {i}", (_STATES.format(i),), partial(self._forward, i), ()))
        steps.append(("head", (last,), self._head, (last,)))
        for i in reversed(layers):
            used = (_STATES.format(i), _GRADIENTS.format(i + 1))
            steps.append((f"backward {i}", used, partial(self._backward, i), used))
        steps.append(("look up", (_GRADIENTS.format(0),), self._look_up, (_GRADIENTS.format(0),)))
        first = next((needs for name, needs, _, _ in steps if not self.work.is_done(name)), ())
        if not all((self.work.folder / name).is_file() for name in first):
            self.work.clear()  # what an unfinished step needs is spent: all begins anew
        sums: dict[str, list[float]] = {name: [0.0] * len(self.others) for name, _ in self.arch.matrices()}
        for n, (name, _, make, spent) in enumerate(steps):
            self.say = partial(self._say, name, n * self.tokens, len(steps) * self.tokens)
            made = self.work.step(name, make, spent)
            self.say(self.tokens)
            for weight, costs in (made or {}).items():
                sums[weight] = [one + other for one, other in zip(sums[weight], costs, strict=True)]
        return {name: tuple(cost / 2 / self.tokens for cost in costs) for name, costs in sums.items()}

    def _embed(self, folder: Path) -> None:
        table = self.exact.matrix("embedding")
        states.write(
            folder / _STATES.format(0),
            (look_up(ids, table) * self.arch.embedding_scale for ids in self.batches),
        )

    def _forward(self, i: int, folder: Path) -> None:
        def outputs() -> Iterator[Tensor]:
            ops = self._ops(self.exact)
            for x in self._read(folder / _STATES.format(i)):
                yield decoder.layer(ops, self.arch, i, x)
                ops.forget(i)

        states.write(folder / _STATES.format(i + 1), outputs())

    def _head(self, folder: Path) -> dict[str, list[float]]:
        """The gradient of log p(y) of tokens y that the model draws; the head looks at each token by itself."""
        probe, random = self._probe(), torch.Generator().manual_seed(_SEED)
        most = max(1, _LOGITS // self.arch.vocab)

        def gradient(x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.requires_grad_()
                log_p = decoder.head(probe, self.arch, x)[0].log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=random)
                log_p.gather(1, drawn).sum().backward()
            assert x.grad is not None
            return x.grad

        def gradients() -> Iterator[Tensor]:
            for x in self._read(folder / _STATES.format(self.arch.layers)):
                if not torch.isfinite(x).all():
                    raise RecipeError(
                        "the model's last hidden states became NaN or infinite on the calibration text: its weights "
                        "do not work there; check the checkpoint or give another text"
                    )
                for part in x.reshape(1, -1, self.arch.hidden).split(most, 1):
                    yield gradient(part.clone())

        states.write(folder / _GRADIENTS.format(self.arch.layers), gradients())
        return probe.sums

    def _backward(self, i: int, folder: Path) -> dict[str, list[float]]:
        probe = self._probe()

        def gradients() -> Iterator[Tensor]:
            both = (folder / _STATES.format(i), folder / _GRADIENTS.format(i + 1))
            for x, upstream in zip(*map(self._read, both), strict=True):
                with torch.enable_grad():
                    x = x.requires_grad_()
                    decoder.layer(probe, self.arch, i, x).backward(upstream)
                probe.forget(i)
                assert x.grad is not None
                yield x.grad

        states.write(folder / _GRADIENTS.format(i), gradients())
        return probe.sums

    def _look_up(self, folder: Path) -> dict[str, list[float]]:
        exact, sums = self.exact.matrix("embedding"), [0.0] * len(self.others)
        for ids, gradient in zip(self.batches, self._read(folder / _GRADIENTS.format(0)), strict=True):
            for k, weights in enumerate(self.others):
                lost = (
                    look_up(ids, weights.matrix("embedding")) - look_up(ids, exact)
                ) * self.arch.embedding_scale
                sums[k] += float((gradient * lost).square().sum())
        return {"embedding": sums}

    def _ops(self, weights: Weights) -> TorchOps:
        return TorchOps(self.arch, weights, self.context, rounded=0)

    def _probe(self) -> "_Probe":
        return _Probe(self.arch, self.exact, self.context, list(map(self._ops, self.others)))

    def _read(self, file: Path) -> Iterator[Tensor]:
        row = 0
        for x in states.read(file, self.arch.hidden, self.lengths):
            yield x
            row += x.shape[0] * x.shape[1]
            self.say(row)

    def _say(self, name: str, before: int, total: int, done: int) -> None:
        self.progress(f"measure effects: {name}", before + done, total)


class _Probe(TorchOps):
    """`TorchOps` that sums up Σ g²δ² of each linear as the gradient g of its outputs comes back, δ what these lose by
    each of several other weights."""

    def __init__(
        self, arch: Architecture, weights: Weights, context: int, others: Sequence[TorchOps]
    ) -> None:
        super().__init__(arch, weights, context, rounded=0)
        self._others = others
        self.sums: dict[str, list[float]] = {}

    def linear(self, x: Tensor, weight: str) -> Tensor:
        y = super().linear(x, weight)
        given, exact = x.detach(), y.detach()

        def came_back(gradient: Tensor) -> None:
            sums = self.sums.setdefault(weight, [0.0] * len(self._others))
            for k, other in enumerate(self._others):
                lost = other.linear(given, weight) - exact
                sums[k] += float((gradient * lost).square().sum())

        y.register_hook(came_back)
        return y


class _One:
    """`Weights` of which one matrix is another's."""

    def __init__(self, weights: Weights, name: str, other: Weights) -> None:
        self._weights, self._name, self._other = weights, name, other
        self.vector = weights.vector

    def scheme(self, name: str) -> Scheme:
        return self._weights.scheme(name)

    def matrix(self, name: str) -> QuantizedTensor:
        return (self._other if name == self._name else self._weights).matrix(name)


def _divergences(
    arch: Architecture,
    exact: Weights,
    others: Sequence[Weights],
    batches: Sequence[slice],
    sequences: Sequence[Sequence[int]],
    work: Staging,
    progress: Progress,
) -> Effects:
    """KL(float ‖ one weight quantized), batch by batch: only what comes behind the weight is computed again."""
    exact, others = Remembered(exact), [Remembered(weights) for weights in others]
    names = [name for name, _ in arch.matrices()]
    context = max(map(len, sequences))

    def start(name: str) -> int:
        """The layer that a weight is in; -1 is the embedding, and behind the last is the head."""
        return int(name.split(".")[1]) if "." in name else -1 if name == "embedding" else arch.layers

    def batch(n: int, _: Path) -> dict[str, list[float]]:
        ids = torch.tensor(sequences[batches[n]])
        ops = TorchOps(arch, exact, context, rounded=0)
        inputs = [decoder.embedding(ops, arch, ids)]
        for i in range(arch.layers):
            inputs.append(decoder.layer(ops, arch, i, inputs[i]))
        reference = decoder.head(ops, arch, inputs[-1]).log_softmax(-1)
        chances, costs = reference.exp(), dict[str, list[float]]()
        for done, name in enumerate(names):
            costs[name] = []
            for weights in others:
                changed, first = TorchOps(arch, _One(exact, name, weights), context, rounded=0), start(name)
                x = decoder.embedding(changed, arch, ids) if first < 0 else inputs[first]
                for i in range(max(first, 0), arch.layers):
                    x = decoder.layer(changed, arch, i, x)
                found = decoder.head(changed, arch, x).log_softmax(-1)
                costs[name].append(float((chances * (reference - found)).sum()))
            progress(f"measure {name}", n * len(names) + done + 1, len(batches) * len(names))
        return costs

    sums = {name: [0.0] * len(others) for name in names}
    for n in range(len(batches)):
        for name, costs in work.step(f"batch {n}", partial(batch, n)).items():
            sums[name] = [one + other for one, other in zip(sums[name], costs, strict=True)]
    tokens = sum(map(len, sequences))
    return {name: tuple(cost / tokens for cost in costs) for name, costs in sums.items()}
