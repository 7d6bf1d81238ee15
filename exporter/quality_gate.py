"""Bounds on what an export may lose: the gate's last check, against the float checkpoint."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from runtimes.bundle import Bundle, Check, Variant
from runtimes.engines import runs_here, simulator

if TYPE_CHECKING:
    from exporter.quality import Quality
    from exporter.quality_sides import Side
    from exporter.quantization.folding import Scales
    from exporter.quantization.weights import Weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QualityBounds:
    """How far an export may be from the float checkpoint, on text that calibrated nothing; None is no bound.

    `max_kl`: mean KL divergence in nats a token. `min_agreement`: percent of tokens after which both find the same one
    likeliest. UsageError for what nothing could meet, or all would.
    """

    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise UsageError(
                f"a bound of {self.max_kl:g} on the KL divergence says nothing: give nats a token, such as 0.05"
            )
        if self.min_agreement is not None and not 0 < self.min_agreement <= 100:
            raise UsageError(
                f"a bound of {self.min_agreement:g} % on the agreement says nothing: give percent, such as 97"
            )

    def __bool__(self) -> bool:
        """Whether anything is bounded."""
        return self.max_kl is not None or self.min_agreement is not None


def hold(
    bundle: Bundle,
    source: Checkpoint,
    bounds: QualityBounds,
    quantized: Callable[[], "Weights"],
    progress: Progress = lambda what, done, total: None,
    scales: "Scales | None" = None,
) -> Iterator[Check]:
    """A check for each model that the bundle's variants are: its weights, and its engine's rounding of activations.

    Weights are read from the variant's files; of a variant that has no reader, because nothing here runs it, they are
    those of `quantized`, which it was written from. Both models go through the reference decoder, a layer at a time.
    `scales`: those that a preparation folded into its weights.
    """
    seen = set()
    for variant in bundle.manifest.variants:
        if (model := (variant.scheme, variant.engine)) not in seen:
            seen.add(model)
            yield _check(bundle, variant, source, bounds, quantized, progress, scales)


def _check(
    bundle: Bundle,
    variant: Variant,
    source: Checkpoint,
    bounds: QualityBounds,
    quantized: Callable[[], "Weights"],
    progress: Progress,
    scales: "Scales | None",
) -> Check:
    from exporter.quality import TOKENS, compare_sides, text_for
    from exporter.quality_sides import Wanted, checkpoint_side, variant_side
    from exporter.stored import stored_weights

    def say(what: str, done: int, total: int) -> None:
        progress(f"verify quality, {what}", done, total)

    readable = runs_here(variant) or simulator(variant)
    weights = stored_weights(bundle, variant) if readable else quantized()
    ours = checkpoint_side(source, Wanted(), Path(), say)
    theirs: Side = replace(variant_side(bundle, variant, weights), scales=scales)
    found = compare_sides(ours, theirs, text_for(ours, theirs, None, TOKENS), "held out", say)
    return _judge(found, variant, bounds)


def _judge(found: "Quality", variant: Variant, bounds: QualityBounds) -> Check:
    kl, agreement = found.kl.mean, found.agreement
    figures = {"tokens": float(found.tokens), "kl": kl, "kl_p99": found.kl.p99, "agreement": agreement}
    passed, bound = True, {"kl": "", "agreement": ""}
    if bounds.max_kl is not None:
        figures["kl_bound"] = bounds.max_kl
        passed &= kl <= bounds.max_kl  # so a NaN fails
        bound["kl"] = f" (bound {bounds.max_kl:g})"
    if bounds.min_agreement is not None:
        figures["agreement_bound"] = bounds.min_agreement
        passed &= agreement >= bounds.min_agreement
        bound["agreement"] = f" (bound {bounds.min_agreement:g} %)"
    detail = (
        f"{variant.name} is {kl:.3g} nats a token{bound['kl']} from the float checkpoint on {found.tokens} held-out "
        f"tokens, and after {agreement:.2f} %{bound['agreement']} of them the same token is likeliest"
    )
    worst = found.worst()
    if not passed and worst is not None:
        detail += (
            f"; {worst.name} loses most ({worst.scheme}, {worst.output_db:.1f} dB): use --algorithm gptq, more bits, "
            "or a recipe that keeps it at int8"
        )
    return Check(name="quality", passed=passed, detail=detail, figures=figures)
