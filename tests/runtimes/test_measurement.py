"""Measuring: workloads, figures, the memory of the process, the table."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes import cpu, memory, report
from runtimes.errors import EngineError, UsageError
from runtimes.measurement import Measurement, quantile, sampled
from runtimes.targets import host
from runtimes.workload import Case, Workload, preset, prompt_ids

SMALL = Workload(name="small", cases=(Case(prompt_tokens=8, new_tokens=4),), repeats=3)


@pytest.fixture(scope="module")
def measurement(toy: Path) -> Measurement:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    (found,) = host.measure(toy, SMALL, threads=1)
    return found


def test_what_where_and_how(measurement: Measurement, toy: Path) -> None:
    assert (measurement.what.model, measurement.what.variant, measurement.what.format) == (
        "toy",
        "cpu",
        "onnx",
    )
    assert measurement.what.bytes == sum((toy / f).stat().st_size for f in ("model.onnx", "model.onnx.data"))
    assert measurement.where.target == "host"
    assert measurement.where.device == cpu.name()
    assert measurement.where.engine.startswith("onnxruntime 1.")
    assert measurement.where.threads == 1
    assert (measurement.how.prompt_tokens, measurement.how.new_tokens, measurement.how.context) == (8, 4, 96)
    assert measurement.command == "gochu bench toy --workload small --threads 1"


def test_figures(measurement: Measurement) -> None:
    for name, unit, samples in (
        ("load_time", "s", 1),
        ("ttft", "s", 3),
        ("prefill_speed", "tokens/s", 3),
        ("decode_speed", "tokens/s", 3),
    ):
        figure = measurement.figure(name)
        assert (figure.unit, figure.kind, len(figure.samples)) == (unit, "measured", samples)
        assert 0 < figure.p5 <= figure.value <= figure.p95
    assert measurement.figure("battery") is None
    ttft, speed = measurement.figure("ttft"), measurement.figure("prefill_speed")
    assert min(ttft.samples) >= 8 / max(speed.samples), "the first token comes after the prompt has been run"


@pytest.mark.skipif(memory.anonymous() is None, reason="this system does not tell the kinds of memory")
def test_memory_is_plausible(measurement: Measurement) -> None:
    peak, private, idle = (
        measurement.figure(n).value for n in ("peak_memory", "peak_anonymous_memory", "idle_memory")
    )
    assert 5e6 < idle <= private <= peak < 1e9


def test_measurements_survive_json(measurement: Measurement) -> None:
    (data,) = json.loads(report.to_json([measurement]))
    assert Measurement.model_validate(data) == measurement
    assert data["schema_version"] == 2


def test_the_table(measurement: Measurement) -> None:
    from rich.console import Console

    text = io.StringIO()
    noted = measurement.model_copy(
        update={"how": measurement.how.model_copy(update={"notes": ("prompt cut",)})}
    )
    report.show([noted], Console(file=text, width=160))
    shown = text.getvalue()
    for part in ("toy cpu", "8 → 4", "TTFT", "MB", "onnxruntime 1.", "prompt cut", "±"):
        assert part in shown


def test_a_bundle_that_fails_is_one_sentence(copy: Path, rewrite: Callable) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    (copy / "model.onnx.data").write_bytes(b"")
    rewrite(copy)
    with pytest.raises(
        EngineError, match=r"^ONNX Runtime cannot load variant cpu .*export the bundle again$"
    ):
        host.measure(copy, SMALL, threads=1)


def test_wrong_use(toy: Path) -> None:
    with pytest.raises(UsageError, match="smoke, standard"):
        host.measure(toy, "enormous")
    with pytest.raises(UsageError, match="at least 1"):
        host.measure(toy, SMALL, threads=0)
    with pytest.raises(UsageError, match="holds 1 to 96"):
        host.measure(toy, SMALL, context=1000)


@pytest.mark.skipif(memory.anonymous() is None, reason="this system does not tell the kinds of memory")
def test_the_peak_of_anonymous_memory_is_seen() -> None:
    """In a process of its own: what other tests left behind would be counted too."""
    code = "import numpy as np; from runtimes import memory; before = memory.anonymous()\n"
    code += "with memory.Peak() as peak: block = np.ones(64 << 20, np.uint8); del block; small = memory.anonymous()\n"
    code += "print(before, small, peak.anonymous, peak.mapped, memory.peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, small, anonymous, mapped, resident = map(int, done.stdout.split())
    assert small < before + (32 << 20) < before + (48 << 20) < resident
    assert small - (1 << 20) < anonymous <= resident  # the kernel counts pages in batches
    assert 1 << 20 < mapped < resident


def test_presets() -> None:
    assert [(c.prompt_tokens, c.new_tokens) for c in preset("standard").cases] == [
        (64, 128),
        (256, 128),
        (1024, 128),
    ]
    assert preset("smoke").cases[0].prompt_tokens < 64


def test_cases_are_clipped_to_the_context() -> None:
    cases = preset("standard").clipped(512)
    assert [(c.prompt_tokens, c.new_tokens) for c, _ in cases] == [(64, 128), (256, 128), (384, 128)]
    assert [bool(note) for _, note in cases] == [False, False, True]
    assert "cut from 1024 tokens to fit the context of 512" in cases[2][1]
    assert len(preset("standard").clipped(256)) == 2, "two cases that become the same are one"
    with pytest.raises(UsageError, match="needs a context of 129"):
        preset("standard").clipped(128)


@given(context=st.integers(1, 3000))
def test_clipped_cases_fit(context: int) -> None:
    if context < 129:
        return
    for case, _ in preset("standard").clipped(context):
        assert case.prompt_tokens + case.new_tokens <= context


def test_prompts_are_the_same_each_time() -> None:
    assert prompt_ids(100, 300) == prompt_ids(100, 300)
    assert prompt_ids(100, 300) != prompt_ids(100, 300, seed=1)
    assert all(0 <= i < 300 for i in prompt_ids(1000, 300))


@given(samples=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), q=st.floats(0, 1))
def test_quantiles_are_numpys(samples: list[float], q: float) -> None:
    assert quantile(samples, q) == pytest.approx(np.quantile(samples, q), rel=1e-9, abs=1e-9)


def test_a_figure_is_the_median_with_its_samples() -> None:
    figure = sampled("ttft", "s", [3.0, 1.0, 2.0])
    assert (figure.value, figure.samples) == (2.0, (3.0, 1.0, 2.0))
    assert 1 < figure.p5 < 2 < figure.p95 < 3


def test_the_cpu() -> None:
    import os

    assert cpu.name()
    assert 1 <= cpu.default_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(
    not hasattr(__import__("os"), "sched_getaffinity"), reason="Linux tells which CPUs may be used"
)
def test_threads_are_for_fast_cores_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A phone's chip: four slow cores, three fast and one fastest; two hardware threads on the last two."""
    capacities = [250, 250, 250, 250, 800, 800, 900, 1024]
    siblings = ["0", "1", "2", "3", "4", "5", "6-7", "6-7"]
    for i, (capacity, sibling) in enumerate(zip(capacities, siblings, strict=True)):
        (tmp_path / f"cpu{i}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{i}/cpu_capacity").write_text(f"{capacity}\n", encoding="ascii")
        (tmp_path / f"cpu{i}/topology/thread_siblings_list").write_text(f"{sibling}\n", encoding="ascii")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cpu, "_SYSFS", tmp_path)
    monkeypatch.setattr(cpu, "_quota", lambda: None)
    assert cpu.default_threads() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert cpu.default_threads() == 2
    monkeypatch.setattr(cpu, "_quota", lambda: 0.5)
    assert cpu.default_threads() == 1
