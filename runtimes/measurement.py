"""A measurement: what was measured, where, how, and the figures, each of which says where it comes from."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from runtimes.bundle import Strict

SCHEMA_VERSION: Literal[1] = 1


class Figure(Strict):
    """One number. A measured one is the median of its samples, with their 5th and 95th percentiles."""

    name: str
    unit: str
    kind: Literal["measured", "predicted", "published"]
    value: float
    p5: float | None = None
    p95: float | None = None
    samples: tuple[float, ...] = ()


class Subject(Strict):
    """What was measured. `bytes`: all files of the variant together."""

    model: str
    variant: str
    format: str
    scheme: str
    bytes: int


class Backend(Strict):
    """Which processors compute. `requested`: what was asked for; `effective`: of each function, how many operations
    each processor gets, as the engine's library itself says (empty if it does not)."""

    requested: str
    effective: dict[str, dict[str, int]] = Field(default_factory=dict)


class Place(Strict):
    """Where it was measured. `target`: host, mac, ...; `device`: what its maker, or its owner, calls it.

    `threads` is None where the library decides; `backend` where there is but one.
    """

    target: str
    device: str
    os: str
    engine: str
    threads: int | None = None
    backend: Backend | None = None


class Method(Strict):
    """How it was measured: lengths in tokens, how often, and what was not as asked for."""

    workload: str
    prompt_tokens: int
    new_tokens: int
    context: int
    warmup: int
    repeats: int
    notes: tuple[str, ...] = ()


class Measurement(Strict):
    """One case of a workload on one target. `command` repeats it; `time` is UTC (ISO 8601)."""

    schema_version: Literal[1] = SCHEMA_VERSION
    what: Subject
    where: Place
    how: Method
    figures: tuple[Figure, ...]
    command: str
    time: str

    def figure(self, name: str) -> Figure | None:
        """The figure by that name, or None if it could not be measured here."""
        return next((figure for figure in self.figures if figure.name == name), None)


def measured(name: str, unit: str, samples: Sequence[float]) -> Figure:
    """A figure from one or more samples."""
    return Figure(
        name=name,
        unit=unit,
        kind="measured",
        value=quantile(samples, 0.5),
        p5=quantile(samples, 0.05),
        p95=quantile(samples, 0.95),
        samples=tuple(samples),
    )


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) of samples, interpolated linearly between the two nearest (numpy's default)."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
