"""Ranges: between which numbers each value of a graph lies, which is what its integers' scale follows from.

An observer sees a value again and again and tells its range in the end. `Observers` keeps one for each step of a
program; which kind, rules over the steps' names say.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.errors import RecipeError

Values = NDArray[np.float32]
_ROUNDS, _GRID = 4, np.linspace(-1, 1, 33)  # of the search of `LeastSquares`, each an eighth as wide


class Quantization(NamedTuple):
    """A number is (integer - zero_point) * scale."""

    scale: float
    zero_point: int


class Range(NamedTuple):
    """From `low` to `high`."""

    low: float
    high: float

    def quantization(self, bits: int) -> Quantization:
        """Unsigned integers over the range, and over 0, which one of them is exactly.

        >>> Range(-1.0, 254.0).quantization(8)
        Quantization(scale=1.0, zero_point=1)
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        largest = 2**bits - 1
        scale = float(np.float32((high - low) / largest)) or float(np.finfo(np.float32).tiny)
        return Quantization(scale, min(max(round(-low / scale), 0), largest))


class Observer(Protocol):
    """What sees a value's numbers, any number of times, and then tells its range."""

    def see(self, values: Values) -> None: ...

    def range(self) -> Range: ...


class MinMax:
    """From the least to the greatest, and `margin` of that beyond both: other texts go further."""

    def __init__(self, margin: float = 0.0) -> None:
        self._margin, self._low, self._high = margin, math.inf, -math.inf

    def see(self, values: Values) -> None:
        low, high = float(values.min()), float(values.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        if math.isnan(low):  # which no comparison keeps
            self._low = self._high = math.nan

    def range(self) -> Range:
        return Range(self._low * (1 + self._margin), self._high * (1 + self._margin))


class Histogram:
    """How often numbers were seen: bins over [-limit, limit], which widen, two into one, when one lies beyond.

    What chooses a range by how much lies in it derives from this.
    """

    BINS = 1 << 14

    def __init__(self) -> None:
        self._limit = 0.0
        self._exact = MinMax()
        self.counts = np.zeros(self.BINS, np.int64)

    def see(self, values: Values) -> None:
        self._exact.see(values)
        largest = max(float(np.abs(values).max()), 1e-30)
        if not math.isfinite(largest):
            return
        if largest > self._limit:
            limit = 2.0 ** math.ceil(math.log2(largest))
            times = round(limit / self._limit) if self._limit else 1
            merged = self.counts.reshape(-1, min(times, self.BINS // 2)).sum(1)
            self.counts[:] = 0
            start = (self.BINS - len(merged)) // 2
            self.counts[start : start + len(merged)] = merged
            self._limit = limit
        self.counts += np.histogram(values, self.BINS, (-self._limit, self._limit))[0]

    def edge(self, bin: int) -> float:
        """Where a bin begins."""
        return (2 * bin / self.BINS - 1) * self._limit

    def range(self) -> Range:
        return self._exact.range()


class Percentile(Histogram):
    """The range that holds `keep` percent, as much left out at either end; never beyond what was seen."""

    def __init__(self, keep: float = 99.99) -> None:
        super().__init__()
        self._keep = keep

    def range(self) -> Range:
        seen = super().range()
        if not self._limit or not all(map(math.isfinite, seen)):
            return seen
        left_out = self.counts.sum() * (100 - self._keep) / 200
        running = np.cumsum(self.counts)
        low = int(np.searchsorted(running, left_out, "right"))
        high = int(np.searchsorted(running, running[-1] - left_out, "left"))
        return Range(max(seen.low, self.edge(low)), min(seen.high, self.edge(high + 1)))


class LeastSquares(Histogram):
    """The range whose integers of `bits` bits are off by the least squared error, never beyond what was seen.

    What lies within is rounded, by a twelfth of a step squared on average (where a step is small beside how far the
    numbers are spread); what lies beyond becomes the nearest end.
    Both ends are searched together, on a grid of shares of what was seen that is made finer around the best. Method:
    Banner et al. 2019 (arXiv 1810.05723, section 3), on a histogram instead of a distribution.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._levels = 2**bits - 1

    def range(self) -> Range:
        seen = super().range()
        if not self._limit or not all(map(math.isfinite, seen)) or seen.low == seen.high:
            return seen
        found, width, sums = np.array([1.0, 1.0]), 1.0, self._sums()
        for _ in range(_ROUNDS):
            low, high = (np.clip(share + width * _GRID, 0.0, 1.0) for share in found)
            errors = self._errors(min(seen.low, 0.0) * low, max(seen.high, 0.0) * high, sums)
            best = np.unravel_index(int(errors.argmin()), errors.shape)
            found, width = np.array([low[best[0]], high[best[1]]]), width / 8
        return Range(max(seen.low, seen.low * found[0]), min(seen.high, seen.high * found[1]))

    def _sums(self) -> list[NDArray[np.float64]]:
        """Of the numbers before each bin, and of all: how many there are, their sum, and that of their squares."""
        middles = (np.arange(self.BINS) + 0.5) * (2 * self._limit / self.BINS) - self._limit
        return [np.concatenate(([0.0], np.cumsum(self.counts * middles**power))) for power in range(3)]

    def _errors(
        self, lows: NDArray[np.float64], highs: NDArray[np.float64], sums: list[NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Summed squared errors of the ranges from each of `lows` to each of `highs`, [lows, highs]."""
        edges = np.arange(1, self.BINS + 1) * (2 * self._limit / self.BINS) - self._limit
        below, upto = np.searchsorted(edges, lows, "left"), np.searchsorted(edges, highs, "left") + 1
        upto = np.minimum(upto, self.BINS)
        under = sums[2][below] - 2 * lows * sums[1][below] + lows**2 * sums[0][below]
        above = [each[-1] - each[upto] for each in sums]
        over = above[2] - 2 * highs * above[1] + highs**2 * above[0]
        inside = np.maximum(sums[0][upto][None, :] - sums[0][below][:, None], 0.0)
        steps = (highs[None, :] - lows[:, None]) / self._levels
        return under[:, None] + over[None, :] + inside * steps**2 / 12


@dataclass(frozen=True)
class Rule:
    """Steps whose name matches `match` (shell wildcards) are seen by what `observer` makes; the first rule wins."""

    match: str
    observer: Callable[[], Observer]


@dataclass(frozen=True)
class Ranges:
    """The range of each step; RecipeError where there is none that could be used."""

    ranges: Mapping[str, Range]

    def __getitem__(self, step: str) -> Range:
        if step not in self.ranges:
            raise RecipeError(f"{step} has no range: calibrate the model again, with this architecture")
        low, high = self.ranges[step]
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RecipeError(
                f"{step} became NaN or infinite while the model was calibrated: its weights do not work"
            )
        if low >= high:
            raise RecipeError(
                f"{step} was always {low:g} while the model was calibrated: calibrate on text that uses the whole model"
            )
        return self.ranges[step]

    def to_json(self) -> str:
        """As JSON; the same ranges give the same text."""
        return json.dumps({step: list(range) for step, range in sorted(self.ranges.items())}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Ranges":
        """Back from `to_json`; RecipeError if it is not that."""
        try:
            ranges = {
                str(step): Range(float(low), float(high)) for step, (low, high) in json.loads(text).items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise RecipeError(f"these are no ranges ({error}): calibrate the model again") from None
        return cls(ranges)


class Observers:
    """One observer for each step, made when the step is first seen."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._observers: dict[str, Observer] = {}

    def see(self, step: str, values: Values) -> None:
        """Show a step's values to its observer."""
        if not values.size:
            return
        if step not in self._observers:
            rule = next(rule for rule in self._rules if fnmatchcase(step, rule.match))
            self._observers[step] = rule.observer()
        self._observers[step].see(values)

    def ranges(self) -> dict[str, Range]:
        """What all have seen so far."""
        return {step: observer.range() for step, observer in self._observers.items()}
