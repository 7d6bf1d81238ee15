"""What a Linux kernel is given to start with: an archive with busybox, kernel modules and the script /init.

The archive is cpio's "newc" (https://docs.kernel.org/driver-api/early-userspace/buffer-format.html).
"""

import lzma
import re
from collections.abc import Iterator, Mapping, Sequence

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_FOLDER, _FILE, _PROGRAM = 0o040755, 0o100644, 0o100755


def ordered(wanted: Sequence[str], modules: Mapping[str, bytes]) -> list[str]:
    """Kernel modules in the order in which they can be loaded: each after those that it names as needed.

    `modules`: the contents of files by module name. One that is not among them is built into the kernel.
    """
    found: list[str] = []
    for name in wanted:
        if name in modules:
            match = _DEPENDS.search(modules[name])
            needed = match[1].decode("ascii") if match else ""
            found += ordered([each.replace("-", "_") for each in needed.split(",") if each], modules)
            found.append(name)
    return list(dict.fromkeys(found))


def plain(name: str, data: bytes) -> bytes:
    """A kernel module's contents, which its file may hold compressed."""
    return lzma.decompress(data) if name.endswith(".xz") else data


def archive(init: str, busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The archive: /init, /bin/busybox, /modules/NAME.ko, and empty folders to mount things at."""
    entries: list[tuple[str, int, bytes]] = [
        *((name, _FOLDER, b"") for name in ("bin", "dev", "modules", "proc", "root", "sys")),
        ("bin/busybox", _PROGRAM, busybox),
        *((f"modules/{name}.ko", _FILE, data) for name, data in modules.items()),
        ("init", _PROGRAM, init.encode()),
        ("TRAILER!!!", 0, b""),
    ]
    return b"".join(part for number, entry in enumerate(entries, 1) for part in _entry(number, *entry))


def _entry(number: int, name: str, mode: int, data: bytes) -> Iterator[bytes]:
    """inode, mode, uid, gid, links, mtime, size, device, its device, name's length, no checksum: 8 hex digits each."""
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    yield _padded(header + encoded)
    yield _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
