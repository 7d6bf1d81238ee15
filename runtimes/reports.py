"""Files of measurements as a report: a table in the terminal, Markdown, CSV, or one HTML page with plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtimes import measurement, report
from runtimes.errors import ResultsError, UsageError
from runtimes.measurement import Measurement
from runtimes.report_words import Words

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "markdown", "csv", "html")
_SUFFIXES = {".md": "markdown", ".markdown": "markdown", ".csv": "csv", ".html": "html", ".htm": "html"}


class Results(NamedTuple):
    """A file of measurements: its name without folder, and what it holds."""

    name: str
    measurements: list[Measurement]


def choose(format: str | None, output: Path | None) -> str:
    """The format that is asked for, or that the output's suffix names; UsageError if there is none such."""
    if format is None:
        format = _SUFFIXES.get(output.suffix.lower()) if output else "table"
    if format not in FORMATS:
        asked = f"format {format!r}" if format else f"format for {output}"
        raise UsageError(f"there is no {asked}; there are {', '.join(FORMATS)}: name one with --format")
    if format == "table" and output:
        raise UsageError(f"a table is for the terminal: write {output} as markdown, csv or html")
    return format


def load(paths: Sequence[Path]) -> list[Results]:
    """The measurements of files; ResultsError if one cannot be read, or there is nothing in any."""
    files = [Results(path.name, measurement.read(path)) for path in paths]
    if not any(each.measurements for each in files):
        raise ResultsError(
            f"there is no measurement in {', '.join(each.name for each in files)}: measure with `gochu bench --out`"
        )
    return files


def everything(files: Sequence[Results]) -> list[Measurement]:
    """All measurements, file by file."""
    return [each for file in files for each in file.measurements]


def show(files: Sequence[Results], lang: str, console: "Console") -> None:
    """Print the table."""
    report.show(everything(files), console, Words(lang))


def render(files: Sequence[Results], format: str, lang: str = "en") -> str:
    """The text of a report: markdown, csv or html."""
    words = Words(lang)
    if format == "html":
        from runtimes.report_html import page

        return page(files, words)
    from runtimes import report_text

    return report_text.markdown(files, words) if format == "markdown" else report_text.csv(files)


def write(text: str, path: Path) -> None:
    """Write a report; ResultsError if that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ResultsError(
            f"the report cannot be written to {path}: {error.strerror}; name another file"
        ) from None
