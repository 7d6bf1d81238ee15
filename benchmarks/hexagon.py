"""Compile for Qualcomm's Hexagon NPU on a laptop: time, memory, sizes, and a step in the simulator beside the CPU.

Whole exports (`gochu export --delegate hexagon`, the gate left out) in subprocesses, into an empty cache: both graphs,
weights shared in one binary. Memory is what no file backs, see common.Run. The weights are random: no work depends on
what they say. The simulator's time says nothing of a phone's, so no speed is reported.

    python benchmarks/hexagon.py --check
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Bound, Run, finish, run_or_stop, table
from export_onnx import GIGABYTE, OFFLINE
from random_checkpoint import write_random_checkpoint

CHIP, CONTEXT = "sm8650", 512
SMALL, LARGE, SPLIT = "Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.2-3B"
# shape, how it is asked for, peak memory allowed
CASES: tuple[tuple[str, tuple[str, ...], float], ...] = (
    (SMALL, ("--scheme", "int4"), 3.0),
    (SMALL, ("--recipe", "hexagon-w4a16"), 3.5),
    (LARGE, ("--scheme", "int4"), 6.0),
    (LARGE, ("--recipe", "hexagon-w4a16"), 6.0),
)
STEPPED = 2  # cases of which a step is simulated
SIZE = 1.1  # of the integers' own
CORRELATION = 0.999
PREDICTED = 0.05
PARTS, STEP = (Path(__file__).with_name(f"hexagon_{name}.py") for name in ("parts", "step"))


def export(checkpoint: Path, output: Path, asked: tuple[str, ...], cache: Path) -> Run:
    """Export anew, nothing in the cache."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("gochu")), "export", str(checkpoint), "-o", str(output)]
    command += ["--delegate", "hexagon", "--chips", CHIP, "--context", str(CONTEXT), "--no-verify", *asked]
    return run_or_stop(command, {**OFFLINE, "XDG_CACHE_HOME": str(cache)})


def sizes(output: Path) -> tuple[int, int, int]:
    """Bytes of the binary, of the integers and scales that it holds, and what was predicted of it."""
    from exporter.architecture import read_architecture
    from exporter.npu import hexagon
    from exporter.quantization.scheme import parse_scheme
    from runtimes.bundle import Bundle

    bundle = Bundle.open(output)
    arch = read_architecture(json.loads(bundle.file("config.json").read_text(encoding="utf-8")))
    schemes = {t.name: parse_scheme(t.scheme) for t in bundle.manifest.tensors if len(t.shape) == 2}
    held = [
        hexagon.stored_bytes(schemes[name], shape)
        for name, shape in arch.matrices()
        if name != "embedding" or arch.tied
    ]
    binary = sum(
        bundle.file(f).stat().st_size for f in bundle.manifest.variants[0].files if f.endswith(".bin")
    )
    return binary, sum(held), hexagon.binary_bytes(arch, schemes)


def step(output: Path) -> dict[str, float]:
    """One token through the simulator, and by the CPU's kernels: correlation of the logits, and whether both choose
    the same; the correlation with the CPU's variant, whose activations are floats."""
    run = run_or_stop([sys.executable, str(STEP), str(output)])
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measure(work: Path) -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    for number, (shape, asked, _) in enumerate(CASES):
        checkpoint = write_random_checkpoint(work / shape, shape)
        output = work / "hexagon"
        run = export(checkpoint, output, asked, work / "hexagon-cache")
        binary, integers, predicted = sizes(output)
        row: dict[str, Any] = {
            "shape": shape,
            "asked": " ".join(asked).removeprefix("--scheme ").removeprefix("--recipe "),
            "wall s": run.wall_s,
            "peak GB": run.peak_anon_bytes / GIGABYTE,
            "binary MB": binary / 1e6,
            "of integers": binary / integers,
            "predicted MB": predicted / 1e6,
        }
        found = step(output) if number < STEPPED else {}
        row |= {
            "correlation": found.get("correlation"),
            "same token": found.get("same"),
            "with float": found.get("with float"),
        }
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        shutil.rmtree(output, ignore_errors=True)
    return rows


def first_part(work: Path) -> dict[str, Any]:
    """The first of the graphs that a model of 3 B parameters is split into: predicted and real size."""
    run = run_or_stop([sys.executable, str(PARTS), SPLIT, CHIP, str(CONTEXT), str(work / "parts")], OFFLINE)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {**found, "wall s": run.wall_s, "peak GB": run.peak_anon_bytes / GIGABYTE}


def bounds(rows: list[dict[str, Any]], part: dict[str, Any]) -> list[Bound]:
    """What is promised of the figures."""
    found = []
    for row, (_, _, memory) in zip(rows, CASES, strict=True):
        name = f"{row['shape']} {row['asked']}"
        found.append(Bound(f"{name}: peak GB", row["peak GB"], memory))
        found.append(Bound(f"{name}: binary over the integers' own size", row["of integers"], SIZE))
        if row["correlation"] is not None:
            found.append(
                Bound(f"{name}: correlation with the CPU", row["correlation"], CORRELATION, at_least=True)
            )
    off = abs(part["binary bytes"] / part["predicted bytes"] - 1)
    found.append(Bound(f"{SPLIT}: graphs that it is split into", part["parts"], 2, at_least=True))
    found.append(Bound(f"{SPLIT}: real over predicted size of the first, off by", off, PREDICTED))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = measure(arguments.work)
    part = first_part(arguments.work)
    shutil.rmtree(arguments.work / "parts", ignore_errors=True)
    table(f"Compiled for {CHIP}, context {CONTEXT}", rows)
    table(f"{SPLIT}: the first of {part['parts']} graphs", [part])
    finish({"benchmark": "hexagon", "cases": rows, "split": part}, bounds(rows, part), arguments.check)


if __name__ == "__main__":
    main()
