"""Stand-ins for the programs that make and run the emulated arm64 machine, and what they fetch.

dpkg-deb and pip are real, over tiny packages and wheels; apt-get copies those instead of asking a mirror; QEMU runs the
guest's program on this machine, or does what STANDIN_QEMU says.
"""

import importlib.metadata
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from runtimes import arm64

APT = """
import os, shutil, sys
from pathlib import Path
arguments = sys.argv[1:]
with open(os.environ["STANDIN_LOG"], "a") as log:
    print(*arguments, file=log)
if words := os.environ.get("STANDIN_APT"):
    print("W: something else\\nE: " + words, file=sys.stderr)
    sys.exit(100)
settings = dict(each.split("=", 1) for each in arguments if "=" in each)
status = Path(settings["Dir::State::status"])
assert status.is_relative_to(settings["Dir::State"])  # apt locks the folder that it is in
if "install" in arguments:
    arm = settings.get("APT::Architecture") == "arm64"
    assert bool(status.read_text()) is not arm  # for ARM all is fetched, for this machine what it has not
    for package in Path(os.environ["STANDIN_PACKAGES"]).glob("*.deb"):
        if package.name.startswith("qemu") is not arm:
            shutil.copy(package, Path(settings["Dir::Cache"]) / "archives")
"""

QEMU = """
import json, os, subprocess, sys, time
from pathlib import Path
if "--version" in sys.argv:
    print("QEMU emulator version 9.9.9 (of a test)")
    sys.exit()
devices = [word.replace(",,", "\\0") for word in sys.argv if word.startswith("local,")]
fields = [dict(part.split("=", 1) for part in device.split(",")[1:]) for device in devices]
folders = {each["id"]: Path(each["path"].replace("\\0", ",")) for each in fields}
work = folders["work"]
record = Path(os.environ["STANDIN_RECORD"])
record.write_text(json.dumps({
    "arguments": sys.argv[1:],
    "pid": os.getpid(),
    "libraries": os.environ.get("LD_LIBRARY_PATH", ""),
    "folders": {tag: str(path) for tag, path in folders.items()},
    "readonly": [each["id"] for each in fields if each.get("readonly") == "on"],
    "stdin": (work / "stdin").read_text(encoding="utf-8"),
    "init": (work / "initrd").read_bytes().decode("latin-1"),
}))
does, _, what = os.environ.get("STANDIN_QEMU", "run").partition(" ")
def leave(code, out="", err=""):
    (work / "out").write_text(out, encoding="utf-8")
    (work / "err").write_text(err, encoding="utf-8")
    (work / "exit").write_text(f"{code}\\n")
if does == "hang":
    time.sleep(30)
    record.unlink()
elif does == "say":
    print(what)
elif does == "refuse":
    print("qemu-system-aarch64:", what, file=sys.stderr)
    sys.exit(1)
elif does == "end":
    code, _, err = what.partition(" ")
    leave(code, err=err)
elif does == "print":
    leave(0, out=what)
elif "bundle" in folders:
    job = json.loads((work / "stdin").read_text(encoding="utf-8"))
    assert job["bundle"] == "/gochu/bundle", job
    done = subprocess.run(
        [sys.executable, "-m", "runtimes.targets.host"],
        input=json.dumps({**job, "bundle": str(folders["bundle"])}),
        capture_output=True, encoding="utf-8", cwd=work, env={**os.environ, "PYTHONPATH": str(work / "code")},
    )
    leave(done.returncode, done.stdout, done.stderr)
else:
    leave(0)
"""


def program(folder: Path, name: str, code: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    path.chmod(0o755)


def module(*needed: str) -> bytes:
    """A kernel module, as far as its needs are told."""
    return b"\x7fELF" + b"\0license=GPL\0depends=" + ",".join(needed).encode() + b"\0name=x\0"


def package(folder: Path, name: str, files: dict[str, bytes | str]) -> None:
    """A Debian package for arm64; a text is what a symbolic link points at."""
    tree = folder / name
    for path, content in files.items():
        place = tree / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            place.symlink_to(content)
        else:
            place.write_bytes(content)
            place.chmod(0o755)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: arm64\nMaintainer: a test\nDescription: a test\n"
    )
    (folder / "packages").mkdir(exist_ok=True)
    command = [
        "dpkg-deb",
        "--root-owner-group",
        "-Znone",
        "--build",
        str(tree),
        str(folder / "packages" / f"{name}_1.deb"),
    ]
    subprocess.run(command, check=True, capture_output=True)


def packages(folder: Path, python: str = "python3.11") -> Path:
    """Debian's packages: a kernel with modules, of which one is compressed, and Python."""
    modules = "lib/modules/6.1.0-9-test/kernel"
    package(
        folder,
        "linux-image-6.1.0-9-test",
        {
            "boot/vmlinuz-6.1.0-9-test": b"a kernel",
            f"{modules}/fs/9p/9p.ko": module("9pnet", "netfs"),
            f"{modules}/fs/netfs/netfs.ko.xz": lzma.compress(module()),
            f"{modules}/net/9p/9pnet.ko": module(),
            f"{modules}/net/9p/9pnet_virtio.ko": module("9pnet"),
            f"{modules}/drivers/virtio/virtio_pci.ko": module("virtio-pci-modern-dev"),
            f"{modules}/drivers/virtio/virtio-pci-modern-dev.ko": module(),
            f"{modules}/drivers/gpu/mali.ko": module(),
        },
    )
    qemu = f"#!{sys.executable}\n{QEMU}".encode()
    package(
        folder,
        "qemu-system-arm",
        {f"usr/bin/{arm64.QEMU}": qemu, "usr/lib/x86_64-linux-gnu/libfdt.so.1": b"a library"},
    )
    package(folder, "busybox-static", {"usr/bin/busybox": b"a busybox"})
    package(folder, "python3", {"usr/bin/python3": python, f"usr/bin/{python}": b"a python"})
    return folder / "packages"


def wheels(folder: Path) -> Path:
    """What the guest needs of Python's packages, NumPy for two kinds of machines."""
    folder.mkdir()
    for name in arm64.DISTRIBUTIONS:
        version = importlib.metadata.version(name)
        tags = ["py3-none-any"]
        if name == "numpy":
            tags = [f"cp311-cp311-manylinux_2_28_{machine}" for machine in ("aarch64", "x86_64")]
        for tag in tags:
            info = f"{name}-{version}.dist-info"
            with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
                wheel.writestr(f"{name}.py", f"tag = {tag!r}\n")
                wheel.writestr(
                    f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                )
                wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
                wheel.writestr(f"{info}/RECORD", "")
    return folder


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def environment(folder: Path) -> dict[str, str]:
    """Make all of it, and return the variables with which it is found."""
    programs = folder / "programs"
    programs.mkdir()
    program(programs, "apt-get", APT)
    program(programs, arm64.QEMU, QEMU)
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "STANDIN_LOG": str(folder / "apt.log"),
        "STANDIN_RECORD": str(folder / "qemu.json"),
        "STANDIN_PACKAGES": str(packages(folder)),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels(folder / "wheels")),
        "XDG_CACHE_HOME": str(folder / "캐시, 둘"),
    }
