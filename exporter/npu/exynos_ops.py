"""The verbs of the decoder in the operators that ExecuTorch hands to the NPU of an Exynos chip.

Written once over a `Graph`, of which there are two: one that records shapes (exynos.py, the pre-check) and one
that computes (exynos_torch.py, what is exported). What is predicted is thereby what is lowered.
"""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from exporter.architecture import Architecture

V = TypeVar("V")

MASKED = -1e4  # added to a score that must not count: exp makes 0 of it, and float16 can hold it


class Graph(Protocol[V]):
    """What operators are called on. `target` is an edge operator's name, as in "aten.mul.Tensor"."""

    def call(self, target: str, *args: Any, **kwargs: Any) -> V:
        """The operator's result."""

    def weight(self, name: str) -> V:
        """A matrix [outputs, inputs] or a vector under its canonical name."""

    def numbers(self, *values: float) -> V:
        """A constant vector."""

    def table(self, name: str) -> V:
        """A constant of the rotary embedding, a row per position: "cos" and "sin" [., dim/2], or, for a head's both
        halves at once, "cos.both" (cos, cos) and "sin.both" (-sin, sin) [., dim]."""

    def input(self, name: str, *shape: int) -> V:
        """What the app gives in each call; the same name stands for the same value."""

    def output(self, name: str, value: V) -> None:
        """What the app gets in each call, besides the logits."""


