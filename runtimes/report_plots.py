"""Plots as SVG that stands in an HTML page: colours are the page's, so they follow dark and light; text is text.

A plot is some 440 units wide, so that its letters are still read where a phone shows it 350 pixels wide. All text is
escaped (`markupsafe`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from runtimes.measurement import quantile

COLOURS = 8  # classes s0 ... s7 of the page
WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 24, 40  # margins
_WIDE = 20.0  # a ratio of largest to smallest from which an axis is logarithmic
_POINTS = 300  # more samples than that are drawn as a band
_BINS = 60
_TRACK = 400  # width of `track`


@dataclass
class Axis:
    """From values to places between `start` and `end`, linear from zero or logarithmic."""

    label: str
    show: Callable[[float], str]
    start: float
    end: float
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def fit(self, values: Iterable[float], *, zero: bool = True, log: bool | None = None) -> "Axis":
        """Let it reach over all values, with a little room, and give it round ticks."""
        low, high = _bounds(values)
        self.log = low > 0 and (high / low > _WIDE if log is None else log)
        if self.log:
            self.low, self.high = low / 1.15, high * 1.15
            self.ticks = _log_ticks(self.low, self.high)
        else:
            room = 0.08 * (high - low or abs(high) or 1.0)
            self.low, self.high = (min(0.0, low) if zero else low - room), high + room
            self.ticks = _round_ticks(self.low, self.high)
        return self

    def at(self, value: float) -> float:
        """Where a value stands."""
        a, b, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (v - a) / (b - a) * (self.end - self.start), 1)


def _bounds(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    return min(listed), max(listed)


def _round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Some multiples of 1, 2 or 5 times a power of ten.

    >>> _round_ticks(0, 43)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda each: abs(each * power - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; fewer where there are many of these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    found = [tick for tick in ticks if low <= tick <= high]
    return found if len(found) <= 7 else [tick for tick in found if math.log10(tick).is_integer()]


@dataclass(frozen=True)
class Point:
    """A point of a series (its colour); `low` and `high`: a bar through it; `hollow`: not measured."""

    x: float
    y: float
    series: int
    title: str
    hollow: bool = False
    low: float | None = None
    high: float | None = None


def scatter(points: Sequence[Point], x: Axis, y: Axis, title: str, *, joined: bool = False) -> Markup:
    """Points, and if they are joined, a line through the medians of each series."""
    across = [p.x for p in points]
    room = () if joined else (0.9 * min(across), 1.1 * max(across))  # what is all but the same is drawn so
    x.fit((*across, *room), zero=False)
    y.fit(value for p in points for value in (p.y, p.low, p.high) if value is not None)
    parts = [_frame(x, y)]
    if joined:
        for series in dict.fromkeys(p.series for p in points):
            by_x: dict[float, list[float]] = {}
            for p in points:
                if p.series == series:
                    by_x.setdefault(p.x, []).append(p.y)
            line = [(x.at(at), y.at(quantile(by_x[at], 0.5))) for at in sorted(by_x)]
            parts.append(_polyline(line, series))
    parts += [_point(p, x, y) for p in points]
    return _svg(title, parts)


def _point(p: Point, x: Axis, y: Axis) -> Markup:
    parts = Markup()
    if p.low is not None and p.high is not None:
        parts += Markup('<line class="bar s{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
            p.series % COLOURS, y.at(p.low), y.at(p.high), x=x.at(p.x)
        )
    return parts + Markup(
        '<circle class="dot s{}{}" cx="{}" cy="{}" r="5"><title>{}</title></circle>'
    ).format(p.series % COLOURS, " hollow" if p.hollow else "", x.at(p.x), y.at(p.y), p.title)


@dataclass(frozen=True)
class Curve:
    """Samples over time: `times` in the unit of the axis."""

    times: Sequence[float]
    values: Sequence[float]
    series: int
    title: str


def curves(found: Sequence[Curve], x: Axis, y: Axis, title: str) -> Markup:
    """The median of neighbours as a line; around it all samples, or what lies between their 5th and 95th percentiles
    where there are too many to see."""
    x.fit((t for c in found for t in c.times), log=False)
    bands = {id(c): _binned(c) for c in found}
    y.fit([v for bins in bands.values() for bin in bins for v in bin[1:]], log=False)
    parts = [_frame(x, y)]
    for c in found:
        bins = bands[id(c)]
        if len(c.values) <= _POINTS:
            parts += [
                Markup('<circle class="speck s{}" cx="{}" cy="{}" r="2"/>').format(
                    c.series % COLOURS, x.at(t), y.at(v)
                )
                for t, v in zip(c.times, c.values, strict=True)
            ]
        else:
            edge = [(x.at(t), y.at(low)) for t, low, _, _ in bins]
            edge += [(x.at(t), y.at(high)) for t, _, _, high in reversed(bins)]
            parts.append(
                Markup('<polygon class="band s{}" points="{}"/>').format(c.series % COLOURS, _places(edge))
            )
        parts.append(_polyline([(x.at(t), y.at(middle)) for t, _, middle, _ in bins], c.series, c.title))
    return _svg(title, parts)


def _binned(c: Curve) -> list[tuple[float, float, float, float]]:
    """(time, lower, median, upper) of neighbours in time; the samples' own ends where all are drawn."""
    size = max(1, math.ceil(len(c.values) / _BINS), min(5, len(c.values) // 4))
    lower, upper = (0.0, 1.0) if len(c.values) <= _POINTS else (0.05, 0.95)
    found = []
    for i in range(0, len(c.values), size):
        values = c.values[i : i + size]
        times = c.times[i : i + size]
        found.append(
            (
                sum(times) / len(times),
                quantile(values, lower),
                quantile(values, 0.5),
                quantile(values, upper),
            )
        )
    return found


def track(value: float, low: float, high: float, axis: Axis, origin: float, style: str) -> Markup:
    """A row of a chart: an interval with its middle, over an axis that other rows share. `origin`: no difference."""
    ticks = Markup("").join(
        Markup('<line class="grid" x1="{x}" x2="{x}" y1="0" y2="20"/>').format(x=axis.at(t))
        for t in axis.ticks
    )
    return (
        Markup('<svg class="track" viewBox="0 0 {} 20" aria-hidden="true">').format(_TRACK)
        + ticks
        + Markup('<line class="origin" x1="{x}" x2="{x}" y1="0" y2="20"/>').format(x=axis.at(origin))
        + Markup('<line class="span {}" x1="{}" x2="{}" y1="10" y2="10"/>').format(
            style, axis.at(max(low, axis.low)), axis.at(min(high, axis.high))
        )
        + Markup('<circle class="mid {}" cx="{}" cy="10" r="5.5"/></svg>').format(style, axis.at(value))
    )


def ruler(axis: Axis) -> Markup:
    """The numbers under rows of `track`."""
    numbers = Markup("").join(
        Markup('<text x="{}" y="12" text-anchor="middle">{}</text>').format(axis.at(t), axis.show(t))
        for t in axis.ticks
    )
    return Markup('<svg class="track" viewBox="0 0 {} 16" aria-hidden="true">{}</svg>').format(
        _TRACK, numbers
    )


def row_axis(values: Iterable[float], show: Callable[[float], str], *, log: bool) -> Axis:
    """An axis for rows of `track`."""
    return Axis("", show, 18, _TRACK - 18).fit(values, zero=False, log=log)


def plane(
    x: str, y: str, show_x: Callable[[float], str], show_y: Callable[[float], str]
) -> tuple[Axis, Axis]:
    """The two axes of a plot, with their labels."""
    return Axis(x, show_x, _LEFT, WIDTH - _RIGHT), Axis(y, show_y, HEIGHT - _BOTTOM, _TOP)


def _frame(x: Axis, y: Axis) -> Markup:
    """Grid, ticks and labels."""
    parts = [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
        ).format(_LEFT, WIDTH - _RIGHT, _LEFT - 6, y.at(t) + 4, y.show(t), y=y.at(t))
        for t in y.ticks
    ]
    parts += [
        Markup(
            '<line class="grid" x1="{x}" x2="{x}" y1="{}" y2="{}"/><text x="{x}" y="{}" text-anchor="middle">{}</text>'
        ).format(_TOP, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM + 15, x.show(t), x=x.at(t))
        for t in x.ticks
    ]
    parts.append(
        Markup(
            '<text class="axis" x="{}" y="{}" text-anchor="end">{}</text><text class="axis" x="2" y="11">{}</text>'
        ).format(WIDTH - _RIGHT, HEIGHT - 6, x.label, y.label)
    )
    return Markup("").join(parts)


def _places(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _polyline(points: Sequence[tuple[float, float]], series: int, title: str = "") -> Markup:
    return Markup('<polyline class="line s{}" points="{}"><title>{}</title></polyline>').format(
        series % COLOURS, _places(points), title
    )


def _svg(title: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
