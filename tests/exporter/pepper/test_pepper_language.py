import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.pepper.language import (
    ends_in_consonant,
    english_numeral,
    korean_numeral,
    particle,
    with_particle,
)

KOREAN_VALUES = {syllable: value for value, syllable in enumerate("영일이삼사오육칠팔구")}
UNITS = {"십": 10, "백": 100, "천": 1000}
ENGLISH_VALUES = {english_numeral(n): n for n in (*range(20), *range(20, 100, 10))}


def read_korean(text: str) -> int:
    total, digit = 0, None
    for syllable in text:
        if syllable in UNITS:
            total += (1 if digit is None else digit) * UNITS[syllable]
            digit = None
        else:
            digit = KOREAN_VALUES[syllable]
    return total + (digit or 0)


def read_english(text: str) -> int:
    total = 0
    for word in text.replace("-", " ").split():
        if word == "thousand":
            total *= 1000
        elif word == "hundred":
            total += total % 10 * 99
        else:
            total += ENGLISH_VALUES[word]
    return total


@given(st.integers(0, 9999))
def test_a_numeral_reads_back_as_its_number(number: int) -> None:
    assert read_korean(korean_numeral(number)) == number
    assert read_english(english_numeral(number)) == number


@pytest.mark.parametrize(
    ("number", "korean", "english"),
    [
        (0, "영", "zero"),
        (10, "십", "ten"),
        (21, "이십일", "twenty-one"),
        (100, "백", "one hundred"),
        (320, "삼백이십", "three hundred twenty"),
        (1111, "천백십일", "one thousand one hundred eleven"),
        (9005, "구천오", "nine thousand five"),
    ],
)
def test_numerals(number: int, korean: str, english: str) -> None:
    assert korean_numeral(number) == korean
    assert english_numeral(number) == english


@pytest.mark.parametrize("number", [-1, 10_000])
@pytest.mark.parametrize("numeral", [korean_numeral, english_numeral])
def test_a_number_beyond_the_words_is_refused(numeral, number: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.9999"):
        numeral(number)


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ("사과", "을/를", "사과를"),
        ("집", "을/를", "집을"),
        ("고추", "이에요/예요", "고추예요"),
        ("하늘", "은/는", "하늘은"),
        ("힣", "은/는", "힣은"),
        (45, "은/는", "45는"),
        (-13, "은/는", "-13은"),
        (1000, "이/가", "1000이"),
        (0, "과/와", "0과"),
        (9, "과/와", "9와"),
    ],
)
def test_particles(word: str | int, pair: str, expected: str) -> None:
    assert with_particle(word, pair) == expected


@given(st.integers(0, 9999))
def test_a_number_takes_the_particle_of_its_numeral(number: int) -> None:
    assert particle(number, "을/를") == particle(korean_numeral(number), "을/를")


def test_a_particle_after_latin_letters_is_refused() -> None:
    with pytest.raises(ValueError, match="Hangul"):
        ends_in_consonant("apple")
