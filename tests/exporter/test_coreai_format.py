"""The decoder for Core AI: the arithmetic in torch, what is written, and what coreai's own CPU runtime makes of it.

That runtime computes in float16, as an Apple device would; none was there.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coreai_torch", reason="coreai-torch is not installed", exc_type=ImportError)

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import MissingExtra, RecipeError, UsageError
from exporter.formats import coreai
from exporter.formats.coreai import ASSET, CHUNK, STEP, check_asset, graphs, kv_cache, write_coreai
from exporter.pepper import checkpoint_path
from exporter.quantization.recipe import Recipe
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import QuantizedWeights
from exporter.torch_ops import TorchOps
from runtimes.errors import BundleError

CONTEXT = 128
PROMPT, TOKENS = 64, torch.randint(0, 512, (1, 84), generator=torch.Generator().manual_seed(3))


def quantized(checkpoint: Checkpoint, scheme: str) -> QuantizedWeights:
    return QuantizedWeights(checkpoint, Recipe.uniform(scheme).resolve(checkpoint.architecture))


def blocks() -> list[tuple[str, int, int]]:
    """What Apple's runner asks for: entry point, first token, how many; a block anew for each token after its first."""
    after = range(PROMPT, TOKENS.shape[1])
    steps = [(f"extend_{CONTEXT}_{STEP}", at - at % STEP, at % STEP + 1) for at in after]
    return [(f"prompt_opt_{CONTEXT}_{CHUNK}", 0, PROMPT), *steps]


def inputs(length: int, first: int, count: int, dtype: Any) -> dict[str, np.ndarray]:
    """Those of a block of `length` tokens at `first`, of which `count` are there: as Apple's runner fills them."""
    mask = np.full((1, CONTEXT, 1, length), -40000, dtype)
    for row in range(count):
        mask[0, : first + row + 1, 0, row] = 0
    return {
        "position_ids": np.arange(first, first + length, dtype=np.uint16)[None],
        "in_step": np.array([first], np.int32),
        "causal_mask": mask,
    }


def ids(length: int, first: int, count: int) -> np.ndarray:
    padded = np.zeros((1, length), np.int32)
    padded[:, :count] = TOKENS[:, first : first + count]
    return padded


def reference(arch: Architecture, weights: QuantizedWeights) -> np.ndarray:
    """Logits [steps, vocab] after each token from the prompt on."""
    return TorchOps(arch, weights, CONTEXT, rounded=0).run(TOKENS)[0, PROMPT:].numpy()


def in_torch(arch: Architecture, weights: QuantizedWeights, dtype: torch.dtype) -> np.ndarray:
    """The same of the modules that are traced."""
    parts, steps = graphs(arch, weights, CONTEXT, dtype=dtype), []
    numbers = {torch.float16: np.float16, torch.float32: np.float32}[dtype]
    with torch.no_grad():
        table = parts["load_embeddings"]()
        caches = {name: torch.zeros_like(parts[blocks()[0][0]].inputs()[name]) for name in coreai.STATES}
        for name, first, count in blocks():
            length = parts[name].length
            x = parts[f"gather_embeddings_{length}"](torch.tensor(ids(length, first, count)), table)
            given = {key: torch.tensor(value) for key, value in inputs(length, first, count, numbers).items()}
            steps.append(parts[name](x, **given, **caches, embedding_table=table).numpy())
    return last_rows(steps)


def last_rows(steps: list[np.ndarray]) -> np.ndarray:
    assert steps[0].shape == ()  # a prompt's
    return np.stack(
        [step[0, 0, count - 1] for step, (_, _, count) in zip(steps, blocks(), strict=True) if step.shape]
    )


def in_coreai(path: Path, arch: Architecture) -> np.ndarray:
    """The same of an asset, by coreai's runtime."""
    from coreai.authoring import AIModelAsset

    async def run() -> np.ndarray:
        async with AIModelAsset.load(path).executable() as model:
            steps, functions = [], {name: model.load_function(name) for name in check_asset(path).inputs}
            table = (await functions["load_embeddings"]())["embedding_table"]
            state = {name: states(functions[blocks()[0][0]], name) for name in coreai.STATES}
            for name, first, count in blocks():
                length = int(name.rpartition("_")[2])
                tokens = array(ids(length, first, count))
                found = await functions[f"gather_embeddings_{length}"](
                    {"in_new_token_ids": tokens, "embedding_table": table}
                )
                given = {key: array(value) for key, value in inputs(length, first, count, np.float16).items()}
                given |= {"transformer_input": found["gathered_embeddings"], "embedding_table": table}
                steps.append((await functions[name](given, state))["out_logits"].numpy())
            return last_rows(steps)

    return asyncio.run(run())


def array(values: np.ndarray) -> Any:
    from coreai.runtime import NDArray

    return NDArray(values)


def states(function: Any, name: str) -> Any:
    """A state's zeros, in the layout that the function asks for."""
