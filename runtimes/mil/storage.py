"""Constants of a Core ML program: packed bytes, in memory or in weight.bin, unpacked when they are asked for.

Layout of weight.bin (apple/coremltools: mlmodel/src/MILBlob/Blob/StorageFormat.hpp, BlobDataType.hpp), little
endian: a header of 64 bytes (count, version 2), then for each constant a record of 64 bytes (sentinel, dtype, size in
bytes, offset of the data) and, aligned to 64 bytes, its data. A program names a constant by its record's offset.
Elements of fewer than 8 bits follow each other without gaps, the first in the lowest bits.
"""

import math
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.errors import BundleError

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
VERSION = 2
_HEADER = struct.Struct("<II")  # constants, version
_RECORD = struct.Struct("<IIQQ")  # sentinel, dtype, size in bytes, offset in bytes


@dataclass(frozen=True)
class Dtype:
    """A type of MIL: `code` in the protobuf, `blob_code` in weight.bin (0: never there), `numpy` when unpacked."""

    name: str
    bits: int
    code: int
    blob_code: int
    numpy: str

    @property
    def floating(self) -> bool:
        return self.name.startswith("fp")

    @property
    def signed(self) -> bool:
        return self.name.startswith("int")


DTYPES = (
    Dtype("bool", 8, 1, 0, "bool"),
    Dtype("string", 0, 2, 0, "object"),
    Dtype("fp16", 16, 10, 1, "float16"),
    Dtype("fp32", 32, 11, 2, "float32"),
    Dtype("int8", 8, 21, 4, "int8"),
    Dtype("int16", 16, 22, 6, "int16"),
    Dtype("int32", 32, 23, 14, "int32"),
    Dtype("int64", 64, 24, 0, "int64"),
    Dtype("int4", 4, 25, 8, "int8"),
    Dtype("uint8", 8, 31, 3, "uint8"),
    Dtype("uint16", 16, 32, 7, "uint16"),
    Dtype("uint32", 32, 33, 15, "uint32"),
    Dtype("uint4", 4, 35, 11, "uint8"),
    Dtype("uint2", 2, 36, 10, "uint8"),
    Dtype("uint1", 1, 37, 9, "uint8"),
    Dtype("uint6", 6, 38, 13, "uint8"),
    Dtype("uint3", 3, 39, 12, "uint8"),
)


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant tensor. `raw`: its bytes as stored, uint8; `key`: equal for constants that are the same bytes."""

    dtype: Dtype
    shape: tuple[int, ...]
    raw: np.ndarray
    key: Hashable

    def read(self) -> np.ndarray:
        """All elements, in the numpy type that holds one."""
        return self._elements(0, math.prod(self.shape)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The elements from `start` to `stop` along the first dimension."""
        row = math.prod(self.shape[1:])
        return self._elements(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def _elements(self, start: int, stop: int) -> np.ndarray:
        if self.dtype.bits < 8:
            return unpack(self.raw, self.dtype.bits, self.dtype.signed, start, stop)
        size = self.dtype.bits // 8
        return self.raw[start * size : stop * size].view(self.dtype.numpy)


def packed_size(dtype: Dtype, shape: tuple[int, ...]) -> int:
    """Bytes that a constant takes, its last byte filled up."""
    return (math.prod(shape) * dtype.bits + 7) // 8


def unpack(raw: np.ndarray, bits: int, signed: bool, start: int, stop: int) -> np.ndarray:
    """Elements `start` to `stop` of packed ones: uint8, or int8 if they are signed (two's complement).

    Each `group` of bytes begins with an element of its own, so all groups are taken apart in the same way.
    """
    shared = math.gcd(bits, 8)
    count, size = 8 // shared, bits // shared  # elements and bytes of a group
    first, last = start // count, -(-stop // count)
    groups = raw[first * size : last * size]
    if short := (last - first) * size - len(groups):
        groups = np.concatenate([groups, np.zeros(short, np.uint8)])
    groups = groups.reshape(-1, size)
    elements = np.empty((len(groups), count), np.uint8)
    up = 8 - bits  # to the top of the byte and down again: the bits above go, a sign spreads
    for i in range(count):
        byte, shift = divmod(i * bits, 8)
        value = groups[:, byte] >> shift
        if shift + bits > 8:
            value |= groups[:, byte + 1] << (8 - shift)
        elements[:, i] = value << up
    flat = elements.reshape(-1)[start - first * count : stop - first * count]
    return (flat.view(np.int8) if signed else flat) >> up


class WeightFile:
    """A weight.bin, mapped into memory; BundleError if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            self._bytes: np.ndarray = np.memmap(path, np.uint8, mode="c") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from None
        if len(self._bytes) < ALIGNMENT or _HEADER.unpack_from(self._bytes.data)[1] != VERSION:
            raise self._damaged(f"it has no header of version {VERSION}")

    def constant(self, offset: int, dtype: Dtype, shape: tuple[int, ...]) -> Constant:
        """The constant whose record is at `offset`; BundleError if what stands there is not of that dtype and size."""
        if offset % ALIGNMENT or offset + ALIGNMENT > len(self._bytes):
            raise self._damaged(f"there is no record at byte {offset} of {len(self._bytes)}")
        sentinel, code, size, start = _RECORD.unpack_from(self._bytes.data, offset)
        if sentinel != SENTINEL:
            raise self._damaged(
                f"the record at byte {offset} begins with {sentinel:#x}, not with {SENTINEL:#x}"
            )
        if code != dtype.blob_code:
            found = next(
                (each.name for each in DTYPES if each.blob_code == code), f"the unknown dtype {code}"
            )
            raise self._damaged(
                f"the record at byte {offset} holds {found} where the program wants {dtype.name}"
            )
        if size != packed_size(dtype, shape):
            raise self._damaged(
                f"the record at byte {offset} holds {size} bytes where {dtype.name} {list(shape)} takes "
                f"{packed_size(dtype, shape)}"
            )
        if start % ALIGNMENT or start + size > len(self._bytes):
            raise self._damaged(
                f"the data at byte {start} of {size} bytes is not in its {len(self._bytes)} bytes"
            )
        raw = np.asarray(self._bytes[start : start + size])
        return Constant(dtype, shape, raw, key=(str(self.path), offset, dtype.name, shape))

    def _damaged(self, why: str) -> BundleError:
        return BundleError(f"{self.path} is cut off or damaged: {why}; export the bundle again")
