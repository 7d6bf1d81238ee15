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
from time import perf_counter, sleep
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from runtimes import checksums, cpu, memory
from runtimes.bundle import MANIFEST, TOKENIZER, Bundle, Strict, Variant, file_sha256
from runtimes.engines import Engine, choose_variant, import_library, open_engine
from runtimes.errors import EngineError, GochuError, MissingExtra
from runtimes.measurement import (
    Answer,
    Backend,
    Condition,
    Figure,
    Kind,
    Mark,
    Measurement,
    Method,
    Place,
    Subject,
    quantile,
    sampled,
)
from runtimes.targets import FLAGS
from runtimes.workload import Case, Workload, prompt_ids

Told = TypeVar("Told", bound=Strict)
_PATIENCE = 60.0  # s, for the last words of a process that was interrupted


class Job(Strict):
    """What the measuring process is told."""

    bundle: str
    variant: str
    case: Case
    context: int
    threads: int
    warmup: int
    repeats: int
    minutes: float = 0.0  # instead of `repeats`
    cool_down: float = 0.0  # s
    prompts: tuple[str, ...] = ()
    answer_tokens: int = 1


class Samples(Strict):
    """What the measuring process says. Times in seconds, one for each repeat; memory in bytes."""

    load: float
    prefill: tuple[float, ...]
    first_token: tuple[float, ...]  # from the prompt's tokens to the first token of the answer
    decode: tuple[float, ...]  # all further tokens together; empty if there were none
    times: tuple[float, ...] = ()  # when each began, since the first did; empty but for a sustained run
    peak_memory: int | None
    peak_anonymous_memory: int | None
    peak_mapped_memory: int | None
    idle_memory: (
        int | None
    )  # anonymous, before the model was loaded: the interpreter and the engine's library
    engine: str
    interrupted: bool = False
    answers: tuple[Answer, ...] = ()


def cases(
    module: str,
    bundle: Bundle,
    variant: Variant,
    workload: Workload,
    *,
    context: int,
    threads: int,
    tell: Callable[..., Job] = Job,
    apart: Callable[[str, Job], str] | None = None,
) -> Iterator[tuple[Job, str, Samples]]:
    """Each case of a workload as `python -m module` measures it, with a note of what was cut.

    `tell`: makes the job of that process from a `Job`'s fields. `apart`: runs it, if not here (`run_apart`). Raises
    ChecksumError if a file is not the one that was exported: that is found out here, so that no figure has the cost in
    it. The workload's prompts are answered in the first case. After one that was interrupted there is no other.
    """
    checksums.check(bundle, variant)
    for number, (case, note) in enumerate(workload.clipped(context)):
        job = tell(
            bundle=str(bundle.path.resolve()),
            variant=variant.name,
            case=case,
            context=context,
            threads=threads,
            warmup=workload.warmup,
            repeats=workload.repeats,
            minutes=workload.minutes,
            cool_down=workload.cool_down,
            prompts=() if number else workload.prompts,
            answer_tokens=workload.answer_tokens,
        )
        samples = spawn(module, job, apart)
        yield job, note, samples
        if samples.interrupted:
            return


def spawn(module: str, job: Job, apart: Callable[[str, Job], str] | None = None) -> Samples:
    """What a measuring process says of its job; EngineError if that is nothing."""
    printed = (apart or run_apart)(module, job)
    try:
        return Samples.model_validate_json(printed)
    except ValidationError:
        raise EngineError(f"the measuring process printed no samples but {printed[:200]!r}") from None


