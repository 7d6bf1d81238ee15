"""Export a checkpoint to a Core ML package with Gochu and by coremltools' trace route, side by side.

Whole commands in subprocesses, imports and all, taken in turns; medians over the repeats. Memory is what no
file backs, see common.Run. Gochu's packages have two functions, for prompts and for single tokens; the traced one
has the second alone, and its weights in float16: see coreml_tracer.py. The weights are random: no work depends on
what they say.

    python benchmarks/export_coreml.py --check
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Bound, Run, finish, run_or_stop, table
from export_onnx import GIGABYTE, OFFLINE, SHAPE, gochu, in_turns, rows
from random_checkpoint import write_random_checkpoint

LARGE = "Llama-3.2-1B"
CONTEXT = 512  # tokens that all packages hold
TRACER = Path(__file__).with_name("coreml_tracer.py")

PEER = "coremltools' trace route, fp16"
OURS = "gochu, int4 rtn-absmax"
SEARCH = "gochu, int4 rtn"
ENGINE = "gochu, int8 rtn, Neural Engine"
LARGER = f"{LARGE}: {SEARCH}"

WALL = 1 / 4  # of the trace route's wall time
MEMORY = 1 / 5  # of the trace route's peak memory
LARGE_MEMORY = 3.0 * GIGABYTE


def tracer(checkpoint: Path, output: Path) -> Run:
    """Export by coremltools' trace route, anew."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [sys.executable, str(TRACER), str(checkpoint), str(output / "model.mlpackage")]
    return run_or_stop([*command, "--context", str(CONTEXT)], OFFLINE)


def ours(
    checkpoint: Path, output: Path, delegate: str = "gpu", scheme: str = "int4", algorithm: str = "rtn"
) -> Run:
    """Export with Gochu, anew."""
    options = ("--format", "coreml", "--delegate", delegate, "--context", str(CONTEXT))
    return gochu(checkpoint, output, scheme, algorithm, options)


def compare(work: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each way to export a checkpoint: wall time, memory, size; and Gochu alone on a larger one."""
    checkpoint = write_random_checkpoint(work / SHAPE, SHAPE)
    ways: dict[str, Callable[[Path], Run]] = {
        PEER: lambda out: tracer(checkpoint, out),
        OURS: lambda out: ours(checkpoint, out, algorithm="rtn-absmax"),
        SEARCH: lambda out: ours(checkpoint, out),
        ENGINE: lambda out: ours(checkpoint, out, "ane", "int8"),
    }
    figures = in_turns(ways, dict.fromkeys(ways, work / "out"), repeats)
    larger = write_random_checkpoint(work / LARGE, LARGE)
    return figures | in_turns({LARGER: lambda out: ours(larger, out)}, {LARGER: work / "out"}, 1)


def bounds(figures: dict[str, dict[str, float]]) -> list[Bound]:
    """What is promised of the figures."""
    theirs = figures[PEER]
    found = []
    for name in (OURS, SEARCH):
        wall = figures[name]["wall_s"] / theirs["wall_s"]
        memory = figures[name]["peak_anon_bytes"] / theirs["peak_anon_bytes"]
        found.append(Bound(f"{name}: wall time over the trace route's", wall, WALL))
        found.append(Bound(f"{name}: peak memory over the trace route's", memory, MEMORY))
    memory = figures[LARGER]["peak_anon_bytes"] / GIGABYTE
    return [*found, Bound(f"{LARGER}: peak GB", memory, LARGE_MEMORY / GIGABYTE)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--repeats", type=int, default=3, help="of each command that is compared")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures = compare(arguments.work, arguments.repeats)
    shutil.rmtree(arguments.work / "out", ignore_errors=True)
    table("Export to a Core ML package", rows(figures))
    finish(
        {"benchmark": "export_coreml", "repeats": arguments.repeats, "exports": figures},
        bounds(figures),
        arguments.check,
    )


if __name__ == "__main__":
    main()
