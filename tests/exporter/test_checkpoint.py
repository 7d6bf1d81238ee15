"""Checkpoints on disk: shards, dtypes, canonical tensors; and every way in which one can be wrong."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import CheckpointError, UnsupportedArchitecture
from exporter.safetensors import to_float32


def everything(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All weights as float32 by canonical name."""
    arch = checkpoint.architecture
    found: dict[str, np.ndarray] = {}
    for name, shape in arch.matrices():
        matrix = checkpoint.matrix(name)
        assert matrix.shape == shape
        found[name] = to_float32(matrix.rows(0, shape[0]))
    for name, length in arch.vectors():
        found[name] = checkpoint.vector(name)
        assert found[name].shape == (length,)
    return found


def test_shards_give_the_same_tensors(checkpoints, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    checkpoints.write(one, "phi3-longrope")
    checkpoints.write(many, "phi3-longrope", shard="200KB")
    assert len(list(many.glob("model-*.safetensors"))) > 3
    with open_checkpoint(one) as whole, open_checkpoint(many) as sharded:
        expected, found = everything(whole), everything(sharded)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_are_read_exactly(checkpoints, tmp_path, dtype):
    model = checkpoints.write(tmp_path / dtype, "gemma2", dtype=dtype)
    theirs = {name: value.float().numpy() for name, value in model.state_dict().items()}
    with open_checkpoint(tmp_path / dtype) as checkpoint:
        ours = everything(checkpoint)
    np.testing.assert_array_equal(ours["embedding"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(ours["layers.1.mlp.down"], theirs["model.layers.1.mlp.down_proj.weight"])
    # Gemma's norms multiply by 1 + weight
    np.testing.assert_array_equal(
        ours["layers.1.mlp_norm"], theirs["model.layers.1.pre_feedforward_layernorm.weight"] + np.float32(1)
    )


def test_the_same_values_in_any_dtype_quantize_alike(checkpoints, tmp_path):
    """bfloat16 widened to float32 is the same number: so are its integers and scales."""
    from exporter.quantization.recipe import Recipe
    from exporter.quantization.weights import QuantizedWeights

    checkpoints.write(tmp_path / "bfloat16", "llama-biases", dtype="bfloat16")
    wide = tmp_path / "float32"
    shutil.copytree(tmp_path / "bfloat16", wide)
    tensors = {name: value.float() for name, value in load_file(wide / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors")
    digests = []
    for folder in (tmp_path / "bfloat16", wide):
        with open_checkpoint(folder) as checkpoint:
            arch = checkpoint.architecture
            weights = QuantizedWeights(checkpoint, Recipe.uniform("int4").resolve(arch))
            digests.append([weights.matrix(name).digest() for name, _ in arch.matrices()])
    assert digests[0] == digests[1]


def test_fused_tensors_are_split_by_rows(checkpoints):
    theirs = checkpoints.model("phi3-longrope").state_dict()
    with open_checkpoint(checkpoints.folder("phi3-longrope")) as checkpoint:
        ours = everything(checkpoint)
    for linears, fused in {
        "attention.q attention.k attention.v": "self_attn.qkv_proj",
        "mlp.gate mlp.up": "mlp.gate_up_proj",
    }.items():
        joined = np.concatenate([ours[f"layers.2.{name}"] for name in linears.split()])
        np.testing.assert_array_equal(joined, theirs[f"model.layers.2.{fused}.weight"].numpy())


def test_row_blocks_join_to_the_whole(checkpoints):
    with open_checkpoint(checkpoints.folder("phi3-longrope")) as checkpoint:
        matrix = checkpoint.matrix("layers.0.attention.k")
        rows = matrix.shape[0]
        parts = [matrix.rows(i, min(i + 7, rows)) for i in range(0, rows, 7)]
        np.testing.assert_array_equal(np.concatenate(parts), matrix.rows(0, rows))


def test_the_fingerprint_changes_with_the_checkpoint(checkpoints, tmp_path):
    folder = tmp_path / "a"
    checkpoints.write(folder, "qwen2")
    first = Checkpoint(folder, "a").fingerprint()
    assert Checkpoint(folder, "a").fingerprint() == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    assert Checkpoint(folder, "a").fingerprint() != first


def test_old_rotary_buffers_are_ignored(damage):
    folder = damage(add={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    open_checkpoint(folder)


def test_a_tied_head_that_is_stored_too_is_ignored(damage):
    folder = damage("qwen2", add={"lm_head.weight": torch.ones(512, 64)})
    open_checkpoint(folder)


@pytest.fixture
def damage(checkpoints, tmp_path) -> Callable[..., Path]:
    """`damage(family, add=..., drop=..., config=...)`: a copy of a tiny checkpoint, changed."""

    def make(
        family: str = "llama-linear-rope",
        add: dict[str, torch.Tensor] | None = None,
        drop: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoints.folder(family), folder)
        if add or drop:
            tensors = load_file(folder / "model.safetensors") | (add or {})
            tensors.pop(drop or "", None)
            save_file(tensors, folder / "model.safetensors")
        if config:
            path = folder / "config.json"
            path.write_text(
                json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8"
            )
        return folder

    return make


def refused(folder: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_missing_tensor(damage):
    refused(damage(drop="model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing")


def test_misshapen_tensor(damage):
    refused(damage(add={"model.layers.1.mlp.up_proj.weight": torch.ones(200, 127)}), r"\[200, 127\]")


def test_transposed_tensor(damage):
    refused(damage(add={"model.layers.1.mlp.up_proj.weight": torch.ones(128, 200)}), r"\[200, 128\]")


def test_extra_tensor(damage):
    folder = damage(add={"model.layers.0.self_attn.q_norm.weight": torch.ones(32)})
    refused(folder, "q_norm.weight has no place")


def test_more_layers_than_the_config_says(damage):
    refused(damage(config={"num_hidden_layers": 2}), "layers.2.* has no place in a llama decoder of 2 layers")


def test_unexpected_bias(damage):
    refused(damage(add={"model.layers.0.mlp.up_proj.bias": torch.ones(200)}), "bias has no place")


def test_integer_weights(damage):
    folder = damage(add={"model.layers.1.mlp.up_proj.weight": torch.ones(200, 128, dtype=torch.int8)})
    refused(folder, "is I8")


def test_truncated_file(damage):
    folder = damage()
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    refused(folder, "cut off or damaged")


def test_no_config(damage):
    folder = damage()
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "null", "\ufeff{}", "[" * 100_000])
def test_config_that_is_not_a_table(damage, text):
    folder = damage()
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, "not JSON|not a JSON table")


def test_config_that_is_not_utf8(damage):
    folder = damage()
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refused(folder, "not JSON")


def test_no_weights(damage):
    folder = damage()
    (folder / "model.safetensors").unlink()
    refused(folder, "no safetensors files")


class Explosive:
    """Unpickling this raises: proof that nobody did."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(damage, name):
    folder = damage()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Explosive()))
    refused(folder, f"{name}, a pickle.*never opens")


def test_a_file_in_place_of_a_folder(damage):
    refused(damage() / "model.safetensors", "is a file")


@pytest.mark.parametrize("name", ["no/such/folder", "nothing-here", "../x/y/z", ""])
def test_no_such_checkpoint(name):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint|repository"):
        open_checkpoint(name or "/nowhere/at/all")


@pytest.fixture
def sharded(checkpoints, tmp_path) -> Path:
    checkpoints.write(tmp_path / "sharded", "qwen2", shard="100KB")
    return tmp_path / "sharded"


def index(folder: Path, **changes: str | None) -> None:
    """Change an index's weight_map; None removes."""
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["weight_map"] = {k: v for k, v in (data["weight_map"] | changes).items() if v is not None}
    path.write_text(json.dumps(data), encoding="utf-8")


def test_missing_shard(sharded):
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(sharded, f"{lost.name} is missing")


def test_missing_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "no model.safetensors.index.json")


def test_index_that_names_a_tensor_which_is_not_there(sharded):
    index(sharded, **{"model.layers.9.x": sorted(p.name for p in sharded.glob("model-*.safetensors"))[0]})
    refused(sharded, "does not hold model.layers.9.x")


@pytest.mark.parametrize(
    "place",
    ["../model.safetensors", "/etc/passwd", "weights.bin", "", "a/b.safetensors", "..", "\0.safetensors"],
)
def test_index_that_leads_elsewhere(sharded, place):
    index(sharded, **{"model.norm.weight": place})
    refused(sharded, "not a safetensors file beside it|is missing")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    refused(sharded, "weight_map|not a JSON table|not JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite(damage, value):
    folder = damage(add={"model.norm.weight": torch.full((128,), value)})
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="NaN or infinite"):
        checkpoint.vector("final_norm")


def test_unknown_family(damage):
    with pytest.raises(UnsupportedArchitecture, match="mamba"):
        open_checkpoint(damage(config={"model_type": "mamba"}))
