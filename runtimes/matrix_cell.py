"""A task of a matrix in a process of its own: a crash loses that task alone, and one task's memory is no other's.

The process is `python -m runtimes.matrix_cell`. It reads a task as a line of JSON and prints as JSON what the task's
function returns. When its standard input is closed, then whoever started it is no more: it stops itself and all that it
started, so that nothing measures beside the one that is tried again.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtimes import measuring, targets
from runtimes.bundle import MANIFEST, Strict, file_sha256
from runtimes.errors import GochuError, TargetError
from runtimes.workload import Workload

STOPPED = 130  # exit code after Ctrl-C
PATIENCE = 30.0  # s, for a task to stop by itself: a farm's run must be cancelled
_TICK = 0.1  # s


class Task(Strict):
    """What to do: `function` ("module:name") is called with `data`. `pool`: what it takes a place of while it runs;
    `kind`: the target, or export."""

    id: str
    label: str
    kind: str
    pool: str
    function: str
    data: dict[str, Any]
    retries: int = 0


class Outcome(Strict):
    """What came of a task: what its function returned, or in a sentence why it returned nothing."""

    id: str
    value: Any = None
    error: str = ""
    exit_code: int = 0
    seconds: float = 0.0


@dataclass
class Stop:
    """Whether tasks must end, and whether at once."""

    asked: bool = False
    at_once: bool = False

    def ask(self, *_: object) -> None:
        """Also a signal's handler: who asks twice is in a hurry."""
        self.asked, self.at_once = True, self.asked


def perform(task: Task, stop: Stop) -> Outcome:
    """Do a task in a process of its own. It is tried again if its target, its engine or the process itself fails."""
    began = time.monotonic()
    for tried in range(task.retries + 1):
        try:
            outcome = _once(task, stop)
        except OSError as error:
            sentence = f"its process could not be started: {error.strerror}; is there enough memory?"
            outcome = Outcome(id=task.id, error=sentence, exit_code=TargetError.exit_code)
        may_pass = outcome.exit_code == TargetError.exit_code
        if stop.asked or not may_pass or tried == task.retries:
            break
    return outcome.model_copy(update={"seconds": time.monotonic() - began})


def _once(task: Task, stop: Stop) -> Outcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "runtimes.matrix_cell"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=measuring.environment(),
            start_new_session=True,  # Ctrl-C reaches it through this process, which can wait for it
        )
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended before it read: its exit code says more
                assert process.stdin is not None
                process.stdin.write(task.model_dump_json().encode() + b"\n")
                process.stdin.flush()
            _wait(process, stop)
        except BaseException:  # a Ray worker is told so to cancel
            _stop(process, Stop(asked=True))
            raise
        finally:
            if process.poll() is None or process.returncode < 0:  # what it started may live on
                _signal(process, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        return _outcome(task, process.returncode, _text(out), _text(err))


def _wait(process: "subprocess.Popen[bytes]", stop: Stop) -> None:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TICK)
            return
        if stop.asked:
            _stop(process, stop)
            return


def _stop(process: "subprocess.Popen[bytes]", stop: Stop) -> None:
    """Interrupt a process and all that it started; kill them when patience is at its end."""
    _signal(process, signal.SIGINT)
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not stop.at_once and time.monotonic() < end:
        time.sleep(_TICK)


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended (macOS: EPERM)
        os.killpg(process.pid, number)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _outcome(task: Task, code: int, printed: str, complained: str) -> Outcome:
    if code == 0:
        return Outcome(id=task.id, value=json.loads(printed))
    if code == STOPPED:
        return Outcome(id=task.id, error="it was stopped", exit_code=STOPPED)
    said = (complained.strip().splitlines() or ["nothing"])[-1]
    if code > 1:
        return Outcome(id=task.id, error=said, exit_code=code)
    how = f"was killed by signal {-code}" if code < 0 else "failed"
    sentence = f"its process {how} and said: {said}; was there enough memory?"
    return Outcome(id=task.id, error=sentence, exit_code=TargetError.exit_code)


def measure(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The function of a cell: its rows. TargetError if the bundle is another one here."""
    manifest = Path(data["bundle"]) / MANIFEST
    if not manifest.is_file() or file_sha256(manifest) != data["digest"]:
        raise TargetError(
            f"{data['bundle']} on this machine is not the bundle that the matrix was read with: every machine must see "
            "the same folder, and nobody may change it meanwhile"
        )
    ((target, known),) = targets.choose(data["target"], data["options"])
    found = target.measure(data["bundle"], Workload.model_validate(data["workload"]), **known)
    return [each.model_dump(mode="json") for each in found]


def main() -> int:
    """Do the task on standard input; the exit code is that of its error."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's workers block it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library says, from native code too, is no part of the answer
    try:
        task = Task.model_validate_json(sys.stdin.buffer.readline())
        threading.Thread(target=_watch, daemon=True).start()
        module, _, name = task.function.partition(":")
        value = getattr(importlib.import_module(module), name)(task.data)
        with os.fdopen(answer, "w", encoding="utf-8") as file:
            json.dump(value, file)
    except GochuError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return STOPPED
    return 0


def _watch() -> None:
    """Stop when the other end of standard input is closed."""
    os.read(0, 1)
    os.killpg(0, signal.SIGINT)
    time.sleep(PATIENCE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
