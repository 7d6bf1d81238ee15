"""Measure on this machine.

Each case runs in a process of its own, so that its memory is its own and nothing is warm that would be cold:
`python -m runtimes.targets.host` reads a job as JSON from standard input and prints raw samples as JSON.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from pydantic import ValidationError

from runtimes import checksums, cpu, memory
from runtimes.bundle import Bundle, Strict, Variant
from runtimes.engines import ENGINES, Engine, choose_variant, open_engine, settle
from runtimes.errors import EngineError, GochuError, MissingExtra
from runtimes.extras import require
from runtimes.measurement import Figure, Measurement, Method, Place, Subject, measured
from runtimes.workload import Case, Workload, preset, prompt_ids

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


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    threads: int | None = None,
    *,
    variant: str | None = None,
    context: int | None = None,
) -> list[Measurement]:
    """Measure a bundle on this machine, one measurement for each case of the workload.

    Figures: load_time, ttft (s), prefill_speed, decode_speed (tokens/s), peak_memory and peak_private_memory
    of the process, idle_memory of the process before it loaded the model (bytes). `context`: length of the KV
    cache, and the limit that cases are clipped to (default: all that the variant can). Raises ChecksumError if
    a file is not the one that was exported: that is found out here, so that no figure has the cost in it.
    """
    bundle = Bundle.open(bundle_path)
    chosen, _ = choose_variant(bundle, variant)
    workload = preset(workload) if isinstance(workload, str) else workload
    context, threads = settle(chosen, context, threads)
    checksums.check(bundle, chosen)
    found = []
    for case, note in workload.clipped(context):
        job = Job(
            bundle=str(bundle.path.resolve()),
            variant=chosen.name,
            case=case,
            context=context,
            threads=threads,
            warmup=workload.warmup,
            repeats=workload.repeats,
        )
        found.append(_measurement(bundle, chosen, workload, job, note, _spawn(job)))
    return found


def run(job: Job) -> Samples:
    """Do the measuring, in this process. It should be a fresh one."""
    bundle = Bundle.open(job.bundle)
    chosen, _ = choose_variant(bundle, job.variant)
    entry = ENGINES[chosen.engine]
    require(entry.library, entry.extra)  # what Python needs to import it is not the model's load time
    ids = prompt_ids(job.case.prompt_tokens, bundle.manifest.model.vocab)
    idle = memory.private()
    with memory.PeakPrivate() as peak:
        start = perf_counter()
        engine = open_engine(bundle, job.variant, context=job.context, threads=job.threads)
        load = perf_counter() - start
        for _ in range(job.warmup):
            _once(engine, ids, job.case.new_tokens)
    runs = [_once(engine, ids, job.case.new_tokens) for _ in range(job.repeats)]
    return Samples(
        load=load,
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


def run_apart(module: str, job: Strict) -> str:
    """What `python -m module` prints in a process of its own, with the job as JSON on its standard input.

    Raises MissingExtra or EngineError with the process's own sentence if it fails.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=job.model_dump_json(),
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
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
        f"the measuring process ended with code {done.returncode} and said: {said}; "
        "was there enough memory? try a shorter context"
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


def place(engine: str, threads: int) -> Place:
    """This machine; `engine`: name and version of the library."""
    return Place(
        target="host",
        device=cpu.name(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        engine=engine,
        threads=threads,
    )


def _spawn(job: Job) -> Samples:
    """Run a job in a process of its own; EngineError if that fails."""
    printed = run_apart("runtimes.targets.host", job)
    try:
        return Samples.model_validate_json(printed)
    except ValidationError:
        raise EngineError(f"the measuring process printed no samples but {printed[:200]!r}") from None


def _measurement(
    bundle: Bundle, variant: Variant, workload: Workload, job: Job, note: str, samples: Samples
) -> Measurement:
    return Measurement(
        what=subject(bundle, variant),
        where=place(samples.engine, job.threads),
        how=Method(
            workload=workload.name,
            prompt_tokens=job.case.prompt_tokens,
            new_tokens=job.case.new_tokens,
            context=job.context,
            warmup=job.warmup,
            repeats=job.repeats,
            notes=(note,) if note else (),
        ),
        figures=_figures(job.case, samples),
        command=f"gochu bench {bundle.path.name} --workload {workload.name} --threads {job.threads}",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _figures(case: Case, samples: Samples) -> tuple[Figure, ...]:
    figures = [
        measured("load_time", "s", [samples.load]),
        measured("ttft", "s", samples.first_token),
        measured("prefill_speed", "tokens/s", [case.prompt_tokens / s for s in samples.prefill]),
    ]
    if samples.decode:
        speeds = [(case.new_tokens - 1) / s for s in samples.decode]
        figures.append(measured("decode_speed", "tokens/s", speeds))
    for name in ("peak_memory", "peak_private_memory", "idle_memory"):
        if (size := getattr(samples, name)) is not None:
            figures.append(measured(name, "bytes", [size]))
    return tuple(figures)


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


if __name__ == "__main__":
    sys.exit(answer(Job, run))
