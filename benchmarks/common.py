"""What the benchmarks share: run a command and watch its memory, print a table, compare with bounds."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STEP = 0.005  # seconds between two looks at the memory
_FIELDS = re.compile(rb"(VmHWM|VmRSS|RssAnon|RssShmem):\s+(\d+) kB")  # of /proc/<pid>/status


@dataclass(frozen=True)
class Run:
    """One command, measured.

    peak_anon_bytes: the most that the process and all its descendants held at one time in pages that no file
    backs (RssAnon + RssShmem); pages of a memory-mapped file cost no memory that could run out, and are only
    in peak_rss_bytes.
    """

    wall_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    returncode: int
    stdout: str
    stderr_tail: str


def run_measured(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run `command` to its end; `env` is added to this process's environment. Linux only (/proc).

    Memory is looked at every 5 ms: a peak shorter than that may be missed in peak_anon_bytes.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=out, stderr=err)
        anon = rss = 0
        while process.poll() is None:
            now = [_memory(pid) for pid in _tree(process.pid)]
            anon = max(anon, sum(a for a, _, _ in now))
            rss = max(rss, sum(r for _, r, _ in now), *(high for _, _, high in now))
            time.sleep(_STEP)
        wall = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        printed, complaint = (file.read().decode("utf-8", errors="replace") for file in (out, err))
    return Run(wall, anon, rss, process.returncode, printed, complaint[-2000:])


def run_or_stop(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """`run_measured`, but a command that fails ends the benchmark with what it said."""
    run = run_measured(command, env)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed with exit code {run.returncode}:\n{run.stderr_tail}")
    return run


def _tree(pid: int) -> list[int]:
    """`pid` and all its descendants (those that have not ended)."""
    found = [pid]
    for parent in found:  # grows while we go through it
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    found += map(int, file.read().split())
        except OSError:  # ended meanwhile
            continue
    return found


def _memory(pid: int) -> tuple[int, int, int]:
    """Bytes now without a file behind them, all resident bytes now, the most resident so far."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            kilobytes = {key: int(value) for key, value in _FIELDS.findall(file.read())}
    except OSError:  # ended meanwhile
        return 0, 0, 0
    get = kilobytes.get  # a process that is ending has no memory lines any more
    anon = get(b"RssAnon", 0) + get(b"RssShmem", 0)
    return 1024 * anon, 1024 * get(b"VmRSS", 0), 1024 * get(b"VmHWM", 0)


@dataclass(frozen=True)
class Bound:
    """A promise about a figure: `value <= limit`, or `value >= limit` where `at_least`."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'kept  ' if self.kept else 'MISSED'} {self.name}: {self.value:.3f} {sign} {self.limit:.3f}"


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print `rows`, which all have the first one's keys, as a table."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for column in rows[0]:
        drawn.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        drawn.add_row(
            *(f"{x:.2f}" if isinstance(x, float) else "" if x is None else str(x) for x in row.values())
        )
    Console(width=110).print(drawn)


def finish(figures: Mapping[str, Any], bounds: Sequence[Bound], check: bool) -> None:
    """Print how each bound fared, then the figures as one line of JSON; end with exit code 1 if `check` and
    a bound was missed, else 0."""
    for bound in bounds:
        print(bound)
    judged = {b.name: {"value": b.value, "limit": b.limit, "kept": b.kept} for b in bounds}
    print(json.dumps({**figures, "bounds": judged}, ensure_ascii=False))
    sys.exit(1 if check and not all(b.kept for b in bounds) else 0)
