"""Measure an ONNX variant in an emulated arm64 machine: instructions per token and memory, but no times.

The same measuring program as on this machine runs in the emulated one, with ONNX Runtime for arm64: so one sees that
the bundle loads and says the same on ARM, how much memory it takes there, and how many instructions, which hardly
differ from run to run: a change that makes it better shows. `runtimes.guest` tells how they are counted. What time they
would take, nobody knows from this. One thread computes, since threads that wait for each other count too.
"""

import os
from collections.abc import Callable
from functools import partial

from runtimes import arm64, guest, measuring
from runtimes.bundle import Bundle, Variant
from runtimes.engines import named_variant, settle
from runtimes.errors import BundleError, UsageError
from runtimes.measurement import Figure, Measurement, Place, sampled
from runtimes.workload import Case, Workload, preset

ENGINE = "onnxruntime"
LEAST_MEMORY = 128  # MiB
MEMORY, MINUTES = 4096, 30.0  # MiB of the machine; until it is switched off
_MODULE = "runtimes.targets.host"
_PER_SECOND = 1e9  # instructions: the machine's clock takes one for each nanosecond
setup = arm64.setup


def check() -> None:
    """MissingExtra if it was not set up."""
    arm64.machine()


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    context: int | None = None,
    memory: int | None = None,
    max_minutes: float | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Measure a bundle's ONNX variant in the emulated machine, which is started anew for each case of the workload.

    Figures, all of the kind "emulated": prefill_instructions and decode_instructions (of a token), and
    `measuring.memory_figures` (bytes). `memory`: of the machine, in MiB (default 4096, taken from this one's as it is
    used); `max_minutes`: of a case, until it is given up (default 30). Raises MissingExtra (not set up), TargetError
    (the machine crashed, or ran out of memory or time), UsageError, BundleError, ChecksumError, EngineError.
    """
    bundle = Bundle.open(bundle_path)
    chosen = _choose(bundle, variant)
    workload = _timeless(preset(workload) if isinstance(workload, str) else workload)
    length, threads = settle(chosen, context, 1)
    if memory is not None and memory < LEAST_MEMORY:
        raise UsageError(
            f"Linux and Python alone need {LEAST_MEMORY} MiB of memory, and {memory} were given: give more"
        )
    if max_minutes is not None and max_minutes <= 0:
        raise UsageError(f"in {max_minutes:g} minutes nothing is measured: allow more with max_minutes")
    machine = arm64.machine()
    order = partial(
        guest.Order,
        bundle=bundle.path,
        packages=arm64.code(),
        memory=memory or MEMORY,
        minutes=max_minutes or MINUTES,
        progress=progress,
    )

    def apart(module: str, job: measuring.Job) -> str:
        ended = guest.run(machine, order(["-m", module], stdin=job.model_dump_json()))
        if ended.code:
            raise measuring.failure(module, ended.code, ended.err)
        return ended.out

    def tell(**fields: object) -> measuring.Job:
        return measuring.Job.model_validate({**fields, "bundle": f"{guest.PLACE}/bundle"})

    return [
        measuring.measurement(
            measuring.subject(bundle, chosen),
            _place(machine, samples.engine),
            measuring.method(workload, job, [note]),
            [*_instructions(job.case, samples), *measuring.memory_figures(samples, "emulated")],
            bundle,
            marks=measuring.marks(samples),
            answers=samples.answers,
            on=arm64.NAME,
            variant=variant,
            context=context,
            memory=memory,
            max_minutes=max_minutes,
        )
        for job, note, samples in measuring.cases(
            _MODULE, bundle, chosen, workload, context=length, threads=threads, tell=tell, apart=apart
        )
    ]


def _choose(bundle: Bundle, name: str | None) -> Variant:
    """The variant named, or the first for ONNX Runtime on a CPU; UsageError or BundleError if that is none."""
    variants = [named_variant(bundle, name)] if name else bundle.manifest.variants
    chosen = next((v for v in variants if v.engine == ENGINE and not v.chips and not v.delegate), None)
    if chosen is not None:
        return chosen
    if name:
        raise UsageError(
            f"variant {name} does not run on ONNX Runtime's CPU, and the emulated machine has no other engine; name "
            "another variant, or measure this one with --on host"
        )
    raise BundleError(
        f"{bundle.path} has no variant for ONNX Runtime on a CPU, and the emulated machine has no other engine; export "
        "one with --format onnx"
    )


def _timeless(workload: Workload) -> Workload:
    """The workload without rests, since nothing becomes hot there; UsageError if it is to last for minutes."""
    if workload.minutes:
        raise UsageError(
            f"workload {workload.name} shows what minutes of work do to a device, and an emulated one has no time and "
            "does not become hot: take another workload, such as smoke"
        )
    return workload.model_copy(update={"cool_down": 0.0})


def _instructions(case: Case, samples: measuring.Samples) -> list[Figure]:
    """What the clock there took for seconds, as instructions of a token."""

    def figure(phase: str, seconds: tuple[float, ...], tokens: int) -> Figure:
        counts = [round(_PER_SECOND * each) / tokens for each in seconds]
        return sampled(f"{phase}_instructions", "instructions", counts, "emulated")

    found = [figure("prefill", samples.prefill, case.prompt_tokens)]
    if samples.decode:
        found.append(figure("decode", samples.decode, case.new_tokens - 1))
    return found


def _place(machine: guest.Machine, engine: str) -> Place:
    return Place(
        target=arm64.NAME,
        device=f"{guest.emulator(machine)}, {guest.CPU_NAME}",
        os=f"Linux {machine.release} aarch64",
        engine=engine,
        threads=1,
    )
