"""Show measurements: a table for people, JSON for programs."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtimes.measurement import Figure, Measurement

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLUMNS = {
    "load_time": "load",
    "ttft": "TTFT",
    "prefill_speed": "prefill tok/s",
    "decode_speed": "decode tok/s",
    "peak_memory": "peak memory",
    "peak_private_memory": "of it private",
}


def to_json(measurements: Sequence[Measurement]) -> str:
    """A JSON list of measurements, raw samples included."""
    return json.dumps([m.model_dump(mode="json") for m in measurements], ensure_ascii=False, indent=2) + "\n"


def table(measurements: Sequence[Measurement]) -> "Table":
    """One line for each measurement, in the order given; medians, ± half of what lies between
    the 5th and 95th percentile."""
    from rich.table import Table

    grid = Table(title=_title(measurements), title_justify="left")
    grid.add_column("model")
    grid.add_column("in → out", justify="right")
    for heading in _COLUMNS.values():
        grid.add_column(heading, justify="right")
    for m in measurements:
        cells = [_cell(m.figure(name)) for name in _COLUMNS]
        grid.add_row(
            f"{m.what.model} {m.what.variant}", f"{m.how.prompt_tokens} → {m.how.new_tokens}", *cells
        )
    return grid


def show(measurements: Sequence[Measurement], console: "Console | None" = None) -> None:
    """Print the table and the notes, on standard error unless another console is given."""
    from rich.console import Console

    console = console or Console(stderr=True)
    console.print(table(measurements))
    for m in measurements:
        for note in m.how.notes:
            console.print(f"{m.how.prompt_tokens} → {m.how.new_tokens}: {note}")


def _title(measurements: Sequence[Measurement]) -> str:
    places = {
        f"{m.where.device}, {m.where.os}, {m.where.engine}, {m.where.threads} threads": None
        for m in measurements
    }
    return "\n".join(places)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    text = _amount(figure.value, figure.unit)
    if len(figure.samples) > 1 and figure.p5 is not None and figure.p95 is not None:
        text += f" ±{(figure.p95 - figure.p5) / 2 / figure.value:.0%}"
    return text if figure.kind == "measured" else f"{text} {figure.kind}"


def _amount(value: float, unit: str) -> str:
    """A number as a person reads it: three digits, and a fitting unit.

    >>> _amount(0.01234, "s"), _amount(123456789, "bytes"), _amount(8.5, "tokens/s"), _amount(1234.5, "tokens/s")
    ('12.3 ms', '123 MB', '8.50', '1234')
    """
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.3g} GB"
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
