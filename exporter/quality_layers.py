"""Two models side by side, layer by layer: how far each tensor is off, and what that makes of each layer's output.

Both run on the same tokens, and one layer of each is in memory. Errors are ratios of signal to noise in decibels
(SQNR): 10 log10 of the sum of squares over the sum of squared differences. 20 dB are an error of a tenth, 40 dB of a
hundredth.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from exporter import decoder
from exporter.quality_sides import Progress, Side
from exporter.quantization.states import batches as together
from exporter.torch_ops import TorchOps, pieces

States = list[Tensor]  # of all batches, [sequences, length, hidden] each


class Ratio:
    """Signal to noise, summed up over parts."""

    def __init__(self) -> None:
        self.signal, self.noise = 0.0, 0.0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Two tensors that should be the same."""
        self.signal += float(wanted.double().square().sum())
        self.noise += float((wanted.double() - found.double()).square().sum())

    @property
    def db(self) -> float | None:
        """In decibels; None if there is no noise at all."""
        return None if self.noise == 0 else 10 * math.log10(max(self.signal, 1e-300) / self.noise)


class Comparison:
    """What was found. `weights`: of each matrix. `products`: of what a linear makes of the first model's activations,
    by its weight's name ("head" for the head, tied or not), and of the rows that "embedding" looks up. `layers`: of
    each layer's output, in which the errors of all before it are."""

    def __init__(self, layers: int) -> None:
        self.weights: dict[str, Ratio] = {}
        self.products: dict[str, Ratio] = {}
        self.layers = [Ratio() for _ in range(layers)]


class _Measured(TorchOps):
    """The first model, which shows each linear's input to the other one, too."""

    other: TorchOps
    found: Comparison

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        rows = super().embed(tokens, weight)
        self._note(weight, weight, rows, self.other.embed(tokens, weight))
        return rows

    def linear(self, x: Tensor, weight: str) -> Tensor:
        y = super().linear(x, weight)
        self._note(
            weight if weight.startswith("layers.") else "head", weight, y, self.other.linear(x, weight)
        )
        return y

    def _note(self, name: str, weight: str, wanted: Tensor, found: Tensor) -> None:
        self.found.products.setdefault(name, Ratio()).add(wanted, found)
        if weight not in self.found.weights:
            ratio = self.found.weights[weight] = Ratio()
            pairs = zip(
                pieces(self.weights.matrix(weight)), pieces(self.other.weights.matrix(weight)), strict=True
            )
            for ours, theirs in pairs:
                ratio.add(ours, theirs)


def batches(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Token ids [sequences, length], as they go through a layer together."""
    return [torch.tensor(sequences[some]) for some in together(map(len, sequences))]


@torch.no_grad()
def run(
    models: Sequence[TorchOps],
    tokens: Sequence[Tensor],
    seen: Callable[[int, Sequence[States]], None] = lambda layer, states: None,
    progress: Progress = lambda what, done, total: None,
) -> list[States]:
    """Hidden states of models of as many layers behind the last layer, all batches going through one at a time.

    `seen`: is shown each layer's output. Of all batches' states there is one copy for each model.
    """
    states = [[decoder.embedding(ops, ops.arch, batch) for batch in tokens] for ops in models]
    count = models[0].arch.layers
    for i in range(count):
        for place in range(len(tokens)):
            for ops, held in zip(models, states, strict=True):
                held[place] = decoder.layer(ops, ops.arch, i, held[place])
                ops.forget(i)
            progress(f"layer {i + 1} of {count}", i * len(tokens) + place + 1, count * len(tokens))
        seen(i, states)
    return states


def compare(
    first: Side, second: Side, tokens: Sequence[Tensor], context: int, progress: Progress
) -> tuple[Comparison, tuple[TorchOps, States], tuple[TorchOps, States]]:
    """Run both; the heads are left to whoever wants logits, and `Comparison` has theirs when they ran."""
    ours, theirs = first.ops(context, _Measured), second.ops(context)
    assert isinstance(ours, _Measured)
    ours.other, ours.found = theirs, Comparison(first.arch.layers)

    def seen(layer: int, states: Sequence[States]) -> None:
        for wanted, found in zip(*states, strict=True):
            ours.found.layers[layer].add(wanted, found)

    states = run((ours, theirs), tokens, seen, progress)
    return ours.found, (ours, states[0]), (theirs, states[1])


@torch.no_grad()
def logits(ops: TorchOps, states: States, size: int) -> Iterator[Tensor]:
    """Logits after each token but the last of each sequence, [size, vocab] at a time."""
    hidden = torch.cat([x[:, :-1].flatten(0, 1) for x in states])
    for rows in hidden.split(size):
        yield decoder.head(ops, ops.arch, rows[None])[0]
