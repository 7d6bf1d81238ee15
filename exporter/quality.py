"""How far one model is from another: what quantization, or a whole export, costs.

Any two of a checkpoint in float, a checkpoint quantized, and a bundle. A checkpoint is run by the reference decoder
(torch), one layer in memory at a time; a bundle by its own engine, a token at a time as when it generates, so that all
that its engine rounds counts. The text is none that quantizers are calibrated on.

>>> compare("pepper", scheme="int4").kl.mean < 0.05                          # doctest: +SKIP
True
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter import quality_layers
from exporter.errors import UsageError
from exporter.quality_layers import Comparison, Ratio, States
from exporter.quality_reference import find_reference
from exporter.quality_sides import FLOAT, Progress, Side, Wanted, open_side
from exporter.quantization.algorithms import DEFAULT
from exporter.quantization.calibration import held_out_sequences, text_digest
from exporter.quantization.recipe import Recipe
from runtimes.bundle import Strict

TOKENS = 2048  # of the text, by default
QUESTIONS = 200  # that a model from pepper is asked by default
FEWEST = 64  # tokens of a text that says anything
_LOGITS = 1 << 22  # values in memory at a time, of each model
KINDS = (
    "embedding",
    *(f"attention.{name}" for name in "qkvo"),
    *(f"mlp.{name}" for name in ("gate", "up", "down")),
    "head",
)


class Divergence(Strict):
    """KL divergence of the second model's next token from the first's, in nats a token."""

    mean: float
    median: float
    p99: float
    largest: float


class Answers(Strict):
    """Exact answers to pepper's held-out questions."""

    asked: int
    right: int


class Model(Strict):
    """One of the two. `prepared`: what was done to its float weights before they were rounded."""

    name: str
    what: str
    bits_per_weight: float
    perplexity: float
    answers: Answers | None = None
    prepared: tuple[str, ...] = ()


class TensorQuality(Strict):
    """`weights_db`: SQNR of the weights themselves; `output_db`: of what the first model's activations become by
    them, rounded as the engine does. None stands for no error at all. `kind`: one of KINDS.

    Weights that were prepared are held against the first model's, prepared alike (`exporter.quality_reference`)."""

    name: str
    kind: str
    layer: int | None
    scheme: str
    weights_db: float | None
    output_db: float | None


class LayerQuality(Strict):
    """SQNR of a layer's output, where both models ran from the tokens on: errors before it are in it."""

    layer: int
    output_db: float | None


class Quality(Strict):
    """The report. `agreement`: percent of tokens after which both find the same one likeliest."""

    first: Model
    second: Model
    text: str
    tokens: int
    kl: Divergence
    agreement: float
    layers: tuple[LayerQuality, ...] = ()
    tensors: tuple[TensorQuality, ...] = ()
    notes: tuple[str, ...] = ()

    def worst(self) -> TensorQuality | None:
        """The tensor that loses most, as its output shows; None if none loses anything."""
        lossy = [tensor for tensor in self.tensors if tensor.output_db is not None]
        return min(lossy, key=lambda tensor: tensor.output_db or 0.0, default=None)

    def by_kind(self) -> dict[str, tuple[float | None, float | None]]:
        """SQNR of weights and of outputs of each kind of tensor: that of the mean relative squared error."""
        kinds = {kind: [t for t in self.tensors if t.kind == kind] for kind in KINDS}
        return {
            kind: (_mean([t.weights_db for t in some]), _mean([t.output_db for t in some]))
            for kind, some in kinds.items()
            if some
        }


