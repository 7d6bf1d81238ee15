"""Faster, slower, or only luckier: verdicts on recorded runs of one bundle, and the command for CI."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from invented_results import measurement, speeds

from runtimes import measurement as results
from runtimes.compare import ENOUGH_RUNS, Compared, _resampled, compare
from runtimes.errors import ResultsError, UsageError
from runtimes.measurement import Figure, Measurement, quantile, sampled
from runtimes.report_compare import lengths, percent, phrase, remarks
from runtimes.report_words import Words

RECORDED = json.loads((Path(__file__).parent / "data/bench_samples.json").read_text(encoding="utf-8"))
PAIRS = 100


def scatter(session: dict[str, Any]) -> float:
    """How many times as fast the fastest samples of a run are as its slowest: of its decode speed, 90 % to 10 %."""
    decode = (run["decode_speed"] for run in session["runs"])
    return median(quantile(each, 0.9) / quantile(each, 0.1) for each in decode)


# Of the sessions, the one that had 2 cores to itself; and of those recorded with some ten to twenty processes that
# wanted them, those in which the samples of a run lie together, and those in which they scatter by factors.
QUIET = [session["runs"] for session in RECORDED if scatter(session) < 1.05]
CALM = [session["runs"] for session in RECORDED if 1.05 <= scatter(session) < 1.5]
CROWDED = [session["runs"] for session in RECORDED if scatter(session) >= 1.5]


def recorded(run: dict[str, Any], slower: float = 1.0) -> Measurement:
    """A recorded run; `slower`: how many times as long everything takes."""
    ttft = sampled("ttft", "s", [each * slower for each in run["ttft"]])
    rest = (
        sampled(name, "tokens/s", [each / slower for each in run[name]])
        for name in ("prefill_speed", "decode_speed")
    )
    return measurement(ttft, *rest)


def pairs(
    sessions: Sequence[list[dict[str, Any]]], runs: int, slower: float = 1.0, number: int = PAIRS
) -> list[Compared]:
    """Pairs of neighbours in time, `runs` on each side, measured in turns: A B A B, or B A B A."""
    drawn = random.Random(20261124)
    found = []
    for _ in range(number):
        session = drawn.choice(sessions)
        start = drawn.randrange(len(session) - 2 * runs + 1)
        window = session[start : start + 2 * runs]
        first = drawn.randrange(2)
        a, b = window[first::2], window[1 - first :: 2]
        found.append(compare(map(recorded, a), [recorded(run, slower) for run in b]))
    return found


def count(found: Sequence[Compared], verdict: str) -> int:
    """Pairs of which all three figures have that verdict."""
    return sum(all(row.verdict == verdict for row in each.rows) for each in found)


def test_two_single_runs_on_a_quiet_machine_are_enough() -> None:
    """A run of 20 samples on each side."""
    same, slow = count(pairs(QUIET, 1), "no difference"), count(pairs(QUIET, 1, 1.1), "worse")
    print(f"same bundle: no difference in {same} of {PAIRS}; a tenth slower: found in {slow} of {PAIRS}")
    assert same >= 95
    assert slow >= 90


def test_runs_of_the_same_bundle_do_not_differ_and_a_tenth_slower_is_found() -> None:
    """Six runs of 20 samples on each side, in turns; each pair counts only if all three figures are right."""
    same, slow = count(pairs(CALM, 6), "no difference"), count(pairs(CALM, 6, 1.1), "worse")
    print(f"same bundle: no difference in {same} of {PAIRS}; a tenth slower: found in {slow} of {PAIRS}")
    assert same >= 95
    assert slow >= 90


def test_even_single_runs_say_nothing_wrong() -> None:
    """One run on each side: a difference is rarely seen where there is none, on whatever machine."""
    for sessions in (QUIET, CALM, CROWDED):
        wrong = [row.verdict in ("better", "worse") for pair in pairs(sessions, 1) for row in pair.rows]
        assert sum(wrong) / len(wrong) <= 0.06, [QUIET, CALM, CROWDED].index(sessions)


def test_on_a_crowded_machine_it_is_not_claimed_that_nothing_changed() -> None:
    """Where samples scatter over a factor of ten, a tenth more is not seen, and the verdict says so."""
    rows = [row for pair in pairs(CROWDED, 6, number=25) for row in pair.rows]
    verdicts = [row.verdict for row in rows]
    assert verdicts.count("undecided") > len(rows) / 4
    assert verdicts.count("better") + verdicts.count("worse") <= 0.05 * len(rows)
    for row in rows:
        if row.verdict == "no difference":
            assert max(-row.intervals[0].low, row.intervals[0].high) <= 0.25


def steady(value: float, runs: int = ENOUGH_RUNS, seed: int = 0, **changes: Any) -> list[Measurement]:
    """Runs of a quiet machine."""
    return [
        measurement(sampled("decode_speed", "tokens/s", speeds(value, 20, seed + i, 0.005)), **changes)
        for i in range(runs)
    ]


def only(found: Compared) -> Any:
    (row,) = found.rows
    return row


def test_the_same_seed_gives_the_same_interval() -> None:
    a, b = steady(30), steady(29.7, seed=50)
    assert compare(a, b) == compare(a, b)
    assert only(compare(a, b)).intervals != only(compare(a, b, seed=1)).intervals


@pytest.mark.parametrize(
    ("figure", "unit", "a", "b", "words"),
    [
        ("decode_speed", "tokens/s", 30.0, 36.0, "faster by 20%"),
        ("decode_speed", "tokens/s", 30.0, 24.0, "slower by 20%"),
        ("ttft", "s", 1.0, 0.5, "faster by 50%"),
        ("ttft", "s", 1.0, 2.0, "slower by 100%"),
        ("peak_memory", "bytes", 5e8, 6e8, "more by 20%"),
        ("decode_instructions", "instructions", 1e9, 0.9e9, "less by 10%"),
        ("energy", "J", 1.0, 1.5, "more by 50%"),
    ],
)
def test_which_way_is_better(figure: str, unit: str, a: float, b: float, words: str) -> None:
    before, after = ([measurement(sampled(figure, unit, [value] * 20))] * 5 for value in (a, b))
    row = only(compare(before, after))
    better = words.startswith(("faster", "less"))
    assert (row.verdict, row.regression) == ("better" if better else "worse", not better)
    assert phrase(row, Words("en")) == words


def test_a_regression_is_one_only_when_its_whole_interval_is_beyond_the_threshold() -> None:
    a, b = steady(30), steady(30 / 1.08, seed=50)
    one = only(compare(a, b)).decisive
    assert one.low < one.change < one.high < -0.05
    assert only(compare(a, b, -one.high - 0.001)).regression
    row = only(compare(a, b, (-one.high - one.change) / 2))
    assert (row.verdict, row.regression) == ("worse", False), "slower, but perhaps by no more than is allowed"
    assert not only(compare(b, a)).regression, "faster is none"


def test_a_phone_that_throttles_is_seen_in_the_median() -> None:
    """Its fastest tenth is as fast as before."""
    slowing = [30.0] * 6 + [21.0] * 14
    a = steady(30)
    b = [measurement(sampled("decode_speed", "tokens/s", slowing)) for _ in range(ENOUGH_RUNS)]
    row = only(compare(a, b))
    assert (row.verdict, row.decided_by) == ("worse", "median")
    assert only(compare(a[:1], b[:1])).decided_by == "fastest tenth"


def test_runs_of_different_lengths_count_by_their_samples() -> None:
    a = [*steady(30), measurement(sampled("decode_speed", "tokens/s", speeds(30, 7, 9, 0.005)))]
    row = only(compare(a, steady(30, seed=50)))
    assert (row.verdict, row.samples, row.runs) == ("no difference", (107, 100), (6, 5))


def test_a_short_run_weighs_as_much_as_it_has_samples() -> None:
    drawn = _resampled([[1.0] * 2, [5.0] * 30], [0.5], np.random.default_rng(0))
    assert set(drawn[0]) == {1.0, 5.0}, "1 only where the short run was drawn twice"
    assert 0.2 < (drawn[0] == 1.0).mean() < 0.3


def test_samples_are_drawn_in_blocks() -> None:
    """Samples that alternate in pairs: blocks of three hold at least one of each, single draws need not."""
    run = [1.0, 1.0, 9.0, 9.0] * 8
    spread = np.ptp(_resampled([run], [0.25], np.random.default_rng(0)))
    assert spread == 0, "a quarter is 1 in any set of blocks"


def test_single_samples_are_undecided_unless_the_difference_is_huge() -> None:
    def load(seconds: float) -> list[Measurement]:
        return [measurement(sampled("load_time", "s", [seconds]))]

    assert only(compare(load(1.0), load(1.5))).verdict == "undecided"
    assert only(compare(load(1.0), load(3.0))).verdict == "worse"
    assert "fewer than 5 runs" in remarks(compare(load(1.0), load(1.5)), Words("en"))[-1]


def test_a_prediction_has_no_noise() -> None:
    def guess(value: float) -> list[Measurement]:
        return [measurement(Figure(name="decode_speed", unit="tokens/s", kind="predicted", value=value))]

    assert only(compare(guess(30), guess(30))).verdict == "no difference"
    assert only(compare(guess(30), guess(30.1))).verdict == "better"


def test_what_is_not_compared_is_told() -> None:
    a, b = steady(30), steady(30, seed=50)
    marked = measurement(*a[0].figures, marks=("throttled",))
    elsewhere = measurement(*a[0].figures, device="갤럭시 S23")
    guess = measurement(
        Figure(name="ttft", unit="s", kind="predicted", value=1.0), sampled("energy", "J", [1.0])
    )
    ttft = measurement(sampled("ttft", "s", [1.0]), sampled("peak_memory", "bytes", [0.0]))
    zero = measurement(sampled("peak_memory", "bytes", [1.0]))
    found = compare([*a, marked, elsewhere, guess, zero], [*b, ttft])
    assert [row.figure for row in found.rows] == ["decode_speed"]
    assert found.rows[0].runs == (5, 5), "the marked run is not among them"
    where = "Example-0.5B, adb, Galaxy S24 Ultra, 64 → 128"
    assert {tuple(each.model_dump().values()) for each in found.skipped} == {
        ("marked", f"A: {where}", "", ("throttled",)),
        ("only in A", "Example-0.5B, adb, 갤럭시 S23, 64 → 128, cpu", "", ()),
        ("of two kinds", where, "ttft", ("predicted", "measured")),
        ("only in A", where, "energy", ()),
        ("zero", where, "peak_memory", ()),
    }
    said = remarks(found, Words("en"))
    assert f"not compared: A: {where} (throttled): a marked run is not like the others" in said
    assert f"not compared: {where}, TTFT (predicted, measured): figures of different kinds" in said
    assert f"비교하지 않음: {where}, TTFT (예측, 측정): 종류가 다른 지표" in remarks(found, Words("ko"))


def test_minutes_are_a_case_of_their_own() -> None:
    a, b = (steady(30, seed=s) + steady(20, seed=s, sustained_minutes=10) for s in (0, 50))
    rows = compare(a, b).rows
    assert [lengths(row, Words("en")) for row in rows] == ["64 → 128", "64 → 128, 10 minutes"]


def test_what_differs_is_told() -> None:
    a = steady(30)
    b = steady(30, seed=50, scheme="int8", variant="other", engine="onnxruntime 1.25")
    found = compare(a, b)
    assert {each[0]: each[1:] for each in found.differs} == {
        "variant": ("cpu", "other"),
        "scheme": ("int4", "int8"),
        "engine": ("onnxruntime 1.24", "onnxruntime 1.25"),
    }
    assert "differs: scheme: int4 → int8" in remarks(found, Words("en"))


def test_several_variants_are_compared_each_with_its_own() -> None:
    a = steady(30) + steady(60, variant="hexagon")
    b = steady(60, variant="hexagon", seed=9) + steady(20, seed=9)
    assert {row.variant: row.verdict for row in compare(a, b).rows} == {
        "cpu": "worse",
        "hexagon": "no difference",
    }
    found = compare(a, steady(30, variant="gpu", seed=9) + steady(30, seed=9))
    assert {each.why for each in found.skipped} == {"only in A", "only in B"}


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(
        ResultsError, match=r"no figure in common .*Pixel.*only in B.*measure the same workload"
    ):
        compare(steady(30), steady(30, device="Pixel 9"))
    with pytest.raises(ResultsError, match=r"one is empty"):
        compare([], [])
    with pytest.raises(UsageError, match="threshold"):
        compare(steady(30), steady(30), threshold=-1)


def test_percent() -> None:
    assert [percent(0.0912), percent(0.5, sign=True), percent(-0.101, sign=True)] == ["9.1%", "+50%", "-10%"]


def test_the_command(gochu: Any, tmp_path: Path) -> None:
    a, b = tmp_path / "전.jsonl", tmp_path / "후.jsonl"
    results.append(a, steady(30, device="갤럭시 <S24>"))
    results.append(b, steady(25, seed=50, device="갤럭시 <S24>"))
    code, out, err = gochu("compare", a, b)
    assert (code, out) == (4, "")
    assert "slower by 17%" in err
    assert "갤럭시 <S24>" in " ".join(err.split())
    assert "gochu: 1 of 1 figures became worse by more than 5% (decode_speed)" in err
    code, out, err = gochu("compare", b, a)
    assert (code, out) == (0, "")
    assert "faster by 20%" in err
    code, _, err = gochu("compare", a, b, "--threshold", "0.3", "--lang", "ko")
    assert (code, "17% 느려짐" in err) == (0, True)
    code, out, err = gochu("compare", a, b, "--json")
    found = json.loads(out)
    assert (code, found["rows"][0]["verdict"], found["rows"][0]["regression"]) == (4, "worse", True)
    assert err.count("\n") == 1


@pytest.mark.parametrize("threshold", ["five", "-5%", "500%", "nan", "%"])
def test_a_threshold_that_is_none(gochu: Any, threshold: str) -> None:
    code, out, err = gochu("compare", "a", "b", "--threshold", threshold)
    assert (code, out) == (2, "")
    assert "is no share" in err


def test_another_language_is_wrong_use(gochu: Any, tmp_path: Path) -> None:
    assert gochu("compare", "a", "b", "--lang", "fr")[0] == 2


@pytest.mark.parametrize("command", ["compare", "report"])
def test_the_help_has_examples(gochu: Any, command: str) -> None:
    code, out, err = gochu(command, "--help")
    assert (code, err) == (0, "")
    assert f"gochu {command}" in out.partition("Examples")[2]
