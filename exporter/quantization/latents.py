"""Weights that can be trained though they are rounded, and the decoder that computes with them.

Each weight has a latent number in units of its scale, and the model computes with the latent's nearest integer times
the scale. Gradients go straight through the rounding (Bengio et al. 2013, arxiv.org/abs/1308.3432, section 4): a latent
gets the gradient of what its integer stands for, and stays within what the bits can hold. Scales learn too, as in LSQ
(Esser et al. 2019, arxiv.org/abs/1902.08153); as latents are in units of them, a scale's gradient is exact: the sum of
its integers, each times the gradient of what it stands for. In the model scales lie on the portable grid, which their
gradients go straight through as well.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter.architecture import Architecture
from exporter.quantization.tensor import QuantizedTensor, pack, round_scales
from exporter.quantization.weights import Weights
from exporter.torch_ops import TorchOps

EDGE = 0.49  # how far a latent is from its integer at most when training starts: 0.5 could round either way


class FakeQuantize(torch.autograd.Function):
    """Latents [outputs, inputs] and scales [outputs, groups] -> the nearest integers times their scales.

    Latents get the gradient of the product times the scale, as if nothing had been rounded; scales get the exact one.
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(latents, scales)
        return _by_group(latents.round(), scales).mul_(scales[..., None]).reshape(latents.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        latents, scales = ctx.saved_tensors
        gradient = _by_group(gradient, scales)
        for_scales = (gradient * _by_group(latents.round(), scales)).sum(-1)
        return (gradient * scales[..., None]).reshape(latents.shape), for_scales


class OnGrid(torch.autograd.Function):
    """The nearest portable scales (see `tensor.round_scales`); gradients pass."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor) -> Tensor:
        return torch.from_numpy(round_scales(scales.numpy()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _by_group(values: Tensor, scales: Tensor) -> Tensor:
    return values.reshape(*scales.shape, -1)


class Latent:
    """A weight that is trained: `latents` [outputs, inputs] in units of its scales, and `logs` [outputs, groups], the
    logarithms of what the scales that it started from are multiplied by; float32."""

    def __init__(self, start: QuantizedTensor, weights: NDArray[np.float32]) -> None:
        assert start.scales is not None, "only integers are trained"
        self.start, self._scales = start, torch.from_numpy(start.scales)
        integers = torch.from_numpy(start.integers().astype(np.float32))
        exact = _by_group(torch.from_numpy(weights), self._scales) / self._scales[..., None]
        self.latents = exact.reshape(start.shape).clamp_(integers - EDGE, integers + EDGE).requires_grad_()
        self.logs = torch.zeros_like(self._scales).requires_grad_()

    def scales(self) -> Tensor:
        """The scales [outputs, groups], on the portable grid."""
        return OnGrid.apply(self._scales * self.logs.exp())

    def values(self) -> Tensor:
        """What the integers stand for, [outputs, inputs]."""
        return FakeQuantize.apply(self.latents, self.scales())

    @torch.no_grad()
    def keep_within(self) -> None:
        """Move latents back that left what the bits can hold, where their gradients would be lost."""
        half = 2 ** (self.start.scheme.bits - 1)
        self.latents.clamp_(-half - EDGE, half - 1 + EDGE)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The integers and scales."""
        start = self.start
        biased = (self.latents.round() + 2 ** (start.scheme.bits - 1)).to(torch.uint8).numpy()
        data = pack(biased, start.scheme.bits)
        return QuantizedTensor(start.name, start.scheme, start.shape, data, self.scales().numpy())


class FromBeginning(TorchOps):
    """`TorchOps` for sequences that are run from their beginning to their end: nothing is kept of them."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        result = super().attention(q, k, v, layer)
        self.forget(layer)
        return result


class Student(FromBeginning):
    """The decoder with trained weights in the place of some, and gradients; activations are not rounded."""

    def __init__(
        self, arch: Architecture, weights: Weights, context: int, latents: Mapping[str, Latent]
    ) -> None:
        super().__init__(arch, weights, context, rounded=0)
        self._latents = latents

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        if weight not in self._latents:
            return super().embed(tokens, weight)
        return functional.embedding(tokens, self._latents[weight].values())

    def product(self, x: Tensor, weight: str) -> Tensor:
        if weight not in self._latents:
            return super().product(x, weight)
        return functional.linear(x, self._latents[weight].values())
