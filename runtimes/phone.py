"""An Android phone over adb: commands, files, and programs that outlive a pulled cable.

Through adbutils, which speaks to the adb server. A lost connection is waited for and what was being done is done again,
so everything here may happen twice and does the same. What a phone keeps stands below FOLDER: files by their bundle's
hash, and a folder for each run, which goes when the run ends.
"""

import contextlib
import os
import shlex
import socket
import stat
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, TypeVar

from runtimes.bundle import file_sha256
from runtimes.errors import TargetError, UsageError
from runtimes.extras import require
from runtimes.farm import Clock

T = TypeVar("T")
EXTRA = "adb"
FOLDER = "/data/local/tmp/gochu"  # the one place where the shell's user may write and execute
PATIENCE = 180.0  # s, for a phone that was lost
TRIES = 4  # of something that fails while the phone is there
SILENCE = 120.0  # s without an answer to a command
LOOK = 0.25  # s between two looks at a runner's memory
_PIECE = 64 * 1024  # bytes: the most that the sync service takes at once (SYNC.TXT)
_SPARE = 32 << 20  # bytes that stay free
_STARTED = 100  # looks, 0.1 s apart, for the first sign of a run

# Runs a program and watches it. Paths are relative to the run's folder, two levels below FOLDER. `pid` is the
# program's, `code` is there when it has ended. meminfo holds the process up for a moment, hence seldom.
_JOB = """: >memory; : >meminfo; : >fdinfo; : >thermal
echo $$ >supervisor
libraries=$(cd {libraries} && pwd)
export LD_LIBRARY_PATH="$libraries" ADSP_LIBRARY_PATH="$libraries"
(sh -c 'echo $$ >pid; exec "$@"' gochu {command} >out 2>err </dev/null; echo $? >code.part; mv code.part code) &
n=0
until [ -f code ]; do
  p=$(cat pid 2>/dev/null)
  if [ -n "$p" ]; then
    grep -E '^(VmHWM|RssAnon|RssFile|RssShmem):' "/proc/$p/status" >>memory 2>/dev/null
    if [ $((n % 40)) = 2 ]; then
      dumpsys meminfo "$p" >>meminfo 2>&1
      {{ echo look; grep -H . "/proc/$p/fdinfo/"*; }} >>fdinfo 2>/dev/null
      dumpsys thermalservice >>thermal 2>&1
    fi
    n=$((n + 1))
  fi
  sleep {look}
done
"""
_START = """mkdir -p {run} && cd {run} || exit 1
if mkdir started 2>/dev/null; then nohup setsid sh job.sh >/dev/null 2>&1 </dev/null & fi
n=0
until [ -s supervisor ]; do n=$((n + 1)); [ $n -gt {looks} ] && exit 1; sleep 0.1; done
"""
_STATE = """cd {run} 2>/dev/null || {{ echo gone; exit; }}
if [ ! -f code ] && kill -0 "$(cat supervisor)" 2>/dev/null; then echo running; exit; fi
cat code 2>/dev/null || echo gone
"""
_KILL = "kill -{signal} -$(cat {run}/supervisor) 2>/dev/null"  # the watcher leads a group: setsid


class Stopped(Exception):
    """The user has stopped the command while a phone was at work."""


@dataclass(frozen=True)
class Ended:
    """A program that ran on the phone: its exit code, what it printed, what was seen of it meanwhile."""

    code: int
    out: str
    err: str
    memory: str  # lines of /proc/PID/status
    meminfo: str
    fdinfo: str  # lines of /proc/PID/fdinfo/*
    thermal: str


class Server:
    """The adb server. Only one that runs is spoken to: adbutils would start one, which would outlive this process."""

    def __init__(self) -> None:
        port = os.environ.get("ANDROID_ADB_SERVER_PORT", "0")
        if not port.isdecimal():
            raise UsageError(
                f"ANDROID_ADB_SERVER_PORT is {port!r}, which is no port: set it to the adb server's, or unset it"
            )
        self._adbutils = require("adbutils", EXTRA)
        self.client: Any = self._adbutils.AdbClient()

    @property
    def lost(self) -> tuple[type[BaseException], ...]:
        """What adbutils raises when an answer does not come: its own errors, the socket's, and those of its reading of
        answers that were cut short."""
        return (self._adbutils.AdbError, OSError, EOFError, struct.error, AssertionError, ValueError)

    def check(self) -> None:
        """TargetError if there is no server."""
        try:
            socket.create_connection((self.client.host, self.client.port), timeout=3).close()
        except OSError:
            raise TargetError(
                f"no adb server answers on {self.client.host}:{self.client.port}: start one with `adb start-server` "
                "(adb comes with Android's platform tools, and inside the Python package adbutils)"
            ) from None

    def states(self) -> dict[str, str]:
        """Each phone's serial number with its state: device, offline, unauthorized, ..."""
        self.check()
        try:
            listed = self.client.list()
        except self.lost as error:
            raise TargetError(f"the adb server does not list its phones: {error}; restart it") from None
        # adbutils cuts a state at its first space: "no permissions (...)"
        return {each.serial: "no permissions" if each.state == "no" else each.state for each in listed}


