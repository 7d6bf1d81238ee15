"""Export a checkpoint to a 4-bit ExecuTorch program with Gochu and with ExecuTorch's own LLM exporter, side by side.

Whole commands in subprocesses, imports and all; memory is what no file backs, see common.Run. What ExecuTorch's
exporter is told, and what is done for it beforehand, is said in executorch_exporter.py. Then both programs run
in ExecuTorch's own LLM runner, ours in Gochu's engine too, and beside them Gochu's ONNX bundle of the same
checkpoint in onnxruntime-genai, in turns as decode_onnx.py does it. The weights are random: no work depends on
what they say.

    python benchmarks/export_executorch.py --check
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Bound, Run, finish, table
from decode_onnx import Case, measure, summary
from executorch_exporter import CONTEXT, PROGRAM, convert, export
from export_onnx import SHAPE, gochu, in_turns, rows
from random_checkpoint import CONFIGS, write_random_checkpoint

PEER = "executorch's exporter, 8da4w"
OURS = "gochu, int4 rtn-absmax"
SEARCH = "gochu, int4 rtn"
FOLDERS = {PEER: "executorch", OURS: "gochu-absmax", SEARCH: "gochu"}

WALL = 1 / 5  # of the exporter's wall time, with the same plain rounding
MEMORY = 1 / 3  # of the exporter's peak memory
PROGRAMS = 2.5  # peak memory over the program's size


def compare(work: Path, checkpoint: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each way to export `checkpoint` into its folder in `work`: wall time, memory, size."""
    base = convert(checkpoint, work / "converted")
    options = ("--format", "executorch", "--context", str(CONTEXT))
    ways: dict[str, Callable[[Path], Run]] = {
        PEER: lambda out: export(base, checkpoint / "tokenizer.json", out),
        OURS: lambda out: gochu(checkpoint, out, algorithm="rtn-absmax", more=options),
        SEARCH: lambda out: gochu(checkpoint, out, more=options),
    }
    folders = {name: work / FOLDERS[name] for name in ways}
    figures = in_turns(ways, folders, repeats)
    shutil.rmtree(work / "converted")
    for name, folder in folders.items():
        figures[name]["program_bytes"] = (folder / PROGRAM).stat().st_size
    return figures


def bounds(figures: dict[str, dict[str, float]]) -> list[Bound]:
    """What is promised of the figures."""
    theirs, ours = figures[PEER], figures[OURS]
    found = [
        Bound("wall time over the exporter's", ours["wall_s"] / theirs["wall_s"], WALL),
        Bound("peak memory over the exporter's", ours["peak_anon_bytes"] / theirs["peak_anon_bytes"], MEMORY),
    ]
    for name in (OURS, SEARCH):
        memory = figures[name]["peak_anon_bytes"] / figures[name]["program_bytes"]
        found.append(Bound(f"{name}: peak memory over the program's size", memory, PROGRAMS))
    return found


def make_cases(work: Path, checkpoint: Path) -> list[Case]:
    """What runs the exported programs, and what is compared with what."""
    onnx = work / "gochu-onnx"
    gochu(checkpoint, onnx)
    sizes = {"vocabulary": CONFIGS[SHAPE]["vocab_size"], "prompt": 256, "new": 64}
    runner = "executorch-runner"
    peer, ours = "executorch's program in its runner", "gochu's program in that runner"
    return [
        Case(peer, runner, work / FOLDERS[PEER], **sizes),
        Case(ours, runner, work / FOLDERS[SEARCH], **sizes, base=peer),
        Case("gochu's program in gochu", "gochu", work / FOLDERS[SEARCH], **sizes, base=ours),
        Case("gochu's ONNX bundle in genai", "genai", onnx, **sizes, base=ours),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, nargs="*", default=list(range(1, cores + 1)))
    parser.add_argument(
        "--repeats", type=int, default=1, help="of each export; one of ExecuTorch's takes minutes"
    )
    parser.add_argument("--launches", type=int, default=3, help="times that all programs are loaded")
    parser.add_argument("--rounds", type=int, default=3, help="generations with each in a launch")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = write_random_checkpoint(arguments.work / SHAPE, SHAPE)
    figures = compare(arguments.work, checkpoint, arguments.repeats)
    cases = make_cases(arguments.work, checkpoint)
    generation: list[dict[str, Any]] = []
    for threads in arguments.threads:
        found = measure(cases, threads, arguments.launches, arguments.rounds)
        generation += summary(cases, found, threads)
    for folder in {case.folder for case in cases} | {arguments.work / name for name in FOLDERS.values()}:
        shutil.rmtree(folder)
    table("Export to a 4-bit ExecuTorch program", rows(figures))
    table("Generation", generation)
    finish(
        {
            "benchmark": "export_executorch",
            "repeats": arguments.repeats,
            "exports": figures,
            "launches": arguments.launches,
            "rounds": arguments.rounds,
            "cases": generation,
        },
        bounds(figures),
        arguments.check,
    )


if __name__ == "__main__":
    main()
