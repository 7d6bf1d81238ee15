import json
from pathlib import Path

import pytest
from decode_onnx import SLICES, Case, bounds, measure, summary
from export_onnx import gochu, size
from random_checkpoint import CONFIGS, write_checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny random checkpoint, exported as the benchmarks do it."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("benchmarks")
    config = CONFIGS["Qwen2.5-0.5B"] | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "bos_token_id": 500,
        "eos_token_id": 501,
    }
    run = gochu(write_checkpoint(folder / "checkpoint", config), folder / "out")
    manifest = (folder / "out" / "manifest.json").stat().st_size  # lists the other files, not itself
    assert json.loads(run.stdout)["bytes"] + manifest == size(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("runtime", ["genai", "gochu"])
def test_each_runtime_times_the_bundle_without_changing_it(exported, runtime):
    pytest.importorskip("onnxruntime")
    if runtime == "genai":
        pytest.importorskip("onnxruntime_genai")
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    found = measure(
        [Case("tiny", runtime, exported, vocabulary=500, prompt=20, new=8)], threads=1, launches=2, rounds=3
    )
    assert {phase: len(rates) for phase, rates in found["tiny"].items()} == {
        "prefill": 6,
        "decode": 6 * SLICES,
    }
    assert all(1 < rate < 1e6 for rates in found["tiny"].values() for rate in rates)
    assert before == {path: path.stat().st_mtime_ns for path in exported.rglob("*")}


def test_a_runtime_that_cannot_load_ends_the_benchmark(tmp_path, capfd):
    with pytest.raises(SystemExit, match="broken: the runtime ended with exit code 1"):
        measure(
            [Case("broken", "gochu", tmp_path, vocabulary=500, prompt=20, new=8)],
            threads=1,
            launches=1,
            rounds=1,
        )
    assert str(tmp_path) in capfd.readouterr().err


def test_ratios_are_taken_within_a_turn_so_that_a_slow_one_does_not_count():
    sizes = {"folder": Path(), "vocabulary": 1, "prompt": 1, "new": 1}
    cases = [Case("theirs", "genai", **sizes), Case("ours", "gochu", **sizes, base="theirs")]
    found = {
        "theirs": {"prefill": [100.0, 10.0, 40.0], "decode": [100.0, 10.0, 40.0]},
        "ours": {"prefill": [120.0, 12.0, 36.0], "decode": [90.0, 9.0, 48.0]},
    }
    rows = summary(cases, found, threads=2)
    assert [row["prefill tok/s"] for row in rows] == [40, 36]
    assert [(bound.value, bound.kept) for bound in bounds(rows)] == [
        (pytest.approx(1.2), True),
        (pytest.approx(0.9), False),
    ]
