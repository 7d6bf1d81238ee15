"""Commands over files of results: `gochu report`, `gochu compare`."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporter.cli_options import Json

if TYPE_CHECKING:
    from runtimes.compare import Compared

ResultsArgument = Annotated[
    list[Path], typer.Argument(metavar="RESULTS.jsonl...", help="Files that `gochu bench --out` wrote.")
]
LangOption = Annotated[str, typer.Option("--lang", help="en or ko.")]

_REPORT = """Show results: a table, Markdown, CSV, or one page with plots that needs nothing else.

With two files the page also shows what changed from the first to the second.

Examples:

  gochu report results.jsonl

  gochu report results.jsonl --format html -o report.html

  gochu report before.jsonl after.jsonl --format html --lang ko -o report.html

  gochu report phones.jsonl laptops.jsonl --format csv > results.csv
"""
_COMPARE = """Tell whether B is faster than A, or only luckier; exit 4 if a figure became worse than allowed.

Several measurements of the same case in a file are several runs. Measure in turns: the machine's drift meets both.

Examples:

  gochu compare before.jsonl after.jsonl

  gochu compare before.jsonl after.jsonl --threshold 10% --json

  for i in 1 2 3 4 5 6; do gochu bench old/ --out a.jsonl; gochu bench new/ --out b.jsonl; done
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(help=_REPORT)(report)
    app.command(help=_COMPARE)(compare)


def report(
    results: ResultsArgument,
    format: Annotated[
        str | None,
        typer.Option("--format", help="table, markdown, csv, html (default: by the output's suffix)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write.", dir_okay=False)
    ] = None,
    lang: LangOption = "en",
) -> None:
    from runtimes import reports

    chosen = reports.choose(format, output)
    files = reports.load(results)
    if chosen == "table":
        from exporter import console

        reports.show(files, lang, console.console)
        return
    text = reports.render(files, chosen, lang)
    if output is None:
        sys.stdout.write(text)
    else:
        reports.write(text, output)


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Results to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Results that may be better or worse.")],
    threshold: Annotated[
        str, typer.Option(metavar="SHARE", help="How much worse a figure may be, as 5% or 0.05.")
    ] = "5%",
    as_json: Json = False,
    lang: LangOption = "en",
) -> None:
    from exporter import console
    from runtimes import compare, measurement, report_compare
    from runtimes.report_words import Words

    allowed, words = _share(threshold), Words(lang)
    found = compare.compare(measurement.read(before), measurement.read(after), allowed)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        report_compare.show(found, words, console.console)
    _fail(found, threshold)


def _fail(found: "Compared", threshold: str) -> None:
    """Regressed if a figure is worse than allowed."""
    from runtimes.errors import Regressed

    if found.regressions:
        names = ", ".join(dict.fromkeys(row.figure for row in found.regressions))
        raise Regressed(
            f"{len(found.regressions)} of {len(found.rows)} figures became worse by more than {threshold} ({names}): "
            "find out why, or allow more with --threshold"
        )


def _share(text: str) -> float:
    """5% and 0.05 are the same."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise typer.BadParameter(
            f"{text!r} is no share between 0 and 1, as 5% or 0.05", param_hint="--threshold"
        )
    return share
