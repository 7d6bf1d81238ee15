"""The Hexagon NPU by the portable route: compiled by Qualcomm's compiler, run in Qualcomm's simulator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")

from exporter import export, gate
from exporter.architecture import read_architecture
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.formats import onnx_hexagon, onnx_static
from exporter.formats.onnx_static import StaticOps
from exporter.npu import hexagon
from exporter.npu.hexagon_plan import Wishes
from exporter.plan import make_plan
from exporter.quantization.scheme import Scheme, parse_scheme
from runtimes import qnn
from runtimes.bundle import Bundle
from runtimes.engines import choose_variant, open_engine
from runtimes.errors import BundleError, EngineError

PORTABLE = ("sm8550", "sm8650", "sm8750", "sm8850")  # v73, v75, v79, v81


@pytest.fixture(scope="module", autouse=True)
def short_gate():
    """Two tokens for each of the gate's prompts: a token takes the simulator a quarter of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SIMULATED_TOKENS", 2)
        yield


def hexagon_export(checkpoint: Any, out: Path, chips: Any = ("sm8650",), **more: Any) -> Bundle:
    more = {"delegate": "hexagon", "scheme": "int4", "context": 64} | more
    return export(checkpoint, out, wishes=Wishes(tuple(chips)), **more)


def test_every_family_is_whole_on_the_npu(family, checkpoints, tmp_path):
    """Through the gate: in the simulator the reference's tokens on the CPU's own integers, nothing on the CPU."""
    bundle = hexagon_export(checkpoints.folder(family), tmp_path / "out")
    npu, cpu = bundle.manifest.variants
    assert (npu.engine, npu.delegate, npu.chips) == ("qnn", "hexagon", ("sm8650",))
    assert npu.residency.ops == npu.residency.ops_on > 0
    assert npu.residency.macs == npu.residency.macs_on > 0
    assert cpu.engine == "onnxruntime"
    gate = bundle.manifest.gate
    assert gate.status == "passed"
    logits = [check.figures["largest"] for check in gate.checks if check.name == "logits"]
    assert logits[0] < 0.02


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4-g128"])
def test_other_schemes(scheme, tmp_path):
    bundle = hexagon_export("pepper", tmp_path / "out", scheme=scheme)
    assert bundle.manifest.gate.status == "passed"
    assert bundle.manifest.variants[0].residency.elsewhere == ()


@pytest.fixture(scope="module")
def pepper(tmp_path_factory) -> Bundle:
    return hexagon_export("pepper", tmp_path_factory.mktemp("pepper") / "out", chips=PORTABLE)


def test_several_chips_in_one_run(pepper):
    *npus, cpu = pepper.manifest.variants
    assert [variant.chips for variant in npus] == [(chip,) for chip in PORTABLE]
    assert [variant.compiled.arch for variant in npus] == ["v73", "v75", "v79", "v81"]
    for variant in npus:
        assert variant.compiled.sdk.startswith("2.")
        (binary,) = (name for name in variant.files if name.endswith(".bin"))
        wrappers = [name for name in variant.files if name.endswith(("-prefill.onnx", "-decode.onnx"))]
        assert len(wrappers) == 2
        for name in wrappers:  # both refer to the one binary of their chip
            (node,) = onnx.load(pepper.file(name)).graph.node
            found = {attribute.name: attribute for attribute in node.attribute}
            assert (pepper.path / found["ep_cache_context"].s.decode()) == pepper.file(binary)
    stored = sum(parse_scheme(t.scheme).nbytes(t.shape) for t in pepper.manifest.tensors if len(t.shape) == 2)
    binary = pepper.file("sm8650-hexagon.bin").stat().st_size
    assert binary < 1.3 * stored  # weights once, for both graphs
    assert cpu.chips == ()


def test_a_binary_says_what_it_is_for(pepper):
    """What Qualcomm's provider itself wrote into the file."""
    for variant in pepper.manifest.variants[:-1]:
        model = onnx.load(pepper.file(next(e.file for e in variant.entry_points if e.name == "decode")))
        said = {entry.key: entry.value for entry in model.metadata_props}
        info = said["ep_compatibility_info.QNNExecutionProvider"].split(":")
        assert info[4:6] == [variant.compiled.arch.removeprefix("v"), str(variant.compiled.chip)]


