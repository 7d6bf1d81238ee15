import json

import numpy as np
import pytest
import random_checkpoint
from random_checkpoint import CONFIGS, tensor_shapes, write_checkpoint
from safetensors import safe_open
from tokenizers import Tokenizer

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
IDS = {"bos_token_id": 500, "eos_token_id": [501, 502]}


def tiny(shape, **changes):
    return CONFIGS[shape] | TINY | IDS | changes


@pytest.mark.parametrize("shape", ["Qwen2.5-0.5B", "Llama-3.2-1B", "Phi-3-mini-4k"])
def test_transformers_loads_every_weight_of_a_folder(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "c", tiny(shape, pad_token_id=None))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("작은 고추 hot")["input_ids"]) == "작은 고추 hot"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (500, 501)


@pytest.mark.parametrize(
    ("shape", "parameters"),  # as the model cards have them, tied heads counted once
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Phi-3-mini-4k", 3_821_079_552),
    ],
)
def test_shapes_have_the_published_number_of_parameters(shape, parameters):
    assert sum(int(np.prod(s)) for s in tensor_shapes(CONFIGS[shape]).values()) == parameters


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_weights_have_the_dtype_and_the_spread_of_a_trained_model(tmp_path, dtype, stored):
    folder = write_checkpoint(tmp_path / "c", tiny("Llama-3.2-1B"), dtype=dtype)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == stored
        assert abs(file.get_tensor("model.norm.weight").float().mean() - 1) < 0.05
        matrix = file.get_tensor("model.embed_tokens.weight").float()
    assert abs(matrix.std() - 0.02) < 0.001
    assert len(matrix.unique(dim=0)) == len(matrix)  # no two rows alike: they would be two equal tokens


def test_a_seed_gives_the_same_weights_and_another_gives_others(tmp_path):
    config = tiny("Qwen2.5-0.5B")
    first, again, other = (
        (write_checkpoint(tmp_path / name, config, seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_large_checkpoints_come_in_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(random_checkpoint, "_SHARD", 100_000)
    config = tiny("Phi-3-mini-4k")
    folder = write_checkpoint(tmp_path / "c", config)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    for name, shape in tensor_shapes(config).items():
        with safe_open(folder / index["weight_map"][name], "np") as file:
            assert tuple(file.get_slice(name).get_shape()) == shape


def test_a_finished_folder_is_kept_and_a_broken_off_one_is_written_anew(tmp_path):
    config = tiny("Llama-3.2-1B")
    folder = write_checkpoint(tmp_path / "c", config)
    weights = folder / "model.safetensors"
    whole, written = weights.read_bytes(), weights.stat().st_mtime_ns
    write_checkpoint(folder, config)
    assert weights.stat().st_mtime_ns == written
    (folder / "random.json").unlink()
    weights.write_bytes(whole[:100])
    write_checkpoint(folder, config)
    assert weights.read_bytes() == whole


def test_special_tokens_stand_at_the_ids_of_the_config_even_among_the_learned_ones(tmp_path):
    folder = write_checkpoint(tmp_path / "c", tiny("Phi-3-mini-4k", bos_token_id=1, eos_token_id=500))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.id_to_token(1) == "<|special_1|>"
    assert tokenizer.encode("<|special_1|>a<|special_500|>").ids[::2] == [1, 500]
    vocabulary = tokenizer.get_vocab()
    assert len(set(vocabulary.values())) == len(vocabulary)
    assert tokenizer.decode(tokenizer.encode("하나, two").ids) == "하나, two"
