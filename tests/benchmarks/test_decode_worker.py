import json
import sys
from pathlib import Path

import pytest
from common import run_or_stop
from decode_onnx import Case, bounds, summary
from export_onnx import gochu, size
from random_checkpoint import CONFIGS, write_checkpoint

WORKER = Path(__file__).parents[2] / "benchmarks" / "decode_worker.py"


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
    assert json.loads(run.stdout)["bytes"] == size(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("runtime", ["genai", "gochu"])
def test_each_runtime_times_the_bundle_without_changing_it(exported, runtime):
    pytest.importorskip("onnxruntime")
    if runtime == "genai":
        pytest.importorskip("onnxruntime_genai")
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    options = ["--threads=1", "--prompt=20", "--new=8", "--repeats=3", "--vocabulary=512"]
    seconds = json.loads(run_or_stop([sys.executable, str(WORKER), runtime, str(exported), *options]).stdout)
    assert [len(seconds[phase]) for phase in ("prefill_s", "decode_s")] == [3, 3]
    assert all(0 < value < 5 for phase in seconds.values() for value in phase)
    assert before == {path: path.stat().st_mtime_ns for path in exported.rglob("*")}


def test_ratios_are_taken_within_a_round_so_that_a_slow_round_does_not_count():
    sizes = {"folder": Path(), "vocabulary": 1, "prompt": 1, "new": 1}
    cases = [Case("theirs", "genai", **sizes), Case("ours", "gochu", **sizes, base="theirs")]
    found = {
        "theirs": [{"prefill": x, "decode": x} for x in (100.0, 10.0, 100.0)],
        "ours": [{"prefill": x, "decode": 0.9 * x} for x in (120.0, 12.0, 120.0)],
    }
    rows = summary(cases, found, threads=2)
    assert rows[1]["prefill ratio"] == pytest.approx(1.2)
    assert [(bound.value, bound.kept) for bound in bounds(rows)] == [
        (pytest.approx(1.2), True),
        (pytest.approx(1.08), True),
    ]
