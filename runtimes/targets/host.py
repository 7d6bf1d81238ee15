"""Measure on this machine, with the engine that the variant has here."""

import os
import sys

from runtimes import extras, measuring
from runtimes.bundle import Bundle
from runtimes.engines import ENGINES, choose_variant, settle
from runtimes.errors import MissingExtra
from runtimes.measurement import Measurement
from runtimes.workload import Workload, preset


def check() -> None:
    """MissingExtra if no engine is installed."""
    if not any(extras.installed(entry.library) for entry in ENGINES.values()):
        raise MissingExtra("no engine is installed; install one with `pip install 'gochu[run]'`")


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    threads: int | None = None,
    *,
    variant: str | None = None,
    context: int | None = None,
) -> list[Measurement]:
    """Measure a bundle on this machine, one measurement for each case of the workload, each in a fresh process.

    Figures: `measuring.figures`. `context`: length of the KV cache, and the limit that cases are clipped to (default:
    all that the variant can). Raises ChecksumError if a file is not the one that was exported, UsageError,
    MissingExtra, BundleError, EngineError.
    """
    bundle = Bundle.open(bundle_path)
    chosen, _ = choose_variant(bundle, variant)
    workload = preset(workload) if isinstance(workload, str) else workload
    length, threads = settle(chosen, context, threads)
    return [
        measuring.measurement(
            measuring.subject(bundle, chosen),
            measuring.place("host", samples.engine, threads),
            measuring.method(workload, job, [note]),
            measuring.figures(job.case, samples),
            bundle,
            marks=measuring.marks(samples),
            answers=samples.answers,
            threads=threads,
            variant=variant,
            context=context,
        )
        for job, note, samples in measuring.cases(
            "runtimes.targets.host", bundle, chosen, workload, context=length, threads=threads
        )
    ]


if __name__ == "__main__":
    sys.exit(measuring.answer(measuring.Job, measuring.run))
