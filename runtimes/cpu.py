"""The CPU of the machine that this process runs on: its name, and how many threads are worth starting."""

import os
import platform
import subprocess
import sys
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu")


def name() -> str:
    """The CPU's name as its maker sells it, or the instruction set where the system does not tell."""
    if sys.platform == "linux":
        for line in _lines(Path("/proc/cpuinfo")):
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware") and value.strip():
                return value.strip()
    if sys.platform == "darwin" and (brand := _sysctl("machdep.cpu.brand_string")):
        return brand
    return platform.processor() or platform.machine()


def default_threads() -> int:
    """One thread for each fast physical core that this process may use.

    A second hardware thread of a core adds nothing to matrix products, and a slow core holds up all others
    at each barrier: on a chip with cores of several speeds those with half the fastest's capacity or less
    are left out (`cpu_capacity`, https://docs.kernel.org/scheduler/sched-capacity.html).
    """
    if sys.platform == "darwin":
        return int(_sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1)
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0))
    capacity = {cpu: int(_read(_SYSFS / f"cpu{cpu}/cpu_capacity") or 1024) for cpu in allowed}
    fast = [cpu for cpu in allowed if 2 * capacity[cpu] > max(capacity.values())]
    cores = {_read(_SYSFS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in fast}
    quota = _quota()
    return max(1, min(len(cores), int(quota)) if quota else len(cores))


def _quota() -> float | None:
    """CPUs that a container may use at once (https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max)."""
    limit, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _read(path: Path) -> str:
    return " ".join(_lines(path)).strip()


def _sysctl(key: str) -> str:
    done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return done.stdout.strip()
