"""Pepper on this machine, by every engine that is installed, and in the emulated arm64 machine: does it say the same
there, do its instructions repeat, is its memory the same? From an empty cache, so that the set-up is in it.

python benchmarks/targets.py --check
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import Bound, finish, run_or_stop, table

from exporter.pepper.questions import held_out
from runtimes.measurement import Answer, Measurement, read

GOCHU = (sys.executable, "-m", "exporter.cli")
FORMATS = {"onnx": "onnxruntime", "executorch": "executorch"}  # and the engine of each
RUNS, QUESTIONS = 3, 12
SPREAD, MEMORY, SECONDS = 0.005, 0.15, 300.0  # share of the least, share of the host's, from an empty cache
COUNTS = ("prefill_instructions", "decode_instructions")


def bench(bundle: Path, target: str, prompts: Sequence[str], *options: str) -> Measurement:
    """One run of `gochu bench` in a process of its own."""
    out = bundle.with_suffix(f".{time.monotonic_ns()}.jsonl")
    asked = (part for prompt in prompts for part in ("--ask", prompt))
    run_or_stop([*GOCHU, "bench", str(bundle), "--on", target, "--out", str(out), *options, *asked])
    (measurement,) = read(out)
    return measurement


def value(measurement: Measurement, name: str) -> float | None:
    figure = measurement.figure(name)
    return None if figure is None else figure.value


def spread(values: Sequence[float]) -> float:
    """How far apart the least and the greatest are, as a share of the least."""
    return (max(values) - min(values)) / min(values)


def row(format: str, measurement: Measurement, reference: Sequence[Answer]) -> dict[str, str | float | None]:
    """A line of the table; `reference`: the answers to compare with."""
    counts = {name.replace("_", " "): value(measurement, name) for name in COUNTS}
    memory = value(measurement, "peak_memory")
    return {
        "format": format,
        "on": measurement.where.target,
        "engine": measurement.where.engine,
        "peak memory, MB": None if memory is None else memory / 1e6,
        **{name: None if count is None else round(count) for name, count in counts.items()},
        "answers as the first": sum(a == b for a, b in zip(measurement.answers, reference, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    arguments = parser.parse_args()
    prompts = [question.prompt for question in held_out(QUESTIONS)]
    with tempfile.TemporaryDirectory() as work:
        bundles = {format: Path(work) / format for format in FORMATS}
        for format, bundle in bundles.items():
            run_or_stop(
                [*GOCHU, "export", "pepper", "--format", format, "--scheme", "int4", "-o", str(bundle)]
            )
        host = {
            format: bench(bundle, "host", prompts, "--threads", "1") for format, bundle in bundles.items()
        }
        os.environ["XDG_CACHE_HOME"] = str(Path(work) / "cache")
        start = time.perf_counter()
        run_or_stop([*GOCHU, "target", "setup", "arm64-emulator"])
        set_up = time.perf_counter() - start
        emulated = [bench(bundles["onnx"], "arm64-emulator", prompts) for _ in range(RUNS)]
        seconds = time.perf_counter() - start
    reference = host["onnx"].answers
    rows = [
        *(row(format, each, reference) for format, each in host.items()),
        *(row("onnx", each, reference) for each in emulated),
    ]
    table(f"pepper, int4, one thread, {len(prompts)} questions in Korean and English", rows)
    for question in reference:
        print(f"{question.prompt} -> {question.text}")
    print(f"set-up {set_up:.0f} s, set-up and {RUNS} runs {seconds:.0f} s")
    memories = [value(each, "peak_memory") for each in (host["onnx"], *emulated)]
    assert all(memories), "a machine did not tell its memory"
    known = [memory for memory in memories if memory]
    counts = {name: [v for each in emulated if (v := value(each, name)) is not None] for name in COUNTS}
    differ = sum(
        ours.tokens != theirs.tokens
        for each in emulated
        for ours, theirs in zip(reference, each.answers, strict=True)
    )
    bounds = [
        Bound("answers that differ between ARM and this machine", differ, 0),
        *(Bound(f"{name}: spread over {RUNS} runs", spread(each), SPREAD) for name, each in counts.items()),
        Bound("peak memory: share by which it differs", max(abs(m / known[0] - 1) for m in known), MEMORY),
        Bound(f"set-up from an empty cache and {RUNS} runs, s", seconds, SECONDS),
    ]
    finish(
        {"benchmark": "targets", "set_up_s": set_up, "seconds": seconds, "runs": rows},
        bounds,
        arguments.check,
    )


if __name__ == "__main__":
    main()
