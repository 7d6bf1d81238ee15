"""The fit: it finds what rows were made from, is not led astray by one of them, and never sees the run it predicts."""

import tomllib
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from runtimes import fit
from runtimes.fit import SPREAD, Fit, Left
from runtimes.fitted import COVERAGE, Quantity, Setting
from runtimes.observed import Row


def made(seconds: float = 1.0) -> list[Row]:
    """Rows of two engines on four chips, from a model whose constants are known, with a tenth of a percent of noise."""
    rng = np.random.default_rng(0)
    rows = []
    for engine, slower in [("one", 1.0), ("two", 1.3)]:
        for chip, share in [("a", 0.5), ("b", 0.6), ("c", 0.7), ("d", 0.55)]:
            for size in (0.002, 0.01, 0.05):
                value = 20 * 2e-4 + slower * size / share
                at = Setting(engine, "cpu", "integer", chip)
                noisy = seconds * value * float(np.exp(rng.normal(0, 0.001)))
                rows.append(Row("decode", at, noisy, size, 20, 1e-4, f"{engine} {size}", "printed", "source"))
    return rows


def test_the_constants_that_rows_were_made_from_are_found() -> None:
    problem = Fit("decode", made())
    found, _, worth = problem.solve(problem.everything())
    guessed, _ = problem.predict(found, problem.everything())
    assert np.abs(guessed - problem.target).max() < 0.06  # shrunk, as if they were as noisy as published ones
    assert 6 < worth < 14  # two engines, eight chips, an overhead; shrunk
    table = problem.table(found, problem.solve(problem.everything())[1], problem.everything())
    overhead = sum(table["overhead"][name][0] for name in ("cpu", "cpu one"))
    assert np.exp(overhead) == pytest.approx(2e-4, rel=0.1)
    rate = sum(table["rate"][name][0] for name in ("cpu", "cpu one", "cpu one integer"))
    assert rate == pytest.approx(np.log(1 / 0.58), abs=0.1)


def test_one_wrong_row_does_not_lead_the_others_astray() -> None:
    rows = made()
    wrong = [replace(rows[0], value=10 * rows[0].value), *rows[1:]]
    problem, misled = Fit("decode", rows), Fit("decode", wrong)
    every = problem.everything()
    before, _ = problem.predict(problem.solve(every)[0], every)
    after, _ = misled.predict(misled.solve(every)[0], every)
    assert np.abs(after - before)[1:].max() < 0.15
    assert np.abs(after - before)[5:].max() < 0.08


def test_a_run_is_predicted_without_having_been_seen() -> None:
    rows = made()
    changed = [*rows[:7], replace(rows[7], value=3 * rows[7].value), *rows[8:]]
    before, after = Fit("decode", rows).leave_one_out(), Fit("decode", changed).leave_one_out()
    assert before[7].error is not None
    assert before[7].chip_error is not None
    assert before[7].error == pytest.approx(0, abs=0.05)
    for name in ("error", "chip_error"):  # of a speed: published a third, so predicted three times as much
        assert 1 + getattr(after[7], name) == pytest.approx(3 * (1 + getattr(before[7], name)), rel=1e-5)
    assert before[7].error != pytest.approx(before[7].chip_error, abs=0.02)


@pytest.mark.parametrize("quantity", SPREAD)
def test_the_spreads_are_the_likeliest(quantity: Quantity, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were chosen by the fitted runs alone, not by how well runs that were left out are predicted."""

    def likelihood(part: str = "rate", kind: str = "engine", times: float = 1.0, noise: float = 1.0) -> float:
        changed = {**SPREAD[quantity], part: {**SPREAD[quantity][part]}}
        changed[part][kind] *= times
        monkeypatch.setitem(fit.SPREAD, quantity, changed)
        monkeypatch.setitem(fit.NOISE, quantity, noise * usual)
        return Fit(quantity, observed).likelihood()

    usual, observed, spreads = fit.NOISE[quantity], fit.shipped_rows(quantity), SPREAD[quantity]
    best = likelihood()
    for factor in (0.5, 2.0):
        assert likelihood(noise=factor) < best
        for part, kinds in spreads.items():
            monkeypatch.setitem(fit.SPREAD, quantity, spreads)
            for kind in kinds.keys() - {"group"}:
                assert likelihood(part, kind, factor) < best, (part, kind, factor)
                monkeypatch.setitem(fit.SPREAD, quantity, spreads)


@pytest.fixture(scope="module")
def left() -> dict[Quantity, list[Left]]:
    return {quantity: fit.leave_one_out(quantity) for quantity in SPREAD}


@pytest.mark.parametrize("quantity", ["decode", "memory"])
def test_the_promise_is_kept(left: dict[Quantity, list[Left]], quantity: Quantity) -> None:
    """Half of the runs that were left out are predicted within 15 %."""
    errors = [abs(each.error) for each in left[quantity] if each.error is not None]
    assert len(errors) >= 0.95 * len(left[quantity])
    assert np.median(errors) <= 0.15


def test_intervals_hold_the_share_of_runs_that_they_claim(left: dict[Quantity, list[Left]]) -> None:
    for runs in left.values():
        known = [each for each in runs if each.error is not None]
        assert np.mean([each.within for each in known]) == pytest.approx(COVERAGE, abs=0.02)
        assert not any(each.within for each in runs if each.error is None)


def test_the_file_is_what_the_observations_give(left: dict[Quantity, list[Left]]) -> None:
    """`python -m runtimes.fit` would write what is there, but for the last digits of another machine's arithmetic."""
    shipped = tomllib.loads((files("runtimes") / "prediction.toml").read_text(encoding="utf-8"))
    assert list(shipped) == list(SPREAD)
    for quantity, table in shipped.items():
        again = fit.constants(quantity, fit.width(left[quantity]))
        assert table.keys() == again.keys()
        for key in ("runs", "noise", "spread", "overhead_spread"):
            assert table[key] == again[key]
        for key in ("parameters", "median_error_fitted", "width"):
            assert table[key] == pytest.approx(again[key], abs=0.05 if key == "parameters" else 1e-3)
        for part in ("rate", "overhead", "sizes"):
            assert table[part].keys() == again[part].keys()
            for name, numbers in again[part].items():
                assert table[part][name] == pytest.approx(numbers, rel=1e-3, abs=2e-3), name


def test_what_is_written_is_toml() -> None:
    tables = {"memory": fit.constants("memory", 1.25)}
    assert tomllib.loads(fit.written(tables))["memory"]["width"] == 1.25
