"""The ONNX Runtime engine on a toy graph: KV cache in place, and each kind of damage in one sentence."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from runtimes.bundle import Bundle
from runtimes.engines import Engine, open_engine
from runtimes.errors import BundleError, EngineError, MissingExtra, PromptError, UsageError

ort = pytest.importorskip("onnxruntime", reason="runs the toy bundle")
pytest.importorskip("onnx", reason="makes the toy bundle")

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 300, 40)]


def opened(folder: Path, **options: Any) -> Engine:
    return open_engine(Bundle.open(folder), threads=1, **options)


def from_scratch(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of all tokens without a KV cache: past of length 0, plain `run`. [n, vocab]"""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0][0]


def test_prefill_then_decode_is_as_from_scratch(toy: Path, all_logits: Path) -> None:
    expected = from_scratch(all_logits, IDS)
    engine = opened(toy)
    np.testing.assert_allclose(engine.prefill(IDS[:20]), expected[19], atol=1e-5)
    for i in range(20, 40):
        np.testing.assert_allclose(engine.decode(IDS[i]), expected[i], atol=1e-5)
        assert engine.position == i + 1


def test_a_prompt_in_several_parts(toy: Path, all_logits: Path) -> None:
    engine = opened(toy)
    for part in (IDS[:1], IDS[1:17], IDS[17:40]):
        logits = engine.prefill(part)
    np.testing.assert_allclose(logits, from_scratch(all_logits, IDS)[-1], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 20, 39, 40, 41])
def test_long_prompts_go_in_chunks(toy: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = opened(toy).prefill(IDS).copy()
    monkeypatch.setattr("runtimes.engines.onnxruntime.CHUNK", chunk)
    np.testing.assert_allclose(opened(toy).prefill(IDS), whole, atol=1e-5)


def test_a_graph_that_returns_all_logits(
    toy: Path, all_logits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, every = opened(toy), opened(all_logits)
    np.testing.assert_allclose(every.prefill(IDS), last.prefill(IDS), atol=1e-5)
    np.testing.assert_allclose(every.decode(5), last.decode(5), atol=1e-5)
    monkeypatch.setattr("runtimes.engines.onnxruntime.LOGITS_LIMIT", 9 * 300)
    np.testing.assert_allclose(opened(all_logits).prefill(IDS), opened(toy).prefill(IDS), atol=1e-5)


def test_going_back_and_on_is_as_from_scratch(toy: Path) -> None:
    engine = opened(toy)
    engine.prefill(IDS)
    engine.decode(7)
    engine.reset(25)
    again = engine.prefill(IDS[:10]).copy()
    np.testing.assert_allclose(again, opened(toy).prefill(IDS[:25] + IDS[:10]), atol=1e-5)
    engine.reset()
    np.testing.assert_array_equal(engine.prefill(IDS), opened(toy).prefill(IDS))
    with pytest.raises(UsageError, match="cannot go back to position 41"):
        engine.reset(41)


def test_logits_stay_what_they_were(toy: Path, all_logits: Path) -> None:
    for folder in (toy, all_logits):
        engine = opened(folder)
        first = engine.prefill(IDS)
        second = engine.decode(1)
        kept = first.copy(), second.copy()
        engine.decode(2)
        engine.prefill(IDS[:3])
        for logits, copy in zip((first, second), kept, strict=True):
            np.testing.assert_array_equal(logits, copy)
            assert (logits.dtype, logits.shape) == (np.float32, (engine.vocab,))


def test_exact_says_the_same_where_nothing_is_rounded(toy: Path) -> None:
    exact = open_engine(Bundle.open(toy), threads=1, exact=True)
    np.testing.assert_array_equal(exact.prefill(IDS), opened(toy).prefill(IDS))


def test_two_turns_reuse_the_cache_and_say_the_same(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtimes.load(toy, threads=1) as model:
        chat = runtimes.Chat(model)
        first = chat.send("안녕", max_tokens=6).finish()
        fed: list[int] = []
        prefill = model.engine.prefill
        monkeypatch.setattr(model.engine, "prefill", lambda ids: fed.append(len(ids)) or prefill(ids))
        second = chat.send("고추", max_tokens=6).finish()
        again = model.generate(chat.messages[:-1], max_tokens=6)
        assert second.tokens == again.tokens
        assert fed[1] == second.prompt_tokens
        assert fed[0] <= second.prompt_tokens - first.prompt_tokens, "the first turn was not run again"


def test_the_context_asked_for(toy: Path) -> None:
    engine = opened(toy, context=10)
    assert engine.context == 10
    engine.prefill(IDS[:10])
    with pytest.raises(PromptError, match="11 tokens do not fit in the context of 10"):
        engine.decode(1)
    with pytest.raises(PromptError, match="50 tokens do not fit"):
        engine.prefill(IDS)
    assert engine.position == 10
    for context in (0, -1, 97):
        with pytest.raises(UsageError, match="holds 1 to 96"):
            opened(toy, context=context)
    with pytest.raises(UsageError, match="at least 1"):
        open_engine(Bundle.open(toy), threads=0)


def test_the_whole_context_can_be_used(toy: Path) -> None:
    engine = opened(toy)
    engine.prefill([5] * 95)
    assert np.isfinite(engine.decode(5)).all()
    assert engine.position == engine.context == 96


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_tokens_outside_the_vocabulary_are_refused(toy: Path, token: int) -> None:
    engine = opened(toy)
    with pytest.raises(PromptError, match="is not in the vocabulary"):
        engine.prefill([1, token])
    with pytest.raises(PromptError, match="is not in the vocabulary"):
        engine.decode(token)
    with pytest.raises(PromptError, match="no tokens"):
        engine.prefill([])
    assert engine.position == 0


def cut_graph(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])


def garbage_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 200)


def empty_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


def cut_data(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def empty_data(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"")


def unknown_operator(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiox"))


def other_names(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"past_key_values.1.key", b"past_key_values.9.key"))


def data_elsewhere(folder: Path) -> None:
    """External data that lies outside the folder."""
    (folder.parent / "outside.data").write_bytes((folder / "model.onnx.data").read_bytes())
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"model.onnx.data", b"../outside.data"))


