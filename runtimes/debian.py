"""Software for another machine, without root: Debian's packages through apt and dpkg, Python's through pip.

apt gets lists, a cache and a record of what is installed of its own, so that it neither reads nor changes this
machine's, and verifies signatures and checksums as ever (apt.conf(5)). Nothing is installed: packages are unpacked into
a folder, and none of their scripts runs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from runtimes.errors import MissingExtra, TargetError

INSTALLED = Path("/var/lib/dpkg/status")
_GLIBC = range(17, 37)  # minor versions whose wheels run on Debian 12's, the first with Python 3.11: 2.36
_LONGEST = 300  # characters of what a tool says


def require_tools() -> None:
    """MissingExtra where there is no apt, no dpkg or no pip."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingExtra(
                f"{tool} is not on the path, and the emulator's system is made of Debian's packages; run this on "
                "Debian 12 or newer, or in a container of it"
            )
    if importlib.util.find_spec("pip") is None:
        raise MissingExtra(
            "pip is not installed for this Python, and fetches what the emulator runs; try `python -m ensurepip`"
        )


def download(
    packages: Sequence[str], folder: Path, architecture: str = "", owned: Path | None = None
) -> list[Path]:
    """Debian packages and all that they depend on, as files in a folder; what is there already is not fetched again.

    `architecture`: of the packages, if it is not this machine's. `owned`: the list of packages that need not be
    fetched since they are there (`INSTALLED`); None if nothing is. TargetError with apt's own words if it fails.
    """
    state, cache = folder / "state", folder / "cache"
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives/partial").mkdir(parents=True, exist_ok=True)
    status = state / "status"  # a copy: apt locks the folder that it is in
    status.write_bytes(owned.read_bytes() if owned else b"")
    settings = {
        "Dir::State": state.resolve(),
        "Dir::State::status": status.resolve(),
        "Dir::Cache": cache.resolve(),
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
    }
    if architecture:
        settings |= {"APT::Architecture": architecture, "APT::Architectures::": architecture}
    apt = [
        "apt-get",
        "--quiet",
        *(part for key, value in settings.items() for part in ("-o", f"{key}={value}")),
    ]
    run([*apt, "update"], "asking Debian's mirror for its packages")
    run(
        [*apt, "install", "--download-only", "--yes", "--no-install-recommends", *packages],
        f"downloading {', '.join(packages)}",
    )
    return sorted((cache / "archives").glob("*.deb"))


def unpack(packages: Sequence[Path], root: Path) -> None:
    """Put the files of packages under a folder."""
    for package in packages:
        run(["dpkg-deb", "--extract", str(package), str(root)], f"unpacking {package.name}")


def wheels(requirements: Sequence[str], python: str, folder: Path) -> None:
    """Python packages for arm64 Linux and a version of Python ("3.11"), and all that they depend on, into a folder.

    TargetError with pip's own words if it fails.
    """
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in reversed(_GLIBC)] + ["manylinux2014_aarch64"]
    run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"),
            *(
                "--target",
                str(folder),
                "--only-binary=:all:",
                "--implementation",
                "cp",
                "--python-version",
                python,
            ),
            *(part for platform in platforms for part in ("--platform", platform)),
            *requirements,
        ],
        f"downloading {', '.join(requirements)} for arm64",
        "pip",
    )


def run(command: Sequence[str], doing: str, tool: str = "") -> None:
    """Run a tool to its end; TargetError with what it complained of if it fails, or is not there."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise TargetError(f"{doing} failed: {command[0]} cannot be run ({error.strerror})") from None
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("E:", "ERROR:"))] or lines[-1:] or ["nothing"]
    raise TargetError(
        f"{doing} failed, and {tool or command[0]} said: {' '.join(telling)[:_LONGEST]}; try again"
    )