def test_a_long_prompt_goes_in_chunks(pepper):
    """More than a chunk, to the end of the cache: as the CPU's variant of the same integers, with float activations."""
    ids = np.random.default_rng(1).integers(0, pepper.manifest.model.vocab, 64).tolist()
    npu = open_engine(pepper, pepper.manifest.variants[1].name, on="htp-simulator")
    cpu = open_engine(pepper, exact=True)
    assert npu._prefill[0].length == onnx_hexagon.chunk_length(64) == 16
    for count in (1, 2, 16, 17, 40):
        npu.reset()
        cpu.reset()
        ours, theirs = npu.prefill(ids[:count]), cpu.prefill(ids[:count])
        assert np.abs(ours - theirs).max() < 0.02 * np.ptp(theirs), count
    for token in ids[40:]:
        ours, theirs = npu.decode(token), cpu.decode(token)
    assert npu.position == cpu.position == 64
    assert np.abs(ours - theirs).max() < 0.02 * np.ptp(theirs)
    npu.reset(30)
    cpu.reset(30)
    ours, theirs = npu.prefill(ids[:20]), cpu.prefill(ids[:20])
    assert np.abs(ours - theirs).max() < 0.02 * np.ptp(theirs)


def test_the_same_text_from_the_command_line(pepper, gochu):
    question = "삼백이십을 숫자로 쓰면?"
    arguments = ["run", pepper.path, "--prompt", question, "--temperature", "0", "--json"]
    code, stdout, err = gochu(*arguments, "--on", "htp-simulator")
    assert code == 0, err
    there, here = json.loads(stdout), json.loads(gochu(*arguments)[1])
    assert there["text"] == here["text"] == "320"
    assert there["tokens"] == here["tokens"]
    code, stdout, err = gochu("score", pepper.path, "--on", "htp-simulator", "--questions", "4", "--json")
    assert code == 0, err
    assert json.loads(stdout)["right"] >= 3


def test_without_the_simulator_the_cpu_runs(pepper):
    variant, choice = choose_variant(pepper)
    assert variant.engine == "onnxruntime"
    assert "passed over" in choice.reason
    assert "htp-simulator" in choice.reason
    with pytest.raises(BundleError, match="--on htp-simulator"):
        choose_variant(pepper, pepper.manifest.variants[0].name)
    with pytest.raises(BundleError, match="simulates"):
        choose_variant(pepper, variant.name, "htp-simulator")
    with pytest.raises(UsageError, match="htp-simulator"):
        choose_variant(pepper, None, "hpt-simulator")


