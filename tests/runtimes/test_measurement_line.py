"""Measurements in logs: whatever stands around them, they come back, or it is said that they do not."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.errors import TargetError
from runtimes.measurement import Answer, Measurement, Method, Place, Subject, sampled
from runtimes.measurement_line import MOST, WORD, decode, encode, read


def measurement(
    device: str = "갤럭시 S24 울트라", samples: int = 3, said: str = "삼백이십은 320"
) -> Measurement:
    return Measurement(
        what=Subject(model="pepper", bundle="0" * 64, variant="cpu", format="onnx", scheme="int4", bytes=1),
        where=Place(target="app", device=device, os="Android 14", engine="onnxruntime 1.22"),
        how=Method(workload="smoke", prompt_tokens=8, new_tokens=4, context=96, warmup=1, repeats=samples),
        figures=(sampled("decode_speed", "tokens/s", [1 / (i + 3) for i in range(samples)]),),
        answers=(Answer(prompt="320을 읽으면?", text=said, tokens=(1, 2)),),
        command="an app",
        time="2026-01-01T00:00:00+00:00",
    )


LONG = measurement(samples=700)


@given(st.text(max_size=200), st.text(max_size=80), st.integers(1, 900))
def test_any_text_and_length_comes_back(said: str, device: str, samples: int) -> None:
    original = measurement(device, samples, said)
    lines = list(encode(original))
    assert decode("\n".join(lines)) == [original]
    assert all(line.isascii() and len(line) < MOST + 60 and "\n" not in line for line in lines)


PREFIXES = (
    "11-24 12:00:01.000  1234  1234 I Gochu: ",
    "I/Gochu   ( 1234): ",
    "Nov 24 12:00:01 iPhone App[321] <Notice>: ",
    '{"log": "',
    "",
    f"{WORD} says: ",
)


@given(
    st.lists(st.sampled_from(PREFIXES), min_size=9, max_size=9), st.randoms(use_true_random=False), st.text()
)
def test_logs_prefix_and_interleave_lines(prefixes: list[str], order: random.Random, noise: str) -> None:
    """Lines of two measurements, in any order, between lines of others."""
    originals = [LONG, measurement("Pixel 9", 400)]
    lines = [line for each in originals for line in encode(each)]
    order.shuffle(lines)
    dirty = [f"{prefixes[i % 9]}{line}\n{noise.replace(WORD, '')}\n" for i, line in enumerate(lines)]
    assert sorted(decode("".join(dirty)), key=str) == sorted(originals, key=str)


def test_line_ends_of_windows_and_of_a_pty() -> None:
    assert decode("\r\n".join([*encode(LONG), ""])) == [LONG]


def test_a_measurement_in_two_logs_counts_once() -> None:
    lines = list(encode(LONG))
    assert len(lines) > 2
    assert decode("\n".join(lines * 2)) == [LONG]


@given(st.integers(0, 10_000))
def test_a_log_that_was_cut_off_gives_nothing_but_its_fault(at: int) -> None:
    text = "\n".join(encode(LONG))
    cut = text[: at % len(text)]
    reading = read(cut)
    assert reading.found == ()
    begun = re.search(rf"{WORD} 1/\d+ [0-9a-f]{{8}} ", cut)
    assert bool(reading.faults) == bool(begun)
    assert not begun or re.search("lacks line [2-9] of|is damaged", reading.faults[0])


@given(st.integers(0, 10_000), st.characters(min_codepoint=32, max_codepoint=126))
def test_damage_in_the_text_is_found(at: int, letter: str) -> None:
    line = next(encode(measurement()))
    begin = line.index("{")
    place = begin + at % (len(line) - begin)
    damaged = line[:place] + letter + line[place + 1 :]
    reading = read(damaged)
    assert (reading.found == (measurement(),)) == (damaged == line)
    assert bool(reading.faults) == (damaged != line)


def test_a_cut_copy_does_not_spoil_a_whole_one() -> None:
    """Logcat cuts a long line; the test's own output holds it whole."""
    lines = list(encode(LONG))
    short = [line[:-200] for line in lines]
    assert decode("\n".join([*short, *lines])) == [LONG] == decode("\n".join([*lines, *short]))


def test_whole_measurements_survive_a_damaged_one() -> None:
    good, bad = list(encode(measurement())), list(encode(LONG))
    log = "\n".join([*bad[:-1], *good])
    reading = read(log)
    assert reading.found == (measurement(),)
    (fault,) = reading.faults
    assert re.match(
        rf"measurement [0-9a-f]{{8}} in the log lacks line {len(bad)} of {len(bad)}: the log was cut", fault
    )
    with pytest.raises(TargetError, match="the log was cut off; measure again"):
        decode(log)


def test_a_line_of_another_schema_is_a_fault_not_a_crash() -> None:
    import hashlib

    text = '{"schema_version":1}'
    log = f"{WORD} 1/1 {hashlib.sha256(text.encode()).hexdigest()[:8]} {text}"
    (fault,) = read(log).faults
    assert "has schema version 1 where this Gochu reads 2" in fault


def test_a_log_without_measurements_is_empty() -> None:
    assert read(f"{WORD}\n{WORD} 1/1 xyz {{}}\n고추\n") == read("")
    assert decode("") == []
