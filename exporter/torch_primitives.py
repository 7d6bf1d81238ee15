"""The primitives of `PrimitiveOps` in torch, for formats that trace the decoder: torch.export writes them down."""

from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.primitive_ops import PrimitiveOps


class TorchPrimitives(PrimitiveOps[Tensor]):
    """What every traced format does alike; a format adds products, positions and attention."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def subtract(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def minimum(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x, y)

    def rsqrt(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def tanh(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)

    def concat(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values), -1)

    def slice(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(list(shape))

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(list(order))
