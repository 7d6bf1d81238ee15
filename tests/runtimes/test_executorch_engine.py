"""The ExecuTorch engine on tiny programs: its KV cache, and each kind of damage in one sentence."""

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("executorch", reason="executorch is not installed")

from runtimes.bundle import Bundle, Choice
from runtimes.engines import import_library, open_engine
from runtimes.engines.executorch import ExecuTorchEngine
from runtimes.errors import BundleError, EngineError, PromptError, UsageError
from runtimes.generate import load

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 512, 40)]


@pytest.fixture(params=["gemma2", "qwen2-window-yarn", "llama-llama3-rope"])
def bundle(request, bundles) -> Bundle:
    return bundles(request.param, "fp32", 64, "executorch")


def opened(bundle: Bundle, **options: Any) -> ExecuTorchEngine:
    engine = open_engine(bundle, threads=1, **options)
    assert isinstance(engine, ExecuTorchEngine)
    return engine


def test_any_way_to_give_the_tokens_is_the_same(bundle):
    engine, expected = opened(bundle), []
    for part in ([IDS], [IDS[:1], IDS[1:17], IDS[17:]], [[token] for token in IDS]):
        engine.reset()
        for tokens in part:
            logits = engine.prefill(tokens)
        expected.append(logits)
    engine.reset()
    engine.prefill(IDS[:30])
    for token in IDS[30:]:
        logits = engine.decode(token)
    assert engine.position == len(IDS)
    for other in (*expected[1:], logits):
        np.testing.assert_allclose(other, expected[0], atol=1e-4 * np.ptp(expected[0]))


def test_going_back_forgets_what_came_after(bundle):
    engine = opened(bundle)
    first = engine.prefill(IDS[:20])
    engine.prefill(IDS[20:])
    engine.reset(12)
    assert engine.position == 12
    np.testing.assert_allclose(engine.prefill(IDS[12:20]), first, atol=1e-4 * np.ptp(first))
    with pytest.raises(UsageError, match="position 21"):
        engine.reset(21)


def test_logits_are_the_callers_own(bundle):
    engine = opened(bundle)
    first = engine.prefill(IDS[:5])
    kept = first.copy()
    engine.decode(7)
    np.testing.assert_array_equal(first, kept)


def test_two_engines_do_not_share_a_cache(bundles):
    one = opened(bundles("qwen2", "int4", 64, "executorch"))
    two = opened(bundles("qwen2", "int8", 64, "executorch"))
    alone = one.prefill(IDS[:9])
    two.prefill(IDS[9:20])
    one.reset()
    two.reset()
    np.testing.assert_array_equal(one.prefill(IDS[:9]), alone)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: e.prefill([]), PromptError, "no tokens"),
        (lambda e: e.prefill([1] * 65), PromptError, "65 tokens do not fit in the context of 64"),
        (lambda e: e.prefill([512]), PromptError, "512 is not in the vocabulary"),
        (lambda e: e.prefill([-1]), PromptError, "-1 is not in the vocabulary"),
        (lambda e: e.decode(512), PromptError, "not in the vocabulary"),
        (lambda e: (e.prefill([1] * 64), e.decode(1)), PromptError, "65 tokens do not fit"),
        (lambda e: (e.close(), e.decode(1)), UsageError, "closed"),
    ],
)
def test_wrong_use_is_one_sentence(bundles, call: Callable[..., Any], error, words):
    engine = opened(bundles("qwen2", "int4", 64, "executorch"))
    with pytest.raises(error, match=words):
        call(engine)


def test_a_context_longer_than_exported_is_refused(bundles):
    with pytest.raises(UsageError, match=r"65 tokens was asked for.*holds 1 to 64"):
        opened(bundles("qwen2", "int4", 64, "executorch"), context=65)
    assert opened(bundles("qwen2", "int4", 64, "executorch"), context=10).context == 10


@pytest.fixture
def copy(bundles, tmp_path) -> Bundle:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("qwen2", "int4", 64, "executorch").path, folder)
    return Bundle.open(folder)


