"""What fits where as one HTML page with charts, that needs nothing else: the pieces are those of `gochu report`."""

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from exporter.fit import PLANNED, Cell
from runtimes import report_plots as plots
from runtimes.report import amount
from runtimes.report_compare import percent
from runtimes.report_html import Plot, Row, render
from runtimes.report_words import Words

_FAR = 2.0  # times the budget: what needs more is drawn at the edge
_STYLES = {"fits": "good", "tight": "tight", "no": "bad"}


def page(cells: Sequence[Cell], words: Words) -> str:
    """The page, in the language of the words; reasons are the rules' own, in English."""
    counts = {verdict: sum(cell.verdict == verdict for cell in cells) for verdict in _STYLES}
    lede = words(
        "fit, lede",
        models=words.counted("model", len({cell.model for cell in cells})),
        devices=words.counted("device", len({cell.device.id for cell in cells})),
        **counts,
    )
    return render(
        "fit_page.jinja",
        words,
        lede=lede,
        cards=list(_cards(cells, words)),
        plots=list(_plots(cells, words)),
        rows=[_row(cell, words) for cell in cells],
    )


def _cards(cells: Sequence[Cell], words: Words) -> Iterator[dict[str, Any]]:
    """For each device the largest model that fits, or else is tight, as it is planned."""
    several = len({cell.model for cell in cells}) > 1
    for device in {cell.device.id: cell.device for cell in cells}.values():
        own = [cell for cell in cells if cell.device.id == device.id]
        first = max(own, key=_worth)
        plan, decode = first.plan, first.plan.prediction.decode if first.plan else None
        head, of = words["fit, none"], words["fit, largest"]
        if plan and several:
            head = first.model
        elif not several:
            head, of = words[f"fit, {first.verdict}"], first.model
        rest = [(words["fit, budget"], amount(first.budget, "bytes"))]
        rest += [(words["fit, needs"], amount(first.needed, "bytes"))] if first.needed else []
        rest += [(words["scheme"], plan.scheme)] if plan else []
        rest += [(words["decode_speed"], f"{amount(decode.value, 'tokens/s')} tokens/s")] if decode else []
        yield {
            "name": device.name,
            "case": f"{device.soc.name} · {device.memory.ram_gib:g} GiB",
            "head": head,
            "of": of,
            "backend": first.backend(),
            "rest": rest,
        }


def _worth(cell: Cell) -> tuple[bool, bool, int, bool, float]:
    """What fits goes before what is tight, and that before what does not; then the largest, as it is planned, or the
    fastest."""
    decode = cell.plan.prediction.decode if cell.plan else None
    speed, planned = decode.value if decode else 0.0, cell.asked == PLANNED
    return cell.verdict == "fits", cell.plan is not None, cell.parameters, planned, speed


def _plots(cells: Sequence[Cell], words: Words) -> Iterator[Plot]:
    yield from _memory(cells, words)
    yield from _speed(cells, words)


def _memory(cells: Sequence[Cell], words: Words) -> Iterator[Plot]:
    """The share of the memory that each needs, by device, or by model where there is one only."""
    shares = {id(cell): share for cell in cells if (share := cell.share) is not None}
    if not shares:
        return
    axis = plots.row_axis([0.0, 1.0, *(min(_FAR, share) for share in shares.values())], percent, log=False)
    several_models = len({cell.model for cell in cells}) > 1
    groups: dict[str, list[Row]] = {}
    for cell in cells:
        if id(cell) not in shares:
            continue
        share, scheme = shares[id(cell)], cell.plan.scheme if cell.plan else cell.asked
        heading, what = (cell.device.name, cell.model) if several_models else (cell.model, cell.device.name)
        style, end = _STYLES[cell.verdict], min(share, axis.high)
        detail = words(
            "fit, of", needed=amount(cell.needed or 0, "bytes"), budget=amount(cell.budget, "bytes")
        )
        groups.setdefault(heading, []).append(
            Row(
                f"{what} · {scheme}",
                f"{percent(share)}, {words[f'fit, {cell.verdict}']}",
                "; ".join(filter(None, (detail, cell.backend()))),
                style,
                plots.track(end, 0.0, end, axis, 1.0, style),
            )
        )
    yield Plot(words["fit, memory"], words["fit, memory, how"], plots.ruler(axis), groups=groups)


def _speed(cells: Sequence[Cell], words: Words) -> Iterator[Plot]:
    """Predicted speed over memory: a colour for each device, or for each model where there is one device."""
    several = len({cell.device.id for cell in cells}) > 1
    series: dict[str, int] = {}
    points = []
    for cell in cells:
        if cell.plan is None or cell.plan.prediction.decode is None:
            continue
        decode, name = cell.plan.prediction.decode, cell.device.name if several else cell.model
        number = series.setdefault(name, len(series))
        title = f"{cell.device.name}, {cell.model} {cell.plan.scheme}: {decode.text}"
        memory = cell.plan.prediction.memory.value
        points.append(plots.Point(memory, decode.value, number, title, True, decode.low, decode.high))
    if points:
        x, y = plots.plane(words["fit, needs"], f"{words['decode_speed']}, tokens/s", _bytes, _plain)
        drawing: Markup = plots.scatter(points, x, y, words["fit, speed"])
        legend = [(number, name) for name, number in series.items()]
        yield Plot(words["fit, speed"], words["fit, speed, how"], drawing, legend)


def _bytes(value: float) -> str:
    return f"{value / 1e9:g} GB"


def _plain(value: float) -> str:
    return f"{value:g}"


def _row(cell: Cell, words: Words) -> dict[str, Any]:
    """A line of the table."""
    plan, decode = cell.plan, cell.plan.prediction.decode if cell.plan else None
    bounds = f"{decode.low:.0f}–{decode.high:.0f}" if decode and decode.low and decode.high else ""
    return {
        "device": cell.device.name,
        "chip": cell.device.soc.name,
        "model": cell.model,
        "backend": cell.backend(),
        "verdict": words[f"fit, {cell.verdict}"],
        "style": _STYLES[cell.verdict],
        "scheme": plan.scheme if plan else cell.asked,
        "context": plan.context if plan else "–",
        "size": amount(plan.prediction.file.value, "bytes") if plan else "–",
        "needs": amount(cell.needed, "bytes") if cell.needed else "–",
        "budget": amount(cell.budget, "bytes"),
        "speed": amount(decode.value, "tokens/s") if decode else "–",
        "spread": bounds,
        "why": f"{cell.reason} [{cell.rule}]" if plan else cell.reason,
    }
