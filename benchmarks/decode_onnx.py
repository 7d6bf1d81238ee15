"""Prefill and decode speed of Gochu's ONNX bundle, and of Gochu's engine.

The same random checkpoint, exported at 4 bits by onnxruntime-genai's builder and by Gochu, runs in
onnxruntime-genai on the same threads; then the same bundle runs in Gochu's engine, and so does pepper's, a
model so small that what is measured is the cost of a step rather than of its products. All are loaded at
once, each in a process of its own, and run in turns, a few tokens at a time: whatever else the machine does
slows them all alike. A ratio is the median over the turns of the ratio within a turn. All is loaded several
times: where the weights come to lie in memory makes some per cent.

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


Rates = dict[str, dict[str, list[float]]]  # case -> phase -> tokens/s in each turn


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


def measure(cases: list[Case], threads: int, launches: int, rounds: int) -> Rates:
    """Load all cases so many times, and each time generate with all of them so many times."""
    found: Rates = {case.name: {"prefill": [], "decode": []} for case in cases}
    for _ in range(launches):
        workers = [Worker(case, threads) for case in cases]
        for worker in workers:  # warm up
            worker.seconds("prefill")
            worker.seconds("decode")
        for turn in range(rounds):
            order = workers[:: -1 if turn % 2 else 1]
            for verb in ("prefill", *["decode"] * SLICES):
                for worker in order:
                    case = worker.case
                    tokens = case.prompt if verb == "prefill" else case.new // SLICES
                    found[case.name][verb].append(tokens / worker.seconds(verb))
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
    small = {"vocabulary": words, "prompt": 256, "new": 192}
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


def summary(cases: list[Case], found: Rates, threads: int) -> list[dict[str, Any]]:
    """A row for each case: median tokens/s, and the ratio to the case that it is compared with."""
    rows = []
    for case in cases:
        row: dict[str, Any] = {"case": case.name, "threads": threads}
        for phase, rates in found[case.name].items():
            row[f"{phase} tok/s"] = median(rates)
            row[f"{phase} ratio"] = None
            if case.base:
                pairs = zip(rates, found[case.base][phase], strict=True)
                row[f"{phase} ratio"] = median(ours / theirs for ours, theirs in pairs)
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
    parser.add_argument("--launches", type=int, default=3, help="times that all cases are loaded")
    parser.add_argument("--rounds", type=int, default=3, help="generations of each case in a launch")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cases = make_cases(arguments.work)
    rows = []
    for threads in arguments.threads:
        found = measure(cases, threads, arguments.launches, arguments.rounds)
        rows += summary(cases, found, threads)
    for case in cases:
        shutil.rmtree(case.folder, ignore_errors=True)
    table("Generation with 4-bit ONNX", rows)
    figures = {
        "benchmark": "decode_onnx",
        "launches": arguments.launches,
        "rounds": arguments.rounds,
        "cases": rows,
    }
    finish(figures, bounds(rows), arguments.check)


if __name__ == "__main__":
    main()
