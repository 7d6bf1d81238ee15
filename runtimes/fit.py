"""Fit the constants of `runtimes.fitted` from the published measurements, and tell how well they predict.

    python -m runtimes.fit            # write runtimes/prediction.toml
    python -m runtimes.fit --check    # exit 1 if that file is not what the observations give

The logarithm of every figure is fitted at once: normal effects around zero (the deviations in SPREAD say how far a
kind of effect usually is from it, so one run of a chip moves its prediction little), residuals by Huber's loss (Robust
Estimation of a Location Parameter, Annals of Mathematical Statistics 35, 1964), found by Gauss-Newton steps. It is
deterministic, and takes seconds.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import profiles
from runtimes.fitted import COVERAGE, DATA, Quantity, down_to, effects, guess, kind
from runtimes.observed import Row, rows

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

HUBER = 1.345  # deviations within which a residual counts in full: 95 % efficient where they are normal
LARGEST_STEP = 1.0  # of an effect in one Gauss-Newton step
STEPS, AGAIN = 60, 12  # at most, from the start and from a fit with one more run
# How far effects usually are from zero, and the noise of a figure beside its rounding: where the likelihood of the
# figures, the effects integrated out by Laplace's method, is largest (`likelihood`), rounded. Backends differ freely.
SPREAD: dict[Quantity, dict[str, dict[str, float]]] = {
    "decode": {
        "rate": {"group": 3.0, "engine": 0.2, "kernel": 0.3, "chip": 0.5, "pair": 0.15},
        "overhead": {"group": 3.0, "engine": 0.6},
    },
    "prefill": {
        "rate": {"group": 3.0, "engine": 0.8, "kernel": 0.5, "chip": 0.5, "pair": 0.7},
        "overhead": {},
    },
    "memory": {"rate": {"group": 1.0, "engine": 0.8}, "overhead": {"group": 2.0, "engine": 1.4}},
}
NOISE: dict[Quantity, float] = {
    "decode": 0.165,
    "prefill": 0.28,
    "memory": 0.165,
}
# Effects of backends where nothing was measured.
START: dict[Quantity, tuple[float, float]] = {
    "decode": (0.7, -9.2),
    "prefill": (-3.0, 0.0),
    "memory": (0.0, 0.0),
}
DIGITS = 4
_HEAD = """# Made by `python -m runtimes.fit` from profiles/observations; not to be edited. The model: runtimes/fitted.
# rate, overhead: the natural logarithm of an effect, and the deviation of the sum down to it; spread: that of an
# effect that was never measured; width: deviations that hold 80 % of the runs, each predicted from the others.
"""


@dataclass(frozen=True)
class Left:
    """A run predicted from all others: `error`, and `chip_error` from the runs on other chips only, each
    predicted / published - 1 of the speed or the memory, None where nothing is predicted then; `deviations` of each;
    `within`, `chip_within`: the interval of such a prediction holds the published figure."""

    row: Row
    error: float | None
    chip_error: float | None
    deviations: float | None
    chip_deviations: float | None
    within: bool = False
    chip_within: bool = False


class Fit:
    """The problem for one quantity: rows and effects as arrays."""

    def __init__(self, quantity: Quantity, observed: Sequence[Row]) -> None:
        self.quantity, self.rows = quantity, tuple(observed)
        names = [effects(quantity, row.at) for row in self.rows]
        self.names: dict[tuple[str, str], int] = {}
        for rate, overhead in names:
            for key in [("rate", name) for name in rate] + [("overhead", name) for name in overhead]:
                self.names.setdefault(key, len(self.names))
        self._rate = np.array([[self.names["rate", name] for name in rate] for rate, _ in names])
        self._overhead = np.array(
            [[self.names["overhead", name] for name in overhead] for _, overhead in names], dtype=np.intp
        )
        self._size, self._units, value, rounding = (
            np.array([getattr(row, name) for row in self.rows])
            for name in ("size", "units", "value", "rounding")
        )
        self.target = np.log(value)
        self._noise = np.hypot(NOISE[quantity], rounding / np.sqrt(3))
        spread, start = SPREAD[quantity], dict(zip(("rate", "overhead"), START[quantity], strict=True))
        self._spread = np.array([spread[part][kind(name)] for part, name in self.names])
        self._start = np.array([start[part] if kind(name) == "group" else 0.0 for part, name in self.names])

    def everything(self) -> Indices:
        return np.arange(len(self.rows))

    def predict(self, found: Floats, chosen: Indices) -> tuple[Floats, Floats]:
        """Logarithms of the figures, and the share of each that goes with its size."""
        sized = self._size[chosen] * np.exp(found[self._rate[chosen]].sum(axis=1))
        fixed = np.zeros_like(sized)
        if self._overhead.shape[1]:
            fixed = self._units[chosen] * np.exp(found[self._overhead[chosen]].sum(axis=1))
        return np.log(sized + fixed), sized / (sized + fixed)

    def solve(self, chosen: Indices, begin: Floats | None = None) -> tuple[Floats, Floats, float]:
        """The effects, their covariance, and how many parameters they are worth (the trace of the hat matrix)."""
        found = self._start if begin is None else begin
        prior = np.diag(1 / self._spread**2)
        for _ in range(STEPS if begin is None else AGAIN):
            guessed, share = self.predict(found, chosen)
            residual = self.target[chosen] - guessed
            scaled = np.abs(residual) / self._noise[chosen]
            weight = np.minimum(1, HUBER / np.maximum(scaled, 1e-12)) / self._noise[chosen] ** 2
            slope = self._slope(share, chosen)
            data = slope.T @ (slope * weight[:, None])
            step = np.linalg.solve(
                data + prior, slope.T @ (weight * residual) - (found - self._start) / self._spread**2
            )
            largest = float(np.abs(step).max())
            found = found + step * min(1, LARGEST_STEP / max(largest, 1e-12))
            if largest < 1e-8:
                break
        covariance = np.linalg.inv(data + prior)
        return found, covariance, float(np.trace(covariance @ data))

    def likelihood(self) -> float:
        """The logarithm of the likelihood of SPREAD and NOISE, but for a constant; Huber's loss for the residuals."""
        every = self.everything()
        found, covariance, _ = self.solve(every)
        scaled = np.abs(self.target - self.predict(found, every)[0]) / self._noise
        loss = np.where(scaled < HUBER, scaled**2 / 2, HUBER * (scaled - HUBER / 2)).sum()
        prior = (((found - self._start) / self._spread) ** 2).sum() / 2
        volume = np.linalg.slogdet(covariance)[1] / 2 - np.log(self._spread).sum()
        return float(volume - loss - prior - np.log(self._noise).sum())

    def _slope(self, share: Floats, chosen: Indices) -> Floats:
        slope = np.zeros((len(chosen), len(self.names)))
        at = np.arange(len(chosen))
        for column in self._rate[chosen].T:
            np.add.at(slope, (at, column), share)
        for column in self._overhead[chosen].T:
            np.add.at(slope, (at, column), 1 - share)
        return slope

    def table(
        self, found: Floats, covariance: Floats, chosen: Indices, only: Iterable[Row] | None = None
    ) -> dict[str, Any]:
        """The constants as `runtimes.fitted.guess` takes them: of the effects that the chosen rows have, or `only`
        those of some rows."""
        spread = SPREAD[self.quantity]
        parts: dict[str, dict[str, list[float]]] = {"rate": {}, "overhead": {}}
        seen = set(self._rate[chosen].ravel()) | set(self._overhead[chosen].ravel())
        for row in self.rows if only is None else only:
            for part, names in zip(parts, effects(self.quantity, row.at), strict=True):
                for name in names:
                    if name in parts[part] or (at := self.names[part, name]) not in seen:
                        continue
                    summed = [self.names[part, above] for above in down_to(names, name)]
                    deviation = np.sqrt(covariance[np.ix_(summed, summed)].sum())
                    parts[part][name] = [float(found[at]), float(deviation)]
        return {
            "noise": NOISE[self.quantity],
            "width": 1.0,
            "spread": spread["rate"],
            "overhead_spread": spread["overhead"],
            "sizes": _sizes([self.rows[at] for at in chosen]) if self.quantity == "memory" else {},
            **parts,
        }

    def leave_one_out(self) -> list[Left]:
        """Each run predicted from constants that never saw it, and those from other chips."""
        every = self.everything()
        full, _, _ = self.solve(every)
        chips = np.array([row.at.chip for row in self.rows])
        elsewhere = {}
        for chip in dict.fromkeys(chips.tolist()):
            others = every[chips != chip]
            found, covariance, _ = self.solve(others, full)
            elsewhere[chip] = self.table(found, covariance, others)
        left = []
        for one, row in enumerate(self.rows):
            others = np.delete(every, one)
            found, covariance, _ = self.solve(others, full)
            error, deviations = self._predicted(row, self.table(found, covariance, others, [row]))
            chip_error, chip_deviations = self._predicted(row, elsewhere[row.at.chip])
            left.append(Left(row, error, chip_error, deviations, chip_deviations))
        return left

    def _predicted(self, row: Row, table: dict[str, Any]) -> tuple[float | None, float | None]:
        """The error of a speed or of memory, and how many deviations it is; None if nothing is predicted."""
        guessed = guess(self.quantity, row.at, row.size, row.units, {self.quantity: table})
        if guessed is None:
            return None, None
        apart = float(np.log(row.value / guessed.value))
        error = float(np.exp(-apart if self.quantity == "memory" else apart)) - 1
        return error, abs(apart) / float(np.log(guessed.high / guessed.value))


