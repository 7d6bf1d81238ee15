"""Measure a Core ML variant on this Mac, with Core ML itself.

As the target host does, through coremltools' predict with make_state, but on processors of your choice; and Core ML is
asked which of them each operation gets. coremltools' own MLModelBenchmarker is not used: version 9.0 looks for the
states of a package with several functions in the wrong place, and fails.

Tried with stand-ins for coremltools alone: it has never run on a Mac.
"""

import importlib
import os
import sys
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from runtimes import apple, measuring
from runtimes.bundle import Bundle, Variant
from runtimes.engines import choose_variant, settle
from runtimes.errors import TargetError
from runtimes.measurement import Backend, Measurement
from runtimes.workload import Workload, preset

if TYPE_CHECKING:
    from runtimes.engines import Engine


def check() -> None:
    """TargetError where there is no Mac."""
    apple.require_macos("mac")


class Job(measuring.Job):
    """What the measuring process is told."""

    compute_units: str


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    context: int | None = None,
    compute_units: str | None = None,
) -> list[Measurement]:
    """Measure a bundle's Core ML variant on this Mac, one measurement for each case of the workload.

    Figures: `measuring.figures`. `compute_units`: cpu, gpu (and CPU), ane (and CPU) or all (default: what the variant
    was made for); `where.backend` says what Core ML made of it. `context` is as for `runtimes.measure`. Raises
    TargetError (no Mac), UsageError, MissingExtra, BundleError, ChecksumError, EngineError.
    """
    check()
    bundle = Bundle.open(bundle_path)
    chosen = apple.choose(bundle, variant, "mac")
    choose_variant(bundle, chosen.name)  # says what hinders it
    workload = preset(workload) if isinstance(workload, str) else workload
    units = apple.compute_units(chosen, compute_units)
    length, threads = settle(chosen, context, None)
    found = list(
        measuring.cases(
            "runtimes.targets.mac",
            bundle,
            chosen,
            workload,
            context=length,
            threads=threads,
            tell=partial(Job, compute_units=units),
        )
    )
    backend, unplanned = _backend(
        bundle, chosen, units
    )  # last: what Core ML then keeps would make loading faster
    return [
        measuring.measurement(
            measuring.subject(bundle, chosen),
            measuring.place("mac", samples.engine, None, backend),
            measuring.method(workload, job, [note, unplanned]),
            measuring.figures(job.case, samples),
            bundle,
            marks=measuring.marks(samples),
            answers=samples.answers,
            on="mac",
            variant=variant,
            context=context,
            compute_units=compute_units,
        )
        for job, note, samples in found
    ]


def run(job: Job) -> measuring.Samples:
    """Do the measuring, in this process."""

    def load(bundle: Bundle) -> "Engine":
        chosen, choice = choose_variant(bundle, job.variant)
        engine: Engine = importlib.import_module("runtimes.engines.coreml").load(
            bundle, chosen, choice, context=job.context, threads=job.threads, compute_units=job.compute_units
        )
        return engine

    return measuring.run(job, load)


def _backend(bundle: Bundle, variant: Variant, units: str) -> tuple[Backend, str]:
    """What was asked for and what Core ML plans, over all packages; and a note if it does not say."""
    engine = importlib.import_module("runtimes.engines.coreml")
    counts: dict[str, Counter[str]] = {}
    requested = apple.COMPUTE_UNITS[units][1]
    for link in engine.links(variant):
        try:
            with apple.step("asking Core ML for its plan", "it needs macOS 14.4 or newer"):
                plan = apple.compute_plan(engine.package_folder(bundle, link), units)
        except TargetError as error:
            return Backend(requested=requested), f"which processor computes what is unknown: {error}"
        for function, placed in plan.items():
            counts.setdefault(function, Counter()).update(placed.values())
    return Backend(requested=requested, effective={name: dict(each) for name, each in counts.items()}), ""


if __name__ == "__main__":
    sys.exit(measuring.answer(Job, run))
