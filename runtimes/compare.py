"""Whether one run of a bundle is faster than another, or only luckier.

Samples of a few repeats are no independent draws: they follow each other in time, whatever else the machine does slows
several in a row, and a whole run may be slow from its first sample to its last. So three things are done:

- A run is resampled before its samples are, and these in blocks: a bootstrap of two levels (Kalibera and Jones,
  "Rigorous benchmarking in reasonable time", https://doi.org/10.1145/2464157.2464160) with circular blocks of the cube
  root of the run's length (Künsch, https://doi.org/10.1214/aos/1176347265; Politis and Romano, 1992).
- What others do on the machine only ever adds time. Beside the median stands the fastest tenth, which they move least
  (Chen and Revels, "Robust benchmarking in noisy environments", https://arxiv.org/abs/1608.04295): on a machine with
  nine times as many processes as cores, medians of two single runs differed by over a third in one pair of twenty,
  their fastest tenths by 5 %. The fastest tenth decides, and from `ENOUGH_RUNS` runs on so does the median, which alone
  sees a phone that throttles.
- A small effect is none: where a program's memory comes to lie makes some per cent (Mytkowicz and others, "Producing
  wrong data without doing anything obviously wrong", https://doi.org/10.1145/1508244.1508275); and from too few runs
  one cannot know how far runs scatter, so that their interval is at least as wide as a floor (`_NOISE`). An interval
  that reaches far to a side is "undecided": what was measured could not have shown a difference.

The floors of times are what runs of pepper's 4-bit bundle scattered by on a shared machine
(`benchmarks/record_samples.py`); those of memory and of instructions are assumed: both hardly scatter.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from runtimes.bundle import Strict
from runtimes.errors import ResultsError, UsageError
from runtimes.measurement import Figure, Kind, Measurement, quantile

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["no difference", "better", "worse", "undecided"]
Statistic = Literal["median", "fastest tenth"]
Obstacle = Literal["only in A", "only in B", "marked", "of two kinds", "zero"]

ENOUGH_RUNS = 5  # on each side, for the scatter of runs to be seen in them
ENOUGH_SAMPLES = 20  # on each side, for a fastest tenth
UNSURE = 0.25  # an interval that reaches further and holds no change is no "no difference"
LEVEL = 0.95  # of an interval; where two statistics decide, of both together
_DRAWS = 1000
_ROOM = 1 << 21  # numbers that are resampled at a time


class _Noise(NamedTuple):
    """Of a kind of figure, as logarithms of ratios. `least`: the smallest effect that is one; `few`: how far an
    interval reaches at least to each side where there are too few runs."""

    least: float
    few: float


_NOISE: dict[str, _Noise] = {
    "time": _Noise(0.03, 0.05),
    "memory": _Noise(0.01, 0.05),
    "instructions": _Noise(0.005, 0.01),
    "certain": _Noise(1e-9, 0.0),
}
# That floor for times where there are fewer than ENOUGH_SAMPLES: as far as the samples of a run lie apart, which of 5
# samples missed the next run's in 1 to 4 % of pairs; and of fewer than 4, one load in twenty took twice as long.
_SCARCE, _SINGLE = 0.1, 0.8


class Interval(Strict):
    """How a statistic changed: after / before - 1, and between which changes it lies with certainty `LEVEL`."""

    of: Statistic
    before: float
    after: float
    change: float
    low: float
    high: float


class Comparison(Strict):
    """One figure of one case, before and after. `decided_by`: the interval from which the verdict is; `runs` and
    `samples` of each side; `regression`: the whole interval is worse than the threshold allows."""

    model: str
    variant: str
    target: str
    device: str
    prompt_tokens: int
    new_tokens: int
    sustained_minutes: float
    figure: str
    unit: str
    kind: Kind
    verdict: Verdict
    regression: bool
    decided_by: Statistic
    intervals: tuple[Interval, ...]
    runs: tuple[int, int]
    samples: tuple[int, int]

    @property
    def decisive(self) -> Interval:
        """The interval from which the verdict is."""
        return next(each for each in self.intervals if each.of == self.decided_by)


class Skipped(Strict):
    """What was not compared, and why. `figure`: its name, or nothing where it is the whole case; `words`: the marks of
    a run, or the kinds of a figure."""

    why: Obstacle
    case: str
    figure: str = ""
    words: tuple[str, ...] = ()


class Compared(Strict):
    """All that two files say of each other. `differs`: what is not the same on both sides, and may be the reason."""

    threshold: float
    rows: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...] = ()
    differs: tuple[tuple[str, str, str], ...] = ()

    @property
    def regressions(self) -> tuple[Comparison, ...]:
        """The rows that are worse than the threshold allows."""
        return tuple(row for row in self.rows if row.regression)


class _Case(NamedTuple):
    model: str
    target: str
    device: str
    prompt_tokens: int
    new_tokens: int
    start: str
    minutes: float

    def __str__(self) -> str:
        text = f"{self.model}, {self.target}, {self.device}, {self.prompt_tokens} → {self.new_tokens}"
        return f"{text}, {self.minutes:g} min" if self.minutes else text


_Detail = tuple[str, int | None, str]  # variant, threads, what was asked of several processors
_Rows = dict[_Detail, list[Measurement]]


def compare(
    before: Iterable[Measurement], after: Iterable[Measurement], threshold: float = 0.05, seed: int = 0
) -> Compared:
    """Compare all that both files measured: the same model, target, device, lengths and start.

    Where a case was measured in several variants, or with several numbers of threads, each is compared with its own.
    Several measurements of a case are several runs of it. Marked ones are left out, and figures of different kinds are
    not compared: `skipped` says so. `threshold`: the part by which a figure may become worse. The same `seed` gives
    the same intervals. ResultsError if the files have no figure in common.
    """
    if not 0 <= threshold < math.inf:
        raise UsageError(f"a threshold of {threshold:g} is none: give a share such as 5% or 0.05")
    skipped: list[Skipped] = []
    sides = [_by_case(side, name, skipped) for side, name in ((before, "A"), (after, "B"))]
    rows: list[Comparison] = []
    differs: dict[tuple[str, str, str], None] = {}
    for case in dict.fromkeys((*sides[0], *sides[1])):
        for old, new in _matched(case, sides[0].get(case, {}), sides[1].get(case, {}), skipped):
            differs |= dict.fromkeys(_differences(old, new))
            rows += _figures(case, old, new, threshold, seed, skipped)
    if not rows:
        reasons = (f"{', '.join(filter(None, (each.case, each.figure)))}: {each.why}" for each in skipped)
        why = "; ".join(dict.fromkeys(reasons)) or "one is empty"
        raise ResultsError(
            f"the two files have no figure in common ({why}): measure the same workload on the same target into both"
        )
    return Compared(threshold=threshold, rows=tuple(rows), skipped=tuple(skipped), differs=tuple(differs))


def _by_case(measurements: Iterable[Measurement], name: str, skipped: list[Skipped]) -> dict[_Case, _Rows]:
    found: dict[_Case, _Rows] = {}
    for m in measurements:
        how, where = m.how, m.where
        case = _Case(
            m.what.model,
            where.target,
            where.device,
            how.prompt_tokens,
            how.new_tokens,
            how.start,
            how.sustained_minutes,
        )
        if m.marks:
            skipped.append(Skipped(why="marked", case=f"{name}: {case}", words=m.marks))
            continue
        detail = (m.what.variant, where.threads, where.backend.requested if where.backend else "")
        found.setdefault(case, {}).setdefault(detail, []).append(m)
    return found


def _matched(
    case: _Case, old: _Rows, new: _Rows, skipped: list[Skipped]
) -> Iterator[tuple[list[Measurement], list[Measurement]]]:
    """Runs that belong together; one variant on each side does, whatever the two are called."""
    if len(old) == len(new) == 1:
        yield next(iter(old.values())), next(iter(new.values()))
        return
    for detail in dict.fromkeys((*old, *new)):
        if detail in old and detail in new:
            yield old[detail], new[detail]
        else:
            why: Obstacle = "only in A" if detail in old else "only in B"
            skipped.append(Skipped(why=why, case=f"{case}, {detail[0]}"))


def _differences(old: Sequence[Measurement], new: Sequence[Measurement]) -> Iterator[tuple[str, str, str]]:
    """What of the subject, the place and the method is not the same: (name, before, after)."""
    for name, read in _CONDITIONS.items():
        before, after = (sorted({str(read(m)) for m in side}) for side in (old, new))
        if before != after:
            yield name, ", ".join(before), ", ".join(after)


_CONDITIONS = {
    "bundle": lambda m: m.what.bundle[:12],
    "variant": lambda m: m.what.variant,
    "format": lambda m: m.what.format,
    "scheme": lambda m: m.what.scheme,
    "bytes": lambda m: m.what.bytes,
    "engine": lambda m: m.where.engine,
    "os": lambda m: m.where.os,
    "threads": lambda m: m.where.threads,
    "context": lambda m: m.how.context,
    "repeats": lambda m: m.how.repeats,
}


def _figures(
    case: _Case,
    old: Sequence[Measurement],
    new: Sequence[Measurement],
    threshold: float,
    seed: int,
    skipped: list[Skipped],
) -> Iterator[Comparison]:
    for name in dict.fromkeys(figure.name for m in (*old, *new) for figure in m.figures):
        by_kind: list[dict[Kind, list[Figure]]] = [{}, {}]
        for found, side in zip(by_kind, (old, new), strict=True):
            for figure in (figure for m in side if (figure := m.figure(name)) is not None):
                found.setdefault(figure.kind, []).append(figure)
        before, after = by_kind
        both = [kind for kind in before if kind in after]
        if not both:
            why: Obstacle = "of two kinds" if before and after else "only in A" if before else "only in B"
            kinds = (*before, *after) if before and after else ()
            skipped.append(Skipped(why=why, case=str(case), figure=name, words=kinds))
        for kind in both:
            sides = before[kind], after[kind]
            if any(value <= 0 for side in sides for run in side for value in _samples(run)):
                skipped.append(Skipped(why="zero", case=str(case), figure=name))  # a ratio to nothing
            else:
                yield _compared(case, new[0].what.variant, *sides, threshold, seed)


def _samples(figure: Figure) -> tuple[float, ...]:
    return figure.samples or (figure.value,)


def higher_is_better(name: str) -> bool:
    """Whether more of a figure is better: of speeds it is, of seconds, bytes, instructions and joules it is not."""
    return name.endswith("_speed")


def _noise(figure: Figure) -> str:
    if figure.kind in ("predicted", "published"):
        return "certain"  # the same formula gives the same number
    if figure.unit == "bytes":
        return "memory"
    return "instructions" if figure.name.endswith("_instructions") else "time"


def _compared(
    case: _Case, variant: str, old: Sequence[Figure], new: Sequence[Figure], threshold: float, seed: int
) -> Comparison:
    """The verdict, from runs of the same figure."""
    one, up = old[0], higher_is_better(old[0].name)
    noise = _noise(one)
    least, floor = _NOISE[noise]
    values = [[_samples(figure) for figure in side] for side in (old, new)]
    samples = [sum(map(len, side)) for side in values]
    few = min(len(old), len(new)) < ENOUGH_RUNS
    scarce = noise == "time" and min(samples) < ENOUGH_SAMPLES
    statistics: tuple[Statistic, ...] = ("median",)
    if scarce:
        floor = max(_apart(run) for side in values for run in side)
    elif noise == "time":
        floor = max(floor, *(_above(run, up) for side in values for run in side))
        statistics = ("fastest tenth", "median")
    deciding = statistics[:1] if few else statistics
    intervals = _intervals(values[0], values[1], statistics, up, 1 - (1 - LEVEL) / len(deciding), seed)
    if few:
        intervals = [_widened(each, floor) for each in intervals]
    told: dict[Statistic, Verdict] = {
        each.of: "better" if (each.change > 0) == up else "worse"
        for each in intervals
        if each.of in deciding and abs(math.log1p(each.change)) >= least and (each.low > 0 or each.high < 0)
    }
    decided_by = max(deciding, key=lambda each: (told.get(each) == "worse", told.get(each) == "better"))
    first = intervals[0]
    unsure = max(-first.low, first.high) > UNSURE
    verdict = told.get(decided_by, "undecided" if unsure else "no difference")
    return Comparison(
        model=case.model,
        variant=variant,
        target=case.target,
        device=case.device,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        sustained_minutes=case.minutes,
        figure=one.name,
        unit=one.unit,
        kind=one.kind,
        verdict=verdict,
        regression=any(
            (each.high < -threshold if up else each.low > threshold)
            for each in intervals
            if told.get(each.of) == "worse"
        ),
        decided_by=decided_by,
        intervals=tuple(intervals),
        runs=(len(old), len(new)),
        samples=(samples[0], samples[1]),
    )


def _apart(run: Sequence[float]) -> float:
    """How far a single run of few samples may be from the next one, as the logarithm of a ratio."""
    return _SINGLE if len(run) < 4 else max(_SCARCE, math.log(max(run) / min(run)))


def _above(run: Sequence[float], up: bool) -> float:
    """How far the fastest sample of a run is from its fastest quarter, as the logarithm of a ratio: where that is far,
    even the fastest were disturbed, and the next run's may be others."""
    best, quarter = (max(run), quantile(run, 0.75)) if up else (quantile(run, 0.25), min(run))
    return math.log(best / quarter)


