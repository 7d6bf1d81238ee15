"""Prefill and decode speed of Gochu's ONNX bundle, and of Gochu's engine.

The same random checkpoint, exported at 4 bits by onnxruntime-genai's builder and by Gochu, runs in
onnxruntime-genai on the same threads; then the same bundle runs in Gochu's engine, and so does pepper's, a
model so small that what is measured is the cost of a step rather than of its products. Each measurement is a
process of its own, taken in turns; a ratio is the median over the rounds of the ratio within a round.

    python benchmarks/decode_onnx.py --check
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import Bound, finish, run_or_stop, table
from export_onnx import OFFLINE, SHAPE, builder, gochu
from random_checkpoint import CONFIGS, write_random_checkpoint

NOISE = 0.05  # by which two runs of the same thing may differ on a shared machine
WORKER = Path(__file__).with_name("decode_worker.py")


@dataclass(frozen=True)
class Case:
    """What runs what: `base` names the case that it is compared with."""

    name: str
    runtime: str
    folder: Path
    vocabulary: int
    prompt: int
    new: int
    base: str | None = None


def measure(case: Case, threads: int, repeats: int) -> dict[str, float]:
    """One process: tokens per second, medians over its repeats."""
    sizes = {"threads": threads, "prompt": case.prompt, "new": case.new, "vocabulary": case.vocabulary}
    options = [f"--{name}={value}" for name, value in {**sizes, "repeats": repeats}.items()]
    command = [sys.executable, str(WORKER), case.runtime, str(case.folder), *options]
    seconds = json.loads(run_or_stop(command, OFFLINE, step=0.1).stdout)
    return {
        "prefill": case.prompt / median(seconds["prefill_s"]),
        "decode": case.new / median(seconds["decode_s"]),
    }


def in_turns(cases: list[Case], threads: int, rounds: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Measure all cases `rounds` times; each round goes through them in the other direction."""
    found: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for turn in range(rounds):
        for case in cases[:: -1 if turn % 2 else 1]:
            found[case.name].append(measure(case, threads, repeats))
    return found


def make_cases(work: Path) -> list[Case]:
    """Export what is to be run, and say what is compared with what."""
    checkpoint = write_random_checkpoint(work / SHAPE, SHAPE)
    theirs, ours, pepper = work / "builder", work / "gochu", work / "pepper"
    builder(checkpoint, theirs)
    gochu(checkpoint, ours)
    gochu("pepper", pepper)
    large = {"vocabulary": CONFIGS[SHAPE]["vocab_size"], "prompt": 256, "new": 64}
    words = json.loads((pepper / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
    small = {"vocabulary": words, "prompt": 64, "new": 64}
    model, bundle = f"{SHAPE}: builder's model in genai", f"{SHAPE}: gochu's bundle in genai"
    return [
        Case(model, "genai", theirs, **large),
        Case(bundle, "genai", ours, **large, base=model),
        Case(f"{SHAPE}: gochu's bundle in gochu", "gochu", ours, **large, base=bundle),
        Case("pepper: gochu's bundle in genai", "genai", pepper, **small),
        Case(
            "pepper: gochu's bundle in gochu",
            "gochu",
            pepper,
            **small,
            base="pepper: gochu's bundle in genai",
        ),
    ]


def summary(
    cases: list[Case], found: dict[str, list[dict[str, float]]], threads: int
) -> list[dict[str, Any]]:
    """A row for each case: tokens/s, and the ratio to the case that it is compared with."""
    rows = []
    for case in cases:
        row: dict[str, Any] = {"case": case.name, "threads": threads}
        for phase in ("prefill", "decode"):
            rates = [turn[phase] for turn in found[case.name]]
            row[f"{phase} tok/s"] = median(rates)
            row[f"{phase} ratio"] = None
            if case.base:
                base = [turn[phase] for turn in found[case.base]]
                row[f"{phase} ratio"] = median(a / b for a, b in zip(rates, base, strict=True))
        rows.append(row)
    return rows


def bounds(rows: list[dict[str, Any]]) -> list[Bound]:
    """No case is slower than what it is compared with, noise allowed for."""
    return [
        Bound(f"{row['case']}, {row['threads']} threads: {phase} ratio", ratio, 1 - NOISE, at_least=True)
        for row in rows
        for phase in ("prefill", "decode")
        if (ratio := row[f"{phase} ratio"]) is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, nargs="+", default=list(range(1, cores + 1)))
    parser.add_argument("--rounds", type=int, default=4, help="processes for each case")
    parser.add_argument("--repeats", type=int, default=2, help="generations in each process")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cases = make_cases(arguments.work)
    rows = []
    for threads in arguments.threads:
        found = in_turns(cases, threads, arguments.rounds, arguments.repeats)
        rows += summary(cases, found, threads)
    for case in cases:
        shutil.rmtree(case.folder, ignore_errors=True)
    table("Generation with 4-bit ONNX", rows)
    figures = {
        "benchmark": "decode_onnx",
        "rounds": arguments.rounds,
        "repeats": arguments.repeats,
        "cases": rows,
    }
    finish(figures, bounds(rows), arguments.check)


if __name__ == "__main__":
    main()