class Phone:
    """One phone, by its serial number. Not for several threads at once."""

    def __init__(
        self,
        server: Server,
        serial: str,
        clock: Clock,
        progress: Callable[[str], None] = lambda what: None,
        stop: Event | None = None,
    ) -> None:
        self.serial, self.name = serial, serial
        self._server, self._clock = server, clock
        self._progress, self._stop = progress, stop or Event()
        self._device: Any = server.client.device(serial)

    def shell(self, script: str, doing: str, *, check: bool = True) -> str:
        """What a script of the phone's shell prints; TargetError if it fails, unless `check` is false."""
        done = self._again(lambda: self._device.shell2(script, timeout=SILENCE, v2=True), doing)
        if check and done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise TargetError(f"{doing} on {self.name} failed with code {done.returncode}: {said}")
        return str(done.stdout)

    def check(self) -> None:
        """TargetError if its adb is too old to tell a command's exit code."""
        features = self._again(lambda: self._device.get_features(), "asking for its features").split(",")
        if "shell_v2" not in features:
            raise TargetError(
                f"{self.name} does not tell the exit codes of commands: it needs Android 7 or newer"
            )

    def properties(self, names: Sequence[str]) -> dict[str, str]:
        """System properties by their names; one that is not set is empty."""
        script = "; ".join(f'echo "$(getprop {shlex.quote(name)})"' for name in names)
        values = self.shell(script, "asking for its properties").splitlines()
        return dict(zip(names, values, strict=False))

    def dumpsys(self, service: str) -> str:
        """What a system service says of itself."""
        return self.shell(f"dumpsys {shlex.quote(service)}", f"asking {service}", check=False)

    def install(self, folder: str, files: Mapping[str, Path], *, executable: Sequence[str] = ()) -> int:
        """Bring files (by their paths below `folder`) to the phone, those that are not there as they are here, and
        return the bytes that were sent. TargetError if there is no room for them, or they do not arrive whole."""
        hashes = {path: file_sha256(local) for path, local in files.items()}
        missing = self._differing(folder, hashes)
        sizes = {path: files[path].stat().st_size for path in missing}
        self._check_room(sum(sizes.values()))
        for number, path in enumerate(missing, 1):
            self.rest(0)
            self._report(f"sending {path} ({sizes[path] / 1e6:.1f} MB), {number} of {len(missing)}")
            self.push(files[path], f"{folder}/{path}", 0o755 if path in executable else 0o644)
        if missing and (damaged := self._differing(folder, {path: hashes[path] for path in missing})):
            raise TargetError(
                f"{damaged[0]} is on {self.name} not what was sent: try another cable or port, and measure again"
            )
        return sum(sizes.values())

    def _differing(self, folder: str, hashes: Mapping[str, str]) -> list[str]:
        """Which files are on the phone not with these SHA-256."""
        places = [shlex.quote(f"{folder}/{path}") for path in hashes]
        script = (
            f'for f in {" ".join(places)}; do if [ -f "$f" ]; then sha256sum <"$f"; else echo none; fi; done'
        )
        found = [line.split()[0] for line in self.shell(script, "comparing files").splitlines()]
        if len(found) != len(hashes):
            raise TargetError(f"{self.name} compares no files (sha256sum): it needs Android 8 or newer")
        return [path for (path, hash), there in zip(hashes.items(), found, strict=True) if hash != there]

    def _check_room(self, wanted: int) -> None:
        table = self.shell(f"mkdir -p {FOLDER} && df -k {FOLDER}", "asking for free space").split("\n")
        fields = table[1].split() if len(table) > 1 else []
        if len(fields) > 3 and fields[3].isdigit() and 1024 * int(fields[3]) < wanted + _SPARE:
            free = 1024 * int(fields[3])
            raise TargetError(
                f"{self.name} has {free / 1e6:.0f} MB free where {wanted / 1e6:.0f} MB are to be sent: delete "
                f"something on it, for example {FOLDER}"
            )

    def push(self, local: Path, remote: str, mode: int = 0o644) -> None:
        """Send a file. Not by adbutils' own push, which loses what the phone says when it refuses one."""

        def send() -> str:
            with local.open("rb") as file, self._device.open_transport(timeout=SILENCE) as connection:
                connection.send_command("sync:")
                connection.check_okay()
                place = f"{remote},{stat.S_IFREG | mode}".encode()
                connection.conn.sendall(b"SEND" + struct.pack("<I", len(place)) + place)
                while piece := file.read(_PIECE):
                    connection.conn.sendall(b"DATA" + struct.pack("<I", len(piece)) + piece)
                connection.conn.sendall(b"DONE" + struct.pack("<I", int(local.stat().st_mtime)))
                answer, length = struct.unpack("<4sI", connection.read_exact(8))
                why = connection.read_exact(length).decode("utf-8", "replace") if answer == b"FAIL" else ""
                return why or ("" if answer == b"OKAY" else f"it answered {answer!r}")

        if why := self._again(send, f"sending {local.name}"):
            raise TargetError(
                f"{self.name} does not take {local.name}: {why}; make room on it and measure again"
            )

    def pull(self, remote: str) -> str:
        """The text of a file that is on the phone."""
        what = f"fetching {PurePosixPath(remote).name}"
        return self._again(
            lambda: bytes(self._device.sync.read_bytes(remote)).decode("utf-8", "replace"), what
        )

    def run(self, command: Sequence[str], libraries: str, minutes: float, doing: str) -> Ended:
        """Run a program on the phone to its end. It goes on if the connection is lost, and is waited for.

        `command` and `libraries` are paths relative to the run's folder. Raises TargetError (it takes longer than
        `minutes`; the phone is lost for good, or was restarted) or Stopped; the program is ended then, as far as the
        phone can be reached.
        """
        run = f"{FOLDER}/runs/{uuid.uuid4().hex[:12]}"
        job = _JOB.format(libraries=shlex.quote(libraries), command=shlex.join(command), look=LOOK)
        with _temporary(job) as script:
            self.push(script, f"{run}/job.sh")
        self.shell(_START.format(run=run, looks=_STARTED), f"starting {doing}")
        ended = False
        try:
            code = self._wait(run, minutes, doing)
            ended = True
            texts = {
                name: self.pull(f"{run}/{name}")
                for name in ("out", "err", "memory", "meminfo", "fdinfo", "thermal")
            }
            return Ended(code=code, **texts)
        finally:
            self._clear(run, ended)

    def _wait(self, run: str, minutes: float, doing: str) -> int:
        start, pause = self._clock.now(), LOOK
        while True:
            state = self.shell(_STATE.format(run=run), f"waiting for {doing}").strip()
            if state == "gone":
                raise TargetError(
                    f"{doing} vanished from {self.name}, which was restarted or ended it: measure again"
                )
            if state != "running":
                return int(state)
            spent = self._clock.now() - start
            if spent >= 60 * minutes:
                raise TargetError(
                    f"{doing} on {self.name} was not done after {minutes:g} minutes and was ended: allow more with "
                    "--option max_minutes=..."
                )
            self._report(f"{doing}, {spent:.0f} s")
            self.rest(pause)
            pause = min(1.5 * pause, 5.0)

    def _clear(self, run: str, ended: bool) -> None:
        """End the program of a run and take away its folder, if the phone is there; what is reused stays."""
        with contextlib.suppress(TargetError, *self._server.lost):
            self._server.check()
            if not ended:
                self._device.shell2(_KILL.format(run=run, signal="TERM"), timeout=SILENCE, v2=True)
                self._clock.sleep(1.0)
                self._device.shell2(_KILL.format(run=run, signal="KILL"), timeout=SILENCE, v2=True)
            self._device.shell2(f"rm -rf {run}", timeout=SILENCE, v2=True)

    def rest(self, seconds: float) -> None:
        """Wait; Stopped if the user has had enough."""
        end = self._clock.now() + seconds
        while not self._stop.is_set():
            left = end - self._clock.now()
            if left <= 0:
                return
            self._clock.sleep(min(left, 0.5))
        raise Stopped

    def _again(self, action: Callable[[], T], doing: str) -> T:
        """Do something, again if the phone was lost meanwhile and has come back."""
        for attempt in range(TRIES):
            self._server.check()
            try:
                return action()
            except self._server.lost as error:
                if attempt == TRIES - 1:
                    raise TargetError(
                        f"{doing} on {self.name} fails again and again ({error}): try another cable or port"
                    ) from None
                self._wait_back(doing)
                self.rest(0.5 * attempt)
        raise AssertionError("the last try returns or raises")

    def _wait_back(self, doing: str) -> None:
        end = self._clock.now() + PATIENCE
        while (state := self._server.states().get(self.serial)) != "device":
            if state == "unauthorized":
                raise TargetError(unauthorized(self.name))
            left = end - self._clock.now()
            if left <= 0:
                raise TargetError(
                    f"{self.name} was lost while {doing} and did not come back within {PATIENCE:.0f} s: check the "
                    "cable and measure again; what was sent is still there"
                )
            self._report(f"lost while {doing}; waiting for it, {left:.0f} s at most")
            if state is None and ":" in self.serial:  # one without a cable does not come back of its own
                with contextlib.suppress(*self._server.lost):
                    self._server.client.connect(self.serial, timeout=5)
            self.rest(1.0)

    def _report(self, what: str) -> None:
        self._progress(f"{self.name}: {what}")


def unauthorized(name: str) -> str:
    """What to say of a phone that has not let this computer in."""
    return (
        f"{name} does not let this computer in: unlock it and accept `Allow USB debugging` on its screen; if it does "
        "not ask, turn USB debugging off and on in its developer options"
    )


@contextmanager
def _temporary(text: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "job.sh"
        place.write_text(text, encoding="utf-8")
        yield place
