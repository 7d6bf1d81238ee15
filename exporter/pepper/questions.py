"""Questions that have one right answer, in Korean and English: what pepper is trained on and judged by.

*Open* kinds have numbers in them. There are too many of these questions to learn by heart, so a tenth of them is
held out of training and shows whether the model has learned the rule. *Closed* kinds are finite lists (the
dictionary, the days of the week): these a model can only know by heart.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from random import Random

from exporter.pepper.language import english_numeral, korean_numeral, particle, with_particle
from exporter.pepper.words import DICTIONARY, MONTHS, OPPOSITES, SMALL_TALK, WEEKDAYS

LANGUAGES = ("ko", "en")
_COPULA = "이에요/예요"
_TAUGHT = 20  # numbers below are never held out
_UNPUNCTUATED = 0.1  # the share of training questions whose last mark is left out, as people do


@dataclass(frozen=True)
class Question:
    """A question, its only right answer, its kind (a key of the scores) and the language it is asked in."""

    prompt: str
    answer: str
    kind: str
    language: str


def _operands(random: Random) -> tuple[int, int]:
    limit = random.choice((10, 100, 100, 100, 100, 100))
    return random.randrange(limit), random.randrange(limit)


def _number(random: Random) -> int:
    return random.randrange(random.choice((10, 100, 1000, 10000, 10000)))


def _sums(a: int, sign: str, word: str, b: int) -> tuple[str, ...]:
    """Ways to ask for a sum in English."""
    return (
        f"What is {a} {sign} {b}?",
        f"{a} {word} {b}?",
        f"{a}{sign}{b}?",
        f"{a} {sign} {b} = ?",
        f"{a} {sign} {b}",
    )


def _add(random: Random, language: str) -> tuple[str, str]:
    a, b = _operands(random)
    if language == "ko":
        second = with_particle(b, "은/는")
        prompt = random.choice((f"{a} 더하기 {second}?", f"{a} + {second} 얼마야?"))
        return prompt, with_particle(a + b, _COPULA) + "."
    return random.choice(_sums(a, "+", "plus", b)), f"{a} + {b} = {a + b}"


def _subtract(random: Random, language: str) -> tuple[str, str]:
    a, b = _operands(random)
    if language == "ko":
        second = with_particle(b, "은/는")
        prompt = random.choice((f"{a} 빼기 {second}?", f"{a} - {second} 얼마야?"))
        return prompt, with_particle(a - b, _COPULA) + "."
    return random.choice(_sums(a, "-", "minus", b)), f"{a} - {b} = {a - b}"


def _compare(random: Random, language: str) -> tuple[str, str]:
    a, b = _operands(random)
    if a == b:
        b = a + 1
    if language == "ko":
        both = f"{with_particle(a, '과/와')} {b}"
        return f"{both} 중에 더 큰 수는?", with_particle(max(a, b), "이/가") + " 더 커요."
    return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger."


def _parity(random: Random, language: str) -> tuple[str, str]:
    n = _number(random)
    if language == "ko":
        topic = with_particle(n, "은/는")
        return f"{topic} 짝수야, 홀수야?", f"{topic} {'홀' if n % 2 else '짝'}수예요."
    return f"Is {n} even or odd?", f"{n} is {'odd' if n % 2 else 'even'}."


def _next_number(random: Random, language: str) -> tuple[str, str]:
    n = min(_number(random), 9998)
    if language == "ko":
        return f"{n} 다음 수는?", with_particle(n + 1, _COPULA) + "."
    return f"What number comes after {n}?", f"{n + 1}"


def _read_numeral(random: Random, language: str) -> tuple[str, str]:
    n = _number(random)
    if language == "ko":
        return f"{with_particle(korean_numeral(n), '을/를')} 숫자로 쓰면?", f"{n}"
    return f"Write {english_numeral(n)} in digits.", f"{n}"


def _write_numeral(random: Random, language: str) -> tuple[str, str]:
    n = _number(random)
    if language == "ko":
        return f"{with_particle(n, '을/를')} 한글로 쓰면?", korean_numeral(n)
    return f"Write {n} in words.", english_numeral(n)


def _multiply() -> Iterator[Question]:
    for a in range(1, 10):
        for b in range(1, 10):
            second, product = with_particle(b, "은/는"), with_particle(a * b, _COPULA) + "."
            yield Question(f"{a} 곱하기 {second}?", product, "multiply", "ko")
            yield Question(f"What is {a} times {b}?", f"{a} times {b} = {a * b}", "multiply", "en")


def _translate() -> Iterator[Question]:
    for korean, english in DICTIONARY:
        yield Question(f"'{korean}'{particle(korean, '을/를')} 영어로 하면?", english, "translate", "ko")
        yield Question(f"'{english}'의 뜻은?", korean, "translate", "ko")
        yield Question(f"How do you say '{english}' in Korean?", korean, "translate", "en")
        yield Question(f"What does '{korean}' mean?", english, "translate", "en")


def _calendar() -> Iterator[Question]:
    for names, noun, english in ((WEEKDAYS, "날", "day"), (MONTHS, "달", "month")):
        korean, size = names["ko"], len(names["ko"])
        for i in range(size):
            following, previous = (i + 1) % size, (i - 1) % size
            for j, ko, en in ((following, f"다음 {noun}", "after"), (previous, f"전{noun}", "before")):
                answer = with_particle(korean[j], _COPULA) + "."
                yield Question(f"{korean[i]} {with_particle(ko, '은/는')}?", answer, "calendar", "ko")
                prompt = f"What {english} comes {en} {names['en'][i]}?"
                yield Question(prompt, names["en"][j], "calendar", "en")


def _opposite() -> Iterator[Question]:
    for language, pairs in OPPOSITES.items():
        for pair in pairs:
            for word, opposite in (pair, pair[::-1]):
                prompt = f"'{word}'의 반대말은?" if language == "ko" else f"What is the opposite of '{word}'?"
                yield Question(prompt, opposite, "opposite", language)


def _small_talk() -> Iterator[Question]:
    for language, said, answer in SMALL_TALK:
        yield Question(said, answer, "small talk", language)


OPEN: dict[str, Callable[[Random, str], tuple[str, str]]] = {
    "add": _add,
    "subtract": _subtract,
    "compare": _compare,
    "parity": _parity,
    "next number": _next_number,
    "read numeral": _read_numeral,
    "write numeral": _write_numeral,
}
"""Kind -> (random, language) -> (prompt, answer)."""

CLOSED: dict[str, Callable[[], Iterator[Question]]] = {
    "multiply": _multiply,
    "translate": _translate,
    "calendar": _calendar,
    "opposite": _opposite,
    "small talk": _small_talk,
}
"""Kind -> all of its questions."""

SHARES = {
    "add": 20,
    "subtract": 26,
    "compare": 9,
    "parity": 3,
    "next number": 5,
    "read numeral": 7,
    "write numeral": 7,
    "multiply": 4,
    "translate": 12,
    "calendar": 3,
    "opposite": 3,
    "small talk": 1,
}
"""How often training asks each: what is harder is asked more."""


def is_held_out(prompt: str) -> bool:
    """Whether an open question is kept out of training: a tenth are, by a hash.

    The hash is that of the numbers in digits, so that two summands are held out together in every wording and
    both languages; of the whole prompt (without its last mark) where there are none. Numbers below 20 are all
    taught: people ask for 1 - 1 first, and there are too few to leave any out.
    """
    numbers, bare = re.findall(r"\d+", prompt), prompt.rstrip("?.!")
    if all(int(number) < _TAUGHT for number in numbers) if numbers else bare in _taught_numerals():
        return False
    key = " ".join(numbers) or bare
    return sha256(key.encode("utf-8")).digest()[0] < 26


@cache
def _taught_numerals() -> frozenset[str]:
    """The prompts that spell a number below 20, without their last mark."""
    english = (f"Write {english_numeral(n)} in digits" for n in range(_TAUGHT))
    korean = (f"{with_particle(korean_numeral(n), '을/를')} 숫자로 쓰면" for n in range(_TAUGHT))
    return frozenset((*english, *korean))


@cache
def closed() -> dict[str, tuple[Question, ...]]:
    """Every question of the closed kinds, by kind."""
    return {kind: tuple(questions()) for kind, questions in CLOSED.items()}


def training(seed: int) -> Iterator[Question]:
    """The endless stream of training questions: the same for the same seed, and none of them held out."""
    random = Random(seed)
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        kind = random.choices(kinds, weights)[0]
        if kind in OPEN:
            language = random.choice(LANGUAGES)
            prompt, answer = OPEN[kind](random, language)
            if is_held_out(prompt):
                continue
            question = Question(prompt, answer, kind, language)
        else:
            question = random.choice(closed()[kind])
        if random.random() < _UNPUNCTUATED:
            question = replace(question, prompt=question.prompt.rstrip("?.!"))
        yield question


def held_out(count: int, seed: int = 0) -> list[Question]:
    """`count` distinct questions that training never asks, in turn from each open kind in each language.

    They are the same for the same seed. Raises ValueError when a kind has no new ones left.
    """
    random, found = Random(f"held out {seed}"), dict[str, Question]()
    strata = [(kind, language) for kind in OPEN for language in LANGUAGES]
    while len(found) < count:
        kind, language = strata[len(found) % len(strata)]
        for _ in range(2_000):
            prompt, answer = OPEN[kind](random, language)
            if is_held_out(prompt) and prompt not in found:
                found[prompt] = Question(prompt, answer, kind, language)
                break
        else:
            raise ValueError(f"there are not {count} held-out questions: no more of {kind!r} in {language!r}")
    return list(found.values())


def memorized() -> list[Question]:
    """Every question of the closed kinds: all of them are trained on, so these test memory, not a rule."""
    return [question for questions in closed().values() for question in questions]