def leave_one_out(quantity: Quantity) -> list[Left]:
    """Each shipped run predicted from the others, with whether its interval holds what was published.

    The width of all intervals is one number, found from the runs that were left out.
    """
    left = Fit(quantity, shipped_rows(quantity)).leave_one_out()
    limit = width(left)

    def holds(deviations: float | None) -> bool:
        return deviations is not None and deviations <= limit

    return [
        replace(each, within=holds(each.deviations), chip_within=holds(each.chip_deviations)) for each in left
    ]


def shipped_rows(quantity: Quantity) -> list[Row]:
    return rows(profiles.observations(), quantity)


def constants(quantity: Quantity, deviations: float) -> dict[str, Any]:
    """One table of prediction.toml. `deviations`: how wide an interval is (`width`)."""
    fit = Fit(quantity, shipped_rows(quantity))
    every = fit.everything()
    found, covariance, worth = fit.solve(every)
    errors = np.abs(np.expm1(fit.target - fit.predict(found, every)[0]))
    return {
        "runs": len(fit.rows),
        "parameters": round(worth, 1),
        "median_error_fitted": round(float(np.median(errors)), DIGITS),
        **fit.table(found, covariance, every),
        "width": round(deviations, DIGITS),
    }


def _sizes(seen: Sequence[Row]) -> dict[str, list[float]]:
    """For each engine and backend, from half the smallest size that was measured to twice the largest."""
    found: dict[str, list[float]] = {}
    for row in seen:
        found.setdefault(f"{row.at.backend} {row.at.engine}", []).append(row.size)
    return {name: [min(each) / 2, max(each) * 2] for name, each in found.items()}


