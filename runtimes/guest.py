"""Run a Python program in an emulated arm64 machine, QEMU's `virt`, and take back what it printed.

The machine has one core, no network, and folders of this machine's as file systems (9p over virtio). It counts:
`-icount shift=0` lets its clock go on by one nanosecond for each instruction that it retires, and `sleep=off` lets it
jump over the time in which it has nothing to do, so what a program there takes for nanoseconds are its instructions
(https://www.qemu.org/docs/master/devel/tcg-icount.html). Addresses and hashes are not random there: a run repeats.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from runtimes import initrd
from runtimes.errors import TargetError

CPU, CPU_NAME = "cortex-a76", "Cortex-A76"
PLACE = "/gochu"  # in the guest: where folders of this machine are
SHARED = ("bundle", "wheels", "work")
_MODULES = ("virtio_pci", "9pnet_virtio", "9p")
_BUFFER = 512_000  # bytes of a 9p message
_KILLED = 128 + signal.SIGKILL
_NO_MEMORY = ("MemoryError", "bad_alloc", "Failed to allocate memory")  # Python's, C++'s, ONNX Runtime's
_LONGEST = 300  # characters of what was said
_VERSION = re.compile(r"version (\d+[\d.]*\d)")
_AGAIN = "remove it, and set the emulator up again"


@dataclass(frozen=True)
class Machine:
    """Where the parts of the emulated machine are, on this one.

    `system` holds the kernel `vmlinuz-RELEASE`, its modules (`modules/NAME.ko`) and the system's files (`root`);
    `python` is put before its own packages; `libraries`: folders of those that QEMU needs and this machine has not.
    """

    qemu: Path
    system: Path
    python: Path
    libraries: Sequence[Path] = ()

    @property
    def kernel(self) -> Path:
        return next(self.system.glob("vmlinuz-*"))

    @property
    def release(self) -> str:
        """Of the kernel, as `uname -r` says it."""
        return self.kernel.name.removeprefix("vmlinuz-")

    @property
    def environment(self) -> dict[str, str]:
        """For QEMU, so that it finds its libraries."""
        libraries = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {**os.environ, **({"LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else {})}


@dataclass(frozen=True)
class Ended:
    """How the program ended, and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Order:
    """What to run: Python's arguments, standard input, a folder for it to read at PLACE/bundle, packages to copy there.

    `writable`: let Python keep the modules that it compiles. `memory` in MiB.
    """

    arguments: Sequence[str]
    stdin: str = ""
    bundle: Path | None = None
    packages: Sequence[Path] = ()
    memory: int = 4096
    minutes: float = 30.0
    writable: bool = False
    progress: Callable[[str], None] = field(default=lambda what: None)


def emulator(machine: Machine) -> str:
    """Name and version of what emulates, as "QEMU 7.2.22"; TargetError if it does not tell."""
    try:
        done = subprocess.run(
            [machine.qemu, "--version"], capture_output=True, encoding="utf-8", env=machine.environment
        )
    except OSError as error:
        raise TargetError(f"{machine.qemu} cannot be run ({error.strerror}): {_AGAIN}") from None
    match = _VERSION.search(done.stdout)
    if match is None:
        said = (done.stderr or done.stdout).strip()[:_LONGEST] or "nothing"
        raise TargetError(f"{machine.qemu} does not tell its version, but says {said}: {_AGAIN}")
    return f"QEMU {match[1]}"


def run(machine: Machine, order: Order) -> Ended:
    """Start the machine, run the program in it, and wait until the machine is off.

    TargetError, in one sentence, if the machine does not start, crashes, runs out of memory, or is not done in time.
    QEMU is gone when this returns or raises, whatever happened.
    """
    try:
        return _run(machine, order)
    except OSError as error:
        raise TargetError(
            f"the emulated machine's files cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}; "
            "make room there, or set TMPDIR to another folder"
        ) from None


def _run(machine: Machine, order: Order) -> Ended:
    with tempfile.TemporaryDirectory(prefix="gochu-arm64-") as folder:
        work = Path(folder)
        for package in order.packages:
            half_written = shutil.ignore_patterns("*.pyc.*")  # by a process that compiles it just now
            shutil.copytree(package, work / "code" / package.name, ignore=half_written)
        (work / "stdin").write_text(order.stdin, encoding="utf-8")
        _write_initrd(machine, order, work / "initrd")
        _emulate(machine, order, work)
        return _left(work, order)


def _write_initrd(machine: Machine, order: Order, path: Path) -> None:
    files = {each.stem: each.read_bytes() for each in sorted((machine.system / "modules").glob("*.ko"))}
    loaded = initrd.ordered(_MODULES, files)
    busybox = (machine.system / "root/bin/busybox").read_bytes()
    path.write_bytes(initrd.archive(_init(order, loaded), busybox, {name: files[name] for name in loaded}))


