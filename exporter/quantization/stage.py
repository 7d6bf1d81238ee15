"""The quantization stage: what a recipe makes of a model's weights, before and independent of any format.

Three steps, each only where the recipe asks for it: preparations change the float weights without changing what they
compute (`quantization.preparation`); what needs a calibration text is found layer by layer (`quantization.streaming`);
and weights that are to be trained start from there (`quantization.qat`).
"""

from collections.abc import Callable, Mapping, Sequence

from exporter.checkpoint import Source
from exporter.quantization.preparation import finder, prepared
from exporter.quantization.recipe import Decision, Recipe, calibrated, starting, trained
from exporter.quantization.training import STEPS
from exporter.quantization.weights import Found, not_found
from exporter.staging import Staging

Progress = Callable[[str, int, int], None]
Texts = Callable[[bool], Sequence[Sequence[int]]]  # token ids to calibrate on, or (True) to train on


def quantize(
    source: Source,
    recipe: Recipe,
    decisions: Mapping[str, Decision],
    texts: Texts,
    context: int,
    work: Staging,
    progress: Progress = lambda what, done, total: None,
    steps: int = STEPS,
) -> tuple[Source, Found]:
    """The source as its weights are quantized, prepared, and what was found of them on a text: both are for
    `QuantizedWeights`, with `decisions` (of the prepared architecture).

    `texts` is called where a text is needed, whose sequences are cut to `context` tokens; `steps` of training. An
    earlier run's layers and training steps in `work` are kept. Raises as `quantize_layers` and `train`.
    """
    source = prepared(source, recipe.prepare)
    found: Found = not_found
    first, finding = starting(decisions), finder(recipe.prepare)
    if finding or calibrated(first):
        from exporter.quantization.streaming import quantize_layers  # here: it needs torch

        found = layers = quantize_layers(source, first, texts(False), context, work, progress, finding)
        source = prepared(source, (), layers.scales) if finding else source
    if trained(decisions):
        from exporter.quantization.qat import train

        found = train(source, decisions, found, texts(True), context, steps, work, progress)
    return source, found
