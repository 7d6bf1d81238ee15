"""What algorithms share that follow the Hessian of a weight's inputs: the mean of x xᵀ on a calibration text."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.errors import RecipeError

DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ (arXiv 2210.17323): another text may use what this one did not


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
