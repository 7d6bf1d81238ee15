"""What a quality report compares: a checkpoint in float, a checkpoint quantized, or a bundle as its engine runs it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture, read_architecture
from exporter.checkpoint import Checkpoint, open_checkpoint, read_json
from exporter.errors import UsageError
from exporter.formats import find_format
from exporter.quantization.calibration import LONGEST, calibration_sequences, text_digest
from exporter.quantization.folding import Scales, folded
from exporter.quantization.preparation import prepared_architecture, refuse_idle
from exporter.quantization.recipe import Decision, Recipe
from exporter.quantization.stage import quantize
from exporter.quantization.weights import OneLayer, QuantizedWeights, SourceWeights, Weights
from exporter.staging import Staging
from exporter.stored import stored_weights
from exporter.tokenizer import TextSide, bundled_text_side, read_text_side
from exporter.torch_ops import ROUNDINGS, TorchOps
from runtimes import extras
from runtimes.bundle import MANIFEST, Bundle, Variant
from runtimes.engines import Engine, choose_variant, open_engine

FLOAT = "float"  # activations that are not rounded
ACTIVATIONS = (FLOAT, "onnxruntime", "executorch")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint becomes before it is compared: float if there is no `recipe`.

    `activations`: whose int8 rounding of them is computed too, where the scheme has it ("float" for none).
    """

    recipe: Recipe | None = None
    calibration: Path | None = None
    activations: str = FLOAT

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise UsageError(
                f"there are no activations as {self.activations!r} rounds them: use one of {', '.join(ACTIVATIONS)}"
            )


