"""Record how much the same measurement of the same bundle scatters, for the tests of `gochu compare`.

    gochu export pepper --format onnx --scheme int4 -o out/
    python benchmarks/record_samples.py out/ tests/runtimes/data/bench_samples.json

Each call adds a session to the file. Its runs follow each other in time, each in a process of its own, as those of
`gochu bench` do: the drift of the machine is in them. That others use the machine too is the point, not a fault.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from runtimes import cpu
from runtimes.targets.host import measure
from runtimes.workload import Case, Workload

FIGURES = ("decode_speed", "prefill_speed", "ttft")
DIGITS = 4  # significant ones: the clock's own error is larger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    case = Case(prompt_tokens=asked.prompt_tokens, new_tokens=asked.new_tokens)
    workload = Workload(name="recorded", cases=(case,), repeats=asked.repeats)
    runs: list[dict[str, object]] = []
    start = time.monotonic()
    for number in range(asked.runs):
        began = time.monotonic() - start
        (found,) = measure(asked.bundle, workload, asked.threads)
        samples = {
            name: [float(f"{each:.{DIGITS}g}") for each in figure.samples]
            for name in FIGURES
            if (figure := found.figure(name)) is not None
        }
        runs.append({"began": round(began, 1)} | samples)
        print(f"{number + 1}/{asked.runs}", file=sys.stderr, flush=True)
    session = {
        "command": shlex.join(["python", "benchmarks/record_samples.py", *sys.argv[1:]]),
        "machine": f"{cpu.name()}, {os.cpu_count()} CPUs, {found.where.engine}, threads: {asked.threads}",
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
        "runs": runs,
    }
    sessions = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else []
    lines = (json.dumps(each, ensure_ascii=False, separators=(",", ":")) for each in (*sessions, session))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
