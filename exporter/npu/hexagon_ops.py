"""The verbs of the decoder in operators that the Hexagon NPU computes on integers: 16 bits, the KV cache 8.

Written once over a `Graph`, of which there are two: one that computes, and keeps the range of each value
(hexagon_torch.py), and one that writes ONNX with those ranges (formats/onnx_qdq.py). So no range can be meant for
another value than it was found on. A step has the same name whatever the number of tokens.
"""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from exporter import decoder
from exporter.architecture import Architecture
from exporter.quantization.ranges import Range

V = TypeVar("V")

EMBEDDING, LOGITS, MASK = "embedding", "logits", "mask"  # steps that have a range, as all of a layer's have
CACHE_BITS = 8  # the NPU multiplies by keys and values of 8 bits, whatever they are stored in
# On v69, a product of 2 heads and more is wrong where an elementwise operator has made fewer rows (QAIRT 2.51, in the
# simulator: tests/exporter/npu); the NPU computes 8 in the time of 1, so the rows of one token are repeated.
FEWEST_ROWS = 8
UNIT, SIGNED_UNIT = Range(0.0, 1.0), Range(-1.0, 1.0)


class Graph(Protocol[V]):
    """What operators are called on. `step` names the range of what comes out; several values can have one range."""

    def input(self, name: str, shape: Sequence[int], step: str, bits: int = 16) -> V:
        """What the app gives in each call."""

    def output(self, name: str, value: V, shape: Sequence[int]) -> None:
        """What the app gets in each call."""

    def op(self, kind: str, *inputs: V, step: str, within: Range | None = None, **attributes: Any) -> V:
        """An ONNX operator with one result; `within`: its range, where that is known beforehand."""

    def product(self, x: V, weight: str, step: str) -> V:
        """x @ Wᵀ, W [outputs, inputs] by its canonical name."""

    def narrow(self, x: V, step: str, bits: int) -> V:
        """The same values in so many bits."""

    def vector(self, name: str) -> V:
        """A norm's weight or a bias."""

    def number(self, value: float) -> V:
        """A constant above 0."""

    def rope_rows(self, table: str, factor: float, shape: Sequence[int]) -> V:
        """Rows of a rotary table, "cos" (cos, cos) or "sin" (-sin, sin) [context, dim], times `factor`, at the
        input `positions` int32 [length]."""

    def reshape(self, x: V, shape: Sequence[int]) -> V:
        """The same elements in another shape."""

    def transpose(self, x: V, order: Sequence[int]) -> V:
        """Dimension `order[i]` of x becomes dimension i."""

    def slice(self, x: V, start: int, stop: int, axis: int = 3) -> V:
        """Elements [start, stop) of one of four dimensions."""

    def concat(self, values: Sequence[V], axis: int) -> V:
        """Side by side; all have one range."""


class LayerSteps(NamedTuple):
    """Names of a layer's steps that others than the program ask for."""

    hidden: str
    keys: str
    values: str
    scores: str
    masked: str


def steps(layer: int) -> LayerSteps:
    """What the values of a layer are called: what it gives on, its cache, scores before and after the mask."""
    name = f"layers.{layer}."
    attention = name + "attention."
    names = ("keys", "values", "scores", "masked")
    return LayerSteps(name + "mlp.sum", *(attention + each for each in names))


