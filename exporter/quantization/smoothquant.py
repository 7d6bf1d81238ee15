"""SmoothQuant: outliers of activations, which one scale for all of them has to reach, move into the weights.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, 2022,
arxiv.org/abs/2211.10438, equation 4: a channel's scale is max|x|^a / max|w|^(1-a), the maxima over a calibration text
and over all weights that the channel meets. The paper scales what comes from norms; here also what `up` and `v` give.
"""

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Matrix
from exporter.quantization.folding import Linears, balanced
from exporter.quantization.hessian import not_active
from exporter.safetensors import to_float32

STRENGTH = 0.5  # the paper's a: outliers are shared alike
_WEIGHTS = 1 << 20  # at a time


def smoothquant_scales(linears: Linears) -> NDArray[np.float32]:
    """Scales [channels] of what feeds `linears`, which know their inputs' peaks.

    RecipeError if the inputs became NaN or infinite.
    """
    assert linears.peaks is not None
    if not np.isfinite(linears.peaks).all():
        raise not_active(linears.matrices[0].name)
    active = linears.channels(linears.peaks)
    heavy = linears.channels(np.max([_largest(matrix) for matrix in linears.matrices], axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return balanced(active**STRENGTH / heavy ** (1 - STRENGTH))


def _largest(matrix: Matrix) -> NDArray[np.float32]:
    """max|w| of each input."""
    outputs, inputs = matrix.shape
    step, found = max(1, _WEIGHTS // inputs), np.zeros(inputs, np.float32)
    for start in range(0, outputs, step):
        rows = to_float32(matrix.rows(start, min(start + step, outputs)))
        np.maximum(found, np.abs(rows).max(axis=0), out=found)
    return found