def run(job: Job, load: Callable[[Bundle], Engine] | None = None) -> Samples:
    """Do the measuring, in this process. It should be a fresh one. `load`: opens the engine in its own way."""
    bundle = Bundle.open(job.bundle)
    chosen, _ = choose_variant(bundle, job.variant)
    import_library(chosen.engine)  # what that takes in time and memory is not the model's
    ids = prompt_ids(job.case.prompt_tokens, bundle.manifest.model.vocab)
    sleep(job.cool_down)
    idle = memory.anonymous()
    with memory.Peak() as peak:
        start = perf_counter()
        engine = (
            load(bundle)
            if load
            else open_engine(bundle, job.variant, context=job.context, threads=job.threads)
        )
        loaded = perf_counter() - start
        for _ in range(job.warmup):
            _once(engine, ids, job.case.new_tokens)
    runs, interrupted = _repeat(engine, ids, job)
    peak_memory = memory.peak_rss()
    return Samples(
        load=loaded,
        prefill=tuple(r.prefill for r in runs),
        first_token=tuple(r.first for r in runs),
        decode=tuple(r.decode for r in runs) if job.case.new_tokens > 1 else (),
        times=tuple(r.began - runs[0].began for r in runs) if job.minutes else (),
        peak_memory=peak_memory,
        peak_anonymous_memory=peak.anonymous,
        peak_mapped_memory=peak.mapped,
        idle_memory=idle,
        engine=engine.version,
        interrupted=interrupted,
        answers=() if interrupted else ask(bundle, engine, job.prompts, job.answer_tokens),
    )


class _Run(NamedTuple):
    """When it began, and seconds of the prefill, until the first token, and of all further tokens together."""

    began: float
    prefill: float
    first: float
    decode: float


def _repeat(engine: Engine, ids: list[int], job: Job) -> tuple[list[_Run], bool]:
    """The measured runs, at least one, and whether Ctrl-C ended them."""
    runs = [_once(engine, ids, job.case.new_tokens)]
    try:
        while perf_counter() - runs[0].began < 60 * job.minutes if job.minutes else len(runs) < job.repeats:
            runs.append(_once(engine, ids, job.case.new_tokens))
    except KeyboardInterrupt:
        return runs, True
    return runs, False


def ask(bundle: Bundle, engine: Engine, prompts: Sequence[str], tokens: int) -> tuple[Answer, ...]:
    """What the model says to each prompt, greedily, in `tokens` at most."""
    if not prompts:
        return ()
    from runtimes.generate import Model
    from runtimes.tokenizer import Tokenizer

    model = Model(bundle, engine, Tokenizer(bundle.file(TOKENIZER)))
    said = ((prompt, model.generate(prompt, max_tokens=tokens)) for prompt in prompts)
    return tuple(Answer(prompt=prompt, text=each.text, tokens=each.tokens) for prompt, each in said)


def _once(engine: Engine, ids: list[int], new_tokens: int) -> _Run:
    """A prompt and its answer. An end-of-text token does not end it, so that all runs are equally long."""
    engine.reset()
    start = perf_counter()
    logits = engine.prefill(ids)
    prefilled = perf_counter()
    token = int(logits.argmax())
    first = perf_counter()
    for _ in range(new_tokens - 1):
        token = int(engine.decode(token).argmax())
    return _Run(start, prefilled - start, first - start, perf_counter() - first)


def run_apart(module: str, job: Strict, env: Mapping[str, str] | None = None) -> str:
    """What `python -m module` prints in a process of its own, with the job as JSON on its standard input.

    `env` is added to this process's environment. Raises MissingExtra or EngineError with the process's own sentence
    if it fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**environment(), **(env or {})},
    )
    with process:
        try:
            printed, complained = process.communicate(job.model_dump_json())
        except KeyboardInterrupt:  # Ctrl-C reached that process too
            printed, complained = _last_words(process)
            if process.returncode != 0:
                raise
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return printed
    raise failure(module, process.returncode, complained)


def failure(module: str, code: int, complained: str) -> MissingExtra | EngineError:
    """The error of a process that ended with that code, and with its own sentence as the last that it complained of."""
    said = (complained.strip().splitlines() or ["nothing"])[-1]
    if code == MissingExtra.exit_code:
        return MissingExtra(said)
    if code > 1:  # another of Gochu's own errors, and its sentence
        return EngineError(said)
    return EngineError(
        f"the process {module} ended with code {code} and said: {said}; was there enough memory? try a shorter context"
    )


def environment() -> dict[str, str]:
    """This process's environment, in which `python -m` finds Gochu's modules, and speaks UTF-8."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}