@dataclass(frozen=True)
class Side:
    """A model with its weights, and how its engine rounds what meets them.

    `what`: for a person, such as "int4 by gptq" or "onnx-int4 on onnxruntime 1.22.0". `source`: the checkpoint's.
    `engine`: opens what runs the bundle, None for a checkpoint, which the reference decoder runs. `prepared`: what was
    done to its float weights, by name, and `scales`: those that a preparation found, None where they are not known.
    """

    name: str
    what: str
    source: str
    arch: Architecture
    text: TextSide
    weights: Weights
    rounds: str
    context: int
    engine: Callable[[int], Engine] | None = None
    prepared: tuple[str, ...] = ()
    scales: Scales | None = None

    def ops(self, context: int, kind: type[TorchOps] = TorchOps) -> TorchOps:
        """The reference decoder on this side's weights, a layer of which is remembered.

        `context`: tokens that the other side's graph holds; a bundle's own is another matter (LongRoPE asks for it).
        """
        exact = self.rounds == FLOAT
        engine = "onnxruntime" if exact else self.rounds
        weights = OneLayer(self.weights)
        context = self.context if self.engine else context
        return kind(self.arch, weights, context, rounded=0 if exact else None, engine=engine)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes on average, with its share of scales and tables."""
        shapes = dict(self.arch.matrices())
        nbytes = sum(self.weights.scheme(name).nbytes(shape) for name, shape in shapes.items())
        return 8 * nbytes / sum(rows * columns for rows, columns in shapes.values())

    def logits(self, sequences: Sequence[Sequence[int]], size: int) -> Iterator[NDArray[np.float32]]:
        """The engine's logits after each token but the last of each sequence, [size, vocab] at a time.

        One token is fed after the other, as when it generates.
        """
        assert self.engine
        engine = self.engine(max(map(len, sequences)))
        held: list[NDArray[np.float32]] = []
        for sequence in sequences:
            engine.reset()
            for token in sequence[:-1]:
                held.append(engine.decode(token))
                if len(held) == size:
                    yield np.stack(held)
                    held.clear()
        engine.close()
        if held:
            yield np.stack(held)


def open_side(
    path: str | os.PathLike[str],
    wanted: Wanted,
    stack: ExitStack,
    work: Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Side:
    """Open a bundle's folder, or a checkpoint (and quantize it); `stack` closes it.

    `work`: a folder where a calibrated algorithm's finished layers wait for a rerun. Raises UsageError where a bundle
    is to be quantized, else as `open_checkpoint`, `Bundle.open` and the quantizers do.
    """
    if (Path(path) / MANIFEST).is_file():
        if wanted.recipe is not None or wanted.activations != FLOAT:
            raise UsageError(
                f"{os.fspath(path)} is a bundle, whose weights and activations are what they are: give --scheme, "
                "--recipe, --algorithm and --activations with a checkpoint"
            )
        return _bundle(Bundle.open(path), variant)
    if variant is not None:
        raise UsageError(f"{os.fspath(path)} is a checkpoint, which has no variants: leave out --variant")
    source = stack.enter_context(open_checkpoint(path, revision))
    return checkpoint_side(source, wanted, work, progress)


def checkpoint_side(source: Checkpoint, wanted: Wanted, work: Path, progress: Progress) -> Side:
    """A checkpoint as the reference decoder runs it."""
    side = Side(
        name=source.name,
        what=FLOAT,
        source=source.source,
        arch=source.architecture,
        text=read_text_side(source),
        weights=SourceWeights(source),
        rounds=wanted.activations,
        context=min(LONGEST, source.architecture.context),
    )
    return side if wanted.recipe is None else _quantized(side, source, wanted.recipe, wanted, work, progress)


def _described(recipe: Recipe, decisions: dict[str, Decision], activations: str) -> str:
    algorithms = dict.fromkeys(d.algorithm for d in decisions.values() if not d.scheme.is_float)
    by = f" by {', '.join(algorithms)}" if algorithms else ""
    how = "" if activations == FLOAT else f", activations as {activations} rounds them"
    return f"{recipe.name}{by}{_after(recipe.prepare)}{how}"


def _after(prepared: Sequence[str]) -> str:
    return f" after {' and '.join(prepared)}" if prepared else ""


def _quantized(
    side: Side, source: Checkpoint, recipe: Recipe, wanted: Wanted, work: Path, progress: Progress
) -> Side:
    """A checkpoint's side with what a recipe makes of its weights."""
    arch, context = prepared_architecture(source.architecture, recipe.prepare), side.context
    decisions = recipe.resolve(arch)
    refuse_idle(recipe.prepare, decisions)
    made = [source.fingerprint(), recipe.prepare, sorted(decisions.items()), text_digest(wanted.calibration)]

    def texts(training: bool) -> list[list[int]]:
        return calibration_sequences(
            source, context, wanted.calibration, progress=progress, training=training
        )

    given, found = quantize(source, recipe, decisions, texts, context, Staging(work, repr(made)), progress)
    return replace(
        side,
        what=_described(recipe, decisions, wanted.activations),
        arch=arch,
        weights=QuantizedWeights(given, decisions, found=found),
        prepared=recipe.prepare,
        scales=folded(given),
    )


def _bundle(bundle: Bundle, name: str | None) -> Side:
    """A bundle's variant that runs here: its own weights, and its own engine; MissingExtra if that is not installed."""
    variant, _ = choose_variant(bundle, name)
    form = find_format(variant.format)
    for library in form.libraries:
        extras.check(library, form.extra)

    def engine(context: int) -> Engine:
        return open_engine(bundle, variant.name, context=context)

    return replace(variant_side(bundle, variant, stored_weights(bundle, variant)), engine=engine)


def variant_side(bundle: Bundle, variant: Variant, weights: Weights) -> Side:
    """A variant's weights, with the rounding of its engine, as the reference decoder runs them.

    Its manifest names the preparations; the scales that one found are not in a bundle.
    """
    made = tuple(bundle.manifest.recipe.get("prepare", ()))
    return Side(
        name=str(bundle.path),
        what=f"{variant.name}{_after(made)}, run by {variant.engine}",
        source=bundle.manifest.model.source,
        arch=read_architecture(read_json(bundle.file("config.json"), required=True)),
        text=bundled_text_side(bundle),
        weights=weights,
        rounds=variant.engine if variant.engine in ROUNDINGS else FLOAT,
        context=variant.context,
        prepared=made,
    )
