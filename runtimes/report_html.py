"""Measurements as one HTML page, with plots, that needs nothing else: no script, no font, no request.

What a page shows is worked out here; how it looks stands in `report_page.jinja`. Names of models and devices are other
people's text: the template escapes all that it is given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files as resources
from typing import Any, NamedTuple

from markupsafe import Markup

from runtimes import report_plots as plots
from runtimes.compare import LEVEL, compare
from runtimes.errors import ResultsError
from runtimes.measurement import Condition, Figure, Measurement
from runtimes.report import ALWAYS, SOMETIMES, amount, cell, processors
from runtimes.report_compare import bounds, figure, lengths, percent, phrase, remarks
from runtimes.report_words import Words
from runtimes.reports import Results, everything

_ALSO = ("peak_mapped_memory", "idle_memory")
_KNOWN = (*ALWAYS, *SOMETIMES, *_ALSO)


class Plot(NamedTuple):
    """A heading, how to read it, and a drawing with a legend of (series, name); or groups of rows, by their heading,
    with the drawing under each, and remarks."""

    heading: str
    how: str
    drawing: Markup
    legend: Sequence[tuple[int, str]] = ()
    groups: "dict[str, list[Row]] | None" = None
    remarks: Sequence[str] = ()


class Row(NamedTuple):
    """A line of a chart: what, the verdict in words, its interval, the drawing; `style`: a class of the page."""

    what: str
    verdict: str
    detail: str
    style: str
    drawing: Markup


def page(files: Sequence[Results], words: Words) -> str:
    """The page, in the language of the words. `files`: where there are two, the second is compared with the first."""
    found = everything(files)
    names = [name for name in _KNOWN if any(m.figure(name) for m in found)]
    names += dict.fromkeys(each.name for m in found for each in m.figures if each.name not in names)
    return render(
        "report_page.jinja",
        words,
        lede=_lede(found, words),
        cards=list(_cards(found, words)),
        plots=list(_plots(files, words)),
        names=[(name, words[name]) for name in names],
        rows=[_row(m, names, words) for m in found],
        meanings=list(_meanings(found)),
    )


def render(template: str, words: Words, **values: Any) -> str:
    """A template beside this module, with all that it is given escaped. `report_style.jinja` and `report_figures.jinja`
    are parts for any page; what they show are `Plot`s."""
    import jinja2

    def source(name: str) -> str:
        return resources("runtimes").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(words=words, **values)


def _lede(found: Sequence[Measurement], words: Words) -> str:
    days = sorted({m.time[:10] for m in found})
    return words(
        "lede",
        measurements=words.counted("measurement", len(found)),
        devices=words.counted("device", len({m.where.device for m in found})),
        days=words("days", first=days[0], last=days[-1]) if len(days) > 1 else days[0],
    )


def _labels(found: Iterable[Measurement], words: Words) -> Callable[[Measurement], str]:
    """What tells a measurement's series from the others: its device, and what else is needed."""
    found = list(found)
    parts: tuple[Callable[[Measurement], str], ...] = (
        lambda m: m.where.device,
        lambda m: m.what.model,
        lambda m: m.what.variant,
        lambda m: m.what.scheme,
        lambda m: m.where.target,
        lambda m: m.where.engine,
        lambda m: m.where.backend.requested if m.where.backend else "",
        lambda m: words.counted("thread", m.where.threads) if m.where.threads else "",
    )
    needed = parts[:1]
    for part in parts[1:]:
        if len({_joined(m, (*needed, part)) for m in found}) > len({_joined(m, needed) for m in found}):
            needed = (*needed, part)
    return lambda m: " · ".join(_joined(m, needed))


def _joined(m: Measurement, parts: Iterable[Callable[[Measurement], str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (part(m) for part in parts))))


