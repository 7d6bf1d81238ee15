"""Measuring: workloads, figures, the memory of the process, the table."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented_results import case as invented

from runtimes import cpu, measuring, memory, report
from runtimes.errors import EngineError, ResultsError, UsageError
from runtimes.measurement import Measurement, append, quantile, read, sampled
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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two measurements of which one has Korean in it."""
    path = tmp_path / "새 폴더/결과.jsonl"
    append(path, [invented("갤럭시 S23", 64), invented("iPhone 16 Pro", 256)])
    return path


def test_results_are_read_as_they_were_added(file: Path) -> None:
    append(file, [invented("Galaxy S24 Ultra", 1024)])
    assert file.read_bytes().count(b"\n") == 3
    assert read(file) == [
        invented(*each) for each in (("갤럭시 S23", 64), ("iPhone 16 Pro", 256), ("Galaxy S24 Ultra", 1024))
    ]
    assert read(file)[0].where.device == "갤럭시 S23"


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_last_line_that_was_cut_off_is_left_out_and_spoils_nothing(file: Path, cut: int) -> None:
    """A cut in the middle of a Korean letter too."""
    file.write_bytes(file.read_bytes()[: -1 - cut])
    assert read(file) == [invented("갤럭시 S23", 64)]
    append(file, [invented("갤럭시 S23", 256)])
    assert read(file) == [invented("갤럭시 S23", 64), invented("갤럭시 S23", 256)]


def test_a_last_line_without_its_end_is_whole(file: Path) -> None:
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert len(read(file)) == 2
    append(file, [invented("갤럭시 S23", 256)])
    assert len(read(file)) == 3


def test_a_line_cut_in_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, [invented("갤럭시 S23", 64)])
    whole = path.read_bytes()
    path.write_bytes(whole + '{"device": "갤'.encode()[:-1])
    append(path, [invented("갤럭시 S23", 64)])
    assert path.read_bytes() == 2 * whole


def test_the_list_that_bench_prints_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(report.to_json([invented("갤럭시 S23", 64)]), encoding="utf-8")
    assert read(path) == [invented("갤럭시 S23", 64)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace('"schema_version":2', '"schema_version":1', 1),
            r"line 1 has schema version 1",
        ),
        (lambda text: text.replace('"figures"', '"numbers"', 1), r"line 1 is no measurement: figures: "),
        (lambda text: "not JSON\n" + text, r"line 1 is not JSON"),
        (lambda text: text.replace("\n", "\n[]\n", 1), r"line 2 has schema version None"),
        (lambda text: "[" * 100_000, r"is not JSON"),
        (lambda text: "[1]", r"has schema version None"),
    ],
)
def test_what_is_no_result_is_named_with_its_line(
    file: Path, change: Callable[[str], str], words: str
) -> None:
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ResultsError, match=words):
        read(file)


def test_files_that_cannot_be_read_or_written(file: Path, gochu: Callable) -> None:
    file.write_bytes("결과".encode("euc-kr"))
    with pytest.raises(ResultsError, match="it is not text in UTF-8"):
        read(file)
    with pytest.raises(ResultsError, match="No such file"):
        read(file.with_name("none.jsonl"))
    with pytest.raises(ResultsError, match=r"cannot be added to .*; name another file"):
        append(file.parent, [invented("갤럭시 S23", 64)])
    code, out, err = gochu("report", file)
    assert (code, out, err.count("\n")) == (3, "", 1)


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("pp512", [(512, 1)]),
        ("tg128", [(1, 128)]),
        ("pp512+tg128", [(512, 128)]),
        ("pp512tg128", [(512, 128)]),
        ("pp64,tg8,pp64", [(64, 1), (1, 8)]),
    ],
)
def test_llama_benchs_names(name: str, cases: list[tuple[int, int]]) -> None:
    found = preset(name)
    assert [(c.prompt_tokens, c.new_tokens) for c in found.cases] == cases
    assert found.name == name


