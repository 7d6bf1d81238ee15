"""Checkpoint folders with the shape of published models and random weights, for measuring without a download.

What an exporter or a runtime takes in time and memory depends on shapes and dtypes, not on what the weights
say. Everything is written slice by slice: the memory needed does not grow with the model.
"""

import json
from collections.abc import Iterator
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 128256,
}

# config.json as published (https://huggingface.co/<owner>/<name>/blob/main/config.json)
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _QWEN
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
    },
    "Qwen2.5-1.5B": _QWEN
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
    },
    "Llama-3.2-1B": _LLAMA
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
    },
    "Llama-3.2-3B": _LLAMA
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
    },
    "Phi-3-mini-4k": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32064,
    },
}

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
_SHARD = 5_000_000_000  # bytes; the size at which Hugging Face begins another file
_BLOCK = 16_777_213  # random numbers drawn; a prime, so that no two rows of a matrix are the same

_TEXT = [
    "The small pepper is the hot one: a model for a phone is small, and it has to be good.",
    "작은 고추가 맵다. 전화기에서 도는 모델은 작지만 야무져야 한다.",
    "One, two, three, four; 하나, 둘, 셋, 넷. 320 + 81 = 401",
]


def write_random_checkpoint(folder: Path, shape: str, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write `folder` as a Hugging Face checkpoint with the config of `shape` (a key of CONFIGS); return it.

    A folder that already holds that very checkpoint is left as it is. dtype: float32, float16 or bfloat16.
    """
    return write_checkpoint(folder, CONFIGS[shape], seed, dtype)


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Write a random checkpoint of a qwen2, llama or phi3 `config` (as in config.json) into `folder`.

    Matrices are normal with deviation 0.02, norm weights 1 + normal with deviation 0.05. One block of random
    numbers serves all tensors, each of which begins at another place in it: drawing billions of numbers would
    take longer than what is measured.
    """
    done = folder / "random.json"  # written last: tells a finished folder from a broken-off one
    made_of = {"config": config, "seed": seed, "dtype": dtype, "writer": 1}
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == made_of:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    _write_json(folder / "config.json", config | {"torch_dtype": dtype, "transformers_version": "4.46.0"})
    _write_tokenizer(folder, config)
    _write_weights(folder, tensor_shapes(config), seed, _DTYPES[dtype])
    _write_json(done, made_of)
    return folder


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, as the family's checkpoints have them."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    query, cache = heads * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        if config["model_type"] == "phi3":
            shapes[at + "self_attn.qkv_proj.weight"] = (query + 2 * cache, hidden)
            shapes[at + "mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        else:
            for name, rows in (("q", query), ("k", cache), ("v", cache)):
                shapes[at + f"self_attn.{name}_proj.weight"] = (rows, hidden)
                if config["model_type"] == "qwen2":
                    shapes[at + f"self_attn.{name}_proj.bias"] = (rows,)
            shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, query)
        shapes[at + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(_BLOCK, dtype=np.float32)
    matrix, norm = _stored(block * 0.02, dtype), _stored(1 + block[: 1 << 16] * 0.05, dtype)
    shards = _shards(shapes, _WIDTH[dtype])
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        index |= dict.fromkeys(shard, name)
        with open(folder / name, "wb") as file:
            file.write(_header(shard, dtype))
            for tensor, shape in shard.items():
                source = norm if tensor.endswith("norm.weight") else matrix
                for piece in _stream(source, int(rng.integers(len(source))), prod(shape)):
                    file.write(piece.view(np.uint8).data)
    if len(shards) > 1:
        total = sum(prod(shape) for shape in shapes.values()) * _WIDTH[dtype]
        metadata = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / "model.safetensors.index.json", metadata)


def _stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """`values` as the file holds them; bfloat16 as uint16, rounded to nearest."""
    if dtype == "BF16":
        return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return values.astype(np.float16) if dtype == "F16" else values


def _stream(source: NDArray[Any], start: int, length: int) -> Iterator[NDArray[Any]]:
    """`length` numbers of `source`, beginning at `start` and going round, in slices without copies."""
    while length:
        piece = source[start : start + length]
        yield piece
        length -= len(piece)
        start = 0


def _shards(shapes: dict[str, tuple[int, ...]], width: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = _SHARD
    for name, shape in shapes.items():
        size = prod(shape) * width
        if size > room and shards[-1]:
            shards.append({})
            room = _SHARD
        shards[-1][name] = shape
        room -= size
    return shards


def _header(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """The head of a safetensors file: length, then JSON (https://github.com/huggingface/safetensors#format)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * _WIDTH[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """A byte-level BPE of a few hundred tokens that takes any text; BOS and EOS at the ids of `config`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    written = json.loads(tokenizer.to_str())
    eos = config["eos_token_id"]
    stops = [eos] if isinstance(eos, int) else eos
    special = {f"<|special_{i}|>": i for i in sorted({config["bos_token_id"], *stops})}
    free = (i for i in count() if i not in special.values())
    learned = written["model"]["vocab"]
    written["model"]["vocab"] = {token: next(free) for token in sorted(learned, key=learned.get)} | special
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    written["added_tokens"] = [{"id": i, "content": token} | flags for token, i in special.items()]
    _write_json(folder / "tokenizer.json", written)
    names = {i: token for token, i in special.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[config["bos_token_id"]],
        "eos_token": names[stops[0]],
        "model_max_length": config["max_position_embeddings"],
        "added_tokens_decoder": {str(i): {"content": token} | flags for token, i in special.items()},
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
