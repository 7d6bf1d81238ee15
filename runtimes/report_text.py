"""Measurements as Markdown, for people, and as CSV, for programs."""

import csv as writer
import io
import re
from collections.abc import Iterable, Sequence

from runtimes.measurement import Measurement
from runtimes.report import ALWAYS, SOMETIMES, cell, where
from runtimes.report_words import Words
from runtimes.reports import Results, everything

COLUMNS = (
    "file time model bundle variant format scheme bytes target device chip os engine threads backend run workload "
    "prompt_tokens new_tokens context start warmup repeats sustained_minutes marks notes command "
    "figure unit kind value p5 p95 samples"
).split()


def csv(files: Sequence[Results]) -> str:
    """One row for each figure, in the tidy form that pandas, R and SQL want: filter `figure`, then pivot.

    Names are English and numbers plain, in seconds, bytes, tokens/s, whatever the report's language. `marks` are
    separated by spaces; `samples` is their number: the raw ones stay in the JSON Lines.
    """
    text = io.StringIO()
    rows = writer.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    for file in files:
        for m in file.measurements:
            about = _about(m)
            for figure in m.figures:
                number = {"figure": figure.name, "samples": len(figure.samples) or 1}
                values = figure.model_dump(include={"unit", "kind", "value", "p5", "p95"})
                rows.writerow({"file": file.name, **about, **number, **values})
    return text.getvalue()


def _about(m: Measurement) -> dict[str, object]:
    what = m.what.model_dump(exclude={"toolchain"})
    place = m.where.model_dump(exclude={"backend"})
    how = m.how.model_dump(exclude={"cool_down", "notes"})
    return {
        **what,
        **place,
        **how,
        "backend": m.where.backend.requested if m.where.backend else None,
        "marks": " ".join(m.marks),
        "notes": "; ".join(m.how.notes),
        "command": m.command,
        "time": m.time,
    }


def markdown(files: Sequence[Results], words: Words) -> str:
    """A table for each place, and under it the notes and the commands that repeat its rows."""
    by_place: dict[str, list[Measurement]] = {}
    for m in everything(files):
        by_place.setdefault(f"{m.where.target}: {where(m.where, words)}", []).append(m)
    parts = [f"# {words['title']}"]
    for place, found in by_place.items():
        parts.append(f"## {_safe(place)}")
        parts.append(_table(found, words))
        parts.append("\n".join(f"- {line}" for line in dict.fromkeys(_remarks(found, words))))
    kinds = dict.fromkeys(figure.kind for m in everything(files) for figure in m.figures)
    marks = dict.fromkeys(mark for m in everything(files) for mark in m.marks)
    parts.append("\n".join(f"- **{words[each]}**: {words[f'{each}, means']}" for each in (*kinds, *marks)))
    return "\n\n".join(parts) + "\n"


def _table(found: Sequence[Measurement], words: Words) -> str:
    names = [name for name in (*ALWAYS, *SOMETIMES) if any(m.figure(name) for m in found)]
    headings = [words["model"], words["in → out"], *(words[name] for name in names), words["marks"]]
    rows = [
        [
            f"{m.what.model} {m.what.variant} ({m.what.scheme})",
            f"{m.how.prompt_tokens} → {m.how.new_tokens}",
            *(cell(m.figure(name), words) for name in names),
            ", ".join(words[mark] for mark in m.marks),
        ]
        for m in found
    ]
    rule = ["---", *["---:"] * (len(names) + 1), "---"]
    lines = [headings, rule, *[[_safe(each) for each in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _remarks(found: Iterable[Measurement], words: Words) -> Iterable[str]:
    for m in found:
        case = f"{m.how.prompt_tokens} → {m.how.new_tokens}"
        yield from (f"{case}: {_safe(note)}" for note in m.how.notes)
        yield f"{words['command']} ({m.time}): {_code(m.command)}"


def _safe(text: str) -> str:
    """A text that Markdown shows as it is, on one line, and that ends no cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A text as code, between more backticks than it has itself."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if "`" in text else ""
    return f"{fence}{room}{' '.join(text.split())}{room}{fence}"