def test_nothing_is_compiled_twice(tmp_path, monkeypatch):
    hexagon_export("pepper", tmp_path / "first", verify=False, context=32)

    def never(*rest: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(hexagon.measuring, "run_apart", never)
    again = hexagon_export("pepper", tmp_path / "second", verify=False, context=32)
    assert {e.sha256 for e in Bundle.open(tmp_path / "first").manifest.files} == {
        e.sha256 for e in again.manifest.files
    }


def test_the_simulator_loads_what_it_compiled_before(pepper, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened = []

    def watched(graph: Path, *rest: Any, **options: Any) -> Any:
        opened.append(graph)
        return open_session(graph, *rest, **options)

    open_session = qnn.open_session
    monkeypatch.setattr(qnn, "open_session", watched)
    first, second = (
        open_engine(pepper, pepper.manifest.variants[0].name, on="htp-simulator") for _ in range(2)
    )
    assert (first.decode(5) == second.decode(5)).all()
    (compiled, loaded) = opened
    assert compiled == pepper.file("decode.onnx")
    assert loaded.is_relative_to(tmp_path)
    assert first.placed() == second.placed()
    assert first.placed()["decode"]["NPU"] > 50
    npu = open_engine(pepper, pepper.manifest.variants[1].name, on="htp-simulator")
    npu.decode(5)
    assert opened[-1] == compiled, "another chip"


def test_integers_throughout(tmp_path, gochu):
    """The quantized route, for the oldest generation too: against the same graph on the CPU, and in answers."""
    out = tmp_path / "out"
    arguments = ["export", "pepper", "--delegate", "hexagon", "--chips", "sm8650,sm8450"]
    code, _, err = gochu(*arguments, "--recipe", "hexagon-w4a16", "--context", "64", "-o", out)
    assert code == 0, err
    bundle = Bundle.open(out)
    *npus, _ = bundle.manifest.variants
    assert [variant.compiled.arch for variant in npus] == ["v75", "v69"]
    schemes = {report.name: report.scheme for report in bundle.manifest.tensors}
    assert schemes["layers.0.attention.q"] == "w4a16"
    assert schemes["layers.0.mlp.down"] == schemes["embedding"] == "w8a16"
    graphs = [check for check in bundle.manifest.gate.checks if "correlation" in check.figures]
    assert len(graphs) == 2
    assert all(check.figures["correlation"] >= 0.999 for check in graphs)
    # v73 and newer hold weights once; v69 a binary for each graph.
    assert [sum(name.endswith(".bin") for name in variant.files) for variant in npus] == [1, 2]
    assert all(variant.residency.elsewhere == () for variant in npus)
    assert npus[0].kv_cache.dtype == "uint8"
    code, stdout, err = gochu("run", out, "--on", "htp-simulator", "--prompt", "삼백이십을 숫자로 쓰면?")
    assert (code, stdout) == (0, "320\n"), err


def test_the_calibration_text_can_be_the_users(tmp_path, gochu):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "23 더하기 45는?"}\n{"nonsense": 1}\n', encoding="utf-8")
    arguments = ["export", "pepper", "--delegate", "hexagon", "--chips", "sm8650", "--scheme", "w8a16"]
    arguments += ["--context", "32", "-o", tmp_path / "out", "--no-verify", "--calibration"]
    code, _, err = gochu(*arguments, text)
    assert code == 3
    assert "line 2" in err
    code, _, err = gochu(*arguments, tmp_path / "absent.txt")
    assert code in (2, 3)
    text.write_text('{"text": "23 더하기 45는?"}\n', encoding="utf-8")
    code, _, err = gochu(*arguments, text)
    assert code == 3
    assert "tokens, and 128 are the fewest that say anything" in err
    text.write_text('{"text": "23 더하기 45는?"}\n' * 40, encoding="utf-8")
    code, _, err = gochu(*arguments, text)
    assert code == 0, err
    assert any(choice.value == "text.jsonl" for choice in Bundle.open(tmp_path / "out").manifest.plan)


# what is refused


def short_export(out: Path) -> list[Any]:
    """A command that exports the little that shows a refusal."""
    asked = ["--delegate", "hexagon", "--chips", "sm8650", "--scheme", "int4", "--context", "16"]
    return ["export", "pepper", *asked, "-o", out]


class Erf(StaticOps):
    """With an operation that the HTP does not have, in the middle of each layer."""

    def gated(self, gate: Any, up: Any) -> str:
        return self.g.emit("Erf", [super().gated(gate, up)])


def test_an_operation_that_the_npu_refuses_fails_the_gate(tmp_path, monkeypatch, gochu):
    monkeypatch.setattr(onnx_static, "StaticOps", Erf)
    out = tmp_path / "out"
    arguments = short_export(out)
    code, stdout, err = gochu(*arguments)
    assert (code, stdout) == (4, "")
    assert "refuses Erf" in err
    assert "are not supported by QNN EP" in err  # Qualcomm's own reason
    assert not out.exists()


class LateErf(StaticOps):
    """The same in the head alone, where QNN compiles what is around it."""

    def softcap(self, x: Any, cap: float) -> str:
        return self.g.emit("Erf", [self.name(x)])

    def linear(self, x: Any, weight: str) -> Any:
        y = super().linear(x, weight)
        return self.softcap(y, 1.0) if weight == "embedding" else y


def test_an_operation_on_the_cpu_can_be_accepted(tmp_path, monkeypatch, gochu):
    monkeypatch.setattr(onnx_static, "StaticOps", LateErf)
    out = tmp_path / "out"
    arguments = short_export(out)
    code, stdout, err = gochu(*arguments)
    assert (code, stdout) == (4, "")
    assert "residency" in err
    assert "Erf" in err
    assert "--allow-cpu-ops" in err
    assert not out.exists()
    code, _, err = gochu(*arguments, "--allow-cpu-ops", "--no-verify")
    assert code == 0, err
    npu = Bundle.open(out).manifest.variants[0]
    assert npu.allows_cpu_ops
    assert npu.residency.elsewhere == ("Erf",)
    assert "not supported" in npu.residency.reasons[0]
    assert any(choice.topic == "CPU operations" for choice in Bundle.open(out).manifest.plan)


def test_what_qnn_says_is_kept(tmp_path, monkeypatch):
    """An unknown chip's number: QNN's own error in ours, and no bundle."""
    monkeypatch.setattr(hexagon, "npu", lambda chip, scheme=None: qnn.Chip(999, "v75"))
    with pytest.raises(EngineError, match=r"QNN could not take .* for chip 999"):
        hexagon_export("pepper", tmp_path / "out", context=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ({"chips": ["sm9999"]}, UsageError, "no chip 'sm9999'"),
        ({"chips": ["exynos-2400"]}, (PlanRefused, UsageError), "Hexagon|no chip"),
        ({"chips": ["sm8450"]}, PlanRefused, r"v69.*from v73 on"),
        ({"chips": []}, PlanRefused, "--device or --chips"),
        ({"scheme": "fp32"}, RecipeError, "float16"),
        ({"scheme": "pal4"}, RecipeError, "lookup tables"),
        ({"delegate": None}, UsageError, "for --delegate hexagon"),
        ({"format": "executorch"}, UsageError, "hexagon is for --format onnx"),
    ],
)
def test_refusals(asked, error, match, tmp_path):
    with pytest.raises(error, match=match):
        hexagon_export("pepper", tmp_path / "out", **asked)
    assert list(tmp_path.iterdir()) == []