def damage(bundle: Bundle, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(bundle.file("model.pte").read_bytes())
    changed = change(data)
    bundle.file("model.pte").write_bytes(data if changed is None else changed)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda data: data[: len(data) // 2], BundleError, "cut off or damaged"),
        (lambda data: data[:20], BundleError, "not an ExecuTorch program"),
        (lambda data: b"", BundleError, "not an ExecuTorch program"),
        (
            lambda data: data.__setitem__(slice(4, 8), b"ET11"),
            BundleError,
            "format ET11 where this ExecuTorch",
        ),
        (lambda data: data.__setitem__(slice(4, 8), b"PK34"), BundleError, "not an ExecuTorch program"),
        (lambda data: data.__setitem__(slice(8, 12), b"none"), BundleError, "where its weights are"),
        (lambda data: struct.pack_into("<Q", data, 24, 1 << 60), BundleError, "cut off or damaged"),
        (lambda data: data.__setitem__(slice(40, 1000), bytes(960)), EngineError, "cannot load model.pte"),
    ],
)
def test_a_damaged_program_is_one_sentence(copy, change, error, words):
    damage(copy, change)
    with pytest.raises(error, match=words) as caught:
        opened(copy)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_never_reaches_the_runtime(copy, monkeypatch):
    """ExecuTorch may end the process on one: the checksum comes first."""
    damage(copy, lambda data: data.__setitem__(3000, data[3000] ^ 1))
    monkeypatch.setattr("runtimes.engines.executorch.import_runtime", lambda: pytest.fail("it was loaded"))
    with pytest.raises(BundleError, match=r"SHA-256 differs"):
        load(copy.path)


def test_nothing_but_the_answer_is_on_the_screen(bundles):
    """The runtime talks to standard error while it loads."""
    bundle = bundles("pepper", "int4", 128, "executorch")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "exporter.cli",
            "run",
            str(bundle.path),
            "--prompt",
            "삼백이십을 숫자로 쓰면?",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "320\n"
    assert len(done.stderr.splitlines()) == 1


def test_the_version_is_named(bundles):
    assert opened(bundles("qwen2", "int4", 64, "executorch")).version.startswith("executorch 1.")


def test_exact_is_said_to_be_the_gates(bundles):
    with pytest.raises(UsageError, match="the gate writes a program with float weights"):
        opened(bundles("qwen2", "int4", 64, "executorch"), exact=True)


def test_a_variant_for_a_gpu_is_passed_over(bundles):
    bundle = bundles("qwen2", "int4", 64, "executorch")
    (cpu,) = bundle.manifest.variants
    gpu = cpu.model_copy(update={"name": "gpu", "delegate": "vulkan"})
    manifest = bundle.manifest.model_copy(update={"variants": (gpu, cpu)})
    chosen = opened(Bundle(Path(bundle.path), manifest)).choice
    assert chosen.value == cpu.name
    assert "passed over gpu" in chosen.reason
    assert "vulkan" in chosen.reason


def test_a_kernel_that_this_runtime_lacks_is_named(bundles, tmp_path):
    program = bundles("qwen2", "fp32", 64, "executorch").path / "model.pte"
    path = tmp_path / "model.pte"
    path.write_bytes(program.read_bytes().replace(b"custom_sdpa", b"custom_sdpx"))
    choice = Choice(topic="variant", value="cpu", reason="a test wants it")
    with pytest.raises(EngineError, match=r"kernel 'llama::custom_sdpx\.out' not found"):
        ExecuTorchEngine(path, choice, context=64, vocab=512, threads=1)


def test_a_measuring_process_imports_all_that_python_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch among it: a quarter of a gigabyte that no phone has, and that would count as the model's memory."""
    done: list[str] = []
    monkeypatch.setattr("runtimes.engines.executorch.import_runtime", lambda: done.append("imported"))
    import_library("executorch")
    assert done == ["imported"]
