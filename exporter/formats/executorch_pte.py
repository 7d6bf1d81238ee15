"""The .pte container: a program in a flatbuffer, and behind it segments of bytes that are streamed.

executorch's own serializer holds the whole file in memory; here only the program is, and weights go from the
quantizer to their place in the file. Layout (pytorch/executorch: schema/program.fbs, schema/extended_header.h):
flatbuffer with an extended header behind its magic, then the segments.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from executorch.exir._serialize import _flatbuffer_program, _program
from executorch.exir.schema import (
    BackendDelegateDataReference,
    DataLocation,
    DataSegment,
    NamedData,
    Program,
    SubsegmentOffsets,
)
from numpy.typing import NDArray

from runtimes.errors import BundleError
from runtimes.pte import read_header

_ALIGNMENT = 128  # bytes; executorch's own choice for segments
# What the flatbuffer's generated classes raise on bytes that are none.
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
)
_HEADER = 32  # bytes of the extended header: a multiple of what the flatbuffer aligns to


@dataclass(frozen=True)
class Blob:
    """`size` bytes of the file: `values`, or a part of the weight matrix `weight`, which is not read yet."""

    size: int
    values: NDArray[Any] | None = None
    weight: str = ""
    part: str = ""


class Layout:
    """Where all bytes behind the program will lie. Constants lie in one segment, named data in one each.

    Data under a name may be a constant's bytes once more: so a tied head is stored once.
    """

    def __init__(self) -> None:
        self._constants: list[tuple[int, Blob]] = [(0, Blob(0))]  # index 0 stands for no constant
        self._named: dict[str, Blob | int] = {}
        self._blobs: dict[int, Blob] = {}  # by offset
        self.size = 0

    def constant(self, blob: Blob) -> int:
        """Room for a constant tensor; its data_buffer_idx."""
        offset, last = self._constants[-1]
        self._constants.append((_aligned(offset + last.size), blob))
        return len(self._constants) - 1

    def named(self, key: str, data: Blob | int) -> None:
        """Data under a name, or a constant (its data_buffer_idx) under one."""
        self._named.setdefault(key, data)

    def place(self, program: Program, payloads: Sequence[int]) -> list[int]:
        """Tell the program where everything lies; returns the offset of each delegate's payload.

        `payloads`: their sizes. Offsets count from the beginning of the segments.
        """
        self._blobs = {offset: blob for offset, blob in self._constants if blob.size}
        offset, last = self._constants[-1]
        self.size = offset + last.size
        program.constant_segment = SubsegmentOffsets(0, [offset for offset, _ in self._constants])
        program.segments = [DataSegment(offset=0, size=self.size)]

        def append(size: int) -> int:
            """A segment behind all others; its offset."""
            offset = _aligned(self.size)
            self.size = offset + size
            program.segments.append(DataSegment(offset=offset, size=size))
            return offset

        offsets = []
        for delegate, size in zip(program.execution_plan[0].delegates, payloads, strict=True):
            offsets.append(append(size))
            delegate.processed = BackendDelegateDataReference(DataLocation.SEGMENT, len(program.segments) - 1)
        for key, data in self._named.items():
            if isinstance(data, int):
                offset, blob = self._constants[data]
                program.segments.append(DataSegment(offset=offset, size=blob.size))
            else:
                self._blobs[append(data.size)] = data
            program.named_data.append(NamedData(key, len(program.segments) - 1))
        return offsets

    def given(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """What is known already, with its offset."""
        for offset, blob in self._blobs.items():
            if blob.values is not None:
                yield offset, blob.values

    def parts(self, weight: str) -> Iterator[tuple[int, str]]:
        """Which parts of a weight matrix go where."""
        for offset, blob in self._blobs.items():
            if blob.weight == weight:
                yield offset, blob.part


class PteWriter:
    """Write a .pte in any order; the program comes last, when its names are known.

    `program` has all in it but the final names of its data, which must be as long as those that it has.
    """

    def __init__(self, path: Path, program: Program, size: int) -> None:
        self._segments = size
        self._program_size = len(_program_bytes(program, 0, size))
        self._base = _aligned(self._program_size)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> "PteWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, offset: int, data: NDArray[Any]) -> None:
        """An array's bytes, at `offset` from the beginning of the segments."""
        self._file.seek(self._base + offset)
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def finish(self, program: Program) -> None:
        """The program, in front of the segments."""
        data = _program_bytes(program, self._base, self._segments)
        assert len(data) == self._program_size, "the final names are as long as the first ones"
        self._file.seek(0)
        self._file.write(data)
        self._file.truncate(self._base + self._segments)


class PteReader:
    """A .pte's program, and its data: each is read when asked for, nothing is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_header(path)
        with open(path, "rb") as file:
            data = file.read(self._header.program_size)
        try:
            self.program = _flatbuffer_program._flatbuffer_to_program(data)
        except _UNREADABLE as error:
            raise BundleError(
                f"{path} holds no program that can be read ({error}); export it again"
            ) from None
        self._named = {data.key: data.segment_index for data in self.program.named_data or ()}

    def names(self) -> Iterator[str]:
        """Keys of all named data."""
        yield from self._named

    def named(self, key: str, kind: Any = np.uint8) -> NDArray[Any]:
        """The data under a name."""
        place = self.program.segments[self._named[key]]
        return self._read(place.offset, place.size, kind)

    def size(self, key: str) -> int:
        """Bytes of the data under a name."""
        return self.program.segments[self._named[key]].size

    def constant(self, index: int, size: int, kind: Any = np.uint8) -> NDArray[Any]:
        """`size` bytes of the constant tensor whose data_buffer_idx is `index`."""
        constants = self.program.constant_segment
        place = self.program.segments[constants.segment_index]
        return self._read(place.offset + constants.offsets[index], size, kind)

    def payload(self, delegate: int) -> bytes:
        """What the first method's delegate is made from."""
        place = self.program.segments[self.program.execution_plan[0].delegates[delegate].processed.index]
        return self._read(place.offset, place.size, np.uint8).tobytes()

    def _read(self, offset: int, size: int, kind: Any) -> NDArray[Any]:
        count = size // np.dtype(kind).itemsize
        with open(self.path, "rb") as file:
            file.seek(self._header.segment_base + offset)
            values = np.fromfile(file, kind, count)
        if len(values) != count:
            raise BundleError(f"{self.path} is cut off; export the bundle again")
        return values


def rename_data(program: Program, names: Mapping[str, str]) -> None:
    """Give named data its final names."""
    for data in program.named_data or ():
        data.key = names.get(data.key, data.key)


def _program_bytes(program: Program, base: int, size: int) -> bytes:
    result = _flatbuffer_program._program_to_flatbuffer(program)
    header = _program._ExtendedHeader(
        program_size=len(result.data) + _HEADER, segment_base_offset=base, segment_data_size=size
    )
    assert _HEADER % result.max_alignment == 0, "the flatbuffer stays aligned behind the header"
    return _program._insert_flatbuffer_header(
        result.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", header.to_bytes().ljust(_HEADER, b"\0")
    )


def _aligned(offset: int) -> int:
    return offset + -offset % _ALIGNMENT
