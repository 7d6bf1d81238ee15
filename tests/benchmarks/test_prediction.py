"""The tables of the benchmark, and that the documents show them as they are today."""

from functools import lru_cache
from pathlib import Path

import pytest
from prediction import QUANTITIES, as_markdown, profile, summary, titled, worst

import profiles
from runtimes.fit import Left, leave_one_out
from runtimes.fitted import Quantity, Setting
from runtimes.observed import Row

DOCS = Path(__file__).parents[2] / "docs"


def left(engine: str, error: float | None, elsewhere: float | None = None, within: bool = True) -> Left:
    at = Setting(engine, "cpu", "integer", "chip")
    row = Row("decode", at, 0.1, 0.1, 1, 0.01, f"model {error}", "10 tokens/s", "source")
    return Left(row, error, elsewhere, None, None, within and error is not None, elsewhere is not None)


def test_errors_are_summed_up_for_each_engine_and_for_all() -> None:
    runs = [left("a", 0.1), left("a", -0.3, within=False), left("a", None), left("b", 0.2, -0.5)]
    first, second, every = summary(runs)
    assert (first["engine"], first["runs"], first["unknown"]) == ("a", 3, 1)
    assert (first["median error"], first["90 % below"]) == ("20.0%", "28.0%")
    assert (first["in the interval"], first["median, other chips"]) == ("1 of 2", "-")
    assert (second["median, other chips"], second["in the interval, other chips"]) == ("50.0%", "1 of 1")
    assert (every["engine"], every["runs"], every["median error"]) == ("all", 4, "20.0%")


def test_half_is_as_wrong_as_double() -> None:
    runs = [left("a", 0.9), left("a", -0.5), left("a", None), left("a", 0.1)]
    assert [row["error"] for row in worst(runs, 2)] == ["-50%", "+90%"]


def test_the_profile_of_this_machine_is_one_that_gochu_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOCHU_PROFILES", profile(tmp_path, 36.2e9)["GOCHU_PROFILES"])
    assert profiles.find("this-machine").soc.bandwidth_bytes_per_s == pytest.approx(36.2e9)


@lru_cache
def published(quantity: Quantity) -> list[Left]:
    return leave_one_out(quantity)


@pytest.mark.parametrize("document", ["prediction.md", "prediction.ko.md"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_documents_show_these_tables(document: str, quantity: Quantity) -> None:
    """If not: python benchmarks/prediction.py --published --markdown, and paste what it prints."""
    text = (DOCS / document).read_text(encoding="utf-8")
    for title, rows in [
        (titled(quantity), summary(published(quantity))),
        (f"{QUANTITIES[quantity]}: the worst", worst(published(quantity))),
    ]:
        _, _, *lines = as_markdown(title, rows)
        assert "\n".join(lines) in text, f"the table of {title} is another today"
