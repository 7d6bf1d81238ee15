"""Bounds on what an export may lose: met and recorded, or missed and nothing left."""

import math

import pytest
import torch

from exporter import export
from exporter.checkpoint import open_checkpoint
from exporter.cli_matrix import Export
from exporter.errors import GateFailed, UsageError
from exporter.quality import TOKENS, compare
from exporter.quality_gate import QualityBounds, _judge, hold
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights

NAME = "qwen2"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the gate takes more, which wait for each other


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles(NAME, "int4")


@pytest.fixture(scope="module")
def checks(bundle, checkpoints):
    """`checks(bounds)`: what they say of a bundle that has lost much: of random weights, at 4 bits."""

    def hold_to(**bounds):
        with open_checkpoint(checkpoints.folder(NAME)) as source:
            return list(hold(bundle, source, QualityBounds(**bounds), pytest.fail))

    return hold_to


def test_bounds_that_are_met_are_recorded(checks, checkpoints, bundle):
    (check,) = checks(max_kl=9, min_agreement=1)
    found = compare(checkpoints.folder(NAME), scheme="int4", activations="onnxruntime")
    assert check.passed
    assert check.figures["kl"] == pytest.approx(found.kl.mean, rel=0.05)  # its context is shorter
    assert check.figures["agreement"] == pytest.approx(found.agreement, abs=5)
    assert (check.figures["kl_bound"], check.figures["agreement_bound"]) == (9, 1)
    assert TOKENS * 0.9 < check.figures["tokens"] < TOKENS
    assert "loses most" not in check.detail


@pytest.mark.parametrize(
    "bounds", [{"max_kl": 0.01}, {"min_agreement": 99}, {"max_kl": 9, "min_agreement": 99}]
)
def test_a_bound_that_is_missed(bounds, checks):
    (check,) = checks(**bounds)
    assert not check.passed
    missed = "(bound 99 %)" if "min_agreement" in bounds else "(bound 0.01)"
    assert all(part in check.detail for part in (missed, "loses most (int4, ", "use --algorithm gptq"))


def test_what_is_no_number_fails(checkpoints, bundle):
    folder = checkpoints.folder(NAME)
    found = compare(folder, scheme="int8", tokens=100)
    (variant,) = bundle.manifest.variants
    assert _judge(found, variant, QualityBounds(max_kl=9)).passed
    lost = found.model_copy(update={"kl": found.kl.model_copy(update={"mean": math.nan})})
    assert not _judge(lost, variant, QualityBounds(max_kl=9)).passed
    assert not _judge(
        found.model_copy(update={"agreement": math.nan}), variant, QualityBounds(None, 1)
    ).passed


def test_what_cannot_be_read_back_is_what_was_written(bundle, checkpoints, monkeypatch, checks):
    (read,) = checks(max_kl=9)
    monkeypatch.setattr("exporter.quality_gate.runs_here", lambda variant: False)
    with open_checkpoint(checkpoints.folder(NAME)) as source:
        decisions = Recipe.uniform("int4").resolve(source.architecture)
        made = hold(bundle, source, QualityBounds(9), lambda: QuantizedWeights(source, decisions))
        assert list(made) == [read]


def test_what_was_prepared_is_held_as_it_was_written(checkpoints, tmp_path, monkeypatch):
    """The same figures from the bundle and, where it cannot be read back, from what it was written from."""
    options = {"scheme": "int4", "context": 128, "format": "onnx", "bounds": QualityBounds(9)}

    def figures(name):
        folder = checkpoints.folder(NAME)
        bundle = export(folder, tmp_path / name, prepare=("hadamard",), **options)
        return bundle.manifest.gate.checks[-1].figures

    read = figures("read")
    monkeypatch.setattr("exporter.quality_gate.runs_here", lambda variant: False)
    assert figures("unread") == read


def test_what_loses_most_is_told_of_what_was_prepared(checkpoints, tmp_path):
    """Rounding to 4 bits loses about 20 dB; against weights that were not prepared it would be all."""
    text = tmp_path / "보정.txt"
    text.write_text("\n\n".join(f"고추 {i}개와 {i} plus {i}." for i in range(30)), encoding="utf-8")
    options = {"scheme": "int4", "prepare": ("hadamard", "awq"), "calibration": text}
    folder = checkpoints.folder(NAME)
    with pytest.raises(GateFailed) as caught:
        export(folder, tmp_path / "out", context=256, format="onnx", bounds=QualityBounds(1e-6), **options)
    worst = compare(folder, activations="onnxruntime", **options).worst()
    assert worst.name.startswith("layers.")
    assert worst.output_db > 15
    assert f"{worst.name} loses most (int4, {worst.output_db:.1f} dB)" in str(caught.value)


def test_an_export_that_misses_leaves_nothing(checkpoints, tmp_path, gochu):
    asked = ["export", checkpoints.folder(NAME), "--scheme", "int4", "--format", "onnx", "--context", 128]
    code, out, err = gochu(*asked, "--max-kl", 0.01, "-o", tmp_path / "out")
    assert (code, out) == (4, "")
    assert err.startswith("gochu: the gate failed at quality: onnx-int4 is ")
    assert err.count("\n") == 1
    assert "the bundle must not be used" in err
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_keeps_them_says_so(checkpoints, tmp_path):
    bounds = QualityBounds(0.001, 99)
    bundle = export(checkpoints.folder(NAME), tmp_path / "out", scheme="fp16", context=128, bounds=bounds)
    assert bundle.manifest.gate.status == "passed"
    check = bundle.manifest.gate.checks[-1]
    assert (check.name, check.passed) == ("quality", True)
    assert 0 < check.figures["kl"] < 0.001
    assert check.figures["agreement"] > 99


def test_pepper_at_8_bits_is_pepper(bundles):
    with open_checkpoint("pepper") as source:
        (check,) = hold(bundles("pepper", "int8"), source, QualityBounds(0.001, 98), pytest.fail)
    assert check.passed, check.detail
    assert check.figures["kl"] > 0


def test_a_matrix_exports_with_bounds(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("exporter.pipeline.export", lambda *_, **options: given.update(options))
    Export(output=str(tmp_path / "out"), min_agreement=97).make()
    assert given["bounds"] == QualityBounds(None, 97)
    assert "min_agreement" not in given


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-kl", "0"], "a bound of 0 on the KL divergence"),
        (["--max-kl", "nan"], "a bound of nan"),
        (["--min-agreement", "101"], "a bound of 101 % on the agreement"),
        (["--max-kl", "0.1", "--no-verify"], "without --no-verify"),
    ],
)
def test_bounds_that_say_nothing(options, said, gochu, tmp_path):
    code, out, err = gochu("export", "pepper", *options, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_bound_is_no_check():
    assert not QualityBounds()
    assert QualityBounds(0.1)
    assert QualityBounds(None, 97)
    with pytest.raises(UsageError):
        QualityBounds(math.inf)
