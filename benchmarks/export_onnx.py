"""Export a checkpoint to 4-bit ONNX with Gochu and with onnxruntime-genai's model builder, side by side.

Whole commands in subprocesses, imports and all, taken in turns; medians over the repeats. Memory is what no
file backs, see common.Run. The weights are random: neither command's work depends on what they say.

    python benchmarks/export_onnx.py --check
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import Bound, Run, finish, run_or_stop, table
from random_checkpoint import CONFIGS, write_random_checkpoint

GIGABYTE = 1e9
SHAPE = "Qwen2.5-0.5B"
LARGE = ("Llama-3.2-1B", "Phi-3-mini-4k")
OFFLINE = {"HF_HUB_OFFLINE": "1"}

BUILDER = "onnxruntime-genai builder, int4"
OURS = "gochu, int4 rtn-absmax"
SEARCH = "gochu, int4 rtn"

WALL = 1 / 5  # of the builder's wall time, with the same plain rounding
MEMORY = 1 / 6  # of the builder's peak memory
SEARCH_WALL = 1 / 2  # of the builder's wall time, with the search for scales
LARGE_MEMORY = 1.0 * GIGABYTE
PHI3_DISK = 2.1 * GIGABYTE


def gochu(
    checkpoint: Path | str,
    output: Path,
    scheme: str = "int4",
    algorithm: str = "rtn",
    more: Sequence[str] = (),
) -> Run:
    """Export with Gochu, anew; `more`: further options."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), "-o", str(output)]
    options = ["--scheme", scheme, "--algorithm", algorithm, "--no-verify", "--json", *more]
    return run_or_stop([*command, *options], OFFLINE)


def builder(checkpoint: Path, output: Path) -> Run:
    """Export with onnxruntime-genai's builder, anew, as its documentation says for a local folder."""
    shutil.rmtree(output, ignore_errors=True)
    options = ["-p", "int4", "-e", "cpu", "-c", str(output.with_name("builder-cache"))]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    return run_or_stop([*command, "-o", str(output), *options], OFFLINE)


def size(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(work: Path, shape: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each way to export a checkpoint of `shape`: wall time, memory, size."""
    checkpoint = write_random_checkpoint(work / shape, shape)
    ways: dict[str, Callable[[Path], Run]] = {
        BUILDER: lambda out: builder(checkpoint, out),
        OURS: lambda out: gochu(checkpoint, out, algorithm="rtn-absmax"),
        SEARCH: lambda out: gochu(checkpoint, out),
    }
    return in_turns(ways, dict.fromkeys(ways, work / "out"), repeats)


def in_turns(
    ways: Mapping[str, Callable[[Path], Run]], folders: Mapping[str, Path], repeats: int
) -> dict[str, dict[str, float]]:
    """Export in each way into its folder, so many times; medians."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    sizes = {}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(way(folders[name]))
            sizes[name] = size(folders[name])
    return {name: summary(runs[name], sizes[name]) for name in ways}


def large(work: Path, shape: str) -> dict[str, dict[str, float]]:
    """Gochu alone on a larger shape."""
    checkpoint = write_random_checkpoint(work / shape, shape)
    figures = {}
    for scheme in ("int4", "int4-g128") if shape.startswith("Phi-3") else ("int4",):
        run = gochu(checkpoint, work / "out", scheme)
        figures[f"{shape}, {scheme} rtn"] = summary([run], size(work / "out"))
    return figures


def summary(runs: list[Run], disk: int) -> dict[str, float]:
    """Medians of `runs`: seconds and bytes."""
    return {
        "wall_s": median(run.wall_s for run in runs),
        "peak_anon_bytes": median(run.peak_anon_bytes for run in runs),
        "peak_rss_bytes": median(run.peak_rss_bytes for run in runs),
        "disk_bytes": disk,
    }


def rows(figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The figures as a table's rows."""
    return [
        {
            "export": name,
            "wall s": f["wall_s"],
            "peak GB, no file behind": f["peak_anon_bytes"] / GIGABYTE,
            "peak GB, all": f["peak_rss_bytes"] / GIGABYTE,
            "disk GB": f["disk_bytes"] / GIGABYTE,
        }
        for name, f in figures.items()
    ]


def bounds(figures: dict[str, dict[str, float]]) -> list[Bound]:
    """What is promised of those of the figures that are there."""
    found = []
    if theirs := figures.get(BUILDER):
        ours, search = figures[OURS], figures[SEARCH]
        memory = ours["peak_anon_bytes"] / theirs["peak_anon_bytes"]
        found = [
            Bound("wall time over the builder's", ours["wall_s"] / theirs["wall_s"], WALL),
            Bound("peak memory over the builder's", memory, MEMORY),
            Bound(
                "wall time with search over the builder's", search["wall_s"] / theirs["wall_s"], SEARCH_WALL
            ),
        ]
    for name, f in figures.items():
        if name.startswith(LARGE):
            found.append(Bound(f"{name}: peak GB", f["peak_anon_bytes"] / GIGABYTE, LARGE_MEMORY / GIGABYTE))
        if name.startswith("Phi-3") and "g128" in name:
            found.append(Bound(f"{name}: disk GB", f["disk_bytes"] / GIGABYTE, PHI3_DISK / GIGABYTE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument(
        "--shape", nargs="+", choices=list(CONFIGS), default=[SHAPE, *LARGE], help="which shapes"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each command that is compared")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gochu-benchmarks")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, float]] = {}
    for shape in arguments.shape:
        if shape in LARGE:
            figures |= large(arguments.work, shape)
        else:
            made = compare(arguments.work, shape, arguments.repeats)
            figures |= made if shape == SHAPE else {f"{shape}: {name}": f for name, f in made.items()}
    shutil.rmtree(arguments.work / "out", ignore_errors=True)
    table("Export to 4-bit ONNX", rows(figures))
    finish(
        {"benchmark": "export_onnx", "repeats": arguments.repeats, "exports": figures},
        bounds(figures),
        arguments.check,
    )


if __name__ == "__main__":
    main()
