"""Core ML in the Neural Engine's layout: values [1, channels, 1, length], every linear a convolution of one point.

Weights are float16, int8 with a scale for each output channel, or lookup tables for groups of output channels. What
depends on the position (the KV cache's rows, the rotary tables', the masks) and the embedding's lookup come first,
for the CPU: nothing after them needs an integer, so the rest can be one piece on the Neural Engine. Rows of the
masks are slices of tables for that reason, and the row that is asked for is a product with 0 and 1. The head is cut
along the vocabulary, and the model by layers into packages, where the Neural Engine's limits ask for it
(exporter/npu/ane.toml has them all, with their sources).

Layout: Apple, Deploying Transformers on the Apple Neural Engine,
https://machinelearning.apple.com/research/neural-engine-transformers
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import decoder
from exporter.architecture import Architecture
from exporter.errors import PlanRefused, RecipeError
from exporter.formats.coreml_ops import CHUNK, MASKED, ProgramOps
from exporter.formats.coreml_program import MilFunction, Package, Var
from exporter.npu.ane import Limits, limits
from exporter.quantization.scheme import Scheme
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, TensorSpec

_POINT = (1, 1)  # a convolution's kernel


@dataclass(frozen=True)
class Part:
    """What one package computes: some layers, the first also the embedding, the last also the head."""

    index: int
    layers: range
    first: bool
    last: bool

    @property
    def whole(self) -> bool:
        """Whether there is no other."""
        return self.first and self.last

    def name(self, of: str) -> str:
        """A package's or an entry point's name, with the part's number if there are several."""
        return of if self.whole else f"{of}.{self.index}"

    @property
    def takes(self) -> str:
        """The input: token ids, or the hidden states by the name that the part before gives them.

        From the second on they are numbered, since no output can have an input's name.
        """
        return "input_ids" if self.first else _hidden(self.index - 1)


@dataclass(frozen=True)
class Pieces(Var):
    """A value that is there in pieces only, cut along its channels."""

    parts: tuple[Var, ...] = ()