def _intervals(
    old: Sequence[Sequence[float]],
    new: Sequence[Sequence[float]],
    statistics: Sequence[Statistic],
    up: bool,
    level: float,
    seed: int,
) -> list[Interval]:
    """Of each statistic of all samples its change, and where that lies by the bootstrap."""
    import numpy as np

    fast = 0.9 if up else 0.1
    qs = [0.5 if statistic == "median" else fast for statistic in statistics]
    random = np.random.default_rng(seed)
    drawn = [_resampled(side, qs, random) for side in (old, new)]
    found = []
    for statistic, q, each in zip(statistics, qs, drawn[1] / drawn[0] - 1, strict=True):
        before, after = (quantile([x for run in side for x in run], q) for side in (old, new))
        low, high = np.quantile(each, [(1 - level) / 2, (1 + level) / 2])
        change = after / before - 1
        found.append(
            Interval(
                of=statistic,
                before=before,
                after=after,
                change=change,
                low=min(float(low), change),
                high=max(float(high), change),
            )
        )
    return found


def _widened(one: Interval, floor: float) -> Interval:
    """An interval that reaches at least so far, as the logarithm of a ratio, to each side."""
    low, high = ((1 + one.change) * math.exp(sign * floor) - 1 for sign in (-1, 1))
    return one.model_copy(update={"low": min(one.low, low), "high": max(one.high, high)})