def _mean(ratios: Sequence[float | None]) -> float | None:
    error = sum(10 ** (-db / 10) for db in ratios if db is not None) / len(ratios)
    return -10 * math.log10(error) if error else None


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str] | None = None,
    *,
    scheme: str | None = None,
    recipe: Recipe | None = None,
    algorithm: str = DEFAULT,
    prepare: tuple[str, ...] = (),
    calibration: Path | None = None,
    activations: str = FLOAT,
    variant: str | None = None,
    revision: str | None = None,
    text: Path | None = None,
    tokens: int = TOKENS,
    questions: int | None = None,
    work: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Quality:
    """Hold `second` against `first`, which is right: checkpoints (folder, repository id, "pepper") or bundles.

    A checkpoint is `first` in float; as `second` it is what `scheme` and `algorithm`, or `recipe`, make of it after
    `prepare` (on `calibration`, where they need a text), with activations as an engine rounds them: "float",
    "onnxruntime" or "executorch". Without `second`, that is the first checkpoint quantized. `variant`: of a bundle that
    is `second`. `text`: a .txt or .jsonl file, of which `tokens` are used (default: see `held_out_sequences`).
    `questions`: how many of pepper's both are asked (default: 200 of what comes from pepper, none of others). `work`: a
    folder that a stopped run finds its quantized layers in. UsageError for models that do not belong together and for a
    text that also calibrates; else as whatever is opened raises.

    Memory: one layer of each model, the hidden states of all tokens, 4 M logits at a time, and what holds the largest
    matrix in float32; of a bundle also what its engine takes. The first model counts twice where `second` was prepared.
    """
    if text is not None and calibration is not None and text_digest(text) == text_digest(calibration):
        raise UsageError(
            f"{text} cannot judge what it calibrated: give --text another text than --calibration, or leave it out"
        )
    if recipe is not None and (scheme is not None or algorithm != DEFAULT):
        raise UsageError("a recipe says schemes and algorithms itself: leave out --scheme and --algorithm")
    if scheme is not None:
        recipe = Recipe.uniform(scheme, algorithm, prepare)
    elif recipe is not None:
        recipe = recipe.after(prepare)
    elif algorithm != DEFAULT:
        raise UsageError(
            f"{algorithm} finds integers of a scheme: give --scheme or --recipe with --algorithm"
        )
    elif prepare:
        raise UsageError("weights are prepared to be rounded: give --scheme or --recipe with --prepare")
    if second is None and recipe is None:
        raise UsageError("there is nothing to compare with: give a second model, or --scheme or --recipe")
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wanted, other = Wanted(recipe, calibration, activations), first if second is None else second

        def opened(path: str | os.PathLike[str], wanted: Wanted, variant: str | None = None) -> Side:
            return open_side(
                path, wanted, stack, folder, variant=variant, revision=revision, progress=progress
            )

        ours, theirs = opened(first, Wanted()), opened(other, Wanted(), variant)
        sequences = text_for(ours, theirs, text, tokens)  # before anything that takes long
        if wanted != Wanted():
            theirs = opened(other, wanted, variant)
        found = compare_sides(ours, theirs, sequences, text.name if text else "held out", progress)
        if questions is None:
            questions = QUESTIONS if {ours.source, theirs.source} == {"pepper"} else 0
        return _asked(found, (ours, theirs), questions, progress)


def text_for(first: Side, second: Side, text: Path | None, tokens: int) -> list[list[int]]:
    """Token ids of the text, the shortest sequences first; UsageError where the two do not read it alike."""
    context = min(first.context, second.context)
    sequences = held_out_sequences(first.text, first.source, context, text, tokens)
    if first.arch.vocab != second.arch.vocab:
        raise _strangers(first, second, f"{first.arch.vocab} tokens in one, {second.arch.vocab} in the other")
    if held_out_sequences(second.text, first.source, context, text, tokens) != sequences:
        raise _strangers(first, second, "the same text becomes other tokens")
    sequences = sorted((sequence for sequence in sequences if len(sequence) > 1), key=len)
    if (count := sum(map(len, sequences))) < FEWEST:
        raise UsageError(
            f"the text has {count} tokens, and {FEWEST} are the fewest that say anything: give a longer one with "
            "--text, or more --tokens"
        )
    return sequences


def _strangers(first: Side, second: Side, why: str) -> UsageError:
    return UsageError(
        f"{first.name} and {second.name} do not belong together ({why}): compare a model with what was made of it"
    )


