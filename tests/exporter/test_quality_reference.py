"""Layers and tensors of what was prepared are held against float weights that were prepared alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter import export
from exporter.checkpoint import Source, open_checkpoint
from exporter.errors import RecipeError, UsageError
from exporter.quality import KINDS, Quality, compare
from exporter.quality_plot import plot
from exporter.quality_sides import Wanted, checkpoint_side
from exporter.quantization.hadamard import Hadamard
from exporter.quantization.recipe import Recipe, Rule
from exporter.safetensors import to_float32

FAMILIES = ("qwen2", "llama-biases", "gemma2")  # a tied head; one apart, and biases; a stream that stays
ENDS = {"embedding", "head"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Any]:
    """The text that judges, as much of it as a bundle's context, and the one that calibrates."""
    folder = tmp_path_factory.mktemp("글")
    judge, calibration = folder / "시험.txt", folder / "보정.txt"
    judge.write_text("작은 고추가 맵다. Small peppers are hot.\n\n" * 8, encoding="utf-8")
    calibration.write_text("\n\n".join(f"고추 {i}개와 {i} plus {i}." for i in range(30)), encoding="utf-8")
    return {"text": judge, "tokens": 100, "calibration": calibration}


@pytest.fixture(scope="module")
def exported(checkpoints, texts, tmp_path_factory) -> Callable[..., Path]:
    """`exported(family, scheme, prepare...)`: a bundle's folder, without the gate, once."""
    made: dict[Any, Path] = {}

    def bundle(*key: str) -> Path:
        if key not in made:
            name, scheme, *prepare = key
            made[key] = tmp_path_factory.mktemp("bundles") / "-".join(key)
            options = {"scheme": scheme, "prepare": tuple(prepare), "context": 128, "format": "onnx"}
            calibration = texts["calibration"] if {"awq", "smoothquant"} & set(prepare) else None
            folder = checkpoints.folder(name)
            export(folder, made[key], calibration=calibration, verify=False, **options)
        return made[key]

    return bundle


def weakest(found: Quality) -> float:
    """Of all tensors and their products."""
    return min(db for tensor in found.tensors for db in (tensor.weights_db, tensor.output_db))


def whole(source: Source, name: str) -> Any:
    matrix = source.matrix(name)
    return to_float32(matrix.rows(0, matrix.shape[0])).astype(np.float64)


@pytest.mark.parametrize("prepare", [("hadamard",), ("awq",), ("smoothquant",), ("hadamard", "awq")])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_rounding_alone_costs(name, prepare, checkpoints, texts):
    """Eight bits lose no more of any tensor, product or layer than they do without, by more than a little."""
    folder = checkpoints.folder(name)
    plain = compare(folder, scheme="int8", **texts)
    found = compare(folder, scheme="int8", prepare=prepare, **texts)
    assert [layer.output_db for layer in found.layers] == pytest.approx(
        [layer.output_db for layer in plain.layers], abs=2
    )
    assert {tensor.kind for tensor in found.tensors} == set(KINDS)
    assert weakest(found) > 43
    assert found.notes == plain.notes == ()
    assert (found.first.prepared, found.second.prepared) == ((), prepare)
    assert found.second.what == f"int8 by rtn after {' and '.join(prepare)}"


def test_a_turned_weight_is_held_against_the_turned_one(checkpoints, texts):
    """By the definition of R1 and R2, written out: W diag(norm) Hᵀ and what an 8-bit grid makes of it."""
    folder = checkpoints.folder("llama-biases")
    found = compare(folder, scheme="int8", prepare=("hadamard",), **texts)
    rows = {tensor.name: tensor for tensor in found.tensors}
    wanted = Wanted(Recipe.uniform("int8", prepare=("hadamard",)))
    with open_checkpoint(folder) as source:
        side = checkpoint_side(source, wanted, Path(), lambda *_: None)
        hidden = source.architecture.hidden
        turn = Hadamard(hidden).columns(np.eye(hidden, dtype=np.float32)).astype(np.float64)
        assert np.abs(turn @ turn.T - np.eye(hidden)).max() < 1e-6
        gain = source.vector("layers.1.mlp_norm")
        turned = {
            "layers.1.mlp.gate": whole(source, "layers.1.mlp.gate") * gain @ turn,
            "layers.0.mlp.down": turn.T @ whole(source, "layers.0.mlp.down"),
            "head": whole(source, "head") * source.vector("final_norm") @ turn,
            "embedding": whole(source, "embedding") @ turn,
        }
        for name, exact in turned.items():
            noise = side.weights.matrix(name).dequantize() - exact
            expected = 10 * np.log10(np.square(exact).sum() / np.square(noise).sum())
            assert rows[name].weights_db == pytest.approx(expected, abs=0.01), name
            assert expected > 35


def test_next_tokens_stay_those_of_the_checkpoint(checkpoints, texts):
    """A preparation that changed the model would be seen: the first model runs as it is."""
    folder = checkpoints.folder("qwen2")
    plain = compare(folder, scheme="int8", **texts)
    found = compare(folder, scheme="int8", prepare=("hadamard",), **texts)
    assert found.first.perplexity == plain.first.perplexity
    exact = compare(folder, scheme="fp32", prepare=("hadamard",), **texts)
    assert abs(exact.kl.mean) < 1e-8
    assert exact.second.perplexity == pytest.approx(plain.first.perplexity, rel=1e-4)
    assert all(tensor.weights_db is tensor.output_db is None for tensor in exact.tensors)  # none is rounded
    assert all(layer.output_db is None for layer in exact.layers)


