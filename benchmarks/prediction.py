"""How well Gochu predicts: against what others published, and against `gochu bench` on this machine.

Published runs: each is predicted from constants that were fitted without it (`runtimes.fit`), and once more without
any run on its chip. This machine: random models of two sizes are exported and measured, and planned for a profile of
this machine with the bandwidth that is measured in the same run; nobody publishes speeds of ONNX Runtime, so there the
interval is wide, and only the memory has a bound.

    python benchmarks/prediction.py --check
    python benchmarks/prediction.py --published --markdown   # the tables of docs/prediction.md
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from common import Bound, finish, run_or_stop, table
from random_checkpoint import CONFIGS, write_random_checkpoint

from runtimes.fit import Left, leave_one_out
from runtimes.fitted import COVERAGE, Quantity, shipped

QUANTITIES: dict[Quantity, str] = {
    "decode": "Decoding speed",
    "memory": "Peak memory",
    "prefill": "Reading a prompt",
}
PROMISED: tuple[Quantity, ...] = ("decode", "memory")
ERROR = 0.15  # median of absolute errors, for the promised quantities
MEMORY = 0.15  # of the peak memory on this machine
WORST = 12  # rows
SHAPES = ("Qwen2.5-0.5B", "Llama-3.2-1B")
FORMATS = ("onnx", "executorch")
CONTEXT, WORKLOAD = 1024, "pp512+tg64"
ARRAY = 256 << 20  # bytes that each thread reads, more than any cache holds
ME = "this-machine"


def summary(left: Sequence[Left]) -> list[dict[str, Any]]:
    """A row for each engine and backend, and for all: errors of what was left out. Runs for which nothing is
    predicted once they are left out (the engine's only one on a chip) are counted as unknown."""
    groups: dict[tuple[str, str], list[Left]] = {}
    for each in left:
        groups.setdefault((each.row.at.engine, each.row.at.backend), []).append(each)
    rows = [_summed(*group, groups[group]) for group in sorted(groups, key=lambda key: -len(groups[key]))]
    return [*rows, _summed("all", "", left)]


def _summed(engine: str, backend: str, left: Sequence[Left]) -> dict[str, Any]:
    errors = [abs(each.error) for each in left if each.error is not None]
    elsewhere = [abs(each.chip_error) for each in left if each.chip_error is not None]
    return {
        "engine": engine,
        "backend": backend,
        "runs": len(left),
        "chips": len({each.row.at.chip for each in left}),
        "unknown": len(left) - len(errors),
        "median error": _percent(errors, 0.5),
        "90 % below": _percent(errors, 0.9),
        "in the interval": f"{sum(each.within for each in left)} of {len(errors)}",
        "median, other chips": _percent(elsewhere, 0.5),
        "in the interval, other chips": f"{sum(each.chip_within for each in left)} of {len(elsewhere)}",
    }


def _percent(errors: Sequence[float], share: float) -> str:
    return f"{np.quantile(errors, share):.1%}" if errors else "-"


def worst(left: Sequence[Left], count: int = WORST) -> list[dict[str, Any]]:
    """The runs with the largest errors, in units of the prediction, so that half and double count alike."""
    known = [each for each in left if each.error is not None]
    known.sort(key=lambda each: -abs(np.log1p(each.error)))
    return [
        {
            "engine": each.row.at.engine,
            "backend": each.row.at.backend,
            "chip": each.row.at.chip,
            "run": each.row.label,
            "published": each.row.printed,
            "error": f"{each.error:+.0%}",
        }
        for each in known[:count]
    ]


def show(title: str, rows: Sequence[dict[str, Any]], markdown: bool) -> None:
    print("\n".join(as_markdown(title, rows))) if markdown else table(title, rows)


def as_markdown(title: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"### {title}\n"
    yield "| " + " | ".join(rows[0]) + " |"
    yield "| " + " | ".join("---" if isinstance(value, str) else "--:" for value in rows[0].values()) + " |"
    yield from ("| " + " | ".join(map(str, row.values())) + " |" for row in rows)
    yield ""


def titled(quantity: Quantity) -> str:
    made = shipped()[quantity]
    return (
        f"{QUANTITIES[quantity]}: {made['runs']} published runs, constants worth {made['parameters']} parameters, "
        f"median error {made['median_error_fitted']:.1%} where they were fitted"
    )


def published(markdown: bool) -> Iterator[tuple[Bound, dict[str, float]]]:
    """Show how the published runs are predicted; the bound of each promise, and its figure."""
    for quantity in QUANTITIES:
        left = leave_one_out(quantity)
        show(titled(quantity), summary(left), markdown)
        show(f"{QUANTITIES[quantity]}: the worst", worst(left), markdown)
        error = float(np.median([abs(each.error) for each in left if each.error is not None]))
        if quantity in PROMISED:
            name = f"{QUANTITIES[quantity].lower()}, median error of runs left out"
            yield Bound(name, error, ERROR), {f"{quantity}_median_error": error}


def bandwidth(threads: int) -> float:
    """Bytes per second that `threads` read from memory together, the best of five."""
    arrays = [np.ones(ARRAY // 4, dtype=np.float32) for _ in range(threads)]

    def once(pool: ThreadPoolExecutor) -> float:
        start = perf_counter()
        list(pool.map(np.max, arrays))
        return threads * ARRAY / (perf_counter() - start)

    with ThreadPoolExecutor(threads) as pool:
        return max(once(pool) for _ in range(5))


def profile(folder: Path, bytes_per_s: float) -> dict[str, str]:
    """Write a profile of this machine; the environment in which Gochu reads it."""
    source = 'source = "measured by benchmarks/prediction.py"'
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    for kind, text in {
        "socs": f'name = "This machine"\nvendor = "any"\n[dram]\ngb_per_s = {bytes_per_s / 1e9:.2f}\n{source}\n',
        "devices": f'name = "This machine"\nos = "linux"\nchip = "{ME}"\n[memory]\nram_gib = {ram:.1f}\n{source}\n',
    }.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{ME}.toml").write_text(text, encoding="utf-8")
    return {"GOCHU_PROFILES": str(folder), "HF_HUB_OFFLINE": "1"}


def gochu(env: dict[str, str], *arguments: object) -> Any:
    command = [sys.executable, "-m", "exporter.cli", *map(str, arguments), "--json"]
    return json.loads(run_or_stop(command, env).stdout)


def here(shape: str, form: str, work: Path, threads: int) -> dict[str, Any]:
    """Export, measure and plan one model; figures side by side. The bandwidth is measured before and after the model
    is, and the mean planned with. Memory is the process's own, less what it has before the model is loaded."""
    env = {"HF_HUB_OFFLINE": "1"}
    checkpoint = write_random_checkpoint(work / shape, shape)
    how = ("--scheme", "int4", "--format", form, "--context", CONTEXT)
    bundle = work / f"{shape}-{form}"
    gochu(env, "export", checkpoint, "-o", bundle, "--algorithm", "rtn-absmax", "--no-verify", *how)
    before = bandwidth(threads)
    (measured,) = gochu(env, "bench", bundle, "--workload", WORKLOAD, "--threads", threads)
    speed = (before + bandwidth(threads)) / 2
    plan = gochu(profile(work / "profiles", speed), "plan", checkpoint, "--device", ME, *how)
    found = {figure["name"]: figure["value"] for figure in measured["figures"]}
    guessed = {row["name"]: row for row in plan["prediction"]}
    memory = found["peak_anonymous_memory"] - found["idle_memory"]
    decode = guessed["decode"]
    return {
        "model": shape,
        "engine": measured["where"]["engine"],
        "bandwidth": speed,
        "file_bytes": (guessed["file"]["value"], measured["what"]["bytes"]),
        "memory_bytes": (guessed["peak memory"]["value"], memory),
        "decode_tokens_per_s": (decode["value"], found["decode_speed"]),
        "decode_interval": (decode["low"], decode["high"]),
    }


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row of `here` for a table: predicted, measured."""
    (file, written), (memory, held) = row["file_bytes"], row["memory_bytes"]
    (speed, measured), (low, high) = row["decode_tokens_per_s"], row["decode_interval"]
    return {
        "model": row["model"],
        "engine": row["engine"],
        "file, MB": f"{file / 1e6:.1f}, {written / 1e6:.1f}",
        "memory, MB": f"{memory / 1e6:.0f}, {held / 1e6:.0f}",
        "error": f"{memory / held - 1:+.1%}",
        "GB/s": f"{row['bandwidth'] / 1e9:.1f}",
        "decode, tokens/s": f"{speed:.1f} ({low:.1f} to {high:.1f}), {measured:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a bound is missed")
    parser.add_argument("--published", action="store_true", help="only what others published")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=CONFIGS)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    bounds: list[Bound] = []
    figures: dict[str, Any] = {}
    for bound, figure in published(asked.markdown):
        bounds.append(bound)
        figures |= figure
    if not asked.published:
        with tempfile.TemporaryDirectory() as folder:
            rows = [
                here(shape, form, Path(folder), asked.threads)
                for shape in asked.shapes
                for form in asked.formats
            ]
        title = f"This machine with {asked.threads} threads: predicted, measured; {COVERAGE:.0%} intervals"
        show(title, [shown(row) for row in rows], asked.markdown)
        figures["here"] = rows
        for row in rows:
            guessed, held = row["memory_bytes"]
            bounds.append(
                Bound(f"memory of {row['model']}, {row['engine']}", abs(guessed / held - 1), MEMORY)
            )
    finish(figures, bounds, asked.check)


if __name__ == "__main__":
    main()