def _resampled(
    runs: Sequence[Sequence[float]], qs: Sequence[float], random: "np.random.Generator"
) -> "np.ndarray":
    """[quantile, draw] of `_DRAWS` sets of samples like these: runs with replacement, and circular blocks of each."""
    import numpy as np

    count, longest = len(runs), max(map(len, runs))
    lengths = np.array([len(run) for run in runs])
    table = np.array([[*run, *[np.nan] * (longest - len(run))] for run in runs])
    blocks = np.maximum(1, np.round(np.cbrt(lengths))).astype(int)
    place = np.arange(longest)
    found = []
    step = max(1, _ROOM // (count * longest))
    for first in range(0, _DRAWS, step):
        drawn = random.integers(0, count, (min(step, _DRAWS - first), count))
        length, block = lengths[drawn][..., None], blocks[drawn][..., None]
        starts = random.integers(0, length, (*drawn.shape, -(-longest // int(blocks.min()))))
        index = (np.take_along_axis(starts, place // block, axis=2) + place % block) % length
        values = np.where(place < length, table[drawn[..., None], index], np.nan)
        ordered = np.sort(values.reshape(len(drawn), -1), axis=1)  # what is no number comes last
        last, row = lengths[drawn].sum(axis=1) - 1, np.arange(len(drawn))
        at = np.multiply.outer(qs, last)
        below = np.floor(at).astype(int)
        low, high = ordered[row, below], ordered[row, np.minimum(below + 1, last)]
        found.append(low + (at - below) * (high - low))
    return np.concatenate(found, axis=1)