def test_a_turned_bundle_is_as_the_checkpoint_it_was_made_of(exported, checkpoints, texts):
    folder, bundle = checkpoints.folder("llama-biases"), exported("llama-biases", "int4", "hadamard")
    asked = {"text": texts["text"], "tokens": texts["tokens"]}
    found = compare(folder, bundle, **asked)
    made = compare(folder, scheme="int4", prepare=("hadamard",), activations="onnxruntime", **asked)
    assert found.tensors == made.tensors
    assert found.layers == made.layers
    assert found.notes == made.notes == ()
    assert found.second.prepared == ("hadamard",)
    assert " after hadamard, run by onnxruntime" in found.second.what
    # a bundle in float is turned too, and one that was turned alike is taken as it is
    halves = compare(exported("llama-biases", "fp16"), bundle, **asked)
    alike = compare(exported("llama-biases", "fp16", "hadamard"), bundle, **asked)
    for other in (halves, alike):
        assert [t.weights_db for t in other.tensors] == pytest.approx(
            [t.weights_db for t in made.tensors], abs=0.1
        )
        assert other.notes == ()


def test_scales_that_are_not_known_leave_the_tensors_of_layers_out(exported, checkpoints, texts, tmp_path):
    folder, bundle = checkpoints.folder("qwen2"), exported("qwen2", "int8", "hadamard", "awq")
    asked = {"text": texts["text"], "tokens": texts["tokens"]}
    found = compare(folder, bundle, **asked)
    assert {tensor.name for tensor in found.tensors} == ENDS
    made = compare(folder, scheme="int8", prepare=("hadamard", "awq"), activations="onnxruntime", **texts)
    assert [layer.output_db for layer in found.layers] == pytest.approx(
        [layer.output_db for layer in made.layers],
        abs=1,  # the bundle's scales were found in its context
    )
    for tensor in found.tensors:
        (other,) = (each for each in made.tensors if each.name == tensor.name)
        assert tensor.weights_db == other.weights_db
        assert tensor.output_db == pytest.approx(other.output_db, abs=0.01)
    (note,) = found.notes
    assert note.startswith(f"{bundle} does not say which scales awq folded into its weights: ")
    assert note.endswith("the checkpoint has them, quantized with --prepare awq")
    back = compare(bundle, folder, **asked)
    assert (back.layers, back.tensors) == ((), ())
    plot(found, tmp_path / "그림.svg")
    with pytest.raises(
        UsageError, match=r"nothing to draw by layer: .* was prepared by hadamard and awq and"
    ):
        plot(back, tmp_path / "그림.svg")


def test_what_was_rounded_before_it_is_not_prepared_after(exported, checkpoints, texts):
    quantized, folder = exported("qwen2", "int8"), checkpoints.folder("qwen2")
    turned = compare(quantized, folder, scheme="int8", prepare=("hadamard",), **texts)
    assert (turned.layers, turned.tensors) == ((), ())
    assert turned.kl.mean < 0.01
    assert f"{quantized} was prepared by nothing and " in turned.notes[0]
    assert turned.notes[0].endswith("against the float checkpoint for them")
    scaled = compare(quantized, folder, scheme="int8", prepare=("awq",), **texts)
    assert {tensor.name for tensor in scaled.tensors} == ENDS
    assert scaled.layers
    assert f"{quantized} was rounded without the scales that were folded into " in scaled.notes[0]


# the command line


def test_the_command_prepares(gochu, checkpoints, texts):
    asked = ["quality", checkpoints.folder("qwen2"), "--scheme", "int8", "--prepare", "hadamard, awq"]
    asked += ["--text", texts["text"], "--tokens", 100, "--calibration", texts["calibration"]]
    code, out, err = gochu(*asked, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["second"]["prepared"] == ["hadamard", "awq"]
    assert weakest(Quality.model_validate(found)) > 43
    code, _, err = gochu(*asked)
    assert code == 0, err
    (row,) = [line.split() for line in err.splitlines() if re.match(r" *weights +\d", line)]
    assert len(row) == 8
    assert all(float(figure) > 43 for figure in row[1:])


def test_the_table_without_tensors_of_layers(gochu, exported, checkpoints, texts):
    bundle = exported("qwen2", "int8", "hadamard", "awq")
    folder = checkpoints.folder("qwen2")
    code, _, err = gochu("quality", folder, bundle, "--text", texts["text"], "--tokens", 100)
    assert code == 0, err
    assert "note: " in err
    assert "attention.q" not in err
    assert re.search(r"embedding \d\d\.\d \(weights \d\d\.\d\), head", err)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, UsageError, "give --scheme or --recipe with --prepare"),
        ({"scheme": "fp16", "prepare": ("smoothquant",)}, RecipeError, "smoothquant is for schemes"),
        ({"scheme": "int4", "prepare": ("고추",)}, RecipeError, "there is no preparation '고추'"),
        ({"scheme": "int4", "prepare": ("awq", "smoothquant")}, RecipeError, "use one of them"),
        (
            {"recipe": Recipe(name="r", prepare=("awq",), rules=(Rule(match="*", scheme="int4"),))},
            UsageError,
            "recipe r says itself what it prepares",
        ),
    ],
)
def test_preparations_that_make_no_sense(arguments, error, said, checkpoints, monkeypatch):
    monkeypatch.setattr("exporter.quality_sides.quantize", pytest.fail)  # it is known before
    with pytest.raises(error, match=said) as caught:
        compare(checkpoints.folder("qwen2"), **{"prepare": ("hadamard",), **arguments})
    assert "\n" not in str(caught.value)
