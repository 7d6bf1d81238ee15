"""Clipping by what it does to the outputs: each group's scale is the one of least error on a calibration text.

What AWQ does after it has moved scales between weights and activations (Lin et al. 2023, arxiv.org/abs/2306.00978,
github.com/mit-han-lab/llm-awq, auto_clip): the largest weights of a group may be clipped if its output then loses less.
There the loss is measured on a sample of inputs x; here with what all of them add up to, since the mean of (e·x)² over
a group's inputs is e H eᵀ for that group's block of the Hessian; and a few shares are enough, since for the integers q
that one gives the best scale is q H wᵀ / q H qᵀ. Blocks off the diagonal, how the errors of groups add up, are left to
GPTQ (`quantization.gptq`).
"""

import torch
from torch import Tensor

from exporter.checkpoint import Matrix
from exporter.quantization.hessian import DAMPING, found_by_rows, mean_square, refuse_not_finite
from exporter.quantization.lattice import snapped
from exporter.quantization.rtn import Quantized, quantize_mse
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import round_scales

_SHARES = [1.05 - 0.07 * i for i in range(10)]  # of the largest weight that are kept; AWQ goes down to half
_TINY = 1e-30
_AT_ONCE = 1 << 22  # weights in memory as float32


@torch.no_grad()
def quantize_clip(matrix: Matrix, scheme: Scheme, hessian: Tensor) -> tuple[Quantized, str]:
    """The nearest integers at the scales of least e H eᵀ within each group, never more than at rounding's own scales.

    `hessian`: the mean of x xᵀ over the weight's inputs x, float32 [inputs, inputs]. RecipeError if it is not finite.
    """
    nearest, _, _ = quantize_mse(matrix, scheme)  # which refuses weights that the scheme cannot hold
    refuse_not_finite(matrix.name, hessian)
    size, high = scheme.group or matrix.shape[1], 2 ** (scheme.bits - 1) - 1
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
    blocks.diagonal(dim1=1, dim2=2).add_(DAMPING * mean_square(hessian))

    def find(w: Tensor, q: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Groups lie first here, [groups, rows, size], so that each is multiplied by its own block."""
        grouped, best = (x.unflatten(1, (-1, size)).transpose(0, 1).contiguous() for x in (w, q))
        chosen = scales.T[..., None]
        least = _cost(grouped - best * chosen, blocks)
        largest = grouped.abs().amax(-1, keepdim=True)
        for share in _SHARES:
            integers = _nearest(grouped, (largest * (share / high)).clamp_(min=_TINY), high)
            outputs = integers @ blocks
            power = (outputs * integers).sum(-1, keepdim=True).clamp_(min=_TINY)
            best_scale = (outputs * grouped).sum(-1, keepdim=True) / power
            tried = held(best_scale, scales)
            integers = _nearest(grouped, tried, high)
            cost = _cost(grouped - integers * tried, blocks)
            better = cost < least
            least = torch.where(better, cost, least)
            chosen, best = torch.where(better, tried, chosen), torch.where(better, integers, best)
        return best.transpose(0, 1).flatten(1), chosen[..., 0].T

    def held(found: Tensor, scales: Tensor) -> Tensor:
        """The nearest scales that the scheme holds, [groups, rows, 1]."""
        if scheme.low_power:
            return torch.from_numpy(snapped(found[..., 0].T.numpy(), scales.numpy())).T[..., None]
        return torch.from_numpy(round_scales(found.numpy()))

    return found_by_rows(matrix, nearest, find, _AT_ONCE), ""


def _nearest(w: Tensor, scales: Tensor, high: int) -> Tensor:
    return (w / scales).round_().clamp_(-high - 1, high)


def _cost(error: Tensor, blocks: Tensor) -> Tensor:
    """e H eᵀ of each output's part in each group, [groups, rows, 1]."""
    return (error @ blocks).mul_(error).sum(-1, keepdim=True)