@pytest.mark.parametrize(
    "name",
    ["", ",", "pp", "pp0", "tg-1", "pp512,", "PP512", "pp512 tg1", "pp99999999", "smoke,pp1", "tg1pp1"],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"there is no workload .*smoke, standard, sustained"):
        preset(name)


def test_a_run_of_minutes_is_repeated_until_they_are_over(toy: Path) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    workload = SMALL.model_copy(update={"minutes": 0.3 / 60, "repeats": 1, "cool_down": 0.01})
    (found,) = host.measure(toy, workload, threads=1)
    speed = found.figure("decode_speed")
    assert len(speed.samples) == len(speed.times) > 3
    assert speed.times[0] == 0
    assert list(speed.times) == sorted(speed.times)
    assert 0.2 < speed.times[-1] < 0.3, "the last one began before the time was over"
    assert (found.how.sustained_minutes, found.how.cool_down) == (0.3 / 60, 0.01)
    assert found.figure("load_time").times == ()


def test_runs_that_became_slower_are_marked() -> None:
    steady, slower = [1.0] * 20, [1.0] * 10 + [1.2] * 10
    assert not measuring.slowed(steady)
    assert measuring.slowed(slower)
    assert not measuring.slowed(slower[::-1]), "faster is not throttled"
    assert not measuring.slowed([1.0] * 10 + [1.09] * 10)
    assert not measuring.slowed([1.0, 9.0]), "too few to say"
    assert not measuring.slowed([1.0] * 19 + [9.0]), "one outlier is none"

    def marks(times: tuple[float, ...], decode: list[float], interrupted: bool = False) -> tuple[str, ...]:
        memory = dict.fromkeys(("peak_memory", "peak_anonymous_memory", "peak_mapped_memory", "idle_memory"))
        return measuring.marks(
            measuring.Samples(
                load=1.0,
                prefill=(1.0,) * 20,
                first_token=(1.0,) * 20,
                decode=tuple(decode),
                times=times,
                engine="e",
                interrupted=interrupted,
                **memory,
            )
        )

    times = tuple(map(float, range(20)))
    assert marks(times, slower) == ("throttled",)
    assert marks((), slower) == (), "only a sustained run can tell"
    assert marks(times, []) == (), "prompts alone: their own times, which are steady"
    assert marks(times, slower, True) == ("interrupted", "throttled")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_an_interrupted_run_is_kept_with_its_mark(toy: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the command and the process that measures, here in the middle of minutes.

    The toy's context is too short for `sustained`, so it is given a shorter prompt and answer; and the measuring
    process tells of each run in a file, for the signal to come when there are some.
    """
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    out, told = tmp_path / "결과.jsonl", tmp_path / "told"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'runtimes.targets.host' in sys.orig_argv:\n"
        "    from runtimes import measuring\n"
        "    once = measuring._once\n"
        "    def telling(*arguments):\n"
        "        found = once(*arguments)\n"
        f"        open({str(told)!r}, 'a').write('.')\n"
        "        return found\n"
        "    measuring._once = telling\n",
        encoding="utf-8",
    )
    code = (
        "from runtimes import workload\n"
        "cases = workload.preset('pp8+tg4').cases\n"
        "shorter = [w.model_copy(update={'cases': cases}) for w in workload._PRESETS if w.name == 'sustained']\n"
        "workload._PRESETS = shorter\n"
        "from exporter.cli import main\n"
        "main()"
    )
    root = Path(measuring.__file__).parents[1]
    command = ["bench", str(toy), "--workload", "sustained", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(root))), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # a terminal's group of processes
    )
    try:
        for _ in range(1200):
            if (told.exists() and told.stat().st_size > 3) or process.poll() is not None:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        printed, complained = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, complained
    assert printed == ""
    assert "interrupted" in complained
    (found,) = read(out)
    assert "interrupted" in found.marks
    assert len(found.figure("decode_speed").samples) >= 1
    assert found.how.sustained_minutes == 10
