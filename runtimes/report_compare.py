"""Show a comparison: what became faster, slower, or neither, and how sure that is."""

from typing import TYPE_CHECKING

from runtimes.compare import ENOUGH_RUNS, LEVEL, Compared, Comparison, Skipped
from runtimes.measurement import Kind
from runtimes.report import amount
from runtimes.report_words import Words

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"better": "green", "worse": "red", "no difference": "", "undecided": "yellow"}


def phrase(row: Comparison, words: Words) -> str:
    """The verdict in words: "slower by 9.1%"."""
    if row.verdict in ("no difference", "undecided"):
        return words[row.verdict]
    change = abs(row.decisive.change)
    if row.unit == "bytes" or row.figure.endswith("_instructions") or row.unit == "J":
        key = "less" if row.verdict == "better" else "more"
    else:
        key = "faster" if row.verdict == "better" else "slower"
    return words(key, x=percent(change))


def bounds(row: Comparison, words: Words) -> str:
    """The interval of the change: "-10% to -8%"."""
    one = row.decisive
    return words("interval", low=percent(one.low, sign=True), high=percent(one.high, sign=True))


def percent(share: float, *, sign: bool = False) -> str:
    """A share as a person reads it.

    >>> percent(0.0912), percent(-0.5, sign=True), percent(0.95)
    ('9.1%', '-50%', '95%')
    """
    text = f"{100 * share:.2g}" if abs(share) < 0.1 else f"{100 * share:.0f}"
    return f"{'+' if sign and share > 0 else ''}{text}%"


def figure(name: str, kind: Kind, words: Words) -> str:
    """A figure's name, with its kind if it is not measured."""
    return words[name] if kind == "measured" else f"{words[name]} ({words[kind]})"


def remarks(found: Compared, words: Words) -> list[str]:
    """What else must be known: what differs, what was not compared, and where runs are too few."""
    said = [words("differs", name=words[name], a=a, b=b) for name, a, b in found.differs]
    said += dict.fromkeys(_skipped(each, words) for each in found.skipped)
    if any(min(row.runs) < ENOUGH_RUNS for row in found.rows):
        said.append(words("few runs", n=ENOUGH_RUNS))
    return said


def _skipped(one: Skipped, words: Words) -> str:
    """What was not compared, and why."""
    what = f"{one.case}, {words[one.figure]}" if one.figure else one.case
    details = f" ({', '.join(words[each] for each in one.words)})" if one.words else ""
    return words("skipped", what=f"{what}{details}", why=words[one.why])


def lengths(row: Comparison, words: Words) -> str:
    """Tokens in and out, and the minutes of a sustained run."""
    minutes = f", {row.sustained_minutes:g} {words['minutes']}" if row.sustained_minutes else ""
    return f"{row.prompt_tokens} → {row.new_tokens}{minutes}"


def show(found: Compared, words: Words, console: "Console") -> None:
    """Print a line for each figure, and the remarks."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table()
    grid.add_column(words["model"], overflow="fold")
    grid.add_column(words["figure"])
    grid.add_column("A", justify="right", no_wrap=True)
    grid.add_column("B", justify="right", no_wrap=True)
    grid.add_column(words["verdict"], no_wrap=True)
    grid.add_column(words("change, certain", level=percent(LEVEL)), no_wrap=True)
    for key in ("decided by", "runs", "samples"):
        grid.add_column(words[key])
    cases: dict[str, list[Comparison]] = {}
    for row in found.rows:
        place = f"{row.target}, {row.device}"
        case = f"{row.model} {row.variant}\n{place}\n{lengths(row, words)}"
        cases.setdefault(case, []).append(row)
    for case, rows in cases.items():
        lines = case.split("\n") if len(rows) >= 3 else [case]
        for number, row in enumerate(rows):
            one, style = row.decisive, _STYLES[row.verdict]
            verdict = escape(phrase(row, words))
            grid.add_row(
                escape(lines[number]) if number < len(lines) else "",
                escape(figure(row.figure, row.kind, words)),
                amount(one.before, row.unit),
                amount(one.after, row.unit),
                f"[{style}]{verdict}[/]" if style else verdict,
                bounds(row, words),
                words[row.decided_by],
                " / ".join(map(str, row.runs)),
                " / ".join(map(str, row.samples)),
            )
        grid.add_section()
    console.print(grid)
    for said in remarks(found, words):
        console.print(said, markup=False)