class ExynosOps(Generic[V]):
    """`decoder.Ops` for one static shape: `length` tokens after `past` slots of the KV cache; batch 1.

    `rewrites` False: as ExecuTorch's own export of language models lowers it, with the cache inside the graph
    (update_cache) and fused attention (custom_sdpa), except where scores are capped, which that cannot do.
    True: only what the backend's table has (`exynos.toml`). The app then gives, for each call,

    - `tokens` int64 [1, length]; `positions` int64 [length];
    - `mask` [1, 1, length, past + length], and `mask.N` for layers with a window of N tokens: 0 or MASKED;
    - `past_k.I`, `past_v.I` [1, kv_heads, past, head_dim] for each layer I (rotated keys),

    and stores what it gets, `k.I` and `v.I` [1, kv_heads, length, head_dim].
    """

    def __init__(
        self,
        graph: Graph[V],
        arch: Architecture,
        *,
        length: int,
        past: int,
        rewrites: bool = True,
    ) -> None:
        self.graph, self.arch, self.rewrites = graph, arch, rewrites
        self.length, self.past, self.total = length, past, past + length
        self._tables: dict[tuple[str, int], V] = {}

    # the verbs

    def embed(self, tokens: V, weight: str) -> V:
        return self.graph.call("aten.embedding.default", self.graph.weight(weight), tokens)

    def scale(self, x: V, factor: float) -> V:
        return self._mul(x, self.graph.numbers(factor))

    def add(self, x: V, y: V) -> V:
        return self.graph.call("aten.add.Tensor", x, y)

    def rms_norm(self, x: V, weight: str) -> V:
        """One operator, which leaves to the compiler how the mean of x² is kept in range: in float16, x² alone
        overflows from |x| = 256 on. ExecuTorch's language models spell it out."""
        if self.rewrites:
            gain = self.graph.weight(weight)
            return self.graph.call("aten.rms_norm.default", x, [self.arch.hidden], gain, self.arch.norm_eps)
        mean = self.graph.call("aten.mean.dim", self._mul(x, x), [-1], True)
        power = self.add(mean, self.graph.numbers(self.arch.norm_eps))
        normed = self._mul(x, self.graph.call("aten.rsqrt.default", power))
        return self._mul(normed, self.graph.weight(weight))

    def linear(self, x: V, weight: str) -> V:
        bias = [self.graph.weight(weight + ".bias")] if self.arch.has_bias(weight) else []
        return self.graph.call("aten.linear.default", x, self.graph.weight(weight), *bias)

    def linears(self, x: V, weights: Sequence[str]) -> list[V]:
        return [self.linear(x, weight) for weight in weights]

    def gated(self, gate: V, up: V) -> V:
        """The builder of gelu does not pass on that it is the form with tanh: if the compiler takes the other,
        results are off by up to 5e-4."""
        if self.arch.activation != "silu":
            active = self.graph.call("aten.gelu.default", gate, approximate="tanh")
        else:
            active = self._mul(gate, self.graph.call("aten.sigmoid.default", gate))
        return self._mul(active, up)

    def last(self, x: V) -> V:
        if self.length == 1:
            return x
        return self.graph.call("aten.slice_copy.Tensor", x, 1, self.length - 1, self.length)

    def softcap(self, x: V, cap: float) -> V:
        return self.scale(self.graph.call("aten.tanh.default", self.scale(x, 1 / cap)), cap)

    def attention(self, q: V, k: V, v: V, layer: int) -> V:
        if not self.rewrites and not self.arch.attention_softcap:
            return self._fused(q, k, v, layer)
        queries = self._rotate(self._heads(q, self.arch.heads), positions=2)
        keys = self._rotate(self._heads(k, self.arch.kv_heads), positions=2)
        values = self._heads(v, self.arch.kv_heads)
        if self.rewrites:
            self.graph.output(f"k.{layer}", keys)
            self.graph.output(f"v.{layer}", values)
        return self._attend(queries, self._cached("k", layer, keys), self._cached("v", layer, values), layer)

    # parts of attention

    def _attend(self, q: V, k: V, v: V, layer: int) -> V:
        """q [1, heads, length, dim], k and v [1, kv_heads, total, dim] -> [1, length, heads * dim].

        Heads that share a key are rows of one product: no key is repeated, and bmm has its three dimensions.
        """
        arch, total = self.arch, self.total
        shared = arch.heads // arch.kv_heads
        rows = shared * self.length
        k = self._permute(self._view(k, arch.kv_heads, total, arch.head_dim), 0, 2, 1)
        scores = self._bmm(self._view(q, arch.kv_heads, rows, arch.head_dim), k)
        scores = self.scale(scores, arch.attention_scale)
        if arch.attention_softcap:
            scores = self.softcap(scores, arch.attention_softcap)
        scores = self.add(self._view(scores, arch.kv_heads, shared, self.length, total), self._mask(layer))
        weights = self.graph.call("aten._softmax.default", scores, -1, False)
        weights = self._view(weights, arch.kv_heads, rows, total)
        mixed = self._bmm(weights, self._view(v, arch.kv_heads, total, arch.head_dim))
        mixed = self._permute(self._view(mixed, 1, arch.heads, self.length, arch.head_dim), 0, 2, 1, 3)
        return self._view(mixed, 1, self.length, arch.heads * arch.head_dim)

    def _fused(self, q: V, k: V, v: V, layer: int) -> V:
        """custom_sdpa on [1, length, heads, dim]; the mask is given only where a window needs one."""
        arch, call = self.arch, self.graph.call
        q = self._rotate(self._split(q, arch.heads), positions=1)
        k = self._rotate(self._split(k, arch.kv_heads), positions=1)
        start = self.graph.input("start", 1)
        k = call("llama.update_cache.default", k, self._cache("k", layer), start)
        v = call("llama.update_cache.default", self._split(v, arch.kv_heads), self._cache("v", layer), start)
        mask = [self._mask(layer)] if self._window(layer) else [None]
        causal = not self._window(layer)
        mixed = call("llama.custom_sdpa.default", q, k, v, start, *mask, 0.0, causal, arch.attention_scale)
        return self._view(mixed, 1, self.length, arch.heads * arch.head_dim)

    def _cached(self, kind: str, layer: int, new: V) -> V:
        """All keys or values, [1, kv_heads, total, dim]."""
        shape = (1, self.arch.kv_heads, self.past, self.arch.head_dim)
        if not self.rewrites:
            new = self._permute(new, 0, 2, 1, 3)
            start = self.graph.input("start", 1)
            cache = self.graph.call("llama.update_cache.default", new, self._cache(kind, layer), start)
            return self._permute(cache, 0, 2, 1, 3)
        if not self.past:
            return new
        return self.graph.call("aten.cat.default", [self.graph.input(f"past_{kind}.{layer}", *shape), new], 2)

    def _cache(self, kind: str, layer: int) -> V:
        """The cache as ExecuTorch keeps it inside the graph."""
        return self.graph.input(
            f"cache_{kind}.{layer}", 1, self.total, self.arch.kv_heads, self.arch.head_dim
        )

    def _rotate(self, x: V, positions: int) -> V:
        """Rotary embedding of [1, ., ., head_dim], whose dimension `positions` runs over the tokens."""
        dim, size = self.arch.rope.dim, self.arch.head_dim
        first, second = self._slice(x, 0, dim // 2), self._slice(x, dim // 2, dim)
        if self.rewrites:
            cos, sin = (self._rows(name, positions) for name in ("cos.both", "sin.both"))
            turned = self._slice(x, 0, dim) if dim < size else x
            swapped = self.graph.call("aten.cat.default", [second, first], -1)
            rotated = self.add(self._mul(turned, cos), self._mul(swapped, sin))
        else:
            cos, sin = (self._rows(name, positions) for name in ("cos", "sin"))
            ahead = self.graph.call("aten.sub.Tensor", self._mul(first, cos), self._mul(second, sin))
            behind = self.add(self._mul(second, cos), self._mul(first, sin))
            rotated = self.graph.call("aten.cat.default", [ahead, behind], -1)
        if dim == size:
            return rotated
        return self.graph.call("aten.cat.default", [rotated, self._slice(x, dim, size)], -1)

    def _rows(self, table: str, positions: int) -> V:
        """The rows of a table at the tokens' positions, read once for all layers."""
        if (table, positions) in self._tables:
            return self._tables[table, positions]
        columns = self.arch.rope.dim // (1 if self.rewrites else 2)
        indices = self.graph.input("positions", self.length)
        rows = self.graph.call("aten.index.Tensor", self.graph.table(table), [indices])
        shape = (1, 1, self.length, columns) if positions == 2 else (1, self.length, 1, columns)
        return self._tables.setdefault((table, positions), self._view(rows, *shape))

    def _mask(self, layer: int) -> V:
        window = self._window(layer)
        name = f"mask.{window}" if window else "mask"
        return self.graph.input(name, 1, 1, self.length, self.total)

    def _window(self, layer: int) -> int:
        """The layer's window in tokens, 0 where it sees all that the graph holds."""
        return self.arch.windows[layer] if self.arch.windows[layer] < self.total else 0

    # operators

    def _heads(self, x: V, heads: int) -> V:
        """[1, length, heads * dim] -> [1, heads, length, dim]."""
        return self._permute(self._split(x, heads), 0, 2, 1, 3)

    def _split(self, x: V, heads: int) -> V:
        """[1, length, heads * dim] -> [1, length, heads, dim]."""
        return self._view(x, 1, self.length, heads, self.arch.head_dim)

    def _mul(self, x: V, y: V) -> V:
        return self.graph.call("aten.mul.Tensor", x, y)

    def _bmm(self, x: V, y: V) -> V:
        return self.graph.call("aten.bmm.default", x, y)

    def _view(self, x: V, *shape: int) -> V:
        return self.graph.call("aten.view_copy.default", x, list(shape))

    def _permute(self, x: V, *order: int) -> V:
        return self.graph.call("aten.permute_copy.default", x, list(order))

    def _slice(self, x: V, start: int, stop: int) -> V:
        """Elements [start, stop) of the last of four dimensions."""
        return self.graph.call("aten.slice_copy.Tensor", x, 3, start, stop)
