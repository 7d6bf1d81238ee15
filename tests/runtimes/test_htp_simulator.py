"""Measuring in Qualcomm's simulator of its NPU: one run of it, and around it what is made of what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.bundle import Bundle
from runtimes.errors import BundleError, MissingExtra, TargetError
from runtimes.hexagon import correlations
from runtimes.measurement import Measurement
from runtimes.targets import htp_simulator as target
from runtimes.workload import preset

QUESTION = "삼백이십을 숫자로 쓰면?"
SEEN = target.Seen(
    engine="onnxruntime-qnn 0, sm8650 (v75, simulated)",
    placed={"prefill": {"NPU": 51}, "decode": {"NPU": 53}},
    correlations=(0.99999, 0.9999),
    prompt_tokens=16,
    new_tokens=2,
    answers=(),
)


def test_the_simulator_answers_and_is_compared(hexagon: Bundle, gochu) -> None:
    code, out, err = gochu(
        "bench", hexagon.path, "--on", "htp-simulator", "--workload", "pp1", "--ask", QUESTION, "--json"
    )
    assert code == 0, err
    (found,) = [Measurement.model_validate(each) for each in json.loads(out)]
    (answer,) = found.answers
    assert (answer.prompt, answer.text) == (QUESTION, "320")
    assert found.how.new_tokens == len(answer.tokens) + 1  # and the one that ends it
    residency = hexagon.manifest.variants[0].residency
    effective = found.where.backend.effective
    assert sum(effective[name]["NPU"] for name in ("prefill", "decode")) == residency.ops == residency.ops_on
    figures = {each.name: each for each in found.figures}
    assert set(figures) == {"npu_operations", "npu_share", "logits_correlation"}  # no time, no memory
    assert {each.kind for each in found.figures} == {"simulated"}
    assert figures["npu_operations"].value == residency.ops
    assert figures["npu_share"].value == 100
    assert len(figures["logits_correlation"].samples) == found.how.new_tokens
    assert min(figures["logits_correlation"].samples) > 0.9999
    assert found.where.chip == "sm8650"
    assert found.command == f"gochu bench out --workload pp1 --on htp-simulator --ask '{QUESTION}'"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[target.Job]]:
    """`told(key=value)`: the simulating process says SEEN with that changed; returns what it is told."""

    def told(**changes: Any) -> list[target.Job]:
        jobs: list[target.Job] = []

        def run_apart(module: str, job: target.Job) -> str:
            assert module == target.__name__
            jobs.append(job)
            return SEEN.model_copy(update=changes).model_dump_json()

        monkeypatch.setattr("runtimes.measuring.run_apart", run_apart)
        return jobs

    return told


def test_without_a_question_a_short_prompt_stands_for_the_workload(hexagon: Bundle, told) -> None:
    jobs = told()
    (found,) = target.measure(hexagon.path, preset("pp40+tg20"))
    assert (len(jobs[0].ids), jobs[0].new_tokens, jobs[0].prompts) == (16, 8, ())
    assert "of the workload, a short prompt of its first case" in found.how.notes
    target.measure(hexagon.path, preset("pp3+tg2"))
    assert (len(jobs[1].ids), jobs[1].new_tokens) == (3, 2)
    asked = preset("smoke").model_copy(update={"prompts": (QUESTION,), "answer_tokens": 5})
    target.measure(hexagon.path, asked)
    assert (jobs[2].new_tokens, jobs[2].prompts) == (5, (QUESTION,))


def test_operations_on_the_cpu(hexagon: Bundle, told) -> None:
    told(placed={"prefill": {"NPU": 3}, "decode": {"NPU": 2, "CPU": 3}})
    with pytest.raises(
        TargetError, match=r"the simulated sm8650 leaves operations to the CPU \(3 of decode\)"
    ):
        target.measure(hexagon.path)
    (found,) = target.measure(hexagon.path, allow_fallback=True)
    assert found.marks == ("cpu_fallback",)
    assert found.command.endswith("--allow-fallback")
    assert found.figure("npu_operations").value == 5
    assert found.figure("npu_share").value == 62.5


@pytest.mark.parametrize("worst", [0.9, float("nan")])
def test_other_logits_than_the_cpus(worst: float, hexagon: Bundle, told) -> None:
    told(correlations=(0.99999, worst, 0.99999))
    with pytest.raises(TargetError, match="does not compute what the same graph computes on the CPU"):
        target.measure(hexagon.path)


def test_a_bundle_or_a_variant_that_is_not_for_hexagon(hexagon: Bundle, toy: Path, gochu) -> None:
    with pytest.raises(
        BundleError, match="no variant for Qualcomm's NPU, only cpu: export one with `gochu export"
    ):
        target.measure(toy)
    with pytest.raises(BundleError, match="made of graphs of any length"):
        target.measure(hexagon.path, variant=hexagon.manifest.variants[-1].name)
    code, out, err = gochu("bench", toy, "--on", "htp-simulator")
    assert (code, out, err.count("\n")) == (3, "", 1)


def test_a_machine_without_the_simulator(hexagon: Bundle, monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(TargetError, match="for x86-64 alone"):
        target.measure(hexagon.path)


def test_without_its_library(hexagon: Bundle, monkeypatch) -> None:
    monkeypatch.setattr("runtimes.extras.installed", lambda module: module != "onnxruntime_qnn")
    with pytest.raises(MissingExtra, match=r"gochu\[hexagon\]"):
        target.measure(hexagon.path)


def test_a_witness_asks_another_the_same() -> None:
    class Echo:
        choice = context = vocab = threads = position = version = None

        def __init__(self, gain: float) -> None:
            self.gain, self.held = gain, [0.0]

        def prefill(self, tokens: list[int]) -> np.ndarray:
            self.held += tokens
            return self.gain * np.array([sum(self.held), len(self.held), 5])

        def decode(self, token: int) -> np.ndarray:
            return self.prefill([token])

        def reset(self, position: int) -> None:
            del self.held[position + 1 :]

    witness = target.Witness(Echo(1))
    for prompt in ([3, 9, 2], [7]):
        witness.reset()
        witness.prefill(prompt)
        witness.decode(4)
        witness.decode(8)
    assert witness.lengths == (3, 3)
    again = witness.ask_again(Echo(2))
    assert [(2 * a == b).all() for a, b in zip(witness.said, again, strict=True)] == [True] * 6
    assert correlations(witness.said, again) == pytest.approx([1.0] * 6)
    assert min(correlations(witness.said, again[::-1])) < 0.999
