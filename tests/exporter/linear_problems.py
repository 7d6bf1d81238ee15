"""Weights and inputs on which the tests of quantization try algorithms."""

import numpy as np
import torch

from exporter.checkpoint import Matrix


def matrix(values: np.ndarray) -> Matrix:
    """Weights [outputs, inputs] as a checkpoint gives them."""
    return Matrix("w", values.shape, lambda start, stop: values[start:stop])


def hessian(inputs: int, seed: int = 0, tokens: int = 600, dead: int = 0) -> torch.Tensor:
    """Of correlated inputs, some far larger than others, and some always zero."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, inputs)) @ random.standard_normal((inputs, inputs)) / inputs**0.5
    x *= np.exp(random.standard_normal(inputs))
    x[:, random.permutation(inputs)[:dead]] = 0
    return torch.tensor(x.T @ x / tokens, dtype=torch.float32)
