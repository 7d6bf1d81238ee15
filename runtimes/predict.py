"""What a decoder will need and how fast it will be, before anything is exported.

Arithmetic over shapes, with the constants of each engine in `engines.toml`, where their sources are. Decoding
reads every weight once per token, so its speed is the memory's (the memory side of the roofline,
https://doi.org/10.1145/1498765.1498785). Reading a prompt is bound by arithmetic instead, and kernels for the
same chip differ by a factor of ten there: its speed is measured (`gochu bench`), not predicted.
"""

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

Kind = Literal["grouped", "channel", "table", "float16", "float32"]
FLOAT, HALF = 4, 2  # bytes of a float32, a float16
CONVERSATION = 512  # tokens in the KV cache for which decoding is predicted


@dataclass(frozen=True)
class Weight:
    """A weight matrix of `shape` (outputs, inputs) as it is stored; `group`: inputs that share a float32 scale, or
    of a `table` of float16 numbers, outputs that share it.

    `multiplied`: a product reads all of it for each token; `looked_up`: it is read row by row, as an embedding.
    """

    shape: tuple[int, int]
    bits: int
    group: int | None
    multiplied: bool = True
    looked_up: bool = False
    table: bool = False

    @property
    def kind(self) -> Kind:
        if self.table:
            return "table"
        if self.bits > 8:
            return "float16" if self.bits == 16 else "float32"
        return "grouped" if self.group else "channel"

    def sizes(self) -> dict[str, int]:
        """Bytes of `data` and `scales` as they are stored, and of a copy in `floats`."""
        outputs, inputs = self.shape
        count = outputs * inputs
        scales = 0 if self.bits > 8 else outputs * (inputs // self.group if self.group else 1) * FLOAT
        if self.table:
            scales = (outputs // self.group if self.group else 1) * 2**self.bits * HALF
        return {"data": count * self.bits // 8, "scales": scales, "floats": count * FLOAT}


@dataclass(frozen=True)
class Decoder:
    """A decoder in numbers. `vectors`: float32 values of norms and biases; `rotary`: rotated dimensions of a
    head; `softcap`: attention scores are capped, which keeps engines from computing them in tiles."""

    weights: tuple[Weight, ...]
    vectors: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    softcap: bool


@dataclass(frozen=True)
class Estimate:
    """One predicted figure, how it was found (`explain`), and between which bounds it is expected."""

    name: str
    unit: Literal["bytes", "tokens/s"]
    value: float
    explain: str
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> str:
        """Name and unit in one word: peak_memory_bytes, decode_tokens_per_s."""
        return f"{self.name} {self.unit}".lower().replace("/", "_per_").replace(" ", "_")

    @property
    def text(self) -> str:
        """The value for a person, with its bounds."""
        show, unit = (_size, "") if self.unit == "bytes" else (_rate, f" {self.unit}")
        bounds = f" ({show(self.low)} to {show(self.high)})" if self.low and self.high else ""
        return f"{show(self.value)}{unit}{bounds}"


@dataclass(frozen=True)
class Prediction:
    """All figures for one decoder, context and engine; `decode` is None where the bandwidth is unknown."""

    file: Estimate
    memory: Estimate
    cache: Estimate
    streamed: Estimate
    decode: Estimate | None

    def rows(self) -> Iterator[Estimate]:
        """The figures in the order in which they are shown."""
        yield from (self.file, self.memory, self.cache, self.streamed)
        if self.decode:
            yield self.decode

    def figures(self) -> dict[str, float]:
        """Figure -> value; the unit is in the key, and _low and _high are its bounds."""
        found: dict[str, float] = {}
        for row in self.rows():
            found[row.key] = row.value
            if row.low is not None and row.high is not None:
                found |= {f"{row.key}_low": row.low, f"{row.key}_high": row.high}
        return found


def predict(
    decoder: Decoder, context: int, *, engine: str = "onnxruntime", bandwidth: float | None = None
) -> Prediction:
    """Predict size, memory and decoding speed.

    `context`: tokens that the KV cache holds; `bandwidth`: peak memory bandwidth in bytes/s, None if unknown;
    `engine`: a table of `engines.toml` (KeyError otherwise).
    """
    costs = _engines()[engine]
    streamed = _streamed(decoder, costs, min(context, CONVERSATION))
    return Prediction(
        file=_file(decoder, costs, context),
        memory=_memory(decoder, costs, context),
        cache=_cache(decoder, costs, context),
        streamed=streamed,
        decode=_decode(streamed.value, costs, bandwidth) if bandwidth else None,
    )


def _file(decoder: Decoder, costs: dict[str, Any], context: int) -> Estimate:
    table = context * (decoder.rotary // 2) * FLOAT
    blocks = [table] * costs["rope_tables"]
    blocks += [size for weight in decoder.weights for size in _stored(weight, costs)]
    end, paged, alignment = 0, costs["paged_bytes"], costs["alignment"]
    for size in blocks:
        end += -end % alignment[size >= paged] + size
    graph = costs["graph_bytes"] + costs["graph_bytes_per_layer"] * decoder.layers
    return Estimate(
        "file",
        "bytes",
        end + decoder.vectors * costs["float_bytes"] + graph,
        "weights with their scales, norms and biases, the tables of the rotary embedding, the graph",
    )


def _stored(weight: Weight, costs: dict[str, Any]) -> Iterator[int]:
    """Bytes of each block of a weight in the file: integers, and scales for products and for looking up."""
    sizes = weight.sizes()
    yield sizes["data"]
    if sizes["scales"]:
        if weight.multiplied:
            yield int(sizes["scales"] * costs["stored_scales"][weight.kind])
        if weight.looked_up and not (weight.multiplied and costs["tied_scales"] == "once"):
            yield sizes["scales"]


def _memory(decoder: Decoder, costs: dict[str, Any], context: int) -> Estimate:
    held = (
        costs["session_bytes"]
        + decoder.vectors * costs["float_bytes"]
        + _total(decoder.weights, costs, "held")
    )
    loading = max((_bytes(weight, costs, "loading") for weight in _multiplied(decoder.weights)), default=0.0)
    cache = _cache_bytes(decoder, costs, context)
    activations = _activations(decoder, costs, context)
    running = cache + activations
    value = held + max(loading, running)
    parts = f"{_size(held)} of weights and session"
    if loading > running:
        parts += f" + {_size(loading)} for the largest weight while it is loaded"
    else:
        parts += f" + {_size(cache)} of KV cache + {_size(activations)} of activations"
    kinds = sorted({weight.kind for weight in _multiplied(decoder.weights)})
    why = "; ".join(costs["weights"][kind]["why"] for kind in kinds)
    spread = costs["spread"] * value
    explain = f"memory of its own, mapped files not counted: {parts} ({why})"
    return Estimate("peak memory", "bytes", value, explain, value - spread, value + spread)


def _activations(decoder: Decoder, costs: dict[str, Any], context: int) -> float:
    """Bytes of the values in a layer while a chunk of the prompt passes it, times what the allocator keeps."""
    chunk = min(costs["prefill_chunk"], context)
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    mlp, attention = 3 * decoder.ffn, 3 * queries + 4 * keys  # gate, up, product; q k v, rotated, output
    alive = chunk * (2 * decoder.hidden + mlp + attention)
    if decoder.softcap:
        alive += decoder.heads * chunk * context  # the scores, as a whole
    return costs["activation_copies"] * alive * costs["float_bytes"]


def _cache(decoder: Decoder, costs: dict[str, Any], context: int) -> Estimate:
    explain = (
        f"2 x {decoder.layers} layers x {decoder.kv_heads} key/value heads x {decoder.head_dim} x {context} tokens "
        f"x {costs['float_bytes']} bytes (part of the peak memory)"
    )
    return Estimate("KV cache", "bytes", _cache_bytes(decoder, costs, context), explain)


def _cache_bytes(decoder: Decoder, costs: dict[str, Any], tokens: int) -> int:
    return int(2 * decoder.layers * decoder.kv_heads * decoder.head_dim * tokens * costs["float_bytes"])


def _streamed(decoder: Decoder, costs: dict[str, Any], tokens: int) -> Estimate:
    value = _total(decoder.weights, costs, "streamed") + _cache_bytes(decoder, costs, tokens)
    explain = f"every weight that is multiplied, and the KV cache of {tokens} tokens"
    return Estimate("read per token", "bytes", value, explain)


def _decode(nbytes: float, costs: dict[str, Any], bandwidth: float) -> Estimate:
    decode = costs["decode"]
    slow, expected, fast = (
        1 / (overhead + nbytes / (efficiency * bandwidth))
        for efficiency, overhead in zip(decode["efficiency"], decode["overhead_s"], strict=True)
    )
    low, middle, high = (f"{efficiency:.0%}" for efficiency in decode["efficiency"])
    explain = (
        f"1 / ({decode['overhead_s'][1] * 1e3:g} ms + {_size(nbytes)} / ({middle} of {_size(bandwidth)}/s)); "
        f"published CPU speeds reach {low} to {high} of the bandwidth"
    )
    return Estimate("decode", "tokens/s", expected, explain, slow, fast)


def _multiplied(weights: Iterable[Weight]) -> list[Weight]:
    return [weight for weight in weights if weight.multiplied]


def _total(weights: Sequence[Weight], costs: dict[str, Any], use: str) -> float:
    unfolded = sum(
        costs.get("unfolded_embedding", 0) * weight.sizes()["floats"]
        for weight in weights
        if weight.looked_up and (weight.multiplied or use == "held")
    )
    return unfolded + sum(_bytes(weight, costs, use) for weight in _multiplied(weights))


def _bytes(weight: Weight, costs: dict[str, Any], use: str) -> float:
    """Bytes of the copies that the engine makes of a weight for `use` (held, loading, streamed)."""
    sizes = weight.sizes()
    return sum(copies * sizes[part] for part, copies in costs["weights"][weight.kind][use].items())


@lru_cache(maxsize=1)
def _engines() -> dict[str, Any]:
    found = tomllib.loads((files("runtimes") / "engines.toml").read_text(encoding="utf-8"))
    return {name: found.get(costs.get("like"), {}) | costs for name, costs in found.items()}


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 999.5e6 else f"{nbytes / 1e6:.3g} MB"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
