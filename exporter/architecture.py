"""What a checkpoint's `config.json` says about its decoder, as plain numbers.

Everything that tells one family from another is read here, once; the decoder and the formats see only an
`Architecture`. A family is a few functions from config keys to fields, and a table of tensor names.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from exporter.errors import CheckpointError, UnsupportedArchitecture
from runtimes.bundle import KVCache


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: head dimensions [0, dim) are rotated in pairs (j, j + dim/2).

    `inv_freq` float32 [dim/2] radians per position; `long_inv_freq` takes its place when the context is
    longer than `original_context` (LongRoPE); cos and sin are multiplied by `scale`.
    """

    dim: int
    inv_freq: tuple[float, ...]
    scale: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    original_context: int = 0

    def is_long(self, context: int) -> bool:
        """Whether a graph made for `context` tokens uses the long factors (for all its positions)."""
        return self.long_inv_freq is not None and context > self.original_context

    def tables(self, context: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin, float32 [context, dim/2] each, for positions 0 .. context-1."""
        frequencies = self.long_inv_freq if self.is_long(context) else self.inv_freq
        angles = np.arange(context, dtype=np.float32)[:, None] * np.array(frequencies, dtype=np.float32)
        scale = np.float32(self.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale

    def whole_tables(self, context: int) -> dict[str, NDArray[np.float32]]:
        """Tables for both halves of a head at once, [context, dim]: "cos" (cos, cos) and "sin" (-sin, sin)."""
        cos, sin = self.tables(context)
        return {"cos": np.concatenate((cos, cos), -1), "sin": np.concatenate((-sin, sin), -1)}


@dataclass(frozen=True)
class Architecture:
    """A Llama-like decoder in numbers. Sizes in elements; 0 for a softcap or window means none."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # tokens it was trained for
    norm_eps: float
    rope: Rope
    tied: bool  # the head is the embedding
    activation: str = "silu"  # or "gelu_tanh"
    biases: frozenset[str] = frozenset()  # names of the linears that add a bias: "attention.q", ...
    norm_offset: float = 0.0  # added to every norm's weight
    post_norms: bool = False  # also normalise the output of attention and MLP
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    windows: tuple[int, ...] = ()  # sliding window of each layer

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Canonical name and shape (outputs, inputs) of every weight matrix, in the decoder's order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "embedding", (self.vocab, self.hidden)
        for i in range(self.layers):
            for name, shape in {
                "attention.q": (q, self.hidden),
                "attention.k": (kv, self.hidden),
                "attention.v": (kv, self.hidden),
                "attention.o": (self.hidden, q),
                "mlp.gate": (self.ffn, self.hidden),
                "mlp.up": (self.ffn, self.hidden),
                "mlp.down": (self.hidden, self.ffn),
            }.items():
                yield f"layers.{i}.{name}", shape
        if not self.tied:
            yield "head", (self.vocab, self.hidden)

    def vectors(self) -> Iterator[tuple[str, int]]:
        """Canonical name and length of every norm weight and bias."""
        lengths = {name: shape[0] for name, shape in self.matrices()}
        for i in range(self.layers):
            norms = ["attention_norm", "mlp_norm"]
            if self.post_norms:
                norms += ["attention_post_norm", "mlp_post_norm"]
            for norm in norms:
                yield f"layers.{i}.{norm}", self.hidden
            for linear in sorted(self.biases):
                yield f"layers.{i}.{linear}.bias", lengths[f"layers.{i}.{linear}"]
        yield "final_norm", self.hidden

    def kv_cache(
        self, dtype: str, *, shared_buffer: bool = True, held_by: Literal["caller", "program"] = "program"
    ) -> KVCache:
        """The layout of this architecture's cache, of numbers of `dtype`."""
        return KVCache(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            shared_buffer=shared_buffer,
            held_by=held_by,
        )

    def has_bias(self, weight: str) -> bool:
        """Whether the linear by that canonical name adds a bias."""
        return weight.partition(".")[2].partition(".")[2] in self.biases

    @cached_property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(rows * columns for _, (rows, columns) in self.matrices()) + sum(
            n for _, n in self.vectors()
        )


class Source(NamedTuple):
    """Where a canonical tensor lies in the checkpoint: rows [start, start + rows) of `tensor`."""

    tensor: str
    start: int
    rows: int


def sources(arch: Architecture) -> dict[str, Source]:
    """Map every canonical name (matrices and vectors) to its place in a Hugging Face checkpoint."""
    found: dict[str, Source] = {}
    for name, length in [(n, shape[0]) for n, shape in arch.matrices()] + list(arch.vectors()):
        if not name.startswith("layers."):
            found[name] = Source(_TOP[name], 0, length)
            continue
        _, i, rest = name.split(".", 2)
        linear, dot, _ = rest.partition(".bias")
        suffix = ".bias" if dot else ".weight"
        if arch.family == "phi3" and linear in _PHI3_FUSED:
            fused, before = _PHI3_FUSED[linear]
            shapes = dict(arch.matrices())
            start = sum(shapes[f"layers.{i}.{other}"][0] for other in before)
            found[name] = Source(f"model.layers.{i}.{fused}{suffix}", start, length)
        else:
            names = _GEMMA_NORMS if arch.post_norms else _NORMS
            theirs = _LINEARS.get(linear) or names[linear]
            found[name] = Source(f"model.layers.{i}.{theirs}{suffix}", 0, length)
    return found


_TOP = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm": "model.norm.weight"}
_LINEARS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_PHI3_FUSED = {  # one tensor holds several linears below each other
    "attention.q": ("self_attn.qkv_proj", ()),
    "attention.k": ("self_attn.qkv_proj", ("attention.q",)),
    "attention.v": ("self_attn.qkv_proj", ("attention.q", "attention.k")),
    "mlp.gate": ("mlp.gate_up_proj", ()),
    "mlp.up": ("mlp.gate_up_proj", ("mlp.gate",)),
}

FAMILIES = ("llama", "qwen2", "gemma2", "phi3")
_REFUSED = {
    "phi3small": "Phi-3-small uses block-sparse attention, which phones' runtimes do not have",
    "phi3_v": "it is a vision model; Gochu exports text decoders",
    "phi4mm": "it is a multimodal model; Gochu exports text decoders",
    "mllama": "it is a vision model; Gochu exports text decoders",
    "qwen2_vl": "it is a vision model; Gochu exports text decoders",
    "qwen2_5_vl": "it is a vision model; Gochu exports text decoders",
    "paligemma": "it is a vision model; Gochu exports text decoders",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Hugging Face `config.json` (transformers 4 and 5 style).

    Raises UnsupportedArchitecture for a model that the decoder does not describe, CheckpointError for a
    config whose values make no sense.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        why = _REFUSED.get(str(family), f"the decoder describes {', '.join(FAMILIES)}")
        raise UnsupportedArchitecture(f"model_type {family!r} cannot be exported: {why}")
    classes = config.get("architectures") or []
    if not isinstance(classes, list):
        raise CheckpointError("config.json: architectures must be a list of class names")
    if classes and not any(str(name).endswith("ForCausalLM") for name in classes):
        raise UnsupportedArchitecture(
            f"{classes[0]} is not a language model: export a ...ForCausalLM checkpoint"
        )
    if config.get("quantization_config"):
        raise UnsupportedArchitecture(
            "the checkpoint is quantized already (it has a quantization_config): export the original float one"
        )
    get = _Reader(config)
    heads, hidden, layers = (
        get.count("num_attention_heads"),
        get.count("hidden_size"),
        get.count("num_hidden_layers"),
    )
    kv_heads = get.count("num_key_value_heads", heads)
    head_dim = get.count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads")
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd; rotary embedding needs pairs")
    gemma = family == "gemma2"
    activation = config.get("hidden_activation" if gemma else "hidden_act") or (
        "gelu_pytorch_tanh" if gemma else "silu"
    )
    if str(activation) not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"activation {activation!r} is not known here: the decoder has {', '.join(_ACTIVATIONS)}"
        )
    if gemma and config.get("use_bidirectional_attention"):
        raise UnsupportedArchitecture(
            "the model attends to both sides (an encoder): Gochu exports causal decoders"
        )
    context = get.count("max_position_embeddings")
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=get.count("intermediate_size"),
        vocab=get.count("vocab_size"),
        context=context,
        norm_eps=get.number("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        rope=_rope(config, family, head_dim, context),
        tied=bool(config.get("tie_word_embeddings", gemma)),
        activation=_ACTIVATIONS[activation],
        biases=_biases(config, family),
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        attention_scale=get.number("query_pre_attn_scalar", 256) ** -0.5 if gemma else head_dim**-0.5,
        attention_softcap=get.optional_number("attn_logit_softcapping", 50.0) if gemma else 0.0,
        final_softcap=get.optional_number("final_logit_softcapping", 30.0) if gemma else 0.0,
        windows=_windows(config, family, layers),
    )


_LIMIT, _LIMITS = (
    1 << 24,
    {"num_hidden_layers": 1000},
)  # beyond any model; what would exhaust memory is refused


class _Reader:
    """Typed access to config values, with an error that names the key."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self.config, self.where = config, where

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LIMITS.get(key, _LIMIT):
            raise CheckpointError(
                f"{self.where}: {key} is {value!r} where a whole number from 1 to {_LIMITS.get(key, _LIMIT)} is needed"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if not _sensible(value):
            raise CheckpointError(f"{self.where}: {key} is {value!r} where a positive number is needed")
        return float(value)

    def optional_number(self, key: str, default: float) -> float:
        """0.0 when the key is there and null."""
        return self.number(key, default) if self.config.get(key, default) is not None else 0.0

    def numbers(self, key: str, length: int) -> NDArray[np.float32]:
        value = self.config.get(key)
        fits = isinstance(value, list) and len(value) == length
        if not fits or not all(map(_sensible, value or ())):
            raise CheckpointError(f"{self.where}: {key} must be a list of {length} positive numbers")
        return np.array(value, dtype=np.float32)


def _sensible(value: Any) -> TypeGuard[float]:
    """A positive number that float32 can compute with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


def _biases(config: Mapping[str, Any], family: str) -> frozenset[str]:
    names: list[str] = []
    if family == "qwen2":
        names += ["attention.q", "attention.k", "attention.v"]
    if family in ("llama", "gemma2") and config.get("attention_bias"):
        names += ["attention.q", "attention.k", "attention.v", "attention.o"]
    if family == "llama" and config.get("mlp_bias"):
        names += ["mlp.gate", "mlp.up", "mlp.down"]
    return frozenset(names)


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int, ...]:
    """The sliding window of each layer in tokens, 0 where a layer sees everything."""
    window = (
        _Reader(config).count("sliding_window", 4096)
        if config.get("sliding_window", 0 if family != "gemma2" else 4096)
        else 0
    )
    if family == "llama" or (family == "qwen2" and not config.get("use_sliding_window")):
        window = 0
    types = config.get("layer_types")
    if types is not None and family in ("qwen2", "gemma2"):
        if (
            not isinstance(types, list)
            or len(types) != layers
            or set(types) - {"sliding_attention", "full_attention"}
        ):
            raise CheckpointError(
                f"config.json: layer_types must say sliding_attention or full_attention for each of {layers} layers"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    if family == "gemma2":
        return tuple(window if i % 2 == 0 else 0 for i in range(layers))
    if family == "qwen2":
        first = config.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise CheckpointError(
                f"config.json: max_window_layers is {first!r} where a whole number is needed"
            )
        return tuple(window if i >= first else 0 for i in range(layers))
    return (window,) * layers


def _rope(config: Mapping[str, Any], family: str, head_dim: int, context: int) -> Rope:
    """`_read_rope`, where values that give no frequencies (a division by zero, say) are refused."""
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            return _read_rope(config, family, head_dim, context)
    except (ArithmeticError, ValueError):
        raise CheckpointError(
            "config.json: the values for the rotary embedding give no frequencies: download it again"
        ) from None


def _read_rope(config: Mapping[str, Any], family: str, head_dim: int, context: int) -> Rope:
    """Rotary frequencies in float32, as they were in training.

    Both styles: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5).
    Sources: RoPE arXiv:2104.09864, YaRN arXiv:2309.00071, LongRoPE arXiv:2402.13753, Llama 3.1's scaling
    as published with its reference code (github.com/meta-llama/llama-models).
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError("config.json: rope_parameters must be a table of values")
    merged = {
        key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None
    }
    if config.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    get = _Reader(merged | given, "config.json: rope_parameters")
    kind = given.get("rope_type", given.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # the names under which it was first published
    dim = int(head_dim * get.number("partial_rotary_factor", 1.0))
    if not 0 < dim <= head_dim or dim % 2:
        raise CheckpointError(f"config.json: {dim} rotary dimensions do not fit a head of {head_dim}")
    theta = get.number("rope_theta", 10000.0)
    base = np.float32(1) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    original = get.count("original_max_position_embeddings", context)
    if kind == "default":
        return Rope(dim, _floats(base))
    if kind == "linear":
        return Rope(dim, _floats(base / np.float32(get.number("factor"))))
    if kind == "llama3":
        return Rope(dim, _floats(_llama3(base, get, original)))
    if kind == "yarn":
        return _yarn(base, get, dim, theta, context, original)
    if kind == "longrope":
        factor = get.number("factor", context / original)
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (base / get.numbers(key, dim // 2) for key in ("short_factor", "long_factor"))
        return Rope(dim, _floats(short), get.number("attention_factor", scale), _floats(long), original)
    raise UnsupportedArchitecture(
        f"rope type {kind!r} is not supported: its frequencies change with the text's length, or it is unknown; "
        "default, linear, llama3, yarn and longrope are"
    )


def _floats(values: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(values.astype(np.float32).tolist())


def _llama3(base: NDArray[np.float32], get: _Reader, original: int) -> NDArray[np.float32]:
    """Slow down long waves by `factor`, leave short ones, and blend in between."""
    factor, low, high = get.number("factor"), get.number("low_freq_factor"), get.number("high_freq_factor")
    turns = original * base / (2 * np.pi)  # rotations within the original context
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return np.float32(1 - blend) * base / np.float32(factor) + np.float32(blend) * base


def _yarn(
    base: NDArray[np.float32], get: _Reader, dim: int, theta: float, context: int, original: int
) -> Rope:
    factor = get.number("factor", context / original)
    mscale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if get.config.get("mscale") and get.config.get("mscale_all_dim"):
        both = [0.1 * get.number(key) * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim")]
        mscale = both[0] / both[1] if factor > 1 else 1.0

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(get.number("beta_fast", 32.0)), dimension(get.number("beta_slow", 1.0))
    if get.config.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    inv_freq = base / np.float32(factor) * ramp + base * (1 - ramp)
    return Rope(dim, _floats(inv_freq), get.number("attention_factor", mscale))
