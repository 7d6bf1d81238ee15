"""Where the time goes: one case of a workload, operator by operator, prefill and decode told apart.

>>> from runtimes.trace import trace                                   # doctest: +SKIP
>>> found = trace("out/", prompt_tokens=64, new_tokens=32)             # doctest: +SKIP
>>> found.phase("decode").operators[0].name                            # doctest: +SKIP
'MatMulNBits'

The engine's own library does the noting (ExecuTorch's event tracer, ONNX Runtime's profiler), so an operator has the
name that this library gives it. The case runs in a process of its own, twice: without tracing, and with it, since
noting takes time too. `python -m runtimes.trace` reads a job as JSON from standard input and prints a trace.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from pydantic import ValidationError

from runtimes import checksums
from runtimes.bundle import Bundle, Strict
from runtimes.engines import choose_variant, settle
from runtimes.errors import EngineError, UsageError
from runtimes.measurement import Place, Subject, quantile
from runtimes.measuring import answer, place, run_apart, subject
from runtimes.workload import Case, Workload, preset, prompt_ids

FRAMEWORK = "framework and tracing"
PREFILLS = 5  # passes over the prompt
DISTURBED = 2  # a pass of over twice the first quartile shows what else the machine did, and does not count
SCHEMA_VERSION: Literal[1] = 1
PhaseName = Literal["prefill", "decode"]
Run = list[tuple[str, float]]  # operators that were called, in order, each with its seconds


class Operator(Strict):
    """All calls of one kind of operator in a phase: seconds of all, of the median one, share of the phase (0..1)."""

    name: str
    calls: int
    total: float
    median: float
    share: float


class Phase(Strict):
    """`passes` over the prompt, or steps of one token, that count; `left_out`: how many more were disturbed.

    `traced`, `untraced`: seconds of a pass with tracing and without, on average, by the clock on the wall; `total`:
    of all passes, traced. `operators`: the longest first; what the library did not ascribe to one is `FRAMEWORK`, so
    that their totals together are `total`.
    """

    name: PhaseName
    passes: int
    left_out: int
    tokens: int  # of one pass
    traced: float
    untraced: float
    total: float
    operators: tuple[Operator, ...]

    def operator(self, name: str) -> Operator | None:
        """The operator by that name, or None if none was called."""
        return next((each for each in self.operators if each.name == name), None)


class Trace(Strict):
    """One case, traced on this machine. `notes`: what to know when reading it; `time` is UTC (ISO 8601)."""

    schema_version: Literal[1] = SCHEMA_VERSION
    what: Subject
    where: Place
    prompt_tokens: int
    new_tokens: int
    context: int
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()
    time: str

    def phase(self, name: str) -> Phase:
        """A phase by its name; UsageError if the case has none such (one new token takes no decode step)."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise UsageError(
            f"there is no phase {name!r}; this trace has {', '.join(p.name for p in self.phases)}"
        )


class Job(Strict):
    """What the tracing process is told."""

    bundle: str
    variant: str
    case: Case
    context: int
    threads: int


def trace(
    bundle_path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    prompt_tokens: int = 16,
    new_tokens: int = 16,
    threads: int | None = None,
    context: int | None = None,
) -> Trace:
    """Trace one case on this machine: a prompt of so many tokens (several times), and then an answer.

    `variant`, `threads` and `context` are as for `runtimes.measure`. Raises UsageError (the case does not fit the
    context), ChecksumError, MissingExtra (the library was built without its tracer), EngineError.
    """
    bundle = Bundle.open(bundle_path)
    chosen, _ = choose_variant(bundle, variant)
    context, threads = settle(chosen, context, threads)
    if min(prompt_tokens, new_tokens) < 1 or prompt_tokens + new_tokens > context:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones were asked for: each must be at least 1, "
            f"and both together at most the context of {context}"
        )
    checksums.check(bundle, chosen)
    job = Job(
        bundle=str(bundle.path.resolve()),
        variant=chosen.name,
        case=Case(prompt_tokens=prompt_tokens, new_tokens=new_tokens),
        context=context,
        threads=threads,
    )
    printed = run_apart("runtimes.trace", job)
    try:
        return Trace.model_validate_json(printed)
    except ValidationError:
        raise EngineError(f"the tracing process printed no trace but {printed[:200]!r}") from None


def trace_workload(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "smoke",
    threads: int | None = None,
    *,
    variant: str | None = None,
    context: int | None = None,
) -> list[Trace]:
    """Trace each case of a workload, cut to the context as `runtimes.measure` does; errors as for `trace`.

    How often is not the workload's to say: the passes of a trace are `PREFILLS` and the steps of one answer.
    """
    chosen, _ = choose_variant(Bundle.open(bundle_path), variant)
    length, _ = settle(chosen, context, threads)
    workload = preset(workload) if isinstance(workload, str) else workload
    traces = []
    for case, note in workload.clipped(length):
        found = trace(
            bundle_path,
            variant=chosen.name,
            prompt_tokens=case.prompt_tokens,
            new_tokens=case.new_tokens,
            threads=threads,
            context=context,
        )
        traces.append(found.model_copy(update={"notes": (*found.notes, note)}) if note else found)
    return traces


