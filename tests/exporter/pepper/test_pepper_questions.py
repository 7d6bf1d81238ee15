import subprocess
import sys
from collections import Counter
from itertools import islice
from operator import add, sub

import pytest

from exporter.pepper.language import with_particle
from exporter.pepper.questions import (
    CLOSED,
    LANGUAGES,
    OPEN,
    SHARES,
    Question,
    held_out,
    is_held_out,
    memorized,
    training,
)
from exporter.pepper.score import score
from exporter.pepper.words import DICTIONARY, OPPOSITES

STREAM = list(islice(training(0), 20_000))


def numbers(text: str) -> list[int]:
    """The numbers in a prompt; a minus in a prompt is always a subtraction."""
    return [int(n) for n in "".join(c if c.isdigit() else " " for c in text).split()]


def test_the_stream_follows_from_its_seed() -> None:
    assert list(islice(training(0), 500)) == STREAM[:500]
    assert list(islice(training(1), 500)) != STREAM[:500]


def test_the_stream_asks_every_kind_in_both_languages() -> None:
    assert {(q.kind, q.language) for q in STREAM} == {(k, lang) for k in SHARES for lang in LANGUAGES}
    assert set(SHARES) == set(OPEN) | set(CLOSED)


@pytest.mark.parametrize(("kind", "operation"), [("add", add), ("subtract", sub)])
def test_arithmetic_is_right(kind: str, operation) -> None:
    for q in (q for q in STREAM if q.kind == kind):
        a, b = numbers(q.prompt)
        value = operation(a, b)
        if q.language == "ko":
            assert q.answer == with_particle(value, "이에요/예요") + "."
        else:
            assert q.answer == f"{a} {'+' if kind == 'add' else '-'} {b} = {value}"


def test_comparison_parity_and_next_number_are_right() -> None:
    for q in STREAM:
        if q.kind == "compare":
            a, b = numbers(q.prompt)
            assert a != b
            assert numbers(q.answer) == [max(a, b)]
        elif q.kind == "parity":
            odd = numbers(q.prompt)[0] % 2 == 1
            assert ("홀수" in q.answer or "odd" in q.answer) == odd
            assert ("짝수" in q.answer or "even" in q.answer) != odd
        elif q.kind == "next number":
            assert numbers(q.answer) == [numbers(q.prompt)[0] + 1]


def test_a_prompt_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for q in [*STREAM, *memorized(), *held_out(1000)]:
        assert answers.setdefault(q.prompt, q.answer) == q.answer


def test_the_word_lists_are_one_to_one() -> None:
    assert len(DICTIONARY) >= 80
    for column in zip(*DICTIONARY, strict=True):
        assert [word for word, count in Counter(column).items() if count > 1] == []
    for pairs in OPPOSITES.values():
        words = [word for pair in pairs for word in pair]
        assert len(words) == len(set(words))


def test_held_out_questions_are_distinct_stratified_and_the_same_each_time() -> None:
    questions = held_out(280)
    assert questions == held_out(280)
    assert questions != held_out(280, seed=1)
    assert questions[:100] == held_out(100)
    assert len({q.prompt for q in questions}) == 280
    assert set(Counter((q.kind, q.language) for q in questions).values()) == {280 // (len(OPEN) * 2)}


def test_training_never_asks_what_is_held_out() -> None:
    kept = {q.prompt.rstrip("?.!") for q in held_out(3000)}
    asked = {q.prompt.rstrip("?.!") for q in STREAM}
    assert kept.isdisjoint(asked)
    assert not any(is_held_out(q.prompt) for q in STREAM if q.kind in OPEN)
    sums = [tuple(numbers(q.prompt)) for q in held_out(700) if q.kind == "add"]
    seen = {tuple(numbers(q.prompt)) for q in STREAM if q.kind == "add"}
    assert seen.isdisjoint(sums), "a sum is held out in every wording"


def test_about_a_tenth_is_held_out() -> None:
    share = sum(is_held_out(f"What is {a} + {b}?") for a in range(100) for b in range(100)) / 10_000
    assert 0.08 < share < 0.12


def test_asking_for_more_than_there_are_is_refused(monkeypatch) -> None:
    number = next(n for n in range(1000) if is_held_out(f"{n}"))
    monkeypatch.setitem(OPEN, "parity", lambda random, language: (f"{number} {language}?", "odd"))
    assert len(held_out(len(OPEN) * 2)) == len(OPEN) * 2
    with pytest.raises(ValueError, match="no more of 'parity' in 'ko'"):
        held_out(len(OPEN) * 2 * 2)


def test_score_counts_by_kind_and_language_and_keeps_the_misses() -> None:
    questions = [
        Question("2 더하기 2는?", "4예요.", "add", "ko"),
        Question("What is 2 + 2?", "2 + 2 = 4", "add", "en"),
        Question("Is 3 even or odd?", "3 is odd.", "parity", "en"),
    ]
    said = {"2 더하기 2는?": " 4예요.\n", "What is 2 + 2?": "2 + 2 = 5", "Is 3 even or odd?": "3 is odd."}
    result = score(said.__getitem__, questions).to_dict()
    assert (result["asked"], result["right"]) == (3, 2)
    assert result["rate"] == pytest.approx(2 / 3)
    assert result["by_kind"]["add"] == {"asked": 2, "right": 1, "rate": 0.5}
    assert result["by_language"]["ko"]["rate"] == 1.0
    assert result["misses"] == [{"prompt": "What is 2 + 2?", "answer": "2 + 2 = 4", "got": "2 + 2 = 5"}]


def test_questions_and_scores_need_the_standard_library_alone() -> None:
    program = (
        "import sys, exporter.pepper, exporter.pepper.questions, exporter.pepper.score, exporter.pepper.train;"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'numpy', 'jinja2') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
