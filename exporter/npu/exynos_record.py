"""A decoder's operators without its numbers: what the pre-check counts. Pure Python, no weights, no library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.npu.exynos_ops import ExynosOps

Shape = tuple[int, ...]
SCALE_BYTES = 4  # a row's scale, and a number of a norm's weight or a bias: float32
_SAME_SHAPE = (
    *("aten.rsqrt.default", "aten.rms_norm.default", "aten._softmax.default"),
    *("aten.gelu.default", "aten.sigmoid.default", "aten.tanh.default"),
)
_BROADCAST = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor")


@dataclass(frozen=True)
class Value:
    """What flows: a shape, and where it comes from: an operation (its index), a weight, an input, or a constant."""

    shape: Shape
    operation: int | None = None
    weight: str | None = None
    input: str | None = None


@dataclass(frozen=True)
class Operation:
    """One operator call. `macs`: multiply-adds of its matrix products; other arithmetic counts as none."""

    target: str
    inputs: tuple[Value, ...]
    shape: Shape
    macs: int


@dataclass
class Recorder:
    """A `Graph` whose values are shapes. Also keeps what a module needs to compute the same: the names and shapes
    of inputs, outputs and weights, and the constants and rotary tables."""

    arch: Architecture
    operations: list[Operation] = field(default_factory=list)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    weights: dict[str, Shape] = field(default_factory=dict)
    constants: dict[tuple[float, ...], Shape] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._shapes: dict[str, Shape] = {
            **dict(self.arch.matrices()),
            **{name: (length,) for name, length in self.arch.vectors()},
        }

    def call(self, target: str, *args: Any, **kwargs: Any) -> Value:
        values = [value for arg in args for value in (arg if isinstance(arg, list) else [arg])]
        given = tuple(value for value in values if isinstance(value, Value))
        shape = result_shape(target, args)
        self.operations.append(Operation(target, given, shape, multiply_adds(target, args)))
        return Value(shape, operation=len(self.operations) - 1)

    def weight(self, name: str) -> Value:
        self.weights[name] = self._shapes[name]
        return Value(self._shapes[name], weight=name)

    def numbers(self, *values: float) -> Value:
        self.constants[values] = (len(values),)
        return Value((len(values),))

    def table(self, name: str) -> Value:
        self.tables.add(name)
        dim = self.arch.rope.dim
        return Value((self.arch.context, dim if name.endswith(".both") else dim // 2))

    def input(self, name: str, *shape: int) -> Value:
        return self.inputs.setdefault(name, Value(shape, input=name))

    def output(self, name: str, value: Value) -> None:
        self.outputs[name] = value


def record(arch: Architecture, *, length: int, past: int, rewrites: bool = True) -> Recorder:
    """Run the decoder on shapes; the logits are the last of the outputs."""
    recorder = Recorder(arch)
    ops = ExynosOps(recorder, arch, length=length, past=past, rewrites=rewrites)
    recorder.output("logits", decoder(ops, arch, recorder.input("tokens", 1, length)))
    return recorder


def weight_bytes(shape: Shape) -> int:
    """Bytes of a weight: a matrix at int8 with a float32 scale per row, a vector in float32.

    >>> weight_bytes((16, 64)), weight_bytes((64,))
    (1088, 256)
    """
    return math.prod(shape) + SCALE_BYTES * shape[0] if len(shape) > 1 else SCALE_BYTES * shape[0]


def multiply_adds(target: str, args: Sequence[Any]) -> int:
    """Multiply-adds of an operator's matrix products; fused attention over every slot of the cache."""
    if target == "aten.linear.default":
        return math.prod(args[0].shape) * args[1].shape[0]
    if target == "aten.bmm.default":
        return math.prod(args[0].shape) * args[1].shape[-1]
    if target == "llama.custom_sdpa.default":
        return 2 * math.prod(args[0].shape) * args[1].shape[1]
    return 0


def result_shape(target: str, args: Sequence[Any]) -> Shape:
    """The shape of what an operator returns, as in torch."""
    if target == "aten.cat.default":
        return _joined([value.shape for value in args[0]], args[1])
    first: Shape = args[0].shape
    if target in _SAME_SHAPE or target == "llama.custom_sdpa.default":
        return first
    if target in _BROADCAST:
        return _broadcast(first, args[1].shape)
    if target == "aten.linear.default":
        return (*first[:-1], args[1].shape[0])
    if target == "aten.bmm.default":
        return (*first[:-1], args[1].shape[-1])
    if target == "aten.embedding.default":
        return (*args[1].shape, first[-1])
    if target == "aten.index.Tensor":
        return (*args[1][0].shape, *first[1:])
    if target == "aten.mean.dim":
        return (*first[:-1], 1)
    if target == "aten.view_copy.default":
        return tuple(args[1])
    if target == "aten.permute_copy.default":
        return tuple(first[i] for i in args[1])
    if target == "aten.slice_copy.Tensor":
        _, dim, start, stop = args
        return (*first[:dim], stop - start, *first[dim + 1 :])
    if target == "llama.update_cache.default":
        return args[1].shape  # what the next operator sees: the whole cache
    raise NotImplementedError(target)


def _joined(shapes: list[Shape], dim: int) -> Shape:
    joined = list(shapes[0])
    joined[dim] = sum(shape[dim] for shape in shapes)
    return tuple(joined)


def _broadcast(x: Shape, y: Shape) -> Shape:
    rank = max(len(x), len(y))
    padded = [(1,) * (rank - len(shape)) + shape for shape in (x, y)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))
