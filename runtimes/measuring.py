"""What targets that run a bundle on this machine share: each case in a process of its own, and what it says.

So its memory is its own, and nothing is warm that would be cold. The process is `python -m` the target's module, which
reads a job as JSON from standard input and prints raw samples as JSON.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from pydantic import ValidationError

from runtimes import checksums, cpu, memory
from runtimes.bundle import Bundle, Strict, Variant
from runtimes.engines import ENGINES, Engine, choose_variant, open_engine
from runtimes.errors import EngineError, GochuError, MissingExtra
from runtimes.extras import require
from runtimes.measurement import Backend, Figure, Measurement, Method, Place, Subject, measured
from runtimes.workload import Case, Workload, prompt_ids

Told = TypeVar("Told", bound=Strict)


class Job(Strict):
    """What the measuring process is told."""

    bundle: str
    variant: str
    case: Case
    context: int
    threads: int
    warmup: int
    repeats: int


class Samples(Strict):
    """What the measuring process says. Times in seconds, one for each repeat; memory in bytes."""

    load: float
    prefill: tuple[float, ...]
    first_token: tuple[float, ...]  # from the prompt's tokens to the first token of the answer
    decode: tuple[float, ...]  # all further tokens together; empty if there were none
    peak_memory: int | None
    peak_private_memory: int | None
    idle_memory: int | None  # private, before the model was loaded: the interpreter and the engine's library
    engine: str


def cases(
    module: str,
    bundle: Bundle,
    variant: Variant,
    workload: Workload,
    *,
    context: int,
    threads: int,
    tell: Callable[..., Job] = Job,
) -> Iterator[tuple[Job, str, Samples]]:
    """Each case of a workload as `python -m module` measures it, with a note of what was cut.

    `tell`: makes the job of that process from a `Job`'s fields. Raises ChecksumError if a file is not the one that was
    exported: that is found out here, so that no figure has the cost in it.
    """
    checksums.check(bundle, variant)
    for case, note in workload.clipped(context):
        job = tell(
            bundle=str(bundle.path.resolve()),
            variant=variant.name,
            case=case,
            context=context,
            threads=threads,
            warmup=workload.warmup,
            repeats=workload.repeats,
        )
        yield job, note, spawn(module, job)


def spawn(module: str, job: Job) -> Samples:
    """What a measuring process says of its job; EngineError if that is nothing."""
    printed = run_apart(module, job)
    try:
        return Samples.model_validate_json(printed)
    except ValidationError:
        raise EngineError(f"the measuring process printed no samples but {printed[:200]!r}") from None


def run(job: Job, load: Callable[[Bundle], Engine] | None = None) -> Samples:
    """Do the measuring, in this process. It should be a fresh one. `load`: opens the engine in its own way."""
    bundle = Bundle.open(job.bundle)
    chosen, _ = choose_variant(bundle, job.variant)
    entry = ENGINES[chosen.engine]
    require(entry.library, entry.extra)  # what Python needs to import it is not the model's load time
    ids = prompt_ids(job.case.prompt_tokens, bundle.manifest.model.vocab)
    idle = memory.private()
    with memory.PeakPrivate() as peak:
        start = perf_counter()
        engine = (
            load(bundle)
            if load
            else open_engine(bundle, job.variant, context=job.context, threads=job.threads)
        )
        loaded = perf_counter() - start
        for _ in range(job.warmup):
            _once(engine, ids, job.case.new_tokens)
    runs = [_once(engine, ids, job.case.new_tokens) for _ in range(job.repeats)]
    return Samples(
        load=loaded,
        prefill=tuple(r[0] for r in runs),
        first_token=tuple(r[1] for r in runs),
        decode=tuple(r[2] for r in runs) if job.case.new_tokens > 1 else (),
        peak_memory=memory.peak_rss(),
        peak_private_memory=peak.bytes,
        idle_memory=idle,
        engine=engine.version,
    )


def _once(engine: Engine, ids: list[int], new_tokens: int) -> tuple[float, float, float]:
    """Seconds of the prefill, until the first token, and of all further tokens together.

    An end-of-text token does not end it, so that all runs are equally long.
    """
    engine.reset()
    start = perf_counter()
    logits = engine.prefill(ids)
    prefilled = perf_counter()
    token = int(logits.argmax())
    first = perf_counter()
    for _ in range(new_tokens - 1):
        token = int(engine.decode(token).argmax())
    return prefilled - start, first - start, perf_counter() - first


def run_apart(module: str, job: Strict, env: Mapping[str, str] | None = None) -> str:
    """What `python -m module` prints in a process of its own, with the job as JSON on its standard input.

    `env` is added to this process's environment. Raises MissingExtra or EngineError with the process's own sentence
    if it fails.
    """
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=job.model_dump_json(),
        capture_output=True,
        encoding="utf-8",
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONIOENCODING": "utf-8",
            **(env or {}),
        },
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if done.returncode == MissingExtra.exit_code:
        raise MissingExtra(said)
    if done.returncode > 1:  # another of Gochu's own errors, and its sentence
        raise EngineError(said)
    raise EngineError(
        f"the process {module} ended with code {done.returncode} and said: {said}; was there enough memory? try a "
        "shorter context"
    )


def subject(bundle: Bundle, variant: Variant) -> Subject:
    """What is measured when this variant is."""
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    return Subject(
        model=bundle.manifest.model.name,
        variant=variant.name,
        format=variant.format,
        scheme=variant.scheme,
        bytes=sum(sizes[path] for path in variant.files),
    )


def place(target: str, engine: str, threads: int | None, backend: Backend | None = None) -> Place:
    """This machine; `engine`: name and version of the library."""
    return Place(
        target=target,
        device=cpu.name(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        engine=engine,
        threads=threads,
        backend=backend,
    )


def measurement(
    what: Subject, where: Place, how: Method, figures: Sequence[Figure], bundle: Bundle, **options: object
) -> Measurement:
    """A measurement of now. `options`: of the command that repeats it; those that are None were not given."""
    given = {"workload": how.workload} | options
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items() if value
    ]
    return Measurement(
        what=what,
        where=where,
        how=how,
        figures=tuple(figures),
        command=" ".join(["gochu bench", shlex.quote(bundle.path.name), *words]),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def method(workload: Workload, job: Job, notes: Sequence[str]) -> Method:
    """How a job was done; notes that are empty are left out."""
    return Method(
        workload=workload.name,
        prompt_tokens=job.case.prompt_tokens,
        new_tokens=job.case.new_tokens,
        context=job.context,
        warmup=job.warmup,
        repeats=job.repeats,
        notes=tuple(filter(None, notes)),
    )


def figures(case: Case, samples: Samples) -> tuple[Figure, ...]:
    """load_time, ttft (s), prefill_speed, decode_speed (tokens/s), peak_memory and peak_private_memory of the process,
    idle_memory of the process before it loaded the model (bytes), as far as they could be measured."""
    found = [
        measured("load_time", "s", [samples.load]),
        measured("ttft", "s", samples.first_token),
        measured("prefill_speed", "tokens/s", [case.prompt_tokens / s for s in samples.prefill]),
    ]
    if samples.decode:
        speeds = [(case.new_tokens - 1) / s for s in samples.decode]
        found.append(measured("decode_speed", "tokens/s", speeds))
    for name in ("peak_memory", "peak_private_memory", "idle_memory"):
        if (size := getattr(samples, name)) is not None:
            found.append(measured(name, "bytes", [size]))
    return tuple(found)


def answer(kind: type[Told], run: Callable[[Told], Strict]) -> int:
    """What a process of `run_apart` does: a job on standard input, what `run` makes of it on standard output.

    Returns the exit code; the sentence of a GochuError goes to standard error.
    """
    try:
        print(run(kind.model_validate_json(sys.stdin.read())).model_dump_json())
    except GochuError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
