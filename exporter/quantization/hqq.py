"""Half-quadratic quantization: scales for an error in which outliers count less, found without a calibration text.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, mobiusml.github.io/hqq_blog. The
error Σ|w - sq|ᵖ with p < 1 is that of a group whose large weights are few: those may be off by much if all others are
then met well. It is split (half-quadratic, Geman and Reynolds 1992) into Σ|e|ᵖ + β/2 Σ(e - (w - sq))², whose two parts
have closed forms: e is w - sq, shrunk towards zero (the generalized soft threshold), and s the least-squares scale of
w - e for the integers that are nearest at the last one.

The original moves the zero point at a fixed scale. Here zero is zero, so the scale moves; residuals are shrunk in units
of it, which makes β mean the same for all weights; and the least error met on the portable grid is kept, beginning with
rounding's own scale (`quantization.rtn`): no group's error is ever larger than by rounding. Only the hollow around that
scale is searched, as by the original: this error is often least where half of a group is clipped, and models lose by
that (2.7 times the KL divergence, on pepper at int4).
"""

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Matrix
from exporter.quantization.rtn import Quantized, least_error, quantize_nearest, rounded
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import round_scales

POWER = 0.7  # p, the original's for language models
_BETA, _GROWTH, _ITERATIONS = 10.0, 1.05, 20
_TINY = np.float32(1e-30)

Array = NDArray[np.float32]


def quantize_hqq(matrix: Matrix, scheme: Scheme) -> Quantized:
    """Round to nearest with the scales of less Σ|error|ᵖ than the least squared error's have (floats are only
    converted)."""

    def choose(w: Array, absmax: Array, low: int, high: int) -> Array:
        return _half_quadratic(w, least_error(scheme)(w, absmax, low, high), low, high)

    return quantize_nearest(matrix, scheme, choose)


def lp_error(residuals: Array) -> Array:
    """Σ|residual|ᵖ over the first dimension: [group, n] -> [n]."""
    return np.power(np.abs(residuals), np.float32(POWER)).sum(0)


def _half_quadratic(w: Array, scales: Array, low: int, high: int) -> Array:
    """Scales [n] of groups [group, n] that lie across columns, from the scales they begin with; each goes
    on as long as its own error falls."""
    best, least, q = scales, np.full_like(scales, np.inf), np.empty_like(w)
    beta, falling = _BETA, np.ones(len(scales), np.bool_)
    for _ in range(_ITERATIONS):
        on_grid = round_scales(scales)
        residuals: Array = w - on_grid * rounded(w, on_grid, low, high, q)
        error = lp_error(residuals)
        falling &= error < least
        if not falling.any():
            break
        best, least = np.where(falling, on_grid, best), np.where(falling, error, least)
        steps: Array = residuals / on_grid
        shrunk = on_grid * _shrink(steps, beta)
        scales = np.einsum("ij,ij->j", q, w - shrunk) / np.maximum(np.einsum("ij,ij->j", q, q), _TINY)
        beta *= _GROWTH
    return best


def _shrink(x: Array, beta: float) -> Array:
    """sign(x) · max(0, |x| - |x|ᵖ⁻¹/β): the e of least |e|ᵖ + β/2 (e - x)², near enough."""
    size: Array = np.abs(x)
    pull = np.power(np.maximum(size, _TINY), np.float32(POWER - 1)) / np.float32(beta)
    return np.copysign(np.maximum(size - pull, np.float32(0)), x)