@pytest.mark.parametrize(
    "damage",
    [
        cut_graph,
        garbage_graph,
        empty_graph,
        cut_data,
        empty_data,
        unknown_operator,
        other_names,
        data_elsewhere,
    ],
)
def test_damage_is_one_sentence(
    copy: Path, rewrite: Callable, damage: Callable[[Path], None], capfd: pytest.CaptureFixture
) -> None:
    damage(copy)
    rewrite(copy)  # the manifest agrees with the files, so only the engine can notice
    for exact in (False, True):
        with pytest.raises(EngineError) as caught:
            open_engine(Bundle.open(copy), threads=1, exact=exact)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert "export the bundle again" in str(caught.value)
    assert capfd.readouterr() == ("", ""), "nothing else on the screen"


@pytest.mark.parametrize(
    "change", [{"kv_heads": 1}, {"head_dim": 32}, {"layers": 1}, {"layers": 3}, {"dtype": "float16"}]
)
def test_a_manifest_that_does_not_fit_the_graph(
    copy: Path, rewrite: Callable, make_variant: Callable, change: dict
) -> None:
    rewrite(copy, variants=[make_variant(kv_cache=make_variant()["kv_cache"] | change)])
    with pytest.raises(EngineError) as caught:
        opened(copy).prefill(IDS)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_fit_the_graph(copy: Path, rewrite: Callable) -> None:
    model = rewrite(copy)["model"]
    for vocab in (299, 301):
        rewrite(copy, model=model | {"vocab": vocab})
        with pytest.raises(EngineError):
            opened(copy).prefill(IDS[:1])


def test_caches_that_are_not_shared_are_refused(
    copy: Path, rewrite: Callable, make_variant: Callable
) -> None:
    rewrite(copy, variants=[make_variant(kv_cache=make_variant()["kv_cache"] | {"shared_buffer": False})])
    with pytest.raises(BundleError, match="does not share"):
        opened(copy)


def test_nothing_is_printed(toy: Path, capfd: pytest.CaptureFixture) -> None:
    opened(toy).prefill(IDS)
    assert capfd.readouterr() == ("", "")


def test_the_first_variant_that_runs_here_is_taken(
    copy: Path, rewrite: Callable, make_variant: Callable
) -> None:
    phone = make_variant(name="npu", chips=["sm8650"], engine="qnn")
    other = make_variant(name="mac", engine="mlx")
    rewrite(copy, variants=[phone, other, make_variant(), make_variant(name="second")])
    bundle = Bundle.open(copy)
    choice = open_engine(bundle, threads=1).choice
    assert choice.value == "cpu"
    assert "npu: variant npu is for sm8650" in choice.reason
    assert "needs the engine mlx" in choice.reason
    assert open_engine(bundle, "second", threads=1).choice.value == "second"
    with pytest.raises(UsageError, match="has no variant 'third'; it has npu, mac, cpu, second"):
        open_engine(bundle, "third")
    with pytest.raises(BundleError, match="is for sm8650"):
        open_engine(bundle, "npu")


def test_no_variant_runs_here(copy: Path, rewrite: Callable, make_variant: Callable) -> None:
    rewrite(copy, variants=[make_variant(name="npu", chips=["sm8650"])])
    with pytest.raises(BundleError, match="is for sm8650"):
        opened(copy)


def test_an_engine_that_is_not_installed(
    copy: Path, rewrite: Callable, make_variant: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(copy, variants=[make_variant(name="npu", chips=["sm8650"]), make_variant()])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'gochu\[run\]'"):
        opened(copy)


def test_nothing_is_told_to_the_maker_of_the_library(toy: Path, tmp_path: Path) -> None:
    """Else onnxruntime leaves a file of events that wait to be sent."""
    code = "import sys; from runtimes.engines import open_engine; from runtimes.bundle import Bundle\n"
    code += "open_engine(Bundle.open(sys.argv[1])).decode(1)"
    kept = tmp_path / "cache"
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment["XDG_CACHE_HOME"] = str(kept)
    subprocess.run([sys.executable, "-c", code, str(toy)], env=environment, check=True)
    assert not list(kept.rglob("*.db"))
    bare = "import onnxruntime as ort, sys; ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    subprocess.run([sys.executable, "-c", bare, str(toy / "model.onnx")], env=environment, check=True)
    if not list(kept.rglob("*.db")):
        pytest.skip("this onnxruntime collects nothing")
