"""The first bytes of an ExecuTorch program (.pte), read without ExecuTorch.

Its runtime ends the process on some damaged files; what can be told from the header is told here first.
Layout: executorch/schema/extended_header.h (pytorch/executorch).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import BundleError

MAGIC = b"ET12"  # file identifier of the schema that ExecuTorch 0.1 to 1.x reads
_EXTENDED = struct.Struct("<4sIQQQ")  # magic, length, program size, segment base, size of all segments


@dataclass(frozen=True)
class Header:
    """Sizes and offsets in bytes from the beginning of the file."""

    program_size: int
    segment_base: int
    segment_size: int


def read_header(path: Path) -> Header:
    """Check and read a .pte's header; BundleError if it is no .pte, another version's, or cut off."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8 + _EXTENDED.size)
    if len(head) < 8 + _EXTENDED.size or head[4:6] != b"ET":
        raise BundleError(f"{path} is not an ExecuTorch program; export the bundle again")
    if head[4:8] != MAGIC:
        raise BundleError(
            f"{path} has the format {head[4:8].decode('latin-1')} where this ExecuTorch reads {MAGIC.decode()}: "
            "export the bundle again with the version that runs it"
        )
    magic, length, program, base, segments = _EXTENDED.unpack_from(head, 8)
    if magic != b"eh00" or length < _EXTENDED.size:
        raise BundleError(f"{path} has no header that says where its weights are; export the bundle again")
    if not 0 < program <= base or base + segments > size:
        raise BundleError(
            f"{path} is cut off or damaged: its header promises {base + segments} bytes, there are {size}; "
            "export the bundle again"
        )
    return Header(program, base, segments)