def run(job: Job) -> Trace:
    """Do the tracing, in this process. It should be a fresh one."""
    bundle = Bundle.open(job.bundle)
    chosen, choice = choose_variant(bundle, job.variant)
    engine_module = importlib.import_module(f"runtimes.engines.{chosen.engine}")
    ids = prompt_ids(job.case.prompt_tokens, bundle.manifest.model.vocab)

    def passes(traced: bool, file: Path) -> tuple["Passes", str]:
        engine = engine_module.load(
            bundle, chosen, choice, context=job.context, threads=job.threads, trace=traced
        )
        made = Passes(engine, ids, job.case.new_tokens)
        if traced:
            engine.write_trace(file)
        engine.close()  # what is read next may be long
        return made, engine.version

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace"
        plain, _ = passes(False, file)
        traced, version = passes(True, file)
        runs = engine_module.read_trace(file)
    if len(runs) != traced.count:
        raise EngineError(
            f"{version} noted {len(runs)} runs of the model where {traced.count} were made: "
            "trace fewer tokens, its memory for notes is full"
        )
    return Trace(
        what=subject(bundle, chosen),
        where=place("host", version, job.threads),
        prompt_tokens=job.case.prompt_tokens,
        new_tokens=job.case.new_tokens,
        context=job.context,
        phases=tuple(
            _phase(name, job.case.prompt_tokens if name == "prefill" else 1, runs, traced, plain)
            for name, made in traced.runs.items()
            if made
        ),
        notes=(engine_module.CLOCK,),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class Passes:
    """A prompt `PREFILLS` times and then an answer, after one unmeasured pass and step.

    `seconds` of each pass by phase; `runs`: which runs of the graph each was (a long prompt takes several);
    `count`: how many runs there were in all.
    """

    def __init__(self, engine: Any, ids: list[int], new_tokens: int) -> None:
        self.seconds: dict[PhaseName, list[float]] = {"prefill": [], "decode": []}
        self.runs: dict[PhaseName, list[slice]] = {"prefill": [], "decode": []}
        self._engine = engine
        token = int(engine.prefill(ids).argmax())
        if new_tokens > 1:
            engine.decode(token)
        for _ in range(PREFILLS):
            engine.reset()
            token = self._timed("prefill", engine.prefill, ids)
        for _ in range(new_tokens - 1):
            token = self._timed("decode", engine.decode, token)
        self.count: int = engine.runs

    def _timed(self, phase: PhaseName, verb: Callable[[Any], Any], argument: Any) -> int:
        """Do it, and note how long it took; the likeliest token."""
        first, start = self._engine.runs, perf_counter()
        logits = verb(argument)
        self.seconds[phase].append(perf_counter() - start)
        self.runs[phase].append(slice(first, self._engine.runs))
        return int(logits.argmax())


def _phase(name: PhaseName, tokens: int, runs: Sequence[Run], traced: Passes, plain: Passes) -> Phase:
    seconds, made = traced.seconds[name], traced.runs[name]
    quiet, untraced = _undisturbed(seconds), _undisturbed(plain.seconds[name])
    total = sum(seconds[i] for i in quiet)
    return Phase(
        name=name,
        passes=len(quiet),
        left_out=len(seconds) - len(quiet),
        tokens=tokens,
        traced=total / len(quiet),
        untraced=sum(plain.seconds[name][i] for i in untraced) / len(untraced),
        total=total,
        operators=_operators([list(chain.from_iterable(runs[made[i]])) for i in quiet], total),
    )


def _undisturbed(seconds: Sequence[float]) -> list[int]:
    """Which passes count."""
    limit = DISTURBED * quantile(seconds, 0.25)
    return [i for i, each in enumerate(seconds) if each <= limit]


def _operators(passes: Sequence[Run], whole: float) -> tuple[Operator, ...]:
    """Calls by name, the longest total first, and what is left of the `whole` seconds, wherever it stands."""
    calls: dict[str, list[float]] = {}
    for name, seconds in chain.from_iterable(passes):
        calls.setdefault(name, []).append(seconds)
    left = whole - sum(map(sum, calls.values()))
    calls[FRAMEWORK] = [left / len(passes)] * len(passes)  # it is known only for all of them together
    operators = [
        Operator(
            name=name,
            calls=len(times),
            total=sum(times),
            median=quantile(times, 0.5),
            share=sum(times) / whole,
        )
        for name, times in calls.items()
    ]
    return tuple(sorted(operators, key=lambda each: -each.total))


if __name__ == "__main__":
    sys.exit(answer(Job, run))
