"""What a decoder will need and how fast it will be, before anything is exported.

Arithmetic over shapes. What each engine costs in memory and in the file was measured (`engines.toml`). Decoding reads
every weight once per token, so its speed is the memory's (the memory side of the roofline,
https://doi.org/10.1145/1498765.1498785), with constants that are fitted from published speeds (`runtimes.fitted`).
Reading a prompt is bound by arithmetic instead, and kernels for the same chip differ by a factor of ten there: it is
predicted only for a chip on which the engine's speed was published.
"""

import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any, Literal

from runtimes.fitted import COVERAGE, Guess, Setting, guess, workspace

Kind = Literal["grouped", "channel", "table", "float16", "float32"]
Backend = Literal["cpu", "gpu", "npu"]
FLOAT, HALF = 4, 2  # bytes of a float32, a float16
CONVERSATION = 512  # tokens in the KV cache for which decoding is predicted
PROMPT = 128  # tokens of the prompt for which the time to the first token is predicted


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

    @cached_property
    def distinct(self) -> tuple[tuple[Weight, int], ...]:
        """Each different weight and how often it is there: a layer's are those of the next."""
        return tuple(Counter(self.weights).items())

    @property
    def multiplied(self) -> Iterator[tuple[Weight, int]]:
        """Of those, the ones that a product reads for each token."""
        return ((weight, count) for weight, count in self.distinct if weight.multiplied)


@dataclass(frozen=True)
class Estimate:
    """One predicted figure, how it was found (`explain`), and between which bounds it is expected."""

    name: str
    unit: Literal["bytes", "tokens/s", "s"]
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
        show, unit = {"bytes": (_size, ""), "s": (_time, ""), "tokens/s": (_rate, " tokens/s")}[self.unit]
        bounds = f" ({show(self.low)} to {show(self.high)})" if self.low and self.high else ""
        return f"{show(self.value)}{unit}{bounds}"


@dataclass(frozen=True)
class Prediction:
    """All figures for one decoder, context and engine. `first` is the time to the first token, `resident` the memory
    as publishers count it, mapped files included; they and `decode` are None where nothing tells, and `unknown` says
    of which speed and why."""

    file: Estimate
    memory: Estimate
    cache: Estimate
    streamed: Estimate
    decode: Estimate | None
    first: Estimate | None = None
    resident: Estimate | None = None
    unknown: tuple[tuple[str, str], ...] = ()

    def rows(self) -> Iterator[Estimate]:
        """The figures in the order in which they are shown."""
        every = (self.file, self.memory, self.resident, self.cache, self.streamed, self.first, self.decode)
        yield from (row for row in every if row)

    def figures(self) -> dict[str, float]:
        """Figure -> value; the unit is in the key, and _low and _high are its bounds."""
        found: dict[str, float] = {}
        for row in self.rows():
            found[row.key] = row.value
            if row.low is not None and row.high is not None:
                found |= {f"{row.key}_low": row.low, f"{row.key}_high": row.high}
        return found


def predict(
    decoder: Decoder,
    context: int,
    *,
    engine: str = "onnxruntime",
    bandwidth: float | None = None,
    backend: Backend | None = None,
    chip: str | None = None,
    prompt: int = PROMPT,
) -> Prediction:
    """Predict size, memory, the time to the first token and decoding speed.

    `context`: tokens that the KV cache holds; `bandwidth`: peak memory bandwidth in bytes/s, None if unknown;
    `engine`: a table of `engines.toml` (KeyError otherwise); `backend`: what computes, None for the engine's usual;
    `chip`: the id of its profile, for what was published of that very chip; `prompt`: tokens before the first.
    """
    costs = _engines()[engine]
    at = _setting(decoder, engine, costs, backend, chip)
    streamed = _streamed(decoder, costs, context if costs["whole_cache"] else min(context, CONVERSATION))
    file = _file(decoder, costs, context)
    prompt = min(prompt, context)
    decode = _decode(streamed.value, decoder.layers, at, bandwidth) if bandwidth else None
    first = _first(decoder, prompt, at, bandwidth, decode) if bandwidth else None
    return Prediction(
        file=file,
        memory=_memory(decoder, costs, context),
        cache=_cache(decoder, costs, context),
        streamed=streamed,
        decode=decode,
        first=first,
        resident=_resident(decoder, file.value, prompt, at),
        unknown=tuple(_unknown(engine, at, bandwidth, decode, first)),
    )


def _setting(
    decoder: Decoder, engine: str, costs: dict[str, Any], backend: Backend | None, chip: str | None
) -> Setting:
    """How the published runs would call this: by the kernel that multiplies most of the weights."""
    weight = dict.fromkeys(costs["kernels"].values(), 0)
    for each, count in decoder.multiplied:
        weight[costs["kernels"][each.kind]] += count * each.shape[0] * each.shape[1]
    kernel = max(weight, key=lambda name: weight[name])
    return Setting(costs.get("published", engine), backend or costs["backend"], kernel, chip)


