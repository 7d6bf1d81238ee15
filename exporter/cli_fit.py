"""The command `gochu fit`: which models fit on which devices."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

_FIT = """Show which models fit on which devices, by which schemes: size, memory, speed, and why. It needs no weights.

With a checkpoint (or a model's name) it is that model on the devices; without one, all models of the catalogue: what
can this phone run?

Examples:

  gochu fit "Llama 3.2 1B" --devices "Galaxy S24 Ultra, SM-S921N, iPhone 16 Pro, Pixel 9"

  gochu fit --device "갤럭시 S24 울트라"

  gochu fit ./Qwen2.5-7B-Instruct --devices "Pixel 8, Pixel 9 Pro" --scheme int4,int4-g128 --context 2048 --json

  gochu fit --device "Galaxy S23" --ram 8,16,32

  gochu fit --devices "iPhone 13, iPhone 16 Pro" --html fit.html --lang ko
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_FIT)(fit)


def fit(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A model's name, a folder, or a repository (default: all models of the catalogue)."
        ),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", "-d", help="A device; give it again for another.")
    ] = None,
    devices: Annotated[str, typer.Option(metavar="NAME,NAME...", help="Devices, with commas.")] = "",
    scheme: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME...", help="Schemes; planned leaves one to the planner (default: see below)."
        ),
    ] = "",
    context: Annotated[int | None, typer.Option(help="Tokens that are to fit (default: planned).")] = None,
    ram: Annotated[
        str, typer.Option(metavar="GB,GB...", help="As if the devices had so much RAM, such as 8,16,32.")
    ] = "",
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts into this file.", dir_okay=False)
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write the table into this file; - is standard output.", dir_okay=False),
    ] = None,
    lang: Annotated[str, typer.Option("--lang", help="Of the page: en or ko.")] = "en",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON value on standard output, and no tables.")
    ] = False,
) -> None:
    from exporter import console, known
    from exporter import fit as fitting
    from runtimes.report_words import Words

    words = Words(lang)
    models = known.catalogue() if checkpoint is None else dict([known.describe_model(checkpoint)])
    usual = fitting.SCHEMES if checkpoint is not None else (fitting.PLANNED,)
    schemes = tuple(_names(scheme)) or usual
    found = fitting.find_devices(device or [], devices)
    if sizes := [ram_gib(size) for size in _names(ram)]:
        found = tuple(fitting.with_ram(each, size) for each in found for size in sizes)
    cells = fitting.fit(models, found, schemes, context)
    if html is not None:
        from exporter.fit_html import page
        from runtimes import reports

        reports.write(page(cells, words), html)
    if csv is not None:
        text = fitting.to_csv(cells)
        if str(csv) == "-":
            sys.stdout.write(text)
        else:
            from runtimes import reports

            reports.write(text, csv)
    if as_json:
        print(json.dumps([cell.to_dict() for cell in cells], ensure_ascii=False, indent=2))
    elif csv is None or str(csv) != "-":
        console.show_fit(cells)
    for file in (html, csv):
        if file is not None and str(file) != "-":
            console.console.print(f"wrote {file}", markup=False)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def ram_gib(size: str) -> float:
    """The RAM that "8", "8GB" or "8 GiB" names: phones are sold by GB and have GiB."""
    from exporter.errors import UsageError

    number = size.upper().replace(" ", "").removesuffix("B").removesuffix("I").removesuffix("G")
    try:
        value = float(number or 0)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise UsageError(f"{size!r} is no size of RAM; give one such as 8GB")
    return value
