"""The program for Hexagon on float tensors: it computes what the decoder means, and finds each step's range."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from exporter import decoder
from exporter.architecture import Architecture
from exporter.errors import RecipeError
from exporter.npu.hexagon_ops import EMBEDDING, MASK, HexagonOps, steps
from exporter.quantization.ranges import MinMax, Observers, Percentile, Range, Ranges, Rule
from exporter.quantization.weights import OneLayer, Weights
from exporter.torch_ops import embedded, pieces, product

RULES = (
    Rule("*.attention.keys", partial(Percentile, 99.99)),
    Rule("*.attention.values", partial(Percentile, 99.99)),
    Rule("*", partial(MinMax, 0.25)),
)
HIDDEN = 50.0  # what a score loses at least, in logit units, where its key must not be seen
_BEHIND = 16.0  # how far at least a score so lowered is behind every other: exp(-16) of its weight is left
_UNSEEN = -1e4  # the same where nothing is rounded


class TorchGraph:
    """`hexagon_ops.Graph` on float tensors. `positions` [length] are the tokens', and the past slots hold those
    before; `inputs` are by name; `observe` sees each value that the program computes."""

    def __init__(
        self, arch: Architecture, weights: Weights, context: int, observe: Callable[[str, Tensor], None]
    ) -> None:
        self.arch, self.weights, self.observe = arch, weights, observe
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.positions = torch.arange(0)
        tables = arch.rope.whole_tables(context)
        self._tables = {name: torch.from_numpy(table) for name, table in tables.items()}

    def input(self, name: str, shape: Sequence[int], step: str, bits: int = 16) -> Tensor:
        return self._mask(int(name.partition(".")[2])) if name.startswith("mask.") else self.inputs[name]

    def output(self, name: str, value: Tensor, shape: Sequence[int]) -> None:
        self.outputs[name] = value

    def op(
        self, kind: str, *inputs: Tensor, step: str, within: Range | None = None, **attributes: Any
    ) -> Tensor:
        result = _OPERATORS[kind](*inputs, **attributes)
        if within is None:
            self.observe(step, result)
        return result

    def product(self, x: Tensor, weight: str, step: str) -> Tensor:
        result = product(x, self.weights.matrix(weight))
        self.observe(step, result)
        return result

    def narrow(self, x: Tensor, step: str, bits: int) -> Tensor:
        self.observe(step, x)
        return x

    def vector(self, name: str) -> Tensor:
        return torch.tensor(self.weights.vector(name))

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def rope_rows(self, table: str, factor: float, shape: Sequence[int]) -> Tensor:
        return (self._tables[table][self.positions] * factor).reshape(*shape)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(*shape)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        return x.permute(*order)

    def slice(self, x: Tensor, start: int, stop: int, axis: int = 3) -> Tensor:
        return x.narrow(axis, start, stop - start)

    def concat(self, values: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(values), axis)

    def _mask(self, window: int) -> Tensor:
        queries, keys = self.positions[:, None], torch.arange(int(self.positions[-1]) + 1)
        seen = keys <= queries
        if window:
            seen &= keys > queries - window
        return torch.where(seen, 0.0, _UNSEEN)[None, None]


def _rms_norm(x: Tensor, gain: Tensor, *, axis: int, epsilon: float, stash_type: int) -> Tensor:
    return functional.rms_norm(x, x.shape[axis:], gain, epsilon)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "Gelu": functional.gelu,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "RMSNormalization": _rms_norm,
    "Sigmoid": torch.sigmoid,
    "Softmax": lambda x, axis: x.softmax(axis),
    "Tanh": torch.tanh,
}


@torch.no_grad()
def calibrate(
    arch: Architecture,
    weights: Weights,
    sequences: Sequence[Sequence[int]],
    context: int,
    chunk: int = 128,
    rules: Sequence[Rule] = RULES,
) -> Ranges:
    """Ranges of all steps, over token sequences, each of at most `context` tokens, that run in chunks as in prefill.

    All sequences go through a layer before the next one is read: each weight is quantized once, and memory holds
    a layer's.
    """
    if not any(map(len, sequences)):
        raise RecipeError("there is no text to calibrate on: give a file that is not empty")
    observers = Observers(rules)

    def observe(step: str, values: Tensor) -> None:
        observers.see(step, values.numpy())

    graph = TorchGraph(arch, OneLayer(weights), context, observe)
    table = weights.matrix("embedding")
    for rows in pieces(table):  # all of it: which tokens come is not known, and a lookup costs no accuracy
        observe(EMBEDDING, rows * arch.embedding_scale)
    hidden = list(embedded(arch, table, sequences, context))
    del table
    for i in range(arch.layers):
        hidden = [_layer(graph, arch, context, i, x, chunk) for x in hidden]
    for x in hidden:
        for part in x.split(chunk, 1):
            decoder.head(HexagonOps(graph, arch, length=part.shape[1], context=context), arch, part)
    return Ranges(_with_mask(arch, observers.ranges()))


def _layer(graph: TorchGraph, arch: Architecture, context: int, i: int, x: Tensor, chunk: int) -> Tensor:
    """One sequence through a layer, chunk by chunk; the cache holds just what was before."""
    made, start = [], 0
    names = (f"{i}.key", f"{i}.value")
    shapes = ((1, arch.kv_heads, arch.head_dim, 0), (1, arch.kv_heads, 0, arch.head_dim))
    graph.inputs = {
        f"past_key_values.{name}": torch.zeros(shape) for name, shape in zip(names, shapes, strict=True)
    }
    for part in x.split(chunk, 1):
        length = part.shape[1]
        graph.positions = torch.arange(start, start + length)
        ops = HexagonOps(graph, arch, length=length, context=context, past=start)
        made.append(decoder.layer(ops, arch, i, part))
        for name, axis in zip(names, (3, 2), strict=True):
            past = graph.inputs[f"past_key_values.{name}"]
            graph.inputs[f"past_key_values.{name}"] = torch.cat(
                (past, graph.outputs[f"present.{name}"]), axis
            )
        start += length
    return torch.cat(made, 1)


def _with_mask(arch: Architecture, ranges: dict[str, Range]) -> dict[str, Range]:
    """The mask's range, and that of scores it was added to: low enough to hide the best score, and no lower,
    since all of it takes its share of the 16 bits."""
    suffix = ".capped" if arch.attention_softcap else ""
    scores = {i: ranges[steps(i).scores + suffix] for i in range(arch.layers)}
    widest = max(high - low for low, high in scores.values())
    mask = Range(-max(HIDDEN, widest + _BEHIND), 0.0)
    masked = {steps(i).masked: Range(low + mask.low, max(high, 0.0)) for i, (low, high) in scores.items()}
    return {**ranges, MASK: mask, **masked}
