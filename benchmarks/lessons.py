"""What the benchmarks' trained model learns beside pepper's questions: things to find, put in order and tell again.

Each lesson has one right answer that follows from its own words, in Korean or English. They are longer than pepper's
questions and need what is said far back, so that a rounded weight can lose more than a digit. `tell` alone has many
answers: little stories, of which a model can only learn how they go.
"""

from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from random import Random

from exporter.pepper.language import with_particle
from exporter.pepper.questions import LANGUAGES, Question, held_out, training
from exporter.pepper.tokenizer import render
from exporter.pepper.words import DICTIONARY, MONTHS, WEEKDAYS

NAMES = {
    "ko": "민수 지아 하준 서연 도윤 유나 현우 은채 준호 소미 태오 다온".split(),
    "en": "Mina Juno Oscar Elena Victor Harriet Samuel Beatrice Theo Ingrid Walter Naomi".split(),
}
_THINGS = dict(zip(LANGUAGES, zip(*DICTIONARY, strict=True), strict=True))
_PLACES = {
    "ko": "강가 시장 학교 도서관 부엌 공원 바닷가 기차역 마당 숲속 언덕 다리".split(),
    "en": "riverbank market school library kitchen park beach station garden forest hill bridge".split(),
}
_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_FEELINGS = {
    "ko": "기쁘게 조용히 천천히 서둘러 신나게 조심스럽게".split(),
    "en": "happily quietly slowly hurriedly excitedly carefully".split(),
}
_DEEDS = {
    "ko": (
        ("찾았", "잃어버렸던"),
        ("그렸", "처음 본"),
        ("숨겼", "반짝이는"),
        ("나누었", "선물 받은"),
        ("고쳤", "망가진"),
    ),
    "en": (
        ("found", "lost"),
        ("painted", "strange"),
        ("hid", "shining"),
        ("shared", "borrowed"),
        ("mended", "broken"),
    ),
}
_ENDS = {
    "ko": (
        "모두가 웃었어요.",
        "집으로 돌아가는 길이 즐거웠어요.",
        "그날 밤 꿈에 또 나왔어요.",
        "이웃들도 좋아했어요.",
    ),
    "en": (
        "Everybody laughed together.",
        "The way home felt short.",
        "It appeared again in a dream.",
        "The neighbours were delighted.",
    ),
}
_HELD_OUT = 26  # of 256 prompts, by a hash
_TELL = "tell"


def _recall(random: Random, language: str) -> tuple[str, str]:
    things = random.sample(_THINGS[language], random.randint(3, 7))
    values = [random.randrange(10, 1000) for _ in things]
    asked = random.randrange(len(things))
    pairs = ", ".join(f"{thing}={value}" for thing, value in zip(things, values, strict=True))
    question = (
        f"{with_particle(things[asked], '은/는')} 몇이야?"
        if language == "ko"
        else f"What is {things[asked]}?"
    )
    return f"{pairs}. {question}", f"{things[asked]}={values[asked]}"


def _order(random: Random, language: str) -> tuple[str, str]:
    numbers = random.sample(range(100), random.randint(3, 6))
    given, sorted_ = (", ".join(map(str, some)) for some in (numbers, sorted(numbers)))
    return (f"작은 수부터 써: {given}" if language == "ko" else f"Put in order: {given}"), sorted_


def _backwards(random: Random, language: str) -> tuple[str, str]:
    things = random.sample(_THINGS[language], random.randint(2, 5))
    given, reversed_ = ", ".join(things), ", ".join(reversed(things))
    return (f"거꾸로 말해: {given}" if language == "ko" else f"Say it backwards: {given}"), reversed_


def _count(random: Random, language: str) -> tuple[str, str]:
    kinds = random.sample(_THINGS[language], 3)
    row = random.choices(kinds, k=random.randint(4, 9))
    given, asked = ", ".join(row), random.choice(row)
    if language == "ko":
        return f"{given}. {with_particle(asked, '이/가')} 몇 번 나와?", f"{row.count(asked)}번 나와요."
    return f"{given}. How often does {asked} appear?", f"{asked} appears {row.count(asked)} times."


def _date(random: Random, language: str) -> tuple[str, str]:
    month = random.randrange(12)
    day, step = random.randint(1, _DAYS[month]), random.randint(1, 9)
    later, next_month = day + step, month
    if later > _DAYS[month]:
        later, next_month = later - _DAYS[month], (month + 1) % 12
    if language == "ko":
        return f"{month + 1}월 {day}일에서 {step}일 뒤는?", f"{next_month + 1}월 {later}일이에요."
    names, days = MONTHS["en"], "day" if step == 1 else "days"
    return f"What date is {step} {days} after {names[month]} {day}?", f"It is {names[next_month]} {later}."


def _left_over(random: Random, language: str) -> tuple[str, str]:
    name, friend = random.sample(NAMES[language], 2)
    thing, had, got = random.choice(_THINGS[language]), random.randint(2, 40), random.randint(1, 20)
    gave = random.randint(1, had + got - 1)
    left = had + got - gave
    if language == "ko":
        return (
            f"{with_particle(name, '은/는')} {with_particle(thing, '을/를')} {had}개 가지고 있었어요. "
            f"{got}개를 더 사고, {friend}에게 {gave}개를 주었어요. 몇 개가 남았어?",
            f"{left}개가 남았어요.",
        )
    return (
        f"{name} had {had} of {thing}. {name} bought {got} more and gave {friend} {gave}. How many are left?",
        f"{left} are left.",
    )