class HexagonOps(Generic[V]):
    """`decoder.Ops` for one static shape: `length` tokens after `past` slots of the KV cache; batch 1.

    For each call, the app gives (integers, which stand for what their steps' ranges say)

    - `hidden` uint16 [1, length, hidden]: embeddings (scaled), or what the part before gave;
    - `positions` int32 [length], below `context`;
    - `mask.0` uint16 [1, 1, length, past + length], and `mask.W` for layers with a window of W tokens: the
      largest integer where a query sees a key, 0 where not;
    - `past_key_values.I.key` uint8 [1, kv_heads, head_dim, past] for each layer I (rotated), and
      `past_key_values.I.value` uint8 [1, kv_heads, past, head_dim];

    and stores what it gets, `present.I.key` and `.value`, the same with `length` in the place of `past`. Which slot a
    token is in does not matter: the mask says what is seen.
    """

    def __init__(
        self, graph: Graph[V], arch: Architecture, *, length: int, context: int, past: int | None = None
    ) -> None:
        """`past`: if it is not `context` (while ranges are found)."""
        self.graph, self.arch, self.length, self.context = graph, arch, length, context
        self.past = context if past is None else past
        self.total = self.past + length
        self._rows = arch.heads // arch.kv_heads * length  # queries that meet the same keys
        self._times = -(-FEWEST_ROWS // self._rows) if arch.kv_heads > 1 else 1
        self._here = ""  # the last weight: what the steps after it are named by
        self._shared: dict[str, V] = {}  # made once for all layers

    def run(self, layers: range, head: bool) -> None:
        """The program of some layers, from `hidden` to `hidden_out`, or to the logits with the head."""
        step = steps(layers.start - 1).hidden if layers.start else EMBEDDING
        x = self.graph.input("hidden", (1, self.length, self.arch.hidden), step)
        for i in layers:
            x = decoder.layer(self, self.arch, i, x)
        if head:
            logits = decoder.head(self, self.arch, x)
            self.graph.output(LOGITS, logits, (1, self.length, self.arch.vocab))
        elif layers.stop < self.arch.layers:
            self.graph.output("hidden_out", x, (1, self.length, self.arch.hidden))

    # the verbs

    def embed(self, tokens: V, weight: str) -> V:
        raise NotImplementedError(
            "rows of the embedding are looked up outside: the NPU would convert the table"
        )

    def scale(self, x: V, factor: float) -> V:
        return self._scaled(x, factor, f"{self._here}.scaled")

    def add(self, x: V, y: V) -> V:
        _, layer, part, *_ = self._here.split(".")
        return self.graph.op("Add", x, y, step=f"layers.{layer}.{part.removesuffix('_post_norm')}.sum")

    def rms_norm(self, x: V, weight: str) -> V:
        self._here = weight
        gain = self.graph.vector(weight)
        return self.graph.op(
            "RMSNormalization", x, gain, step=weight, axis=-1, epsilon=self.arch.norm_eps, stash_type=1
        )

    def linear(self, x: V, weight: str) -> V:
        self._here = weight if "." in weight else LOGITS
        y = self.graph.product(x, weight, self._here)
        if self.arch.has_bias(weight):
            y = self.graph.op("Add", y, self.graph.vector(f"{weight}.bias"), step=self._here)
        return y

    def linears(self, x: V, weights: Sequence[str]) -> list[V]:
        return [self.linear(x, weight) for weight in weights]

    def gated(self, gate: V, up: V) -> V:
        name = self._here.rpartition(".")[0]
        step = f"{name}.active"
        if self.arch.activation == "silu":
            sigmoid = self.graph.op("Sigmoid", gate, step=f"{name}.sigmoid", within=UNIT)
            active = self.graph.op("Mul", gate, sigmoid, step=step)
        else:
            active = self.graph.op("Gelu", gate, step=step, approximate="tanh")
        return self.graph.op("Mul", active, up, step=f"{name}.gated")

    def last(self, x: V) -> V:
        return x

    def softcap(self, x: V, cap: float) -> V:
        return self._capped(x, cap, self._here)

    def attention(self, q: V, k: V, v: V, layer: int) -> V:
        arch, name = self.arch, f"layers.{layer}.attention"
        queries = self._heads(q, arch.heads)
        if self._rows > self.length:  # heads that share a key are rows of one product: no key is repeated
            queries = self.graph.reshape(queries, (1, arch.kv_heads, self._rows, arch.head_dim))
        if self._times > 1:
            queries = self.graph.concat([queries] * self._times, axis=2)
        times = self._rows // self.length * self._times
        queries = self._rotate(queries, f"{name}.q", arch.attention_scale, times)
        keys = self._rotate(self._heads(k, arch.kv_heads), f"{name}.k")
        keys = self.graph.narrow(self.graph.transpose(keys, (0, 1, 3, 2)), steps(layer).keys, CACHE_BITS)
        values = self.graph.narrow(self._heads(v, arch.kv_heads), steps(layer).values, CACHE_BITS)
        shape = (1, arch.kv_heads, self.length, arch.head_dim)
        self.graph.output(f"present.{layer}.key", keys, (*shape[:2], arch.head_dim, self.length))
        self.graph.output(f"present.{layer}.value", values, shape)
        return self._attend(queries, self._keys(layer, keys), self._values(layer, values), layer)

    # parts of attention

    def _attend(self, q: V, k: V, v: V, layer: int) -> V:
        """q [1, kv_heads, ., dim], k [1, kv_heads, dim, total], v [1, kv_heads, total, dim] ->
        [1, length, heads * dim]."""
        arch, graph, step = self.arch, self.graph, steps(layer)
        scores = graph.op("MatMul", q, k, step=step.scores)
        if arch.attention_softcap:
            scores = self._capped(scores, arch.attention_softcap, step.scores)
        masked = graph.op("Add", scores, self._mask(layer), step=step.masked)
        weights = graph.op("Softmax", masked, step=f"layers.{layer}.attention.weights", within=UNIT, axis=-1)
        mixed = graph.op("MatMul", weights, v, step=f"layers.{layer}.attention.mixed")
        if self._times > 1:
            mixed = graph.slice(mixed, 0, self._rows, axis=2)
        if self.length > 1:
            mixed = graph.reshape(mixed, (1, arch.heads, self.length, arch.head_dim))
            mixed = graph.transpose(mixed, (0, 2, 1, 3))
        return graph.reshape(mixed, (1, self.length, arch.heads * arch.head_dim))

    def _keys(self, layer: int, new: V) -> V:
        shape = (1, self.arch.kv_heads, self.arch.head_dim, self.past)
        past = self.graph.input(f"past_key_values.{layer}.key", shape, steps(layer).keys, CACHE_BITS)
        return self.graph.concat([past, new], axis=3)

    def _values(self, layer: int, new: V) -> V:
        shape = (1, self.arch.kv_heads, self.past, self.arch.head_dim)
        past = self.graph.input(f"past_key_values.{layer}.value", shape, steps(layer).values, CACHE_BITS)
        return self.graph.concat([past, new], axis=2)

    def _rotate(self, x: V, step: str, factor: float = 1.0, times: int = 1) -> V:
        """Rotary embedding of [1, ., times * length, head_dim], times `factor`, which the rotary tables carry.

        All that a rotation is made of has one range: 16 bits have room for that.
        """
        dim, size, graph = self.arch.rope.dim, self.arch.head_dim, self.graph
        cos, sin = (self._rope(table, factor, times) for table in ("cos", "sin"))
        first, second = graph.slice(x, 0, dim // 2), graph.slice(x, dim // 2, dim)
        turned = graph.slice(x, 0, dim) if dim < size else x
        step = f"{step}.rotated"
        ahead = graph.op("Mul", turned, cos, step=step)
        behind = graph.op("Mul", graph.concat([second, first], axis=3), sin, step=step)
        rotated = graph.op("Add", ahead, behind, step=step)
        if dim == size:
            return rotated
        rest = graph.op("Mul", graph.slice(x, dim, size), graph.number(factor), step=step)
        return graph.concat([rotated, rest], axis=3)

    def _rope(self, table: str, factor: float, times: int) -> V:
        name = f"{table} {factor} {times}"
        if name not in self._shared:
            shape = (1, 1, self.length, self.arch.rope.dim)
            self._shared[name] = self._repeated(self.graph.rope_rows(table, factor, shape), times)
        return self._shared[name]

    def _mask(self, layer: int) -> V:
        """[1, 1, ., total], a row for each query."""
        window = self.arch.windows[layer]
        name = f"mask.{window if window < self.context else 0}"
        if name not in self._shared:
            mask = self.graph.input(name, (1, 1, self.length, self.total), MASK)
            self._shared[name] = self._repeated(mask, self._rows // self.length * self._times)
        return self._shared[name]

    def _repeated(self, x: V, times: int) -> V:
        """[1, 1, length, .] -> [1, 1, times * length, .], once for all layers; one row is broadcast."""
        return self.graph.concat([x] * times, axis=2) if times > 1 and self.length > 1 else x

    # operators

    def _heads(self, x: V, heads: int) -> V:
        """[1, length, heads * dim] -> [1, heads, length, dim]."""
        if self.length == 1:
            return self.graph.reshape(x, (1, heads, 1, self.arch.head_dim))
        x = self.graph.reshape(x, (1, self.length, heads, self.arch.head_dim))
        return self.graph.transpose(x, (0, 2, 1, 3))

    def _capped(self, x: V, cap: float, step: str) -> V:
        """cap * tanh(x / cap)."""
        small = self._scaled(x, 1 / cap, f"{step}.scaled")
        tanh = self.graph.op("Tanh", small, step=f"{step}.tanh", within=SIGNED_UNIT)
        return self._scaled(tanh, cap, f"{step}.capped")

    def _scaled(self, x: V, factor: float, step: str) -> V:
        return self.graph.op("Mul", x, self.graph.number(factor), step=step)