def compare_sides(
    first: Side, second: Side, sequences: Sequence[Sequence[int]], text: str, progress: Progress
) -> Quality:
    """The report on two opened models, without answers."""
    tokens = quality_layers.batches(sequences)
    context = (first if first.engine else second).context
    size = max(1, _LOGITS // first.arch.vocab)
    reference = find_reference(first, second)
    found, held, ours, theirs = None, reference.side, None, None
    if held:
        found, exact, theirs = quality_layers.compare(held, second, tokens, context, progress)
        if held is first and not first.engine:
            ours = exact
        else:  # the head has not run that the second's is held against
            for _ in quality_layers.logits(*exact, size):
                pass

    def rows(side: Side, run: tuple[quality_layers.TorchOps, States] | None) -> Iterator[Tensor]:
        if side.engine:
            return map(torch.from_numpy, side.logits(sequences, size))
        if run is None:
            ops = side.ops(context)
            run = ops, quality_layers.run((ops,), tokens, progress=progress)[0]
        return quality_layers.logits(*run, size)

    targets = torch.tensor(list(chain.from_iterable(sequence[1:] for sequence in sequences)))
    figures = _Figures((rows(first, ours), rows(second, theirs)), targets, progress)
    return Quality(
        first=_model(first, figures.losses[0]),
        second=_model(second, figures.losses[1]),
        text=text,
        tokens=len(targets),
        kl=_divergence(figures.kl),
        agreement=100 * float(figures.same.mean()),
        layers=_layers(found) if found else (),
        tensors=_tensors(second, found, reference.inside) if found else (),
        notes=(reference.note,) if reference.note else (),
    )


class _Figures:
    """Of each token: the divergence, whether the likeliest next token is the same, and both models' loss in nats."""

    def __init__(self, rows: Sequence[Iterator[Tensor]], targets: Tensor, progress: Progress) -> None:
        kl, same, done = list[Tensor](), list[Tensor](), 0
        losses: tuple[list[Tensor], list[Tensor]] = ([], [])
        for ours, theirs in zip(*rows, strict=True):
            wanted, found = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
            kl.append((wanted.exp() * (wanted - found)).sum(-1))
            same.append(ours.argmax(-1) == theirs.argmax(-1))
            next_ones = targets[done : done + len(ours), None]
            for loss, some in zip(losses, (wanted, found), strict=True):
                loss.append(-some.gather(-1, next_ones)[:, 0])
            done += len(ours)
            progress("logits", done, len(targets))
        self.kl: NDArray[np.float64] = torch.cat(kl).numpy()
        self.same = torch.cat(same).double().numpy()
        self.losses = [torch.cat(loss).numpy() for loss in losses]


def _divergence(kl: NDArray[np.float64]) -> Divergence:
    return Divergence(
        mean=float(kl.mean()),
        median=float(np.median(kl)),
        p99=float(np.percentile(kl, 99)),
        largest=float(kl.max()),
    )


def _model(side: Side, losses: NDArray[np.float64]) -> Model:
    return Model(
        name=side.name,
        what=side.what,
        bits_per_weight=side.bits_per_weight,
        perplexity=float(np.exp(losses.mean())),
        prepared=side.prepared,
    )


def _layers(found: Comparison) -> tuple[LayerQuality, ...]:
    return tuple(LayerQuality(layer=i, output_db=ratio.db) for i, ratio in enumerate(found.layers))


def _tensors(side: Side, found: Comparison, inside_too: bool) -> tuple[TensorQuality, ...]:
    def row(name: str, product: Ratio) -> TensorQuality:
        weight = name if name in found.weights else "embedding"  # a tied head
        inside = name.startswith("layers.")
        return TensorQuality(
            name=name,
            kind=name.split(".", 2)[2] if inside else name,
            layer=int(name.split(".")[1]) if inside else None,
            scheme=side.weights.scheme(weight).name,
            weights_db=found.weights[weight].db,
            output_db=product.db,
        )

    return tuple(
        row(name, product)
        for name, product in found.products.items()
        if inside_too or not name.startswith("layers.")
    )


def _asked(found: Quality, sides: Sequence[Side], questions: int, progress: Progress) -> Quality:
    """With the answers of both to pepper's questions."""
    if not questions:
        return found
    from exporter.pepper.questions import held_out
    from exporter.pepper.score import score
    from exporter.quality_answers import answer_all

    asked, models = held_out(questions), []
    for side, model in zip(sides, (found.first, found.second), strict=True):
        said = answer_all(side, [question.prompt for question in asked], progress)
        right = score(said.__getitem__, asked).overall.right
        models.append(model.model_copy(update={"answers": Answers(asked=questions, right=right)}))
    return found.model_copy(update={"first": models[0], "second": models[1]})