def _last_words(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What an interrupted process still says: it may have measured something."""
    try:
        return process.communicate(timeout=_PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        return process.communicate()


def subject(bundle: Bundle, variant: Variant) -> Subject:
    """What is measured when this variant is."""
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    return Subject(
        model=bundle.manifest.model.name,
        bundle=file_sha256(bundle.path / MANIFEST),
        variant=variant.name,
        format=variant.format,
        scheme=variant.scheme,
        bytes=sum(sizes[path] for path in variant.files),
        toolchain=dict(variant.toolchain),
    )


def place(
    target: str, engine: str, threads: int | None, backend: Backend | None = None, chip: str | None = None
) -> Place:
    """This machine; `engine`: name and version of the library; `chip`: one that it simulates."""
    return Place(
        target=target,
        device=cpu.name(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        engine=engine,
        chip=chip,
        threads=threads,
        backend=backend,
    )


def measurement(
    what: Subject,
    where: Place,
    how: Method,
    figures: Sequence[Figure],
    bundle: Bundle,
    *,
    marks: Sequence[Mark] = (),
    answers: Sequence[Answer] = (),
    before: Condition | None = None,
    after: Condition | None = None,
    **options: object,
) -> Measurement:
    """A measurement of now. `options`: of the command that repeats it; those that are None were not given."""
    return Measurement(
        what=what,
        where=where,
        how=how,
        figures=tuple(figures),
        marks=tuple(marks),
        before=before,
        after=after,
        answers=tuple(answers),
        command=command(bundle, how.workload, answers, **options),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def command(bundle: Bundle, workload: str, answers: Sequence[Answer], **options: object) -> str:
    """The command that repeats a measurement; options that are None were not given."""
    given = {"workload": workload} | options
    words = [_word(name, value) for name, value in given.items() if value]
    words += [f"--ask {shlex.quote(answer.prompt)}" for answer in answers]
    return " ".join(["gochu bench", shlex.quote(bundle.path.name), *words])


def _word(name: str, value: object) -> str:
    """An option as it is said on the command line."""
    if name not in ("workload", "on", *FLAGS):
        return f"--option {shlex.quote(f'{name}={value}')}"
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {shlex.quote(str(value))}"


def marks(samples: Samples) -> tuple[Mark, ...]:
    """What must be known of a run before its figures are believed."""
    found: list[Mark] = ["interrupted"] if samples.interrupted else []
    if samples.times and slowed(samples.decode or samples.prefill):
        found.append("throttled")
    return tuple(found)


def slowed(seconds: Sequence[float]) -> bool:
    """Whether the last fifth of the runs took a tenth longer than the first fifth, by their medians."""
    fifth = len(seconds) // 5
    return fifth > 0 and quantile(seconds[-fifth:], 0.5) > 1.1 * quantile(seconds[:fifth], 0.5)


def method(workload: Workload, job: Job, notes: Sequence[str]) -> Method:
    """How a job was done; notes that are empty are left out."""
    return Method(
        workload=workload.name,
        prompt_tokens=job.case.prompt_tokens,
        new_tokens=job.case.new_tokens,
        context=job.context,
        warmup=job.warmup,
        repeats=job.repeats,
        sustained_minutes=job.minutes,
        cool_down=job.cool_down,
        notes=tuple(filter(None, notes)),
    )


def figures(case: Case, samples: Samples, kind: Kind = "measured") -> tuple[Figure, ...]:
    """load_time, ttft (s), prefill_speed, decode_speed (tokens/s); peak_memory of the process, and of it
    peak_anonymous_memory and peak_mapped_memory, and idle_memory (bytes), as far as they could be measured."""
    times = samples.times
    found = [
        sampled("load_time", "s", [samples.load], kind),
        sampled("ttft", "s", samples.first_token, kind, times),
        sampled("prefill_speed", "tokens/s", [case.prompt_tokens / s for s in samples.prefill], kind, times),
    ]
    if samples.decode:
        speeds = [(case.new_tokens - 1) / s for s in samples.decode]
        found.append(sampled("decode_speed", "tokens/s", speeds, kind, times))
    return (*found, *memory_figures(samples, kind))


def memory_figures(samples: Samples, kind: Kind = "measured") -> tuple[Figure, ...]:
    """The kinds of memory that were seen, in bytes."""
    names = ("peak_memory", "peak_anonymous_memory", "peak_mapped_memory", "idle_memory")
    sizes = ((name, getattr(samples, name)) for name in names)
    return tuple(sampled(name, "bytes", [size], kind) for name, size in sizes if size is not None)


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