class AneOps(ProgramOps):
    """The verbs of `decoder.Ops` as operations of one function of one part."""

    wide = "fp16"
    channels = 1  # the axis along which a token's numbers lie

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        function: MilFunction,
        length: int,
        context: int,
        part: Part,
        bounds: Limits,
    ) -> None:
        self._part, self._limits = part, bounds
        if part.first:
            self.x = function.input(part.takes, "int32", (1, length))
        else:
            self.x = function.input(part.takes, "fp16", (1, arch.hidden, 1, length))
        super().__init__(arch, weights, function, length, context, part.layers)
        for layer in part.layers:
            self._mask(arch.windows[layer])
        self._row = self._asked_row(function) if part.last and length > 1 else None

    def embed(self, tokens: Var, weight: str) -> Var:
        """Rows of the table, or of its pieces if those are the head's too: then all others count 0 times."""
        ids = self.reshape(tokens, (self.length,))
        shared = self.arch.tied and self._part.whole
        pieces = self._pieces(weight) if shared else [range(self._shapes[weight][0])]
        size = len(pieces[0])
        if len(pieces) == 1:
            rows = self._rows(weight, pieces[0], ids)
        else:
            numbers = self._integer("floor_div", ids, size)
            places = self._integer("mod", ids, size)
            found = [
                self._rows_if(weight, piece, self._integer("minimum", places, len(piece) - 1), numbers, i)
                for i, piece in enumerate(pieces)
            ]
            rows = found[0]
            for other in found[1:]:
                rows = self.add(rows, other)
        return self.transpose(rows, (2, 1, 3, 0))

    def rms_norm(self, x: Var, weight: str) -> Var:
        """By layer_norm, which rounds once: beside its negative, a vector has the mean 0. One more channel,
        √(hidden · eps), brings eps into the length of x / p, whose squares stay in range."""
        hidden, shape, axis = self.arch.hidden, x.shape, self.channels
        own = np.full((1, 1, 1, shape[3]), math.sqrt(hidden * self.arch.norm_eps), np.float16)
        x = self.concat([x, self.f.const(own)], axis)
        largest = self.reduce("reduce_max", self.unary("abs", x), axis)
        x = self.binary("real_div", x, self._power_of_two(largest))
        both = self.concat([x, self.scale(x, -1)], axis)
        gamma = self._blob(weight, "fp16", (both.shape[axis],), lambda: self._gamma(weight))
        axes = np.array([axis], np.int32)
        normed = self.f.op(
            "layer_norm", "fp16", both.shape, x=both, axes=axes, gamma=gamma, epsilon=np.float16(0)
        )
        begin, end = np.zeros(4, np.int32), np.array(shape, np.int32)
        return self.f.op("slice_by_index", "fp16", shape, x=normed, begin=begin, end=end)

    def _gamma(self, weight: str) -> NDArray[np.float16]:
        """A norm's weight as layer_norm takes it: 0 for eps's channel and the negatives, which nobody reads."""
        gamma = np.zeros(2 * (self.arch.hidden + 1), np.float16)
        gamma[: self.arch.hidden] = self.weights.vector(weight) * norm_scale(self.arch)
        return gamma

    def _power_of_two(self, x: Var) -> Var:
        """One near x > 0, between x / 4 and x, so that division by it is exact; at least 2^-4.

        x less a 1024th of it is rounded to one or two of float16's steps below x, and a step is a power of two. Where
        a processor rounds it in another way, so is the quotient rounded, as it would be by x itself.
        """
        step = self.binary("sub", x, self.scale(x, 1 - 2**-10))
        return self.binary("maximum", self.scale(step, 2**9), np.float16(2**-4))

    def linear(self, x: Var, weight: str) -> Var:
        parts = [self._conv(x, weight, rows) for rows in self._pieces(weight)]
        if len(parts) == 1:
            return parts[0]
        shape = (1, self._shapes[weight][0], 1, x.shape[3])
        return Pieces(weight, "fp16", shape, tuple(parts))

    def softcap(self, x: Var, cap: float) -> Var:
        if isinstance(x, Pieces):
            parts = tuple(super(AneOps, self).softcap(part, cap) for part in x.parts)
            return Pieces(x.name, x.kind, x.shape, parts)
        return super().softcap(x, cap)

    def last(self, x: Var) -> Var:
        if self._row is None:
            return x
        return self.reduce("reduce_sum", self.binary("mul", x, self._row), -1)

    def heads(self, x: Var, count: int) -> Var:
        size = self.arch.head_dim
        if self.length == 1:
            return self.reshape(x, (1, count, 1, size))
        return self.transpose(self.reshape(x, (1, count, size, self.length)), (0, 1, 3, 2))

    def merged(self, x: Var) -> Var:
        if self.length > 1:
            x = self.transpose(x, (0, 1, 3, 2))
        return self.reshape(x, (1, self.arch.heads * self.arch.head_dim, 1, self.length))

    def mask(self, window: int) -> Var:
        """[1, 1, length, context], from a table of what a key counts that comes so much later than the chunk's first
        token: -context, ..., context - 1."""
        later = np.arange(-self.context, self.context) - np.arange(self.length)[:, None]
        seen = (later <= 0) & (later > -(window or len(later[0])))
        table = np.where(seen, 0, MASKED).astype(np.float16)[None, None]
        first = self.f.op("sub", "int32", (1,), x=np.array([self.context], np.int32), y=self.position)
        begin = self.concat_ints([0, 0, 0], first, [])
        return self.window(table, begin, (1, 1, self.length, self.context))

    def outputs(self, x: Var) -> list[TensorSpec]:
        """Make a value what the function gives; says which outputs these are."""
        if not self._part.last:
            named = {_hidden(self._part.index): x}
        else:
            pieces = x.parts if isinstance(x, Pieces) else (x,)
            rows = [self.reshape(piece, (1, 1, piece.shape[1])) for piece in pieces]
            named = {"logits": rows[0]} if len(rows) == 1 else {f"logits_{i}": r for i, r in enumerate(rows)}
        for name, value in named.items():
            self.f.output(name, value)
        return [TensorSpec(name=name, dtype="float16", shape=v.shape) for name, v in named.items()]

    def inputs(self) -> list[TensorSpec]:
        """What the function takes."""
        kinds = {"int32": "int32", "fp16": "float16"}
        specs = [
            TensorSpec(name=self.x.name, dtype=kinds[self.x.kind], shape=self.x.shape),
            TensorSpec(name="position", dtype="int32", shape=(1,)),
        ]
        if self._row is not None:
            specs.append(TensorSpec(name="last", dtype="int32", shape=(1,)))
        return specs

    def _asked_row(self, function: MilFunction) -> Var:
        """[1, 1, 1, length]: 1 at the row whose logits are wanted, else 0."""
        last, ends = function.input("last", "int32", (1,)), self.length - 1
        first = self.f.op("sub", "int32", (1,), x=np.array([ends], np.int32), y=last)
        begin = self.concat_ints([0, 0, 0], first, [])
        table = (np.arange(2 * self.length - 1) == ends).astype(np.float16)
        return self.window(table.reshape(1, 1, 1, -1), begin, (1, 1, 1, self.length))

    def _conv(self, x: Var, weight: str, rows: range) -> Var:
        bias: dict[str, Any] = {}
        if self.arch.has_bias(weight):
            bias["bias"] = self.vector(f"{weight}.bias")
        return self.f.op(
            "conv",
            "fp16",
            (1, len(rows), 1, x.shape[3]),
            x=x,
            weight=self.matrix(weight, rows, _POINT),
            strides=np.array(_POINT, np.int32),
            pad_type="valid",
            pad=np.zeros(4, np.int32),
            dilations=np.array(_POINT, np.int32),
            groups=1,
            **bias,
        )

    def _pieces(self, weight: str) -> list[range]:
        """A head's outputs, as many at a time as an axis can be long, whole tables only; all of another's."""
        outputs, scheme = self._shapes[weight][0], self.weights.scheme(weight)
        if weight.startswith("layers."):
            return [range(outputs)]
        count = -(-outputs // self._limits.axis)
        step = (scheme.group or 1) if scheme.table else 1
        size = -(-outputs // count // step) * step
        return [range(start, min(start + size, outputs)) for start in range(0, outputs, size)]

    def _rows(self, weight: str, piece: range, ids: Var) -> Var:
        """[length, hidden, 1, 1]."""
        return self.f.op(
            "gather",
            "fp16",
            (self.length, self.arch.hidden, *_POINT),
            x=self.matrix(weight, piece, _POINT),
            indices=ids,
            axis=0,
            batch_dims=0,
            validate_indices=False,
        )

    def _rows_if(self, weight: str, piece: range, places: Var, numbers: Var, number: int) -> Var:
        """`_rows` where the token is in piece `number`, else 0."""
        here = self.f.op("equal", "bool", numbers.shape, x=numbers, y=np.int32(number))
        counts = self.f.op("cast", "fp16", here.shape, x=here, dtype="fp16")
        counts = self.reshape(counts, (self.length, 1, *_POINT))
        return self.binary("mul", self._rows(weight, piece, places), counts)

    def _integer(self, type: str, x: Var, y: int) -> Var:
        return self.f.op(type, "int32", x.shape, x=x, y=np.int32(y))


def norm_scale(arch: Architecture) -> float:
    """What norms' weights are multiplied by: the channel for eps has a part in the mean."""
    return math.sqrt(arch.hidden / (arch.hidden + 1))


def write_coreml_ane(
    arch: Architecture, weights: Weights, context: int, folder: Path, bounds: Limits | None = None
) -> tuple[EntryPoint, ...]:
    """Write `model.mlpackage` into `folder`, or `model.0.mlpackage`, ... if one would pass the limit of bytes.

    Returns the entry points: `prefill` and `decode` of each package, numbered if there are several. Memory is
    bounded by the largest weight. `bounds`: other limits than the Neural Engine's.

    Raises:
        RecipeError: a scheme that the Neural Engine does not take.
        PlanRefused: a single layer is larger than a package may be, or a dimension than any.
    """
    bounds = bounds or limits()
    for name, _ in arch.matrices():
        _require_taken(name, weights.scheme(name))
    for what, size in {"hidden state": 2 * (arch.hidden + 1), "MLP": arch.ffn, "context": context}.items():
        if size > bounds.axis:
            raise PlanRefused(
                f"the {what} needs a dimension of {size}, and the Neural Engine has at most {bounds.axis}: use the "
                "layout for the GPU"
            )
    entries: list[EntryPoint] = []
    for part in split(arch, weights, context, bounds.package_bytes):
        file = part.name("model") + ".mlpackage"
        package = Package(folder / file)
        for entry, length in {"prefill": min(CHUNK, context), "decode": 1}.items():
            ops = AneOps(arch, weights, package.function(entry), length, context, part, bounds)
            outputs = tuple(ops.outputs(_compute(ops, arch, part)))
            entries.append(
                EntryPoint(name=part.name(entry), file=file, inputs=tuple(ops.inputs()), outputs=outputs)
            )
        package.finish({"gochu.family": arch.family, "gochu.context": str(context)})
    return tuple(entries)


def _require_taken(name: str, scheme: Scheme) -> None:
    if scheme.is_integer and scheme.group is not None:
        raise RecipeError(
            f"{name} is to be {scheme.name}, and with scales for groups of inputs the Neural Engine computes wrong "
            "numbers in silence: use pal4-g8, int8-channel or fp16"
        )


def _compute(ops: AneOps, arch: Architecture, part: Part) -> Var:
    x = decoder.embedding(ops, arch, ops.x) if part.first else ops.x
    for i in part.layers:
        x = decoder.layer(ops, arch, i, x)
    return decoder.head(ops, arch, x) if part.last else x


def split(arch: Architecture, weights: Weights, context: int, most: int) -> list[Part]:
    """The fewest packages of at most `most` bytes of weights each, filled in order; PlanRefused if a layer is larger.

    The embedding goes with the first layer, the head with the last. A tied one is stored in both packages, and once
    where both are one.
    """
    stored = {name: _stored(weights.scheme(name), shape) for name, shape in arch.matrices()}
    stored |= {name: 2 * length for name, length in arch.vectors()}
    stored |= {
        name: 4 * (length + 1) for name, length in arch.vectors() if name.endswith("_norm")
    }  # see _gamma
    most -= _tables(arch, context)
    if sum(stored.values()) <= most:
        return [Part(0, range(arch.layers), True, True)]
    sizes = [0] * arch.layers
    for name, size in stored.items():
        sizes[_place(name, arch.layers)] += size
    sizes[-1] += stored["embedding"] if arch.tied else 0
    if (largest := max(sizes)) > most:
        raise PlanRefused(
            f"layer {sizes.index(largest)} (the first with the embedding, the last with the head) takes "
            f"{largest / 1e6:.1f} MB, and a package for the Neural Engine has room for {most / 1e6:.1f} MB: quantize "
            "to fewer bits"
        )
    groups = list(_fill(sizes, most))
    return [Part(i, group, i == 0, i == len(groups) - 1) for i, group in enumerate(groups)]


def _fill(sizes: list[int], most: int) -> Iterator[range]:
    start = held = 0
    for i, size in enumerate(sizes):
        if held + size > most:
            yield range(start, i)
            start, held = i, 0
        held += size
    yield range(start, len(sizes))


def _place(name: str, layers: int) -> int:
    """The layer that a weight goes with."""
    if name.startswith("layers."):
        return int(name.split(".")[1])
    return 0 if name == "embedding" else layers - 1


def _stored(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes of a weight in a package, where no float has more than 16 bits."""
    return Scheme(16).nbytes(shape) if scheme.is_float else scheme.nbytes(shape)


def _tables(arch: Architecture, context: int) -> int:
    """Bytes of the tables that every package has: rotary embedding, masks, the rows that can be asked for, eps."""
    tokens = min(CHUNK, context) + 1  # of both functions
    masks = len({window if window < context else 0 for window in arch.windows}) * tokens * 2 * context
    return 2 * (2 * context * arch.rope.dim + masks + 3 * tokens)


def _hidden(index: int) -> str:
    return "hidden" if index == 0 else f"hidden_{index}"
