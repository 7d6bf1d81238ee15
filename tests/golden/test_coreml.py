"""coremltools' own conversion of a transformers model, which shares no code with Gochu, run by our evaluator.

It is traced by torch and converted by coremltools' frontend and passes, in float32 and without states: what remains
is the evaluator.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools", reason="coremltools is not installed")

import coremltools as ct
from coremltools.converters.mil.frontend.torch import ops

from runtimes.mil.evaluator import Evaluator
from runtimes.mil.package import open_package

LENGTH = 8  # within the sliding window of Gemma 2: one causal mask holds for all layers


class Logits(torch.nn.Module):
    """Token ids [1, length] -> logits, with nothing else around the model."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model = model
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("mask", mask[None, None])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=self.mask, use_cache=False).logits


@pytest.fixture(autouse=True)
def scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools 9.0 takes int() of arrays with one element, which numpy 2.4 refuses."""
    original = ops._cast

    def cast(context: Any, node: Any, dtype: type, name: str) -> None:
        value = context[node.inputs[0]].val
        if value is not None and np.ndim(value):
            context.add(ops.mb.const(val=dtype(value.item()), name=node.name))
        else:
            original(context, node, dtype, name)

    monkeypatch.setattr(ops, "_cast", cast)


def converted(model: Any, folder: Path) -> Path:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    ids = torch.zeros(1, LENGTH, dtype=torch.int32)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model, LENGTH), ids, check_trace=False)
    package = ct.convert(
        traced,
        inputs=[ct.TensorType("ids", (1, LENGTH), np.int32)],
        outputs=[ct.TensorType("logits")],
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    path = folder / "model.mlpackage"
    package.save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", ["llama-llama3-rope", "qwen2", "gemma2"])
def test_the_evaluator_says_what_transformers_says(name, checkpoints, tmp_path):
    model = checkpoints.model(name)
    evaluator = Evaluator(open_package(converted(model, tmp_path)))
    ids = np.random.default_rng(0).integers(0, 512, (1, LENGTH)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()).logits.numpy()
    found = evaluator.run("main", {"ids": ids})["logits"]
    assert found.dtype == np.float32
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))
