"""Tracing: time by operator, in both formats; how it is shown and drawn."""

import importlib.metadata
import io
import itertools
import json
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runtimes import report
from runtimes.bundle import Bundle, Choice
from runtimes.errors import EngineError, MissingExtra, UsageError
from runtimes.measurement import Place, Subject
from runtimes.measuring import run_apart
from runtimes.trace import (
    FRAMEWORK,
    PREFILLS,
    Job,
    Operator,
    Phase,
    Trace,
    _undisturbed,
    run,
    trace,
    trace_workload,
)
from runtimes.workload import Case, Workload

PROMPT, NEW = 24, 9


def traces_itself() -> bool:
    """Whether the ExecuTorch that is installed has hooks for tracing."""
    try:
        version = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= (1, 5)


needs_hooks = pytest.mark.skipif(not traces_itself(), reason="needs executorch 1.5, whose runtime can trace")


@pytest.fixture(scope="module")
def onnx(bundles) -> Path:
    return bundles("pepper", "int4").path


@pytest.fixture(scope="module")
def of_onnx(onnx) -> Trace:
    return trace(onnx, prompt_tokens=PROMPT, new_tokens=NEW, threads=1)


@pytest.fixture(scope="module")
def executorch(bundles) -> Path:
    pytest.importorskip("executorch", reason="runs a .pte")
    return bundles("pepper", "int4", format="executorch").path


@pytest.fixture(scope="module")
def of_executorch(executorch) -> Trace:
    return trace(executorch, prompt_tokens=PROMPT, new_tokens=NEW, threads=1)


@pytest.fixture
def invented() -> Trace:
    """A trace whose figures are known."""

    def phase(name: str, tokens: int, *operators: tuple[str, int, float]) -> Phase:
        total = sum(seconds for _, _, seconds in operators)
        made = [
            Operator(name=name, calls=calls, total=seconds, median=seconds / calls, share=seconds / total)
            for name, calls, seconds in operators
        ]
        return Phase(
            name=name,
            passes=2,
            left_out=1,
            tokens=tokens,
            traced=total / 2,
            untraced=total / 4,
            total=total,
            operators=made,
        )

    return Trace(
        what=Subject(model="작은고추", bundle="0" * 64, variant="cpu", format="onnx", scheme="int4", bytes=1),
        where=Place(target="host", device="a chip", os="an OS", engine="an engine 1", threads=2),
        prompt_tokens=64,
        new_tokens=3,
        context=128,
        phases=(
            phase("prefill", 64, ("MatMul", 8, 0.6), ("Attention", 4, 0.3), (FRAMEWORK, 2, 0.1)),
            phase("decode", 1, ("MatMul", 8, 0.03), ("Cast", 2, 0.00003), ("Add", 2, 0.00001)),
        ),
        notes=("a clock that ticks slowly",),
        time="2026-01-01T00:00:00+00:00",
    )


def check_sums(found: Trace) -> None:
    """Each part is a part, all of them are the whole, and every pass was counted or left out."""
    prefill, decode = found.phases
    assert (prefill.name, prefill.tokens, prefill.passes + prefill.left_out) == ("prefill", PROMPT, PREFILLS)
    assert (decode.name, decode.tokens, decode.passes + decode.left_out) == ("decode", 1, NEW - 1)
    for phase in found.phases:
        assert sum(each.total for each in phase.operators) == pytest.approx(phase.total)
        assert sum(each.share for each in phase.operators) == pytest.approx(1)
        assert phase.traced == pytest.approx(phase.total / phase.passes)
        assert phase.untraced > 0
        for each in phase.operators:
            assert 0 <= each.median <= each.total
            assert each.calls % phase.passes == 0, "each pass calls the same operators"
            assert each.share == pytest.approx(each.total / phase.total)
        assert [each.total for each in phase.operators] == sorted(
            (each.total for each in phase.operators), reverse=True
        )
        assert 0 < phase.operator(FRAMEWORK).share < 1, (
            "operators alone take less than the clock on the wall says"
        )


