"""The decoder for Exynos as a torch program: the same operators that the pre-check counts, with numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.npu.exynos_ops import MASKED, ExynosOps
from exporter.npu.exynos_record import Recorder, record
from exporter.quantization.weights import Weights


class ExynosDecoder(torch.nn.Module):
    """`decoder` over `ExynosOps`, static: `length` tokens after `past` slots of the cache, at positions below
    `context`. Graphs of one model that take turns need the same `context`: some rotary tables depend on it.

    Takes the tensors of `inputs` in their order and returns those of `outputs`: each layer's new keys and values,
    and the logits [1, 1, vocab]. All weights are dequantized to float32 and held in memory.
    """

    def __init__(self, arch: Architecture, weights: Weights, *, length: int, past: int, context: int) -> None:
        super().__init__()
        self.arch, self.length, self.past = arch, length, past
        self.recorded: Recorder = record(arch, length=length, past=past)
        matrices = dict(arch.matrices())
        for name in self.recorded.weights:
            rows = weights.matrix(name).dequantize() if name in matrices else weights.vector(name)
            self.register_buffer(_attribute(name), torch.from_numpy(np.ascontiguousarray(rows)))
        for values in self.recorded.constants:
            self.register_buffer(_attribute(values), torch.tensor(values, dtype=torch.float32))
        for name, rows in rotary_tables(arch, context).items():
            if name in self.recorded.tables:
                self.register_buffer(_attribute(f"rotary.{name}"), torch.from_numpy(rows))

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes; all float32, `tokens` and `positions` int64."""
        return {name: value.shape for name, value in self.recorded.inputs.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.recorded.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        graph = TorchGraph(self, dict(zip(self.recorded.inputs, inputs, strict=True)))
        ops = ExynosOps(graph, self.arch, length=self.length, past=self.past)
        graph.output("logits", decoder(ops, self.arch, graph.input("tokens", 1, self.length)))
        return tuple(graph.outputs[name] for name in self.outputs)

    def export(self) -> torch.export.ExportedProgram:
        """The program that `exynos.lower` takes."""
        examples = [
            torch.zeros(shape, dtype=torch.int64 if name in ("tokens", "positions") else torch.float32)
            for name, shape in self.inputs.items()
        ]
        return torch.export.export(self, tuple(examples))


class TorchGraph:
    """`exynos_ops.Graph` on tensors; weights and constants are the buffers of `module`."""

    def __init__(self, module: torch.nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.module, self.inputs = module, inputs
        self.outputs: dict[str, Tensor] = {}

    def call(self, target: str, *args: Any, **kwargs: Any) -> Tensor:
        """The edge operator's counterpart in torch, which export makes that operator again."""
        namespace, name, overload = target.replace("view_copy", "reshape").replace("_copy", "").split(".")
        operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        result: Tensor = operator(*args, **kwargs)
        return result

    def weight(self, name: str) -> Tensor:
        return self.module.get_buffer(_attribute(name))

    def numbers(self, *values: float) -> Tensor:
        return self.module.get_buffer(_attribute(values))

    def table(self, name: str) -> Tensor:
        return self.module.get_buffer(_attribute(f"rotary.{name}"))

    def input(self, name: str, *shape: int) -> Tensor:
        return self.inputs[name]

    def output(self, name: str, value: Tensor) -> None:
        self.outputs[name] = value


def rotary_tables(arch: Architecture, context: int) -> dict[str, NDArray[np.float32]]:
    """`exynos_ops.Graph.table` for positions 0 .. context-1, by name."""
    cos, sin = arch.rope.tables(context)
    both = {f"{name}.both": table for name, table in arch.rope.whole_tables(context).items()}
    return {"cos": cos, "sin": sin, **both}


def app_inputs(
    shapes: Mapping[str, Sequence[int]],
    tokens: Sequence[int],
    cache: Mapping[str, NDArray[np.float32]],
    cached: int,
) -> dict[str, NDArray[Any]]:
    """What an app gives in a call, by name: `shapes` are `ExynosDecoder.inputs`.

    `tokens` follow `cached` earlier ones, whose keys and values are the first slots of `cache`, by the names of the
    inputs (`past_k.0`, ...) [1, kv_heads, past, head_dim].
    """
    length = len(tokens)
    past = shapes[next(name for name in shapes if name.startswith("mask"))][-1] - length
    here = np.arange(cached, cached + length)
    given: dict[str, NDArray[Any]] = {"tokens": np.array([tokens], np.int64), "positions": here}
    slots = np.arange(past)
    keys = np.concatenate(
        (np.where(slots < cached, slots, cached + length), here)
    )  # an empty slot: in the future
    for name in shapes:
        if name.startswith("mask"):
            window = int(name.partition(".")[2] or 0)
            seen = keys <= here[:, None]
            if window:
                seen &= keys > here[:, None] - window
            given[name] = np.where(seen, 0, MASKED).astype(np.float32)[None, None]
    return {name: given[name] if name in given else cache[name] for name in shapes}


def _attribute(name: str | tuple[float, ...]) -> str:
    """A buffer's name: torch allows no dot in it."""
    if isinstance(name, str):
        return name.replace(".", "_")
    return "numbers_" + "_".join(str(value).replace(".", "p").replace("-", "m") for value in name)
