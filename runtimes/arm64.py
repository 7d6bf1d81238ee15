"""The parts of the emulated arm64 machine, and how they are made: Debian's kernel and Python, and wheels for them.

They stand in the user's cache folder, each a folder that was made under another name and renamed when it was whole, so
that a set-up that was stopped goes on where it was:

    qemu/           the emulator, unless this machine has one installed
    system-KEY/     vmlinuz-RELEASE, modules/, root/: Debian for arm64, of the release whose packages this machine gets
    python-KEY/     what `runtimes` needs of Python's packages, in the versions that are installed here

KEY stands for what was asked for: another version of ONNX Runtime here makes another folder there. What packages
depend on, and that they are what their maker signed, is apt's and pip's business.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtimes import debian, guest, initrd
from runtimes.errors import MissingExtra, TargetError
from runtimes.folders import cache_folder

NAME = "arm64-emulator"
QEMU = "qemu-system-aarch64"
PACKAGES = ("linux-image-arm64", "busybox-static", "python3", "libgomp1", "libstdc++6")
DISTRIBUTIONS = ("jinja2", "numpy", "onnxruntime", "pydantic", "tokenizers")
CODE = ("runtimes", "profiles")  # of this project, which the guest runs
_PROBE = "import jinja2, numpy, onnxruntime, tokenizers, runtimes.generate, runtimes.targets.host"
_DRIVERS = ("9p", "fscache", "netfs", "virtio")  # folders of the kernel's modules
_FIRST = (3, 11)  # the oldest Python that runs this project
_SPACE = 1_000_000_000  # bytes while it is made

Progress = Callable[[str], None]


def folder() -> Path:
    """Where the machine's parts are."""
    return cache_folder() / NAME


def missing() -> list[str]:
    """The parts that are not there yet."""
    system = _system()
    absent = {QEMU: _qemu() is None, "system": not system.exists()}
    absent["python"] = absent["system"] or not _python(system).exists()
    return [part for part, gone in absent.items() if gone]


def machine() -> guest.Machine:
    """The machine, ready to run; MissingExtra if it was not set up, or not for the versions that are installed now."""
    qemu = _qemu()
    if absent := missing():
        raise MissingExtra(
            f"the arm64 emulator is not set up ({', '.join(absent)} missing); run `gochu target setup {NAME}`, which "
            "takes a minute or two and fetches some 200 MB"
        )
    assert qemu is not None
    system = _system()
    return guest.Machine(qemu, system, _python(system), _libraries(qemu))


def setup(progress: Progress = lambda what: None) -> Path:
    """Make the parts that are missing, try the machine, and return their folder.

    Raises MissingExtra (no apt, dpkg or pip: not on Debian), TargetError (no space, no network, ...).
    """
    home = folder()
    if not missing():
        return home
    debian.require_tools()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home, progress):
            _make(home, progress)
    except OSError as error:
        raise TargetError(
            f"the emulator's parts cannot be written to {home}: {error.strerror or error}; make room there, or set "
            "XDG_CACHE_HOME to another folder"
        ) from None
    return home


def _make(home: Path, progress: Progress) -> None:
    if (free := shutil.disk_usage(home).free) < _SPACE:
        raise TargetError(
            f"{home} has {free / 1e6:.0f} MB free, and the emulator needs {_SPACE / 1e6:.0f} MB while it is made: make "
            "room there, or set XDG_CACHE_HOME to another folder"
        )
    fetched = home / "fetched"
    if _qemu() is None:
        progress("fetching QEMU")
        with _part(home / "qemu") as part:
            debian.unpack(
                debian.download(["qemu-system-arm"], fetched / "qemu", owned=debian.INSTALLED), part
            )
    system = _system()
    if not system.exists():
        progress("fetching Debian for arm64")
        with _part(system) as part:
            _fill_system(part, debian.download(PACKAGES, fetched / "system", "arm64"))
    python = _python(system)
    if not python.exists():
        progress("fetching Python's packages for arm64")
        with _part(python) as part:
            debian.wheels(_requirements(), _version(system), part)
            progress("starting the machine for the first time")
            _try(system, part, progress)
    shutil.rmtree(fetched, ignore_errors=True)


