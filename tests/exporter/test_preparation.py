"""What is done to float weights before they are quantized changes nothing that the model says: every family, against
transformers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoint import Source, open_checkpoint
from exporter.quantization.folding import BEFORE, Scaled
from exporter.quantization.recipe import Recipe
from exporter.quantization.rotation import Rotated
from exporter.quantization.weights import QuantizedWeights
from exporter.safetensors import to_float32
from exporter.torch_ops import TorchOps

BOUND = 1e-4  # of the logits' range


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def logits(source: Source, ids: torch.Tensor) -> torch.Tensor:
    arch = source.architecture
    weights = QuantizedWeights(source, Recipe.uniform("fp32").resolve(arch))
    return TorchOps(arch, weights, 64).run(ids)


def ids() -> torch.Tensor:
    return torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(48))


def scaled(source: Source) -> Scaled:
    """All that can be scaled, each channel by a factor of its own, from a ninth to nine."""
    arch, random, scales = source.architecture, np.random.default_rng(5), dict[str, Any]()
    lengths = {name: shape[0] for name, shape in arch.matrices()} | dict(arch.vectors())
    for i in range(arch.layers):
        for kind in set(BEFORE.values()):
            name = f"layers.{i}.{kind}"
            scales[name] = np.exp(random.uniform(-2.2, 2.2, lengths[name])).astype(np.float32)
    return Scaled(source, scales)


def both(source: Source) -> Scaled:
    return scaled(Rotated(source))


PREPARED: dict[str, Callable[[Source], Source]] = {"rotated": Rotated, "scaled": scaled, "both": both}


@pytest.mark.parametrize("how", PREPARED)
def test_every_family_says_the_same(how, family, checkpoints):
    with open_checkpoint(checkpoints.folder(family)) as source, torch.no_grad():
        theirs = checkpoints.model(family)(ids()).logits
        prepared = PREPARED[how](source)
        ours = logits(prepared, ids())
        assert float((ours - theirs).abs().max() / (theirs.max() - theirs.min())) <= BOUND
        changed = [
            name
            for name, _ in prepared.architecture.matrices()
            if name != "head" and not np.allclose(whole(prepared, name), whole(source, name))
        ]
        layers = sum(name.startswith("layers.") for name in changed)
    if how == "rotated" and family == "gemma2":  # whose post norms keep the residual stream as it is
        assert {name.split(".", 2)[-1] for name in changed} == {"attention.v", "attention.o"}
    else:
        assert layers == 7 * source.architecture.layers
        assert ("embedding" in changed) == (how != "scaled" and family != "gemma2")


def whole(source: Source, name: str) -> Any:
    matrix = source.matrix(name)
    return to_float32(matrix.rows(0, matrix.shape[0]))
