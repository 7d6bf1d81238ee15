"""What a model's layers and tensors are held against where its float weights were prepared before they were rounded.

A preparation (`quantization.preparation`) leaves what the model says as it is, but weights and hidden states become
others by far more than rounding makes of them. So they are held against the first model's float weights, prepared as
the second's were: turned in the same way, which names alone say, and by the same scales, which only whoever found them
knows. What concerns next tokens stays with the first model as it is.
"""

from dataclasses import dataclass, replace

from exporter.quality_sides import Side
from exporter.quantization.folding import Scales
from exporter.quantization.preparation import PREPARATIONS, finder, prepared
from exporter.quantization.weights import SourceWeights, WeightsSource


@dataclass(frozen=True)
class Reference:
    """`side`: the first model, its weights as the second's before rounding, or None where that cannot be had.

    `inside`: whether that holds for the tensors in layers too; `note`: if not, why, and what to do, in one sentence.
    """

    side: Side | None
    inside: bool = True
    note: str = ""


def find_reference(first: Side, second: Side) -> Reference:
    """What the second model's layers and tensors are held against: the first, prepared as the second was."""
    ours, theirs = _turns(first), _turns(second)
    scaling = finder(first.prepared) or finder(second.prepared)
    floats = all(first.weights.scheme(name).is_float for name, _ in first.arch.matrices())
    if ours != theirs and (ours or not floats):
        return Reference(None, note=_other_basis(first, second))
    inside = not scaling or (floats and not finder(first.prepared) and second.scales is not None)
    turns = theirs if ours != theirs else ()
    scales = second.scales if inside else None
    side = _prepared(first, turns, scales) if turns or scales else first
    if dict(side.arch.matrices()) != dict(second.arch.matrices()):
        return Reference(
            None, note="the models are of other shapes: figures of layers and tensors are left out"
        )
    return Reference(side, inside, "" if inside else _other_scales(first, second))


def _turns(side: Side) -> tuple[str, ...]:
    """Its preparations that need no calibration text, and turn the hidden states with the weights."""
    return tuple(name for name in side.prepared if not PREPARATIONS[name].find)


def _prepared(side: Side, turns: tuple[str, ...], scales: Scales | None) -> Side:
    source = prepared(WeightsSource(side.weights, side.arch), turns, scales)
    return replace(side, arch=source.architecture, weights=SourceWeights(source))


def _other_basis(first: Side, second: Side) -> str:
    ours, theirs = (" and ".join(side.prepared) or "nothing" for side in (first, second))
    return (
        f"{first.name} was prepared by {ours} and {second.name} by {theirs} before they were rounded: figures of "
        f"layers and tensors are left out; hold {second.name} against the float checkpoint for them"
    )


def _other_scales(first: Side, second: Side) -> str:
    for side in (first, second):
        if (made := finder(side.prepared)) and side.scales is None:
            name = next(name for name in side.prepared if PREPARATIONS[name] is made)
            return (
                f"{side.name} does not say which scales {name} folded into its weights: figures of the tensors in its "
                f"layers are left out; the checkpoint has them, quantized with --prepare {name}"
            )
    return (
        f"{first.name} was rounded without the scales that were folded into {second.name}: figures of the tensors in "
        f"layers are left out; hold {second.name} against the float checkpoint for them"
    )