def _unknown(
    engine: str, at: Setting, bandwidth: float | None, decode: Estimate | None, first: Estimate | None
) -> Iterator[tuple[str, str]]:
    unit = at.backend.upper()
    if bandwidth is None:
        why = "the bandwidth of this chip's memory is not known"
        yield from (("first token", why), ("decode", why))
        return
    if first is None:
        yield (
            "first token",
            f"no prompt speed of {engine} on this chip's {unit} was published, and it does not follow from other "
            "chips': gochu bench measures it",
        )
    if decode is None:
        yield "decode", f"no engine's speed on any {unit} was published"


def _file(decoder: Decoder, costs: dict[str, Any], context: int) -> Estimate:
    table = context * (decoder.rotary // 2) * FLOAT
    blocks = [table] * costs["rope_tables"]
    stored = {weight: tuple(_stored(weight, costs)) for weight, _ in decoder.distinct}
    blocks += [size for weight in decoder.weights for size in stored[weight]]
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
    held = costs["session_bytes"] + decoder.vectors * costs["float_bytes"] + _total(decoder, costs, "held")
    loading = max((_bytes(weight, costs, "loading") for weight, _ in decoder.multiplied), default=0.0)
    cache = _cache_bytes(decoder, costs, context)
    activations = _activations(decoder, costs, context)
    running = cache + activations
    value = held + max(loading, running)
    parts = f"{_size(held)} of weights and session"
    if loading > running:
        parts += f" + {_size(loading)} for the largest weight while it is loaded"
    else:
        parts += f" + {_size(cache)} of KV cache + {_size(activations)} of activations"
    kinds = sorted({weight.kind for weight, _ in decoder.multiplied})
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
    value = _total(decoder, costs, "streamed") + _cache_bytes(decoder, costs, tokens)
    explain = f"every weight that is multiplied, and the KV cache of {tokens} tokens"
    return Estimate("read per token", "bytes", value, explain)


def _decode(nbytes: float, layers: int, at: Setting, bandwidth: float) -> Estimate | None:
    found = guess("decode", at, nbytes / bandwidth, layers)
    if found is None:
        return None
    limit = bandwidth / nbytes  # no token is faster than its bytes can be read
    slow, expected, fast = (min(1 / seconds, limit) for seconds in (found.high, found.value, found.low))
    explain = (
        f"1 / ({layers} layers x {_time(found.overhead)} + {_size(nbytes)} / ({1 / found.rate:.0%} of "
        f"{_size(bandwidth)}/s)); {_basis(found, at)}"
    )
    return Estimate("decode", "tokens/s", expected, explain, slow, fast)


def _first(
    decoder: Decoder, prompt: int, at: Setting, bandwidth: float, decode: Estimate | None
) -> Estimate | None:
    """Two operations for each weight of the layers and token, the head seeing the last token alone; but a prompt
    takes no less than a token of the answer, which reads the same weights."""
    vocabulary = {weight.shape[0] for weight, _ in decoder.distinct if weight.looked_up}
    layers = ((each, count) for each, count in decoder.multiplied if each.shape[0] not in vocabulary)
    operations = 2 * sum(count * each.shape[0] * each.shape[1] for each, count in layers)
    found = guess("prefill", at, operations / bandwidth, 0)
    if found is None:
        return None
    value, low, high = (prompt * seconds for seconds in (found.value, found.low, found.high))
    if decode and decode.low and decode.high and value < 1 / decode.value:
        value, low, high = 1 / decode.value, 1 / decode.high, 1 / decode.low
        explain = f"{prompt} tokens are read in no less time than a token of the answer, which needs the same weights"
    else:
        rate = f"{operations / found.value / 1e9:.3g}"
        explain = f"{prompt} tokens x {operations / 1e9:.3g} GOP / {rate} GOP/s"
    return Estimate("first token", "s", value, f"{explain}; {_basis(found, at)}", low, high)


def _resident(decoder: Decoder, file: float, prompt: int, at: Setting) -> Estimate | None:
    values = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim
    extra = workspace(values, decoder.hidden, decoder.ffn, prompt)
    found = guess("memory", at, file, extra)
    if found is None:
        return None
    explain = (
        f"{found.rate:.2f} x the file of {_size(file)} + {found.overhead:.2f} x {_size(extra)} of cache, activations "
        f"and process: as those count it who published it, most with the pages of mapped files; {_basis(found, at)}"
    )
    return Estimate("resident memory", "bytes", found.value, explain, found.low, found.high)


def _basis(found: Guess, at: Setting) -> str:
    """What a fitted figure rests on: the most special that was measured."""
    engine = f"{at.backend} {at.engine}"
    if any(" on " in name for name in found.known):
        what = f"fitted from published runs of {at.engine} on this chip"
    elif engine in found.known:
        what = f"fitted from published runs of {at.engine} on other chips"
    else:
        what = (
            f"no speed of {at.engine} on a {at.backend.upper()} was published: the average of other engines"
        )
    return f"{what}; {COVERAGE:.0%} of such figures are between the bounds"


def _total(decoder: Decoder, costs: dict[str, Any], use: str) -> float:
    unfolded = sum(
        count * costs.get("unfolded_embedding", 0) * weight.sizes()["floats"]
        for weight, count in decoder.distinct
        if weight.looked_up and (weight.multiplied or use == "held")
    )
    return unfolded + sum(count * _bytes(weight, costs, use) for weight, count in decoder.multiplied)


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


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