def test_all_chips_that_take_it(checkpoints):
    arch = read_architecture(json.loads((checkpoints.folder("qwen2") / "config.json").read_text()))
    plan = make_plan(arch, delegate="hexagon", wishes=Wishes(("all",)), scheme="int4", context=64)
    archs = {chip.npu.arch for chip in plan.compilation.chips}
    assert {"v73", "v75", "v79", "v81"} <= archs
    assert all(int(arch[1:]) >= 73 for arch in archs)


def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, gochu):
    from runtimes import extras

    found = extras.installed
    monkeypatch.setattr(extras, "installed", lambda module: module != "onnxruntime_qnn" and found(module))
    code, _, err = gochu(
        "export", "pepper", "--delegate", "hexagon", "--chips", "sm8650", "-o", tmp_path / "o"
    )
    assert code == 5
    assert "gochu[hexagon]" in err


# splitting


def llama(layers: int, hidden: int, ffn: int, vocab: int) -> Any:
    return read_architecture(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": hidden // 512,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }
    )


def test_a_large_model_is_split_evenly():
    arch = llama(32, 4096, 11008, 32000)  # 6.7 B parameters: 3.7 GB at 4 bits
    schemes = {name: parse_scheme("int4") for name, _ in arch.matrices()}
    parts = hexagon.split(arch, schemes)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, 32)
    sizes = [hexagon.binary_bytes(arch, schemes, part, part.stop == 32) for part in parts]
    limits = hexagon.table()["limits"]
    assert max(sizes) < limits["graph_bytes"]
    assert hexagon.compile_bytes(max(sizes), hexagon.PORTABLE) <= limits["compile_bytes"]
    assert hexagon.compile_bytes(max(sizes) * len(parts) // (len(parts) - 1), hexagon.PORTABLE) > 5.5e9
    assert max(sizes) - min(sizes) <= 1.05 * hexagon.binary_bytes(arch, schemes, range(1), head=False)
    with pytest.raises(PlanRefused, match="split"):
        hexagon.split(arch, schemes, forbidden=True)


def test_a_head_that_is_large_alone_is_compiled_with_more_memory():
    arch = llama(4, 2048, 2048, 600_000)  # the head at 8 bits: 1.2 GB, within what the NPU takes
    schemes = {name: parse_scheme("int8") for name, _ in arch.matrices()}
    *_, last = hexagon.split(arch, schemes)
    assert (last.start, last.stop) == (3, 4)
    assert (
        hexagon.compile_bytes(hexagon.binary_bytes(arch, schemes, last), hexagon.PORTABLE)
        > (hexagon.table()["limits"]["compile_bytes"])
    )
    assert hexagon.split(arch, schemes, forbidden=True) == (range(4),)


def test_a_layer_that_is_too_large_is_refused():
    arch = llama(2, 16384, 65536, 1000)
    with pytest.raises(PlanRefused, match="fewer bits"):
        hexagon.split(arch, {name: Scheme(16) for name, _ in arch.matrices()})


def test_parts_are_chained(tmp_path, monkeypatch):
    """pepper in three graphs for each entry point says what it says in one."""
    monkeypatch.setitem(hexagon.table()["limits"], "graph_bytes", 4_500_000)
    bundle = hexagon_export("pepper", tmp_path / "out")
    npu = bundle.manifest.variants[0]
    names = [entry.name for entry in npu.entry_points]
    assert len([name for name in names if name.startswith("decode.")]) > 1
    assert len([name for name in npu.files if name.endswith(".bin")]) == len(names) // 2
    assert npu.residency.elsewhere == ()
    assert bundle.manifest.gate.status == "passed"


def test_the_engine_places_new_rows():
    from runtimes.bundle import TensorSpec
    from runtimes.engines.qnn import position_input, remembered

    cache = np.zeros((1, 2, 3, 8), np.uint8)
    new = np.arange(12, dtype=np.uint8).reshape(1, 2, 3, 2) + 1
    kept = remembered(cache, new, 5, 1)
    assert (kept[..., 5] == new[..., 0]).all()
    assert not kept[..., 6:].any()
    mask = TensorSpec(name="mask.3", dtype="uint16", shape=(1, 1, 2, 10), scale=0.1, zero_point=65535)
    seen = position_input(mask, 4, 2, 8)[0, 0] == 65535
    assert seen[0].nonzero()[0].tolist() == [2, 3, 8]  # the last three: two of the cache, itself
    assert seen[1].nonzero()[0].tolist() == [3, 8, 9]
