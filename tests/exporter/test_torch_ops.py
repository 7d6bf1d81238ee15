"""The reference decoder against transformers, which shares no code with it: every family, every rope variant."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.architecture import Rope
from exporter.checkpoint import open_checkpoint
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights
from exporter.torch_ops import TorchOps, round_by_group

BOUND = 1e-4  # of the logits' range


@pytest.fixture
def reference(checkpoints) -> Callable[..., TorchOps]:
    """`reference(family, context)`: TorchOps on the float32 weights of a tiny checkpoint (or a folder)."""

    def make(family: str | Path, context: int) -> TorchOps:
        folder = family if isinstance(family, Path) else checkpoints.folder(family)
        checkpoint = open_checkpoint(folder)
        arch = checkpoint.architecture
        return TorchOps(arch, QuantizedWeights(checkpoint, Recipe.uniform("fp32").resolve(arch)), context)

    return make


@torch.no_grad()
def expected(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 512, (batch, count), generator=torch.Generator().manual_seed(count))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the range of transformers' logits."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def test_whole_sequence(family, checkpoints, reference):
    """48 tokens: past every sliding window (8 and 12)."""
    ids = tokens(48, batch=2)
    assert error(reference(family, 64).run(ids), expected(checkpoints.model(family), ids)) <= BOUND


def test_prefill_then_single_tokens(family, checkpoints, reference):
    ids = tokens(40)
    ops = reference(family, 64)
    parts = [
        ops.run(ids[:, :20]),
        ops.run(ids[:, 20:27]),
        *(ops.run(ids[:, i : i + 1]) for i in range(27, 40)),
    ]
    assert error(torch.cat(parts, 1), expected(checkpoints.model(family), ids)) <= BOUND


def test_windows_change_the_answer(checkpoints, reference):
    """The parity above would mean nothing if the windows had no effect."""
    for family in ("qwen2-window-yarn", "gemma2", "phi3-longrope"):
        ops = reference(family, 64)
        assert any(ops.arch.windows)
        blind = TorchOps(dataclasses.replace(ops.arch, windows=(0,) * ops.arch.layers), ops.weights, 64)
        ids = tokens(48)
        assert error(blind.run(ids), ops.run(ids)) > 100 * BOUND


def test_beyond_the_original_context_of_longrope(checkpoints, reference):
    """transformers takes the long factors for all positions once a sequence is longer than the original context;
    a graph made for a longer context has them from the start."""
    ids = tokens(100)
    theirs = expected(checkpoints.model("phi3-longrope"), ids)
    assert error(reference("phi3-longrope", 256).run(ids), theirs) <= BOUND
    ops = reference("phi3-longrope", 256)
    short = dataclasses.replace(ops.arch, rope=dataclasses.replace(ops.arch.rope, long_inv_freq=None))
    assert error(TorchOps(short, ops.weights, 256).run(ids), theirs) > 100 * BOUND


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3, factor 8": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    },
    "llama3, factor 32": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 5e5,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
        "rope_theta": 1e4,
    },
    "yarn with an attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
        "rope_theta": 1e4,
    },
}


def tables_of(module: Any, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of a transformers rotary module, [context, dim/2]."""
    with torch.no_grad():
        cos, sin = module(torch.zeros(1, 1), torch.arange(context)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


def assert_same_tables(rope: Rope, module: Any, context: int) -> None:
    for ours, theirs in zip(rope.tables(context), tables_of(module, context), strict=True):
        # float32 angles of thousands of radians: one bit of the frequency moves them in the 4th digit
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * context)


@pytest.mark.parametrize("name", ROPES)
def test_rope_tables(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from exporter.architecture import read_architecture

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=4096,
        rope_parameters=copy.deepcopy(ROPES[name]),
    )
    rope = read_architecture(config.to_dict()).rope
    assert_same_tables(rope, LlamaRotaryEmbedding(config), 500)


def test_longrope_tables_short_and_long():
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    from exporter.architecture import read_architecture

    factors = {"short_factor": [1.0 + i / 50 for i in range(12)], "long_factor": [1.1 + i for i in range(12)]}
    config = Phi3Config(
        hidden_size=128,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=4096,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 256,
            **factors,
        },
        pad_token_id=0,
    )
    rope = read_architecture(config.to_dict()).rope
    assert rope.dim == 24
    assert rope.scale > 1
    assert not np.allclose(rope.tables(256)[0][:200], rope.tables(257)[0][:200])
    assert_same_tables(rope, Phi3RotaryEmbedding(config), 256)
    assert_same_tables(rope, Phi3RotaryEmbedding(config), 257)


def test_rounded_activations_are_int8_with_one_scale_per_group():
    x = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1))
    x[0, 0, :32] = 0
    y = round_by_group(x, 32)
    assert y.shape == x.shape
    for token, rounded in zip(x.reshape(-1, 70).numpy(), y.reshape(-1, 70).numpy(), strict=True):
        for start in (0, 32, 64):
            group, result = token[start : start + 32], rounded[start : start + 32]
            scale = np.abs(group).max() / 127
            if scale == 0:
                assert not result.any()
                continue
            q = result / scale
            np.testing.assert_allclose(q, np.rint(q), atol=1e-3)
            assert np.abs(group - result).max() <= scale / 2 * 1.001
