"""A measurement: what was measured, where, how, and the figures, each of which says where it comes from.

One schema for every target, so that a row from a phone can be laid beside a row from a laptop. A file of results is
JSON Lines: a measurement a line (`append`, `read`).
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field, ValidationError

from runtimes.bundle import Strict
from runtimes.errors import ResultsError

SCHEMA_VERSION: Literal[2] = 2

# measured: by a clock, on the thing itself. emulated: by another machine's instructions, of which the number is true
# and the time is not. simulated: what a simulator of an NPU says. predicted: by a formula. published: by someone else.
Kind = Literal["measured", "emulated", "simulated", "predicted", "published"]

# interrupted: it was stopped before its end. throttled: it became slower while it ran, or the device said that it was
# hot. cpu_fallback: another processor computed than the one asked for, and that was allowed.
Mark = Literal["interrupted", "throttled", "cpu_fallback"]


class Figure(Strict):
    """One number. One from samples is their median, with their 5th and 95th percentiles; no sample is left out.

    `times`: when each sample was taken, in seconds since the case began, where it ran for minutes.

    Names in use: load_time, warm_load_time (what was loaded before), compile_time (what the device's library compiles
    at the first load), ttft (s);
    prefill_speed, decode_speed (tokens/s); prefill_instructions, decode_instructions (of a token); peak_memory (all
    that was resident), peak_anonymous_memory (of it what no file backs), peak_mapped_memory (of it mapped files),
    peak_accelerator_memory (buffers of a GPU or an NPU), idle_memory (anonymous, before the model was loaded) (bytes);
    energy (J of a token); npu_operations, npu_share (of all operations, those that an NPU computes, and percent);
    logits_correlation (of a step's logits with the same graph's on the CPU).
    """

    name: str
    unit: str
    kind: Kind
    value: float
    p5: float | None = None
    p95: float | None = None
    samples: tuple[float, ...] = ()
    times: tuple[float, ...] = ()


class Subject(Strict):
    """What was measured. `bundle`: SHA-256 of its manifest, and so of all its files; `bytes`: all files of the
    variant together; `toolchain`: what made it, by name with version."""

    model: str
    bundle: str
    variant: str
    format: str
    scheme: str
    bytes: int
    toolchain: dict[str, str] = Field(default_factory=dict)


class Backend(Strict):
    """Which processors compute. `requested`: what was asked for; `effective`: of each function, how many operations
    each processor gets, as the engine's library itself says (empty if it does not)."""

    requested: str
    effective: dict[str, dict[str, int]] = Field(default_factory=dict)


class Place(Strict):
    """Where it was measured. `target`: host, mac, ...; `device`: what its maker, or its owner, calls it; `chip`: its
    id in the profiles, where it is known; `run`: the farm's id of the run.

    `threads` is None where the library decides; `backend` where there is but one.
    """

    target: str
    device: str
    os: str
    engine: str
    chip: str | None = None
    threads: int | None = None
    backend: Backend | None = None
    run: str | None = None


class Method(Strict):
    """How it was measured: lengths in tokens, how often, and what was not as asked for.

    `start`: whether the process was a new one. `sustained_minutes`: how long the case was repeated, instead of
    `repeats` times. `cool_down`: seconds of rest before it.
    """

    workload: str
    prompt_tokens: int
    new_tokens: int
    context: int
    warmup: int
    repeats: int
    start: Literal["cold", "warm"] = "cold"
    sustained_minutes: float = 0.0
    cool_down: float = 0.0
    notes: tuple[str, ...] = ()


class Condition(Strict):
    """The state of a device. `thermal`: in the system's own word (Android: none, light, moderate, severe, ...);
    `celsius`: the hottest that it tells; `battery`: percent; `charging`."""

    thermal: str = ""
    celsius: float | None = None
    battery: float | None = None
    charging: bool | None = None


class Answer(Strict):
    """What the model said to a prompt, greedily: the same on every target, or one of them is wrong."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


class Origin(Strict):
    """The cell of a matrix that a measurement comes from (`runtimes.matrix`): its id, and which of its rows this is."""

    id: str
    row: int
    of: int


class Measurement(Strict):
    """One case of a workload on one target. `command` repeats it; `time` is UTC (ISO 8601); `cell`: of a matrix."""

    schema_version: Literal[2] = SCHEMA_VERSION
    what: Subject
    where: Place
    how: Method
    figures: tuple[Figure, ...]
    marks: tuple[Mark, ...] = ()
    before: Condition | None = None
    after: Condition | None = None
    answers: tuple[Answer, ...] = ()
    cell: Origin | None = None
    command: str
    time: str

    def figure(self, name: str) -> Figure | None:
        """The figure by that name, or None if it could not be measured here."""
        return next((figure for figure in self.figures if figure.name == name), None)


def sampled(
    name: str, unit: str, samples: Sequence[float], kind: Kind = "measured", times: Sequence[float] = ()
) -> Figure:
    """A figure from one or more samples."""
    return Figure(
        name=name,
        unit=unit,
        kind=kind,
        value=quantile(samples, 0.5),
        p5=quantile(samples, 0.05),
        p95=quantile(samples, 0.95),
        samples=tuple(samples),
        times=tuple(times),
    )


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) of samples, interpolated linearly between the two nearest (numpy's default)."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def append(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add measurements to a file of results, which is made if there is none; ResultsError if it cannot be written.

    A last line that was cut short goes, so that it does not spoil the next one.
    """
    text = "".join(each.model_dump_json() + "\n" for each in measurements)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if _open_ended(file):
                file.seek(0)
                before = file.read()
                rest = before.rpartition(b"\n")[2]
                if _whole(rest.decode("utf-8", "replace")):
                    text = "\n" + text
                else:
                    file.truncate(len(before) - len(rest))
            file.write(text.encode())
    except OSError as error:
        raise ResultsError(
            f"the results cannot be added to {path}: {error.strerror}; name another file"
        ) from None


def _open_ended(file: IO[bytes]) -> bool:
    """Whether a file's last line has no end."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read() != b"\n"


def read(path: Path) -> list[Measurement]:
    """The measurements of a file: JSON Lines, or the JSON list that `gochu bench --json` prints.

    ResultsError names the line that is none. A last line that was cut short, by a process that was killed, is left
    out: a rerun measures it again.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ResultsError(
            f"{path} cannot be read: {why}; name a file that `gochu bench --out` wrote"
        ) from None
    if text.lstrip().startswith("["):
        return [_measurement(data, str(path)) for data in _parsed(text, str(path))]
    *whole, rest = text.split("\n")
    found = [parse(line, f"{path}, line {number}") for number, line in enumerate(whole, 1) if line.strip()]
    if rest.strip() and _whole(rest):
        found.append(parse(rest, str(path)))
    return found


def _whole(line: str) -> bool:
    """Whether a line was written to its end."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def parse(text: str, where: str) -> Measurement:
    """A measurement from its JSON; ResultsError names `where` it stood."""
    return _measurement(_parsed(text, where), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ResultsError(f"{where} is not JSON: name a file that `gochu bench --out` wrote") from None


def _measurement(data: Any, where: str) -> Measurement:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"{where} has schema version {version!r} where this Gochu reads {SCHEMA_VERSION}: measure again"
        )
    try:
        return Measurement.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{where} is no measurement: {place}: {first['msg']}") from None
