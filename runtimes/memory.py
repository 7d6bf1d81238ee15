"""Memory of this process, as the kernel counts it.

`peak_rss` counts everything resident, the pages of mapped files too, which the system can take back at any
time (RssFile). `anonymous` leaves those out (RssAnon + RssShmem): what a phone must have free, or it ends the app
(https://docs.kernel.org/filesystems/proc.html, /proc/PID/status).
"""

import sys
import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.005  # s


def peak_rss() -> int | None:
    """The largest resident set so far, in bytes; None where the system does not tell."""
    if fields := _fields():
        return fields["VmHWM"]
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def available() -> int | None:
    """Bytes that a new process can have without swapping (Linux: MemAvailable); None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(found) * 1024 if found else None


def anonymous() -> int | None:
    """Resident memory that is not a mapped file, in bytes; None where the system does not tell."""
    fields = _fields()
    return fields["RssAnon"] + fields["RssShmem"] if fields else None


class Peak:
    """Watches the kinds of memory from a thread while the `with` block runs: `.anonymous` and `.mapped` are the
    largest that it saw, in bytes, None where the system does not tell.

    The kernel keeps no high-water mark of them, hence the thread; do not take times inside the block.
    """

    anonymous: int | None = None
    mapped: int | None = None

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        if self._look():
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.anonymous is not None:
            self._stop.set()
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._look()

    def _look(self) -> bool:
        fields = _fields()
        if fields:
            self.anonymous = max(self.anonymous or 0, fields["RssAnon"] + fields["RssShmem"])
            self.mapped = max(self.mapped or 0, fields["RssFile"])
        return bool(fields)


def _fields() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes; empty where there is no such file."""
    if not _STATUS.exists():
        return {}
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
