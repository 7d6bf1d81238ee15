"""Numbers in words, and the Korean particles that depend on the sound a word ends in."""

_DIGITS = "영일이삼사오육칠팔구"
_UNITS = ((1000, "천"), (100, "백"), (10, "십"), (1, ""))
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def korean_numeral(number: int) -> str:
    """The Sino-Korean numeral of 0..9999 in Hangul: 320 is 삼백이십. A leading 일 is left out: 100 is 백."""
    if not 0 <= number <= 9999:
        raise ValueError(f"{number} is not in 0..9999, the numbers that pepper writes in words")
    if number == 0:
        return _DIGITS[0]
    text = ""
    for value, unit in _UNITS:
        digit = number // value % 10
        if digit:
            text += ("" if digit == 1 and value > 1 else _DIGITS[digit]) + unit
    return text


def english_numeral(number: int) -> str:
    """The English numeral of 0..9999: 320 is "three hundred twenty"."""
    if not 0 <= number <= 9999:
        raise ValueError(f"{number} is not in 0..9999, the numbers that pepper writes in words")
    if number < 20:
        return _ONES[number]
    if number < 100:
        ones = f"-{_ONES[number % 10]}" if number % 10 else ""
        return _TENS[number // 10 - 2] + ones
    value, unit = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {english_numeral(number % value)}" if number % value else ""
    return f"{_ONES[number // value]} {unit}{rest}"


def ends_in_consonant(word: str | int) -> bool:
    """Whether a Hangul word, or a number as it is read in Korean (-10000 < n < 10000), ends in a consonant.

    A precomposed syllable is 0xAC00 + (initial * 21 + vowel) * 28 + final, with final 0 for "none"
    (The Unicode Standard, section 3.12).
    """
    last = (korean_numeral(abs(word)) if isinstance(word, int) else word)[-1]
    if not "가" <= last <= "힣":
        raise ValueError(f"{word!r} does not end in a Hangul syllable, so no particle follows from it")
    return (ord(last) - 0xAC00) % 28 != 0


def particle(word: str | int, pair: str) -> str:
    """The one of a pair, written "after a consonant/after a vowel" as in "을/를", that follows `word`."""
    after_consonant, after_vowel = pair.split("/")
    return after_consonant if ends_in_consonant(word) else after_vowel


def with_particle(word: str | int, pair: str) -> str:
    """`word` and its particle: (320, "을/를") is "320을", ("사과", "을/를") is "사과를"."""
    return f"{word}{particle(word, pair)}"