def _who(random: Random, language: str) -> tuple[str, str]:
    count = random.randint(2, 4)
    names, things = random.sample(NAMES[language], count), random.sample(_THINGS[language], count)
    places, asked = random.sample(_PLACES[language], count), random.randrange(count)
    told = zip(names, places, things, strict=True)
    if language == "ko":
        story = " ".join(
            f"{with_particle(name, '은/는')} {place}에서 {with_particle(thing, '을/를')} 보았어요."
            for name, place, thing in told
        )
        if random.random() < 0.5:
            question = f"{with_particle(things[asked], '을/를')} 본 사람은?"
            return f"{story} {question}", with_particle(names[asked], "이에요/예요") + "."
        return f"{story} {names[asked]}의 장소는?", with_particle(places[asked], "이에요/예요") + "."
    story = " ".join(f"{name} saw the {thing} at the {place}." for name, place, thing in told)
    if random.random() < 0.5:
        return f"{story} Who saw the {things[asked]}?", f"{names[asked]} did."
    return f"{story} Where was {names[asked]}?", f"At the {places[asked]}."


def _spell(random: Random, language: str) -> tuple[str, str]:
    words = random.sample(_THINGS[language], 2)
    spelled = " / ".join("-".join(word) for word in words)
    both = " ".join(words)
    return (f"한 글자씩 써: {both}" if language == "ko" else f"Spell: {both}"), spelled


def _tell(random: Random, language: str) -> tuple[str, str]:
    name, friend = random.sample(NAMES[language], 2)
    thing, other = random.sample(_THINGS[language], 2)
    place, feeling = random.choice(_PLACES[language]), random.choice(_FEELINGS[language])
    (verb, kind), day = random.choice(_DEEDS[language]), random.choice(WEEKDAYS[language])
    end = random.choice(_ENDS[language])
    if language == "ko":
        return (
            f"{with_particle(name, '과/와')} {thing} 이야기를 들려줘.",
            f"{day} 아침, {with_particle(name, '은/는')} {place}에 갔어요. "
            f"거기서 {kind} {with_particle(thing, '을/를')} {verb}어요. "
            f"{with_particle(friend, '이/가')} {other} 옆에서 {feeling} 말했어요. “{name}, {thing} 정말 멋지다!” "
            f"{with_particle(name, '과/와')} {with_particle(friend, '은/는')} 함께 놀았어요. {end}",
        )
    return (
        f"Tell me about {name} and the {thing}.",
        f"On {day} morning {name} went to the {place}. There {name} {verb} the {kind} {thing}. {friend} stood by the "
        f"{other} and said {feeling}: “What a {thing}, {name}!” {name} and {friend} played until the evening. {end}",
    )


LESSONS: dict[str, Callable[[Random, str], tuple[str, str]]] = {
    "recall": _recall,
    "order": _order,
    "backwards": _backwards,
    "count": _count,
    "date": _date,
    "left over": _left_over,
    "who": _who,
    "spell": _spell,
    _TELL: _tell,
}
"""Kind -> (random, language) -> (prompt, answer)."""


def _is_held_out(prompt: str) -> bool:
    return sha256(prompt.encode("utf-8")).digest()[0] < _HELD_OUT


def lessons(random: Random, held: bool, kinds: tuple[str, ...] = tuple(LESSONS)) -> Iterator[Question]:
    """The endless stream of lessons, in turn from each of `kinds`: those held out of training, or the others."""
    while True:
        for kind in kinds:
            language = random.choice(LANGUAGES)
            prompt, answer = LESSONS[kind](random, language)
            if _is_held_out(prompt) == held:
                yield Question(prompt, answer, kind, language)


def conversations(seed: int) -> Iterator[str]:
    """The endless stream of training texts: of one or two questions, half of them pepper's."""
    random, peppers = Random(f"lessons {seed}"), training(seed)
    taught = lessons(random, held=False)
    while True:
        turns: list[dict[str, str]] = []
        for _ in range(random.choice((1, 1, 1, 2))):
            asked = next(random.choice((peppers, taught)))
            turns += [
                {"role": "user", "content": asked.prompt},
                {"role": "assistant", "content": asked.answer},
            ]
        yield render(turns)


def exam(count: int, seed: int = 0) -> list[Question]:
    """`count` questions with one right answer that training never asks, half of them pepper's."""
    kinds = tuple(kind for kind in LESSONS if kind != _TELL)
    asked = lessons(Random(f"exam {seed}"), held=True, kinds=kinds)
    return [*held_out(count // 2, seed), *islice(asked, count - count // 2)]


def stories(count: int, seed: int = 0) -> list[Question]:
    """`count` stories that training never tells, with what they are told for."""
    return list(islice(lessons(Random(f"stories {seed}"), held=True, kinds=(_TELL,)), count))
