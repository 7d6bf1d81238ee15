import json
from functools import cache
from pathlib import Path

import pytest
from decode_onnx import SLICES, Case, bounds, measure, summary
from export_onnx import gochu, size

NEEDS = {"genai": "onnxruntime_genai", "gochu": "onnxruntime", "executorch-runner": "executorch"}


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint, exported as the benchmarks do it into the format that this function is told."""
    folder = tmp_path_factory.mktemp("benchmarks")

    @cache
    def export(format):
        pytest.importorskip(format)
        out = folder / format
        run = gochu(tiny_checkpoint, out, more=("--format", format))
        manifest = (out / "manifest.json").stat().st_size  # lists the other files, not itself
        assert json.loads(run.stdout)["bytes"] + manifest == size(out)
        return out

    return export


@pytest.mark.parametrize(
    ("runtime", "format", "launches"),  # to load executorch takes seconds
    [
        ("genai", "onnx", 2),
        ("gochu", "onnx", 2),
        ("gochu", "executorch", 1),
        ("executorch-runner", "executorch", 1),
    ],
)
def test_each_runtime_times_the_bundle_without_changing_it(exported, runtime, format, launches, capfd):
    pytest.importorskip(NEEDS[runtime])
    folder = exported(format)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    case = Case("tiny", runtime, folder, vocabulary=500, prompt=20, new=SLICES * 10)
    found = measure([case], threads=1, launches=launches, rounds=3)
    assert {phase: len(rates) for phase, rates in found["tiny"].items()} == {
        "prefill": 3 * launches,
        "decode": 3 * launches * SLICES,
    }
    assert all(1 < rate < 1e6 for rates in found["tiny"].values() for rate in rates)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert capfd.readouterr().out == ""


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
