"""Prefill and decode speed of Gochu's ONNX bundle, and of Gochu's engine.

The same random checkpoint, exported at 4 bits by onnxruntime-genai's builder and by Gochu, runs in
onnxruntime-genai on the same threads; then the same bundle runs in Gochu's engine, and so does pepper's, a
model so small that what is measured is the cost of a step rather than of its products. All are loaded at
once, each in a process of its own, and run in turns, a few tokens at a time: whatever else the machine does
slows them all alike. A ratio is the median over the rounds of the ratio within a round.

    python benchmarks/decode_onnx.py --check
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import Bound, finish, table
from export_onnx import SHAPE, builder, gochu
from random_checkpoint import CONFIGS, write_random_checkpoint

NOISE = 0.05  # by which two runs of the same thing may differ on a shared machine
QUIET = 0.05  # seconds until idle threads have stopped spinning
SLICES = 4  # turns in which a round's tokens are generated
SCRIPT = Path(__file__).with_name("decode_worker.py")


@dataclass(frozen=True)
class Case:
    """What runs what: `base` names the case that it is compared with."""

    name: str
    runtime: str
    folder: Path
    vocabulary: int
    prompt: int  # tokens
    new: int  # tokens to generate after the first
    base: str | None = None


class Worker:
    """A case, loaded in a process of its own."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case = case
        sizes = {
            "threads": threads,
            "vocabulary": case.vocabulary,
            "prompt": case.prompt,
            "tokens": case.new // SLICES,
            "context": case.prompt + case.new + 1,
        }
        options = [f"--{name}={value}" for name, value in sizes.items()]
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), case.runtime, str(case.folder), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def seconds(self, verb: str) -> float:
        """Let it do `prefill` or `decode`, when all others are quiet."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(verb, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.case.name}: the runtime ended with exit code {self._process.wait()}")
        time.sleep(QUIET)
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measure(cases: list[Case], threads: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Tokens per second in each round, after one to warm up; neighbours in time are compared."""
    workers = [Worker(case, threads) for case in cases]
    found: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for turn in range(rounds + 1):
        order = workers[:: -1 if turn % 2 else 1]
        prefill = {worker: worker.seconds("prefill") for worker in order}
        slices = [{worker: worker.seconds("decode") for worker in order} for _ in range(SLICES)]
        for worker in workers if turn else []:
            decode = sum(part[worker] for part in slices)
            rates = {"prefill": worker.case.prompt / prefill[worker], "decode": worker.case.new / decode}
            found[worker.case.name].append(rates)
    for worker in workers:
        worker.close()
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
    small = {"vocabulary": words, "prompt": 128, "new": 320}
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
    parser.add_argument("--rounds", type=int, default=7, help="generations of each case")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cases = make_cases(arguments.work)
    rows = []
    for threads in arguments.threads:
        found = measure(cases, threads, arguments.rounds)
        rows += summary(cases, found, threads)
    for case in cases:
        shutil.rmtree(case.folder, ignore_errors=True)
    table("Generation with 4-bit ONNX", rows)
    figures = {
        "benchmark": "decode_onnx",
        "rounds": arguments.rounds,
        "cases": rows,
    }
    finish(figures, bounds(rows), arguments.check)


if __name__ == "__main__":
    main()