def calls(phase: Phase) -> dict[str, int]:
    """Calls in one pass."""
    return {each.name: each.calls // phase.passes for each in phase.operators}


def test_onnx_runtime(of_onnx: Trace, onnx: Path) -> None:
    check_sums(of_onnx)
    assert of_onnx.where.engine.startswith("onnxruntime ")
    assert (of_onnx.what.format, of_onnx.where.threads) == ("onnx", 1)
    layers = Bundle.open(onnx).manifest.model.layers
    graph = pytest.importorskip("onnx").load(onnx / "model.onnx", load_external_data=False).graph
    written = Counter(node.op_type for node in graph.node)
    for phase in of_onnx.phases:
        called = calls(phase)
        assert called["GroupQueryAttention"] == layers
        for name in ("MatMulNBits", "GatherBlockQuantized", "SkipSimplifiedLayerNormalization"):
            assert called[name] == written[name] > 0, "as often as it stands in the file"
    assert calls(of_onnx.phase("prefill")) == calls(of_onnx.phase("decode"))


def test_a_prompt_costs_more_than_a_token(of_onnx: Trace) -> None:
    """The phases are told apart: the same nodes multiply 24 rows in one and 1 row in the other."""
    prefill, decode = (phase.operator("MatMulNBits").median for phase in of_onnx.phases)
    assert prefill > 2 * decode


def test_a_long_prompt_is_one_pass_of_several_runs(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.engines.onnxruntime.CHUNK", 10)
    bundle = Bundle.open(onnx)
    found = run(job(bundle, PROMPT, 2))
    prefill, decode = found.phases
    layers = bundle.manifest.model.layers
    assert calls(prefill)["GroupQueryAttention"] == 3 * layers
    assert calls(decode)["GroupQueryAttention"] == layers
    assert calls(prefill)[FRAMEWORK] == 1


def job(bundle: Bundle, prompt: int, new: int) -> Job:
    return Job(
        bundle=str(bundle.path),
        variant=bundle.manifest.variants[0].name,
        case=Case(prompt_tokens=prompt, new_tokens=new),
        context=64,
        threads=1,
    )


def test_notes_that_are_not_complete_are_no_trace(onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler whose memory is full leaves out the last runs."""
    from runtimes.engines import onnxruntime

    whole = onnxruntime.read_trace
    monkeypatch.setattr(onnxruntime, "read_trace", lambda path: whole(path)[:-1])
    with pytest.raises(EngineError, match=r"noted 7 runs of the model where 8 were made: trace fewer tokens"):
        run(job(Bundle.open(onnx), PROMPT, 2))


def test_one_new_token_takes_no_decode_step(onnx: Path) -> None:
    found = run(job(Bundle.open(onnx), PROMPT, 1))
    assert [phase.name for phase in found.phases] == ["prefill"]
    with pytest.raises(UsageError, match="no phase 'decode'; this trace has prefill"):
        found.phase("decode")


def test_a_workload_is_traced_case_by_case(onnx: Path) -> None:
    cases = tuple(Case(prompt_tokens=length, new_tokens=2) for length in (8, 32))
    short, cut = trace_workload(onnx, Workload(name="two", cases=cases), 1, context=24)
    assert [(each.prompt_tokens, each.new_tokens, each.context) for each in (short, cut)] == [
        (8, 2, 24),
        (22, 2, 24),
    ]
    assert len(short.notes) == 1
    assert "prompt cut from 32 tokens to fit the context of 24" in cut.notes


def test_wrong_use(onnx: Path) -> None:
    for prompt, new in ((0, 1), (1, 0), (60, 5)):
        with pytest.raises(UsageError, match="at most the context of 64"):
            trace(onnx, prompt_tokens=prompt, new_tokens=new, context=64)
    with pytest.raises(UsageError, match="has no variant 'npu'"):
        trace(onnx, variant="npu")


def test_an_engine_that_is_not_traced_notes_nothing(onnx: Path, tmp_path: Path, monkeypatch) -> None:
    from runtimes.engines import open_engine

    monkeypatch.chdir(tmp_path)
    engine = open_engine(Bundle.open(onnx), threads=1)
    engine.prefill([1, 2, 3])
    engine.close()
    assert list(tmp_path.iterdir()) == []


@needs_hooks
def test_executorch(of_executorch: Trace, executorch: Path) -> None:
    check_sums(of_executorch)
    assert of_executorch.where.engine.startswith("executorch ")
    assert of_executorch.what.format == "executorch"
    layers = Bundle.open(executorch).manifest.model.layers
    for phase in of_executorch.phases:
        called = calls(phase)
        assert called["llama::custom_sdpa"] == layers
        assert called["llama::update_cache"] == 2 * layers
        assert called["embedding_4bit"] == 1
        matrices = [name for name in called if name.startswith("Fully Connected") and "QB4W" in name]
        assert sum(called[name] for name in matrices) == 7 * layers + 1, (
            "q, k, v, o, gate, up, down; and the head"
        )
        assert called["Sigmoid (NC)"] == layers
    assert "microsecond" in of_executorch.notes[0]


@needs_hooks
def test_executorchs_own_inspector_says_the_same(executorch: Path, tmp_path: Path) -> None:
    from executorch.devtools import Inspector

    from runtimes.engines import executorch as engine_module

    bundle, path = Bundle.open(executorch), tmp_path / "dump"
    variant = bundle.manifest.variants[0]
    choice = Choice(topic="variant", value=variant.name, reason="a test wants it")
    engine = engine_module.load(bundle, variant, choice, context=64, threads=1, trace=True)
    engine.prefill([1, 2, 3])
    for _ in range(3):
        engine.decode(4)
    engine.write_trace(path)
    ours: Counter[str] = Counter()
    runs = engine_module.read_trace(path)
    for name, seconds in itertools.chain.from_iterable(runs):
        ours[name] += seconds
    theirs: Counter[str] = Counter()
    for block in Inspector(etdump_path=str(path)).event_blocks:
        for event in block.events:
            theirs[event.name.partition(" #")[0]] += sum(event.perf_data.raw) / 1e3  # milliseconds
    assert len(runs) == engine.runs == 4
    kernels = (
        "llama::custom_sdpa",
        "llama::update_cache",
        "embedding_4bit",
        "slice_copy",
        engine_module.SCALARS,
    )
    delegates = sum(seconds for name, seconds in ours.items() if name not in kernels)
    for name in ("Slice (ND, X32)", "Fully Connected (NC, F32) GEMM", "Multiply (ND)"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-9)
    assert delegates == pytest.approx(theirs["DELEGATE_CALL"], abs=1e-9)
    assert sum(ours[name] for name in kernels) == pytest.approx(theirs["OPERATOR_CALL"], abs=1e-9)


def test_reading_an_etdump(tmp_path: Path) -> None:
    """Written with ExecuTorch's own serializer: a kernel, one without a name, a delegate of two nodes."""
    pytest.importorskip("executorch", reason="writes an ETDump")
    from executorch.devtools.etdump import schema_flatcc as schema
    from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc

    from runtimes.engines.executorch import DELEGATE, SCALARS, read_trace

    def event(instruction: int, name: str | None, start: int, end: int, node: str | None = None) -> Any:
        noted = schema.ProfileEvent(name, min(instruction, 0), instruction, -1, node, b"", start, end)
        return schema.Event(noted, None, None)

    load = [event(-1, "Program::load_method", 0, 10)]
    first = [
        event(0, "native_call_slice_copy.Tensor_out", 1000, 3000),
        event(0, "OPERATOR_CALL", 500, 3500),
        event(1, "OPERATOR_CALL", 4000, 4100),
        event(2, None, 5000, 6000, "Multiply (ND) #1"),
        event(2, None, 6000, 9000, "Multiply (ND) #12"),
        event(2, "DELEGATE_CALL", 4200, 9200),
        event(-1, "Method::execute", 0, 10000),
    ]
    dump = schema.ETDumpFlatCC(
        0, [schema.RunData("x", -1, [], events) for events in (load, first, [first[2], first[-1]])]
    )
    data = serialize_to_etdump_flatcc(dump)
    path = tmp_path / "dump"
    path.write_bytes(struct.pack("<I", len(data)) + data)
    (kernel, scalars, one, two, rest), second = read_trace(path)
    assert kernel == ("slice_copy", pytest.approx(3e-6))
    assert scalars == (SCALARS, pytest.approx(1e-7))
    assert (one, two) == (("Multiply (ND)", pytest.approx(1e-6)), ("Multiply (ND)", pytest.approx(3e-6)))
    assert rest == (DELEGATE, pytest.approx(1e-6))
    assert [name for name, _ in second] == [SCALARS]


def test_a_runtime_without_hooks_says_what_to_install(executorch: Path, tmp_path: Path) -> None:
    """So was the runtime of executorch 1.4: it took the option, and wrote nothing."""
    from runtimes.engines import executorch as engine_module

    class Silent:
        def write_etdump_result_to_file(self, path: str) -> None:
            pass

    bundle = Bundle.open(executorch)
    variant = bundle.manifest.variants[0]
    choice = Choice(topic="variant", value=variant.name, reason="a test wants it")
    engine = engine_module.load(bundle, variant, choice, context=64, threads=1, trace=True)
    engine._program = Silent()
    with pytest.raises(MissingExtra, match=r"without event tracing.*pip install.*executorch>=1\.5"):
        engine.write_trace(tmp_path / "dump")


@pytest.mark.parametrize(("code", "error"), [(5, MissingExtra), (3, EngineError), (6, EngineError)])
def test_an_error_of_the_tracing_process_is_its_sentence(
    code: int, error: type[Exception], onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"import sys; print('much\\nit lacks a part', file=sys.stderr); sys.exit({code})"
    (tmp_path / "failing.py").write_text(script, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(error, match=r"^it lacks a part$"):
        run_apart("failing", job(Bundle.open(onnx), 1, 1))


def test_passes_that_something_disturbed_do_not_count() -> None:
    assert _undisturbed([1.0, 1.1, 5.0, 1.2, 1.3]) == [0, 1, 3, 4]
    assert _undisturbed([1.0, 2.1]) == [0, 1]
    assert _undisturbed([3.0]) == [0]


def test_traces_survive_json(invented: Trace, of_onnx: Trace) -> None:
    for found, data in zip((invented, of_onnx), json.loads(report.to_json([invented, of_onnx])), strict=True):
        assert Trace.model_validate(data) == found
        assert data["schema_version"] == 1


def test_the_table(invented: Trace) -> None:
    from rich.console import Console

    text = io.StringIO()
    report.show_traces([invented], Console(file=text, width=120))
    shown = text.getvalue()
    assert "a chip, an OS, an engine 1, 2 threads" in shown
    assert "작은고추 cpu: prefill of 64 tokens, 500 ms (250 ms when not traced)" in shown
    assert "decode of a token, 15 ms" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert ["MatMul", "4", "300 ms", "75 ms", "60.0%"] in rows
    assert ["2 others", "2", "20 µs", "", "0.1%"] in rows
    assert "2 passes; 1 more took over twice as long" in shown
    assert "a clock that ticks slowly" in shown


def test_the_plot(invented: Trace, of_onnx: Trace, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    from runtimes.plot import plot

    path = tmp_path / "trace.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot([invented, of_onnx], path)
    assert capfd.readouterr() == ("", ""), "fonts without Korean letters are no news"
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 400
    assert len(data) > 20_000


def test_an_svg_has_the_letters_themselves(invented: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    from runtimes.plot import OTHERS, plot

    path = tmp_path / "trace.svg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot([invented], path)
    drawn = path.read_text(encoding="utf-8")
    for part in (
        "작은고추 cpu",
        "prefill, 64 tokens",
        "MatMul",
        "Attention",
        FRAMEWORK,
        OTHERS,
        "60%",
        "500 ms",
    ):
        assert part in drawn


def test_a_letter_that_no_font_has_is_a_box(invented: Trace) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    from runtimes.plot import _fonts, drawable

    latin = [font for font in _fonts() if font.family == "DejaVu Sans"]
    assert drawable("작은 pepper\nµ", latin) == "□□ pepper\nµ"
    assert drawable("작은", None) == "작은"


def test_plots_that_cannot_be(invented: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtimes.plot import plot

    with pytest.raises(UsageError, match=r"neither \.png nor \.svg"):
        plot([invented], tmp_path / "trace.jpg")
    with pytest.raises(UsageError, match="no trace to draw"):
        plot([], tmp_path / "trace.png")

    with pytest.raises(UsageError, match="nowhere is not a folder"):
        plot([invented], tmp_path / "nowhere/trace.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"matplotlib is not installed.*gochu\[plot\]"):
        plot([invented], tmp_path / "trace.png")


def test_the_command_line(gochu, onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    picture = tmp_path / "trace.png"
    code, out, err = gochu("bench", onnx, "--trace", "--threads", 1, "--plot", picture, "--json")
    assert (code, err) == (0, "")
    (found,) = [Trace.model_validate(each) for each in json.loads(out)]
    assert [phase.name for phase in found.phases] == ["prefill", "decode"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    code, out, err = gochu("bench", onnx, "--trace", "--threads", 1)
    assert (code, out) == (0, "")
    assert "MatMulNBits" in err
    assert gochu("bench", onnx, "--plot", picture)[0] == 2
    code, _, err = gochu("bench", onnx, "--trace", "--plot", tmp_path / "trace.gif")
    assert code == 2
    assert "neither .png nor .svg" in err
