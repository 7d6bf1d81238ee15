"""GPTQ: what rounding one weight loses is made up for by the weights that are rounded after it.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
arxiv.org/abs/2210.17323. An output's error on the calibration text is (w - q) H (w - q)ᵀ, where H = X Xᵀ is the same
for all outputs. Inputs are rounded one after another; each one's error goes to those that come, by the rows of U,
where UᵀU = H⁻¹ (the paper's Cholesky form), within a block at once and to those behind it together.

Four things differ from the paper. A group's scale is the one of least squared error (`quantization.rtn`), on the
portable grid, found when the group is reached. Where it must be known before, because inputs are taken out of order or
a group is all of them, that one cuts off too much: weights grow by the errors that they make up for. So larger ones are
tried too, and each output keeps those of its least error. An input that the calibration text never used keeps its
weights, nearest integers as without a text: another text may use it. And an output that rounding to nearest serves
better on H, which feedback alone does not rule out, is rounded to nearest: no output's error is ever larger than
without GPTQ.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint import Matrix
from exporter.errors import RecipeError
from exporter.quantization.descent import descend
from exporter.quantization.hessian import (
    DAMPING,
    dequantized,
    found_by_rows,
    mean_square,
    output_error,
    refuse_not_finite,
)
from exporter.quantization.rtn import Quantized, mse_scales, quantize_mse
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import round_scales

DAMPINGS = (DAMPING, 0.1, 1.0)  # of the mean of H's diagonal, tried in this order
BLOCK = 128  # inputs whose errors reach those behind them together; groups divide it or are its multiples
_SHARES = (0.85, 0.95, 1.05)  # of a group's largest weight: where integers end, half a step beyond the last
_SOLVED = 256  # rows of a triangle, of which twice as many are inverted by halves
_AT_ONCE = 1 << 23  # weights in memory as float32


@torch.no_grad()
def quantize_gptq(
    matrix: Matrix, scheme: Scheme, hessian: Tensor, *, act_order: bool = False, sweeps: int = 0
) -> tuple[Quantized, str]:
    """Integers of least error on the inputs that `hessian` is of, and a note where it needed more damping.

    `hessian`: the mean of x xᵀ over the weight's inputs x, float32 [inputs, inputs]. `act_order`: inputs with the
    largest activations first, while they can still be made up for; groups then have scales that are known before,
    so that they stay what they are in every format. `sweeps`: how often all are chosen anew afterwards
    (`quantization.descent`). RecipeError if the Hessian is not one.
    """
    nearest, _, _ = quantize_mse(matrix, scheme)  # which refuses weights that the scheme cannot hold
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    factor, note = _factor(matrix.name, hessian if order is None else hessian[order][:, order])
    static = act_order or scheme.group is None or scheme.low_power

    def find(w: Tensor, rounded: Tensor, their_scales: Tensor) -> tuple[Tensor, Tensor]:
        q, scales = rounded, their_scales
        least = output_error(w - dequantized(q, scales), hessian)
        for start in _starts(w, their_scales, scheme, static):
            made = _feed_back(w, start, factor, scheme, order, static)
            cost = output_error(w - dequantized(*made), hessian)
            better = (cost < least)[:, None]
            q, scales = (torch.where(better, *pair) for pair in zip(made, (q, scales), strict=True))
            least = torch.minimum(cost, least)
        if sweeps:
            q, scales = (part.T.contiguous() for part in (q, scales))
            high, free = 2 ** (scheme.bits - 1) - 1, not scheme.low_power
            descend(w.T.contiguous(), q, scales, hessian, high, sweeps, rescale=free)
            q, scales = q.T, scales.T
        return q, scales

    return found_by_rows(matrix, nearest, find, _AT_ONCE), note


def _starts(w: Tensor, nearest: Tensor, scheme: Scheme, static: bool) -> Iterator[Tensor]:
    """Scales [outputs, groups] to try, those of rounding to nearest first; of weights [outputs, inputs]."""
    yield nearest
    if static and not scheme.low_power and scheme.bits < 8:  # of 8 bits nothing is cut off
        largest = w.reshape(*nearest.shape, -1).abs().amax(-1).numpy()
        for share in _SHARES:
            yield torch.from_numpy(round_scales(largest * np.float32(share / (2 ** (scheme.bits - 1) - 0.5))))


def _factor(name: str, hessian: Tensor) -> tuple[Tensor, str]:
    """The upper triangular U with UᵀU = H⁻¹, H damped as little as makes it positive definite; and a note if that is
    more than usual."""
    refuse_not_finite(name, hessian)
    mean = mean_square(hessian)  # where nothing was ever active H is the identity, which rounds to nearest
    for damping in DAMPINGS:
        # From H = RRᵀ, R upper triangular, which is Cholesky's factor read backwards: U is R⁻¹
        backwards = hessian.flip(0, 1)
        backwards.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        del backwards
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            _invert(upper)
            note = f"GPTQ's Hessian needed damping {damping:g}" if damping != DAMPINGS[0] else ""
            return upper, note
    raise RecipeError(
        f"the Hessian of {name}'s inputs is not positive definite even with {DAMPINGS[-1]:g} times its mean diagonal "
        "added: give a longer calibration text, or use rtn for it in a recipe"
    )


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place, by its quarters: a solver does not see the zeros of the identity."""
    half = len(upper) // 2
    if half < _SOLVED:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True))
        return
    first, corner, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert(first)
    _invert(second)
    corner.copy_(first @ corner @ second).neg_()


def _feed_back(
    w: Tensor, given: Tensor, factor: Tensor, scheme: Scheme, order: Tensor | None, static: bool
) -> tuple[Tensor, Tensor]:
    """Integers (as float32) [outputs, inputs] and scales [outputs, groups] of weights [outputs, inputs].

    `given`: the scales if they are `static`; others are found when their group is reached.
    Inputs lie in rows here, so that a step works on a row and a group's scales are found as `rtn` finds them.
    """
    outputs, inputs = w.shape
    size, high = scheme.group or inputs, 2 ** (scheme.bits - 1) - 1
    w = w.T.clone(memory_format=torch.contiguous_format)
    groups = [i // size for i in (range(inputs) if order is None else order.tolist())]
    scales = given.T.clone(memory_format=torch.contiguous_format)
    if order is not None:
        w = w[order]
    q = torch.empty_like(w)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(stop - start, outputs)
        for i in range(start, stop):
            if not static and i % size == 0:
                scales[groups[i]] = torch.from_numpy(mse_scales(w[i : i + size].numpy(), scheme))
            scale, error = scales[groups[i]], errors[i - start]
            torch.div(w[i], scale, out=q[i]).round_().clamp_(-high - 1, high)
            torch.addcmul(w[i], q[i], scale, value=-1, out=error).div_(factor[i, i])
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        q[order] = q.clone()
    return q.T, scales.T