def _init(order: Order, modules: Sequence[str]) -> str:
    """The first program of the guest: mounts, runs Python, leaves its exit code, and turns the machine off."""
    kept = "" if order.writable else ",ro"
    environment = {
        "HOME": "/tmp",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": f"{PLACE}/work/code:{PLACE}/wheels",
        "PYTHONUTF8": "1",
    } | ({} if order.writable else {"PYTHONDONTWRITEBYTECODE": "1"})
    command = shlex.join(["chroot", "/root", "/usr/bin/python3", *order.arguments])
    lines = [
        "#!/bin/busybox sh",
        'b() { /bin/busybox "$@"; }',
        "share() {",
        f'  b mount -t 9p -o "trans=virtio,version=9p2000.L,msize={_BUFFER},$3" "$1" "$2" && return',
        '  b echo "gochu: cannot mount $1"; b poweroff -f',
        "}",
        "b mount -t proc proc /proc; b mount -t sysfs sys /sys; b mount -t devtmpfs dev /dev",
        *(f"b insmod /modules/{name}.ko" for name in modules),
        f"share root /root cache=loose{kept}",
        *(f"b mount --move /{name} /root/{name}" for name in ("proc", "sys", "dev")),
        "b mount -t tmpfs tmp /root/tmp",
        f"share wheels /root{PLACE}/wheels cache=loose{kept}",
        f"share work /root{PLACE}/work cache=none",
        *([f"share bundle /root{PLACE}/bundle cache=loose,ro"] if order.bundle else []),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"cd /root{PLACE}/work",
        f"b {command} <stdin >out 2>err",
        "b echo $? >exit",
        "cd /; b sync; b poweroff -f",
    ]
    return "\n".join(lines) + "\n"


def _command(machine: Machine, order: Order, work: Path) -> list[str]:
    folders = {"root": machine.system / "root", "wheels": machine.python, "work": work}
    if order.bundle:
        folders["bundle"] = order.bundle
    words = [
        str(machine.qemu),
        *("-machine", "virt", "-cpu", CPU, "-smp", "1", "-m", str(order.memory)),
        *(
            "-icount",
            "shift=0,sleep=off",
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ),
        *("-kernel", str(machine.kernel), "-initrd", str(work / "initrd")),
        *("-append", "console=ttyAMA0 loglevel=4 panic=-1 norandmaps"),
    ]
    for tag, path in folders.items():
        plain = str(path.resolve()).replace(",", ",,")  # a comma ends an option
        fixed = "" if order.writable or tag == "work" else ",readonly=on"
        words += ["-fsdev", f"local,id={tag},path={plain},security_model=none,multidevs=remap{fixed}"]
        words += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    if shutil.which("setpriv"):  # QEMU does not outlive this process, even one that is killed
        words = ["setpriv", "--pdeathsig", "KILL", *words]
    return words


def _emulate(machine: Machine, order: Order, work: Path) -> None:
    """QEMU from its start to its end; its console goes to the file `console`, its complaints to `qemu`."""
    with (work / "console").open("wb") as console, (work / "qemu").open("wb") as complaints:
        process = _start(_command(machine, order, work), machine.environment, console, complaints)
        try:
            _wait(process, order)
        finally:
            process.kill()
            process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        said = _text(work / "qemu").strip().splitlines() or [f"exit code {process.returncode}"]
        raise TargetError(
            f"QEMU could not run the arm64 machine: {said[-1][:_LONGEST]}; if that does not help, remove "
            f"{machine.system.parent} and set the emulator up again"
        )


def _start(
    command: Sequence[str], environment: Mapping[str, str], console: IO[bytes], complaints: IO[bytes]
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=complaints,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends QEMU
        )
    except OSError as error:
        raise TargetError(f"{command[0]} cannot be run ({error.strerror}): {_AGAIN}") from None


def _wait(process: "subprocess.Popen[bytes]", order: Order) -> None:
    start = time.monotonic()
    while True:
        left = 60 * order.minutes - (time.monotonic() - start)
        if left <= 0:
            raise TargetError(
                f"the emulated machine was not done after {order.minutes:g} minutes and was switched off: take a "
                "smaller workload, or allow more with --option max_minutes=..."
            )
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(1.0, left))
            return
        order.progress(f"emulated arm64: {time.monotonic() - start:.0f} s")


def _left(work: Path, order: Order) -> Ended:
    """What the program left; TargetError if it, or the whole machine, was cut off."""
    console = _text(work / "console")
    code = _text(work / "exit").strip()
    if not code.isdigit():
        raise TargetError(f"the emulated machine went off before its work was done: {_reason(console)}")
    err = _text(work / "err")
    if int(code) == _KILLED or (int(code) and any(word in err for word in _NO_MEMORY)):
        raise TargetError(
            f"the emulated machine's {order.memory} MiB of memory were not enough for the program: give it more "
            "with --option memory=..., or shorten the context"
        )
    if int(code) > 128:
        raise TargetError(
            f"the program crashed in the emulated machine, with signal {int(code) - 128}: does the bundle's variant "
            "run with --on host?"
        )
    return Ended(int(code), _text(work / "out"), err)


def _reason(console: str) -> str:
    """The line of a console that says what went wrong: the kernel's last words, ours, or the last of all."""
    lines = [line.strip() for line in console.splitlines() if line.strip()]
    for telling in ("Kernel panic", "gochu:", "Out of memory"):
        for line in lines:
            if telling in line:
                return line[line.index(telling) :][:_LONGEST]
    return f"its last words were {lines[-1][:_LONGEST]!r}" if lines else "it printed nothing"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