def width(left: Sequence[Left]) -> float:
    """The deviations that hold as many runs as an interval should."""
    return float(np.quantile([each.deviations for each in left if each.deviations is not None], COVERAGE))


def written(tables: dict[str, dict[str, Any]]) -> str:
    """The text of prediction.toml."""
    return (
        _HEAD + "".join(f"\n{line}" for name, table in tables.items() for line in _toml(name, table)) + "\n"
    )


def _toml(name: str, table: dict[str, Any]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    yield f"[{name}]"
    yield from (f"{key} = {value}" for key, value in table.items() if key not in inner)
    for key, values in inner.items():
        yield ""
        yield f"[{name}.{key}]"
        for effect, value in sorted(values.items()):
            yield f'"{effect}" = {[_short(each) for each in value] if isinstance(value, list) else value}'
    yield ""


def _short(value: float) -> float:
    return float(f"{value:.4f}") if abs(value) < 1e3 else float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtimes.fit", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    asked = parser.parse_args(arguments)
    left = {quantity: leave_one_out(quantity) for quantity in SPREAD}
    text = written({quantity: constants(quantity, width(runs)) for quantity, runs in left.items()})
    file = Path(str(files("runtimes") / DATA))
    if not asked.check:
        file.write_text(text, encoding="utf-8")
        return 0
    same = file.read_text(encoding="utf-8") == text
    print(f"{DATA} is {'' if same else 'not '}what the observations give", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
