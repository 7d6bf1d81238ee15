"""What algorithms share that follow the Hessian of a weight's inputs: the mean of x xᵀ on a calibration text."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.checkpoint import Matrix
from exporter.errors import RecipeError
from exporter.quantization.rtn import Quantized
from exporter.quantization.tensor import QuantizedTensor, pack
from exporter.safetensors import to_float32

DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ (arXiv 2210.17323): another text may use what this one did not
_COLUMNS = (
    512  # of a Hessian that are worked on together: of what lies below its diagonal nothing is computed again
)


def add_squares(hessian: Tensor, x: Tensor) -> None:
    """Add xᵀx of x [tokens, inputs] to a Hessian, the blocks of columns on the diagonal and above it."""
    for start in range(0, len(hessian), _COLUMNS):
        stop = start + _COLUMNS
        hessian[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def make_mean(hessian: Tensor, tokens: int) -> None:
    """What `add_squares` added up of `tokens` becomes their mean, below the diagonal too."""
    hessian /= tokens
    for start in range(0, len(hessian), _COLUMNS):
        stop = start + _COLUMNS
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T


def refuse_not_finite(name: str, hessian: Tensor) -> None:
    """RecipeError if the inputs of a weight were no numbers."""
    if not torch.isfinite(hessian).all():
        raise not_active(name)


def not_active(name: str) -> RecipeError:
    """What is raised where a weight's inputs are no numbers."""
    return RecipeError(
        f"the inputs of {name} became NaN or infinite on the calibration text: the weights before it do not work"
    )


def mean_square(hessian: Tensor) -> float:
    """Of all inputs; 1 if nothing was ever active, so that what is a share of it still stands for something."""
    return float(hessian.diagonal().mean()) or 1.0


def importance(name: str, hessian: Tensor) -> NDArray[np.float64]:
    """How much an error in each input's weights costs, their mean 1, float64 [inputs]: the damped diagonal."""
    refuse_not_finite(name, hessian)
    damped = hessian.diagonal().double() + DAMPING * mean_square(hessian)
    return (damped / damped.mean()).numpy()


def found_by_rows(
    matrix: Matrix,
    nearest: QuantizedTensor,
    find: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    at_once: int,
) -> Quantized:
    """What `find` makes of some rows at a time, `at_once` weights: outputs do not depend on each other.

    `find` is given weights and their nearest integers [rows, inputs] and those integers' scales [rows, groups], all
    float32, and gives integers and scales for them. `nearest` is overwritten.
    """
    outputs, inputs = matrix.shape
    scheme, data, scales = nearest.scheme, nearest.data, nearest.scales
    assert scales is not None, "floats and tables are not found so"
    squared = power = worst = 0.0
    step = max(1, at_once // inputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        w = torch.tensor(to_float32(matrix.rows(start, stop)))
        rounded = torch.from_numpy(nearest.integers(start, stop)).float()
        q, found = find(w, rounded, torch.from_numpy(scales[start:stop]))
        error = w - dequantized(q, found)
        biased = (q + 2 ** (scheme.bits - 1)).to(torch.uint8).numpy()
        data[start:stop] = pack(biased, scheme.bits)
        scales[start:stop] = found.numpy()
        squared += float(error.square().sum())
        power += float(w.square().sum())
        worst = max(worst, float(error.abs().max()))
    tensor = QuantizedTensor(matrix.name, scheme, matrix.shape, data, scales)
    return tensor, squared / power if power else float(worst > 0), worst


def dequantized(q: Tensor, scales: Tensor) -> Tensor:
    """Integers [rows, inputs] times their groups' scales [rows, groups]."""
    return (q.reshape(*scales.shape, -1) * scales[..., None]).reshape(q.shape)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Each output's mean squared error on the inputs: e H eᵀ, [outputs], by H's upper half."""
    total = torch.zeros(len(error))
    for start in range(0, len(hessian), _COLUMNS):
        stop = start + _COLUMNS
        block = error[:, start:stop]
        before = (error[:, :start] @ hessian[:start, start:stop]).mul_(2)  # which is below the diagonal too
        total += before.addmm_(block, hessian[start:stop, start:stop]).mul_(block).sum(1)
    return total
