"""AWQ: channels that are active most get larger weights, whose rounding then costs them less.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023,
arxiv.org/abs/2306.00978. A channel's scale is the size of its activations to some power (section 3.2), the power that
leaves the least error in the outputs, found by trying 20 of them. Two things differ from the paper: the size is the
root of the mean square, and the error is e H eᵀ of all outputs of the linears that share the input, H the mean of x xᵀ:
the mean squared error on the calibration text, without running on it again. Each power is tried with nearest integers
at the tensor's own scheme, whatever algorithm then rounds the weights.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.checkpoint import Matrix, matrix_of
from exporter.quantization.algorithms import DEFAULT, find_algorithm
from exporter.quantization.folding import Linears, balanced
from exporter.quantization.hessian import output_error, refuse_not_finite
from exporter.safetensors import to_float32

POWERS = tuple(i / 20 for i in range(20))
_OUTPUTS = 1024  # of each weight, evenly chosen, that a power is tried on


@torch.no_grad()
def awq_scales(linears: Linears) -> NDArray[np.float32] | None:
    """Scales [channels] of what feeds `linears`, which know their Hessian; None where no power is better than none.

    RecipeError if the inputs became NaN or infinite.
    """
    hessian = linears.hessian
    assert hessian is not None
    refuse_not_finite(linears.matrices[0].name, hessian)
    size = linears.channels(hessian.diagonal().sqrt().numpy())
    samples = [_some(matrix) for matrix in linears.matrices]
    best, least = None, np.inf
    for power in POWERS:
        scales = balanced(size**power)
        error = _error(linears, samples, linears.spread(scales), hessian)
        if error < least:
            best, least = (scales if power else None), error
    return best


def _some(matrix: Matrix) -> NDArray[np.float32]:
    """Rows all over a weight, at most `_OUTPUTS` of them."""
    outputs = matrix.shape[0]
    chosen = np.unique(np.linspace(0, outputs - 1, min(outputs, _OUTPUTS)).round().astype(int))
    if len(chosen) == outputs:
        return to_float32(matrix.rows(0, outputs))
    return np.concatenate([to_float32(matrix.rows(int(i), int(i) + 1)) for i in chosen])


def _error(
    linears: Linears, samples: list[NDArray[np.float32]], scales: NDArray[np.float32], hessian: torch.Tensor
) -> float:
    """Mean squared error in the outputs where weights are rounded that were multiplied by `scales` [inputs]."""
    total = 0.0
    for matrix, made, sample in zip(linears.matrices, linears.decisions, samples, strict=True):
        if not made.scheme.is_integer:
            continue
        wide = sample * scales
        quantize = find_algorithm(made.algorithm, made.scheme).from_weights
        quantize = quantize or find_algorithm(DEFAULT, made.scheme).from_weights
        assert quantize
        tensor, _, _ = quantize(matrix_of(matrix.name, wide), made.scheme)
        error = torch.from_numpy(tensor.dequantize() / scales - sample)
        total += float(output_error(error, hessian).sum()) * matrix.shape[0] / len(sample)
    return total