def _fill_system(part: Path, packages: Sequence[Path]) -> None:
    """Unpack packages; of the kernel's, which holds thousands of drivers, what the machine needs."""
    root, modules = part / "root", part / "modules"
    modules.mkdir()
    kernels = [each for each in packages if each.name.startswith("linux-image-")]
    debian.unpack([each for each in packages if each not in kernels], root)
    for kernel in kernels:
        _take_kernel(kernel, part)
    if not list(part.glob("vmlinuz-*")):
        raise TargetError("Debian's kernel package holds no kernel: its layout has changed; update Gochu")
    for name in ("bin", "sbin", "lib"):  # newer releases have them in /usr alone
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", *(f"{guest.PLACE[1:]}/{each}" for each in guest.SHARED)):
        (root / name).mkdir(parents=True, exist_ok=True)
    if tuple(map(int, _version(part).split("."))) < _FIRST:
        raise TargetError(
            f"this machine's Debian has Python {_version(part)} for arm64, and {'.'.join(map(str, _FIRST))} is needed: "
            "use Debian 12 or newer"
        )


def _take_kernel(package: Path, part: Path) -> None:
    """vmlinuz-RELEASE, and the modules for virtio and 9p."""
    listing = ["dpkg-deb", "--fsys-tarfile", str(package)]
    try:
        with (
            subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacking,
            tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
        ):
            for member in archive:
                path = Path(member.name)
                name, dot_ko, _ = path.name.partition(".ko")
                if path.name.startswith("vmlinuz-"):
                    kept = part / path.name
                elif dot_ko and path.parent.name in _DRIVERS:
                    kept = part / "modules" / f"{name.replace('-', '_')}.ko"
                else:
                    continue
                if file := archive.extractfile(member):
                    kept.write_bytes(initrd.plain(path.name, file.read()))
    except tarfile.TarError as error:
        raise TargetError(f"{package.name} cannot be unpacked ({error}); set the emulator up again") from None


def _try(system: Path, python: Path, progress: Progress) -> None:
    """Start the machine and import everything there: it works, and Python keeps the modules that it compiled."""
    qemu = _qemu()
    assert qemu is not None
    order = guest.Order(["-c", _PROBE], packages=code(), writable=True, progress=progress)
    ended = guest.run(guest.Machine(qemu, system, python, _libraries(qemu)), order)
    if ended.code:
        said = (ended.err.strip().splitlines() or ["nothing"])[-1]
        raise TargetError(f"the machine starts, but what was fetched does not work there: {said}")


def code() -> list[Path]:
    """The folders of this project's packages that the guest runs."""
    top = Path(__file__).resolve().parents[1]
    return [top / name for name in CODE]


def _requirements() -> list[str]:
    """What to fetch, in the versions that are installed here, so that both machines run the same."""

    def pinned(name: str) -> str:
        try:
            return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
        except importlib.metadata.PackageNotFoundError:
            return name

    return [pinned(name) for name in DISTRIBUTIONS]


def _system() -> Path:
    return folder() / f"system-{_key(PACKAGES)}"


def _python(system: Path) -> Path:
    return folder() / f"python-{_key([system.name, *_requirements()])}"


def _key(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def _version(system: Path) -> str:
    """The version of the guest's Python, as 3.11."""
    return os.readlink(system / "root/usr/bin/python3").removeprefix("python")


def _qemu() -> Path | None:
    """This machine's QEMU, or the one that was fetched."""
    fetched = folder() / "qemu/usr/bin" / QEMU
    installed = shutil.which(QEMU)
    return Path(installed) if installed else fetched if fetched.exists() else None


def _libraries(qemu: Path) -> list[Path]:
    """Folders of libraries that were fetched with QEMU, and are not where the system looks."""
    fetched = folder() / "qemu"
    if not qemu.is_relative_to(fetched):
        return []
    return sorted({*fetched.glob("usr/lib/*-linux-gnu*"), *fetched.glob("lib/*-linux-gnu*")})


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    yield part
    part.rename(path)


@contextmanager
def _locked(home: Path, progress: Progress) -> Iterator[None]:
    """Wait until no other process makes the same."""
    import fcntl  # not on Windows, where there is no apt either

    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another set-up")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
