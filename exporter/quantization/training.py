"""What training the quantized weights takes, said before it begins; how it goes is in `quantization.qat`."""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.architecture import Architecture
from exporter.errors import PlanRefused, UsageError
from exporter.quantization.recipe import Decision, trained
from runtimes.memory import available

STEPS = 100
TOKENS = 1024  # of a step, at most, unless one sequence is longer
LOGITS = 1 << 24  # of a step that are in memory together, 64 MB in float32

_A_WEIGHT = 16  # bytes: the weight, its gradient, and Adam's two moments, float32 each
_A_SCALE = 20  # bytes: the same, and the scale that it started from
_AT_ONCE = 6 * 4 * LOGITS  # bytes: both models' logits, their logarithms, and gradients
_ELSE = 500_000_000  # bytes: torch, and what a step computes in one layer


@dataclass(frozen=True)
class Training:
    """`steps` of Adam, each on up to TOKENS tokens; `nbytes` of memory at its peak, of which `for_weights` are the
    trained weights' and their optimizer's."""

    steps: int
    nbytes: int
    for_weights: int

    @property
    def value(self) -> str:
        """What a plan says of it."""
        return f"{self.steps} steps, about {gb(self.nbytes)} of memory on this computer"

    @property
    def reason(self) -> str:
        """What that is made of."""
        return (
            f"each on up to {TOKENS} tokens of the calibration text; while it is trained, a weight takes {_A_WEIGHT} "
            f"bytes (itself, its gradient and Adam's two moments), {gb(self.for_weights)} in all, and "
            f"{gb(self.nbytes - self.for_weights)} are for one layer's weights and values, the teacher's head and torch"
        )

    def refuse_if_too_large(self) -> None:
        """PlanRefused if this machine has not as much memory free."""
        free = available()
        if free is not None and self.nbytes > free:
            raise PlanRefused(
                f"training takes about {gb(self.nbytes)} of memory, of which {gb(self.for_weights)} are {_A_WEIGHT} "
                f"bytes for each trained weight, and {gb(free)} are free here: use --algorithm gptq, which needs one "
                "layer in memory, or a machine with more"
            )


def plan_training(
    arch: Architecture, decisions: Mapping[str, Decision], steps: int | None
) -> Training | None:
    """What training the weights takes whose algorithm asks for it, None if there are none; `steps` None is STEPS.

    UsageError if there are none and steps were asked for, or fewer than 0.
    """
    names = trained(decisions)
    if steps is not None and not names:
        raise UsageError("--qat-steps is for --algorithm qat: drop it, or ask for that")
    if steps is not None and steps < 0:
        raise UsageError(f"{steps} training steps were asked for: give 0, which trains nothing, or more")
    if not names:
        return None
    shapes = dict(arch.matrices())
    for_weights = 0
    for name in names:
        outputs, inputs = shapes[name]
        group = decisions[name].scheme.group or inputs
        for_weights += outputs * inputs * _A_WEIGHT + outputs * inputs // group * _A_SCALE
    kept = sum(decisions[name].scheme.nbytes(shape) for name, shape in shapes.items() if name not in names)
    layer = sum(rows * columns for name, (rows, columns) in shapes.items() if name.startswith("layers.0."))
    head = arch.vocab * arch.hidden
    # Of a layer and of the head what the integers stand for and their gradients; the teacher's head; states of layers
    rest = kept + 8 * max(layer, head) + 4 * head + 4 * TOKENS * arch.hidden * arch.layers + _AT_ONCE + _ELSE
    return Training(STEPS if steps is None else steps, for_weights + rest, for_weights)


def gb(nbytes: float) -> str:
    """Bytes as a plan writes them.

    >>> gb(3_210_000_000), gb(41_000_000)
    ('3.2 GB', '41 MB')
    """
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
