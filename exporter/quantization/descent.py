"""Coordinate descent after GPTQ: each weight, and each scale, is chosen anew for what all the others have left.

GPTQ rounds every weight once, and what is rounded early is never looked at again. Going over the inputs some times
more lowers the same error, e H eᵀ for each output's error e = q·s - w, by steps that are each the best one: in one
weight the error is a parabola, so that the integer nearest to its lowest point is the best one there is (Behdin et al.
2023, QuantEase, arxiv.org/abs/2309.01885, algorithm 1, there without GPTQ before it and with fixed scales). In one
group's scale it is a parabola too, whose lowest point, on the portable grid, is taken where it is lower than before.
"""

import torch
from torch import Tensor

from exporter.quantization.tensor import round_scales

BLOCK = 128  # inputs whose changes reach all others together


@torch.no_grad()
def descend(
    w: Tensor,
    q: Tensor,
    scales: Tensor,
    hessian: Tensor,
    high: int,
    sweeps: int,
    rescale: bool = True,
) -> None:
    """Improve integers q in [-high - 1, high] and, if `rescale`, scales in place; no output's error grows.

    w, q float32 [inputs, outputs], so that a step works on a row; scales [groups, outputs]; hessian [inputs, inputs],
    of which inputs that were never used have zeros: their integers stay.
    """
    inputs, _ = w.shape
    size = inputs // len(scales)
    block = min(size, BLOCK)
    starts = [start for first in range(0, inputs, size) for start in range(first, first + size, block)]
    diagonal = hessian.diagonal()
    used = (diagonal > 0).tolist()
    slope = hessian @ (q * scales.repeat_interleave(size, 0) - w)  # half of the error's, in each weight
    for _ in range(sweeps):
        for start in starts:
            group = start // size
            end = (group + 1) * size
            stop = min(start + block, end)
            rows, scale = q[start:stop], scales[group]
            before, near, step = rows * scale, slope[start:stop].clone(), torch.empty_like(scale)
            for i in range(start, stop):
                if used[i]:
                    torch.addcdiv(
                        rows[i - start], near[i - start], scale, value=-1 / diagonal[i].item(), out=step
                    )
                    step.round_().clamp_(-high - 1, high)
                    change = (step - rows[i - start]).mul_(scale)
                    rows[i - start] = step
                    near.addr_(hessian[start:stop, i], change)
            if rescale and block == size:
                _rescale(rows, scale, near, hessian[start:stop, start:stop])
            slope.addmm_(hessian[:, start:stop], rows * scale - before)
            if rescale and block < size and stop == end:
                group_rows = slice(group * size, end)
                change = _rescale(q[group_rows], scale, slope[group_rows], hessian[group_rows, group_rows])
                slope.addmm_(hessian[:, group_rows], q[group_rows] * change)


def _rescale(q: Tensor, scale: Tensor, slope: Tensor, hessian: Tensor) -> Tensor:
    """Give a group, q [size, outputs], its best scales [outputs] in place where they lower the error; their change."""
    curve, slant = (q * (hessian @ q)).sum(0), (q * slope).sum(0)
    best = torch.from_numpy(round_scales((scale - slant / curve.clamp_min(1e-30)).numpy()))
    change = best - scale
    change *= change * (change * curve + 2 * slant) < 0
    scale += change
    return change
