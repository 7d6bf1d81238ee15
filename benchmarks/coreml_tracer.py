"""coremltools' trace route on a Hugging Face checkpoint, as export_coreml.py measures it: one function, float16.

transformers loads the checkpoint in float32, torch traces one step of it (a token at a position, with keys and
values in buffers), and coremltools converts the trace, its buffers as states: the route of coremltools' guide to
stateful models. Nothing is compressed: that would come afterwards, and take longer.

    python benchmarks/coreml_tracer.py CHECKPOINT model.mlpackage --context 512
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache


class States(Cache):
    """The wrapper's buffers [layers, kv heads, context, head size] as transformers wants a cache."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.keys, self.values = keys, values
        self.position = torch.tensor(0)  # where the next token goes

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = slice(self.position, self.position + 1)
        self.keys[layer, :, here], self.values[layer, :, here] = keys[0], values[0]
        return self.keys[layer][None], self.values[layer][None]


class Step(torch.nn.Module):
    """forward(token int32 [1, 1], position int32 [], mask [1, 1, 1, context]) -> logits [1, 1, vocab]."""

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        self.model, self.context = model, context
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, config.num_key_value_heads, context, head)
        self.register_buffer("key_cache", torch.zeros(shape))
        self.register_buffer("value_cache", torch.zeros(shape))
        self.states = States(self.key_cache, self.value_cache)

    def forward(self, token: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.states.position = position
        return self.model(
            input_ids=token,
            position_ids=position.reshape(1, 1),
            attention_mask=mask,
            past_key_values=self.states,
        ).logits


def load(checkpoint: Path, context: int) -> Step:
    """One step of a checkpoint's model, in float32; `context`: tokens that its states hold."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Step(model, context).eval()


def convert(step: Step) -> Any:
    """The ML Program of one step, as coremltools' MLModel."""
    import coremltools as ct

    token, position = torch.zeros(1, 1, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)
    mask = torch.zeros(1, 1, 1, step.context)
    with torch.no_grad():
        traced = torch.jit.trace(step, (token, position, mask), check_trace=False)
    states = {"key_cache": step.key_cache, "value_cache": step.value_cache}
    with _scalars():
        return ct.convert(
            traced,
            inputs=[
                ct.TensorType("token", (1, 1), np.int32),
                ct.TensorType("position", (1,), np.int32),
                ct.TensorType("mask", tuple(mask.shape), np.float16),
            ],
            outputs=[ct.TensorType("logits", dtype=np.float16)],
            states=[
                ct.StateType(ct.TensorType(shape=tuple(state.shape), dtype=np.float16), name)
                for name, state in states.items()
            ],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        )


@contextmanager
def _scalars() -> Iterator[None]:
    """coremltools 9.0 takes int() of arrays with one element, which numpy 2.4 refuses."""
    from coremltools.converters.mil.frontend.torch import ops

    original = ops._cast

    def cast(context: Any, node: Any, dtype: type, name: str) -> None:
        value = context[node.inputs[0]].val
        if value is not None and np.ndim(value):
            context.add(ops.mb.const(val=dtype(value.item()), name=node.name))
        else:
            original(context, node, dtype, name)

    with patch.object(ops, "_cast", cast):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("package", type=Path, help="where to; ends in .mlpackage")
    parser.add_argument("--context", type=int, required=True, help="tokens that the states hold")
    arguments = parser.parse_args()
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    convert(load(arguments.checkpoint, arguments.context)).save(str(arguments.package))


if __name__ == "__main__":
    main()