def _cards(found: Sequence[Measurement], words: Words) -> Iterator[dict[str, Any]]:
    """Of each series the case that is worth most; of several runs of it the middle one, not the luckiest."""
    label = _labels(found, words)
    by_label: dict[str, list[Measurement]] = {}
    for m in found:
        by_label.setdefault(label(m), []).append(m)
    for name, rows in by_label.items():
        best = max(_middles(rows), key=_worth)
        head = (
            next(
                (each for key in ("decode_speed", "decode_instructions") if (each := best.figure(key))), None
            )
            or best.figures[0]
        )
        rest = [best.figure(key) for key in ("ttft", "prefill_speed", "peak_memory", "peak_anonymous_memory")]
        yield {
            "name": name,
            "case": f"{best.what.model} {best.what.scheme} · {best.how.prompt_tokens} → {best.how.new_tokens}",
            "head": _number(head),
            "head_name": figure(head.name, head.kind, words),
            "rest": [(figure(each.name, each.kind, words), _number(each)) for each in rest if each][:3],
            "marks": [(mark, words[mark]) for mark in best.marks],
        }


def _middles(rows: Iterable[Measurement]) -> Iterator[Measurement]:
    """Of runs of the same case, as far as they are alike, the one in the middle."""
    cases: dict[tuple[Any, ...], list[Measurement]] = {}
    for m in rows:
        cases.setdefault((m.how.prompt_tokens, m.how.new_tokens, *_worth(m)[:-1]), []).append(m)
    for runs in cases.values():
        yield sorted(runs, key=_worth)[len(runs) // 2]


def _worth(m: Measurement) -> tuple[bool, bool, bool, float]:
    """What was measured, and whole, goes before what was not, short before sustained; then the fastest."""
    speed = m.figure("decode_speed")
    return (
        all(each.kind == "measured" for each in m.figures),
        not m.marks,
        not m.how.sustained_minutes,
        speed.value if speed else 0.0,
    )


def _number(each: Figure) -> str:
    """A figure with its unit."""
    return f"{amount(each.value, each.unit)}{'' if each.unit in ('s', 'bytes', 'instructions') else f' {each.unit}'}"


def _plots(files: Sequence[Results], words: Words) -> Iterator[Plot]:
    """All plots for which there is something to draw."""
    found = everything(files)
    if len(files) == 2:
        yield from _before_and_after(files[0], files[1], words)
    label = _labels(found, words)
    series = {name: number for number, name in enumerate(dict.fromkeys(map(label, found)))}
    yield from _decode_and_memory(found, label, series, words)
    yield from _prefill(found, label, series, words)
    yield from _over_time(found, label, series, words)
    yield from _predicted(found, words)


def _plain(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"


def _bytes(value: float) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def _plot(
    key: str, points: Sequence[plots.Point], series: dict[str, int], drawing: Markup, words: Words
) -> Plot:
    used = {p.series for p in points}
    legend = [(number, name) for name, number in series.items() if number in used]
    return Plot(words[key], words[f"{key}, how"], drawing, legend)


def _title(m: Measurement, name: str, figures: Iterable[Figure], words: Words) -> str:
    """What one reads when one points at a point."""
    values = "; ".join(f"{figure(each.name, each.kind, words)} {_number(each)}" for each in figures)
    marks = "".join(f" [{words[mark]}]" for mark in m.marks)
    return f"{name}, {m.how.prompt_tokens} → {m.how.new_tokens}: {values}{marks}"


Label = Callable[[Measurement], str]


def _decode_and_memory(
    found: Sequence[Measurement], label: Label, series: dict[str, int], words: Words
) -> Iterator[Plot]:
    points = []
    for m in found:
        speed, size = m.figure("decode_speed"), m.figure("peak_memory") or m.figure("peak_anonymous_memory")
        if speed and size:
            hollow = not speed.kind == size.kind == "measured"
            title = _title(m, label(m), (speed, size), words)
            points.append(plots.Point(size.value, speed.value, series[label(m)], title, hollow))
    if points:
        x, y = plots.plane(words["peak_memory"], f"{words['decode_speed']}, tokens/s", _bytes, _plain)
        yield _plot(
            "decode and memory",
            points,
            series,
            plots.scatter(points, x, y, words["decode and memory"]),
            words,
        )


def _prefill(
    found: Sequence[Measurement], label: Label, series: dict[str, int], words: Words
) -> Iterator[Plot]:
    points = []
    for m in found:
        if speed := m.figure("prefill_speed"):
            title = _title(m, label(m), (speed,), words)
            hollow = speed.kind != "measured"
            points.append(
                plots.Point(
                    m.how.prompt_tokens, speed.value, series[label(m)], title, hollow, speed.p5, speed.p95
                )
            )
    if len({p.x for p in points}) > 1:
        x, y = plots.plane(
            words["tokens in the prompt"], f"{words['prefill_speed']}, tokens/s", _plain, _plain
        )
        drawing = plots.scatter(points, x, y, words["prefill by length"], joined=True)
        yield _plot("prefill by length", points, series, drawing, words)


def _over_time(
    found: Sequence[Measurement], label: Label, series: dict[str, int], words: Words
) -> Iterator[Plot]:
    curves, points = [], []
    for m in found:
        speed = m.figure("decode_speed") or m.figure("prefill_speed")
        if speed and len(speed.times) > 1 and len(speed.times) == len(speed.samples):
            title = _title(m, label(m), (speed,), words)
            minutes = [t / 60 for t in speed.times]
            curves.append(plots.Curve(minutes, speed.samples, series[label(m)], title))
            points.append(plots.Point(0, 0, series[label(m)], title))
    if curves:
        x, y = plots.plane(
            words["minutes since the start"], f"{words['decode_speed']}, tokens/s", _plain, _plain
        )
        yield _plot("over time", points, series, plots.curves(curves, x, y, words["over time"]), words)


def _predicted(found: Sequence[Measurement], words: Words) -> Iterator[Plot]:
    """Each predicted figure beside the same one that was measured: same bundle's model, variant and scheme, device
    and lengths. A marked run is not what was predicted."""
    values: dict[tuple[str, str], dict[bool, Figure]] = {}
    for m in found:
        if m.marks:
            continue
        case = f"{m.what.model} {m.what.variant} {m.what.scheme} · {_case(m)}"
        for each in m.figures:
            if each.kind in ("predicted", "measured") and each.value > 0:
                values.setdefault((case, each.name), {})[each.kind == "predicted"] = each
    pairs = {key: (both[True], both[False]) for key, both in values.items() if len(both) == 2}
    if not pairs:
        return
    axis = plots.row_axis(
        [*(guess.value / real.value for guess, real in pairs.values()), 0.8, 1.2], percent, log=False
    )
    groups: dict[str, list[Row]] = {}
    for (case, name), (guess, real) in pairs.items():
        ratio = guess.value / real.value
        detail = f"{words['predicted']} {_number(guess)}, {words['measured']} {_number(real)}"
        drawing = plots.track(ratio, min(ratio, 1), max(ratio, 1), axis, 1.0, "neutral")
        groups.setdefault(case, []).append(Row(words[name], percent(ratio), detail, "neutral", drawing))
    key = "predicted and measured"
    yield Plot(words[key], words[f"{key}, how"], plots.ruler(axis), groups=groups)


def _case(m: Measurement) -> str:
    return f"{m.where.device} · {m.how.prompt_tokens} → {m.how.new_tokens}"


_FAR = 0.6  # changes beyond it are drawn at the edge
_STYLES = {"better": "good", "worse": "bad", "no difference": "neutral", "undecided": "neutral"}


def _before_and_after(before: Results, after: Results, words: Words) -> Iterator[Plot]:
    """What changed, by `runtimes.compare`; a sentence where the files have nothing in common."""
    key = "before and after"
    how = words(f"{key}, how", a=before.name, b=after.name, level=percent(LEVEL))
    try:
        found = compare(before.measurements, after.measurements)
    except ResultsError:
        yield Plot(words[key], words["nothing in common"], Markup(""), groups={})
        return
    ends = [end for row in found.rows for end in (row.decisive.low, row.decisive.high, row.decisive.change)]
    axis = plots.row_axis(
        [*(max(-_FAR, min(_FAR, end)) for end in ends), -0.1, 0.1],
        lambda share: percent(share, sign=True),
        log=False,
    )
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        one, style = row.decisive, _STYLES[row.verdict]
        middle = max(axis.low, min(axis.high, one.change))
        groups.setdefault(f"{row.model} {row.variant} · {row.device} · {lengths(row, words)}", []).append(
            Row(
                figure(row.figure, row.kind, words),
                phrase(row, words),
                f"{amount(one.before, row.unit)} → {amount(one.after, row.unit)} ({words[row.decided_by]}); "
                f"{percent(LEVEL)}: {bounds(row, words)}",
                style,
                plots.track(middle, one.low, one.high, axis, 0.0, style),
            )
        )
    yield Plot(words[key], how, plots.ruler(axis), groups=groups, remarks=remarks(found, words))


def _row(m: Measurement, names: Sequence[str], words: Words) -> dict[str, Any]:
    """A line of the table, and what stands under it."""
    return {
        "device": m.where.device,
        "place": " · ".join((m.where.target, m.where.engine)),
        "model": m.what.model,
        "variant": " · ".join((m.what.variant, m.what.scheme)),
        "case": f"{m.how.prompt_tokens} → {m.how.new_tokens}",
        "cells": [_parts(m.figure(name), words) for name in names],
        "marks": [(mark, words[mark]) for mark in m.marks],
        "notes": m.how.notes,
        "command": m.command,
        "conditions": [(words[key], value) for key, value in _conditions(m, words) if value],
        "answers": m.answers,
    }


def _parts(each: Figure | None, words: Words) -> dict[str, str] | None:
    """A cell: number, spread, kind."""
    if each is None:
        return None
    number, *rest = cell(each.model_copy(update={"kind": "measured"}), words).split(" ±")
    return {
        "number": number,
        "spread": f"±{rest[0]}" if rest else "",
        "kind": each.kind if each.kind != "measured" else "",
    }


def _conditions(m: Measurement, words: Words) -> Iterator[tuple[str, str]]:
    what, place, how = m.what, m.where, m.how
    yield "time", m.time
    yield "bundle", what.bundle[:16]
    yield "format", what.format
    yield "bytes", amount(what.bytes, "bytes")
    yield "toolchain", ", ".join(f"{name} {version}" for name, version in what.toolchain.items())
    yield "chip", place.chip or ""
    yield "os", place.os
    yield "threads", str(place.threads or "")
    yield "backend", processors(place.backend, words) if place.backend else ""
    yield "run", place.run or ""
    yield "workload", how.workload
    yield "context", str(how.context)
    yield "start", words[how.start]
    yield "warmup", str(how.warmup)
    yield "repeats", "" if how.sustained_minutes else str(how.repeats)
    yield "minutes", f"{how.sustained_minutes:g}" if how.sustained_minutes else ""
    yield "cool_down", f"{how.cool_down:g}" if how.cool_down else ""
    yield "before", _condition(m.before, words)
    yield "after", _condition(m.after, words)


def _condition(state: Condition | None, words: Words) -> str:
    """A device's state in a line."""
    if state is None:
        return ""
    parts = [f"{words['thermal']} {state.thermal}"] if state.thermal else []
    parts += [f"{state.celsius:g} °C"] if state.celsius is not None else []
    parts += [f"{words['battery']} {state.battery:g} %"] if state.battery is not None else []
    parts += [words["charging"]] if state.charging else []
    return ", ".join(parts)


def _meanings(found: Sequence[Measurement]) -> Iterator[str]:
    """The kinds and marks that occur."""
    yield from dict.fromkeys(each.kind for m in found for each in m.figures)
    yield from dict.fromkeys(mark for m in found for mark in m.marks)
