"""What the benchmark of quantization is made of: its texts, what other projects hand back, and its bounds."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: nothing is quantized")
pytest.importorskip("transformers", reason="transformers is not installed: no model is trained")

import lessons  # noqa: E402
import peers  # noqa: E402
import quantization  # noqa: E402
from common import Bound  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from exporter.pepper.tokenizer import BEGIN, USER  # noqa: E402
from exporter.quantization.algorithms import ALGORITHMS, TABLE_ALGORITHMS  # noqa: E402
from exporter.quantization.scheme import parse_scheme  # noqa: E402


def some(kind: str, count: int = 40) -> list:
    return list(islice(lessons.lessons(Random(kind), held=False, kinds=(kind,)), count))


def test_answers_follow_from_what_is_asked():
    for q in some("order"):
        numbers = [int(n) for n in re.findall(r"\d+", q.prompt)]
        assert q.answer == ", ".join(map(str, sorted(numbers)))
    for q in some("recall"):
        pairs, question = q.prompt.rsplit(". ", 1)
        asked, value = q.answer.split("=")
        assert f"{asked}={value}" in pairs.split(", ")
        assert question.startswith(asked) or question == f"What is {asked}?"
    for q in some("backwards"):
        given = q.prompt.split(": ")[1].split(", ")
        assert q.answer.split(", ") == given[::-1]
    for q in some("count"):
        row, _ = q.prompt.rsplit(". ", 1)
        number = re.search(r"\d+", q.answer)
        assert number
        assert int(number[0]) in Counter(row.split(", ")).values()
    for q in some("left over"):
        had, got, gave = (int(n) for n in re.findall(r"\d+", q.prompt))
        assert q.answer.startswith(str(had + got - gave))
    for q in some("date", 200):
        if q.language == "ko":
            month, day, step = (int(n) for n in re.findall(r"\d+", q.prompt))
            to_month, to_day = (int(n) for n in re.findall(r"\d+", q.answer))
            assert (to_month, to_day) == later(month, day, step)


def later(month: int, day: int, days: int) -> tuple[int, int]:
    from datetime import date, timedelta

    found = date(2023, month, day) + timedelta(days=days)  # no leap year
    return found.month, found.day


def test_what_is_asked_was_never_taught():
    taught = set()
    for text in islice(lessons.conversations(0), 3000):
        assert text.startswith(BEGIN)
        taught |= {turn.split("<|end|>")[0] for turn in text.split(USER)[1:]}
    asked = lessons.exam(200)
    assert len({q.prompt for q in asked}) > 190
    assert not taught & {q.prompt for q in (*asked, *lessons.stories(50))}
    assert {q.kind for q in asked} > set(lessons.LESSONS) - {"tell"}


def test_texts_are_the_same_for_the_same_seed():
    first, again, other = (list(islice(lessons.conversations(seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_a_checkpoint_gets_what_a_peer_found_and_nothing_else(tmp_path):
    own, folder = tmp_path / "own", tmp_path / "made"
    own.mkdir()
    (own / "config.json").write_text("{}")
    tensors = {"a.weight": torch.ones(2, 4).half(), "norm.weight": torch.full((4,), 0.1).half()}
    save_file(tensors, own / "model.safetensors")
    save_file({"a.weight": torch.full((2, 4), 1 / 3)}, tmp_path / "found.safetensors")
    made = load_file(peers.merged(own, tmp_path / "found.safetensors", folder) / "model.safetensors")
    assert torch.equal(made["a.weight"], torch.full((2, 4), 1 / 3))
    assert torch.equal(made["norm.weight"], tensors["norm.weight"].float())
    assert (folder / "config.json").is_file()
    save_file({"b.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match=r"b\.weight"):
        peers.merged(own, tmp_path / "other.safetensors", folder)


def test_the_workers_answers_are_found_among_other_prints():
    lines = [json.dumps({"output": name, "seconds": 1.5, "versions": {}}) for name in "ab"]
    printed = f"INFO loading\r50%\n{lines[0]}\nnoise {{}}\n{lines[1]}\n"
    assert [answer["output"] for answer in peers.read_answers(printed, 2)] == ["a", "b"]
    with pytest.raises(SystemExit, match="2 of 3 tasks"):
        peers.read_answers(printed, 3)


def test_every_algorithm_of_the_registry_is_measured():
    for scheme, registry in (("int4", ALGORITHMS), ("pal4", TABLE_ALGORITHMS)):
        measured = list(quantization.algorithms(parse_scheme(scheme)))
        assert measured == list(registry)
        assert {"rtn", "gptq", "gptq-descent", "qat"} < set(measured) or "kmeans" in measured
    assert dict(quantization.known(["int4", "int9", "w4a16"])).keys() == {"int4", "w4a16"}


def row(algorithm: str, divergence: float, seconds: float = 1.0, **other):
    values = {"model": "pepper", "weights": "layers", "scheme": "int4", "ours": True, "answers": 99.0}
    return quantization.Row(
        algorithm=algorithm,
        divergence=divergence,
        seconds=seconds,
        agreement=98.0,
        nbytes=None,
        **(values | other),
    )


def table(gptq: float = 0.3, answers: float = 98.5) -> list:
    whole = [
        row("gptq", gptq, weights="all", scheme=scheme, answers=answers if scheme == "int4" else 99.5)
        for scheme in ("int4", "int8")
    ]
    return [row("rtn-absmax", 1.0), row("gptq", gptq), row("gptq-descent", gptq * 0.9), *whole]


def kept(bounds: Iterable[Bound]) -> list[bool]:
    return [bound.kept for bound in bounds]


def test_bounds_are_missed_by_a_worse_gptq_and_by_lost_answers():
    assert kept(quantization.promises(table(), {"pepper": 99.4})) == [True, True, True]
    assert kept(quantization.promises(table(gptq=0.34), {"pepper": 99.4})) == [False, True, True]
    assert kept(quantization.promises(table(answers=98.3), {"pepper": 99.4})) == [True, False, True]


def test_a_model_that_learned_no_rounding_is_judged_by_the_best():
    rows = [replace(row, model="lessons") for row in table(gptq=0.36)]
    (bound,) = quantization.promises(rows, {"lessons": 40.0})
    assert bound.kept
    assert "gptq-descent" in bound.name
    assert bound.value == pytest.approx(0.324)


def test_a_peer_that_is_better_or_quicker_misses_a_bound():
    for divergence, seconds, wanted in (
        (0.4, 2.0, [True, True]),
        (0.26, 2.0, [False, True]),
        (0.4, 0.5, [True, False]),
    ):
        peer = row("llmcompressor 1", divergence, seconds, ours=False)
        assert kept(quantization.against_peers([*table(), peer])) == wanted


def test_training_follows_the_preparation_that_served_the_best(monkeypatch):
    asked = []

    def measured(subject, weights, scheme, algorithm, prepare=""):
        asked.append((weights, scheme, algorithm, prepare))
        yield row(algorithm, {"hadamard": 0.3, "awq": 0.2, "smoothquant": 0.4, "": 0.1}[prepare])

    monkeypatch.setattr(quantization, "measured", measured)
    rows = list(quantization.ours(None, ["int4", "pal4"]))
    assert len(rows) == len(asked) == len(set(asked))
    trained = [one for one in asked if one[2] == "qat" and one[3]]
    assert trained == [("layers", "int4", "qat", "awq")]
    assert asked[-1] == trained[0]
    assert {prepare for _, scheme, _, prepare in asked if scheme == "pal4"} == {""}
