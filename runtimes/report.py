"""Show measurements and traces: a table for people, JSON for programs."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtimes.bundle import Strict
from runtimes.measurement import Backend, Figure, Measurement, Place
from runtimes.report_words import ENGLISH, Words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from runtimes.trace import Operator, Phase, Trace

SMALL = 0.005  # operators with a smaller share of a phase are shown together
ALWAYS = ("load_time", "ttft", "prefill_speed", "decode_speed", "peak_memory", "peak_anonymous_memory")
SOMETIMES = (
    "compile_time",
    "prefill_instructions",
    "decode_instructions",
    "peak_accelerator_memory",
    "energy",
    "npu_share",
    "logits_correlation",
)


def to_json(found: Sequence[Strict]) -> str:
    """A JSON list of measurements, raw samples included, or of traces."""
    return json.dumps([each.model_dump(mode="json") for each in found], ensure_ascii=False, indent=2) + "\n"


def table(measurements: Sequence[Measurement], words: Words = ENGLISH) -> "Table":
    """One line for each measurement, in the order given; medians, ± half of what lies between
    the 5th and 95th percentile."""
    from rich.markup import escape
    from rich.table import Table

    several = len({m.where.target for m in measurements}) > 1
    marked = any(m.marks for m in measurements)
    grid = Table(title=escape(_title(measurements, several, words)), title_justify="left")
    if several:
        grid.add_column(words["target"])
    grid.add_column(words["model"])
    grid.add_column(words["in → out"], justify="right")
    timed = ALWAYS if any(m.figure(name) for m in measurements for name in ALWAYS) else ()
    names = [*timed, *(name for name in SOMETIMES if any(m.figure(name) for m in measurements))]
    for name in names:
        grid.add_column(words[f"column {name}"] if name in ALWAYS else words[name], justify="right")
    if marked:
        grid.add_column(words["marks"])
    for m in measurements:
        cells = [m.where.target] if several else []
        cells += [f"{m.what.model} {m.what.variant}", f"{m.how.prompt_tokens} → {m.how.new_tokens}"]
        cells += [cell(m.figure(name), words) for name in names]
        cells += [", ".join(words[mark] for mark in m.marks)] if marked else []
        grid.add_row(*map(escape, cells))
    return grid


def show(
    measurements: Sequence[Measurement], console: "Console | None" = None, words: Words = ENGLISH
) -> None:
    """Print the table, the answers and the notes, on standard error unless another console is given."""
    from rich.console import Console

    console = console or Console(stderr=True)
    console.print(table(measurements, words))
    for m in measurements:
        for answer in m.answers:
            console.print(f"{m.where.target}: {answer.prompt} → {answer.text}", markup=False)
        for note in m.how.notes:
            console.print(
                f"{m.where.target}, {m.how.prompt_tokens} → {m.how.new_tokens}: {note}", markup=False
            )


def phase_table(phase: "Phase") -> "Table":
    """A line for each operator, the longest first: calls and time of one pass, the median call, the share."""
    from rich.table import Table

    grid = Table()
    grid.add_column("operator")
    for heading in ("calls", "time", "median call", "share"):
        grid.add_column(heading, justify="right")
    large = [each for each in phase.operators if abs(each.share) >= SMALL]
    small = [each for each in phase.operators if abs(each.share) < SMALL]
    for each in large:
        grid.add_row(
            each.name,
            *_part(phase, [each]),
            amount(each.median, "s") if each.median else "–",
            f"{each.share:.1%}",
        )
    if small:
        share = sum(each.share for each in small)
        grid.add_row(f"{len(small)} others", *_part(phase, small), "", f"{share:.1%}")
    return grid


def show_traces(traces: "Sequence[Trace]", console: "Console | None" = None) -> None:
    """Print a table for each phase, and the notes, on standard error unless another console is given."""
    from rich.console import Console

    console = console or Console(stderr=True)
    for place in dict.fromkeys(where(trace.where) for trace in traces):
        console.print(place, markup=False)
    for trace in traces:
        for phase in trace.phases:
            length = f" of {phase.tokens} tokens" if phase.name == "prefill" else " of a token"
            console.print(
                f"\n{trace.what.model} {trace.what.variant}: {phase.name}{length}, {amount(phase.traced, 's')} "
                f"({amount(phase.untraced, 's')} when not traced)",
                markup=False,
            )
            console.print(phase_table(phase))
            if phase.left_out:
                console.print(
                    f"{phase.passes} passes; {phase.left_out} more took over twice as long and do not count"
                )
    for note in dict.fromkeys(note for trace in traces for note in trace.notes):
        console.print(note, markup=False)


def _part(phase: "Phase", operators: "Sequence[Operator]") -> tuple[str, str]:
    """Calls and time of some operators in one pass."""
    calls = sum(each.calls for each in operators) / phase.passes
    return f"{calls:.4g}", amount(sum(each.total for each in operators) / phase.passes, "s")


def _title(measurements: Sequence[Measurement], several: bool, words: Words) -> str:
    return "\n".join(
        dict.fromkeys(f"{m.where.target}: " * several + where(m.where, words) for m in measurements)
    )


def where(place: Place, words: Words = ENGLISH) -> str:
    """A place in a line, and in a second one what was asked of several processors and what they got."""
    line = f"{place.device}, {place.os}, {place.engine}"
    if place.threads is not None:
        line += f", {words.counted('thread', place.threads)}"
    if place.backend is not None:
        line += f"\n  {processors(place.backend, words)}"
    return line


def processors(backend: Backend, words: Words) -> str:
    """What was asked of several processors and what they got."""
    shares = [
        words("function's", function=function)
        + ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        for function, counts in backend.effective.items()
    ]
    return words("asked for", requested=backend.requested, effective="; ".join(shares) or words["unknown"])


def cell(figure: Figure | None, words: Words = ENGLISH) -> str:
    """A figure with its spread, and with its kind if it is not measured."""
    if figure is None:
        return "–"
    text = amount(figure.value, figure.unit)
    if len(figure.samples) > 1 and figure.p5 is not None and figure.p95 is not None and figure.value:
        text += f" ±{(figure.p95 - figure.p5) / 2 / figure.value:.0%}"
    return text if figure.kind == "measured" else f"{text} {words[figure.kind]}"


def amount(value: float, unit: str) -> str:
    """A number as a person reads it: three digits, and a fitting unit.

    >>> amount(0.01234, "s"), amount(1.5e-5, "s"), amount(123456789, "bytes"), amount(8.5, "tokens/s")
    ('12.3 ms', '15 µs', '123 MB', '8.50')
    >>> amount(62.5, "%"), amount(0.9999791, "")
    ('62.5 %', '0.99998')
    """
    if unit == "%":
        return f"{value:.3g} %"
    if unit == "":  # a correlation: what it lacks to 1 is what tells
        return f"{value:.5f}"
    if unit == "instructions":
        return f"{value / 1e6:.3g} M" if value < 1e9 else f"{value / 1e9:.3g} G"
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.3g} GB"
    if unit == "s":
        if abs(value) < 1e-3:
            return f"{value * 1e6:.3g} µs"
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
