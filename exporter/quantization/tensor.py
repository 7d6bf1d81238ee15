"""A quantized weight: the integers and scales (or a table) that every format stores as they are."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.quantization.scheme import Scheme

SMALLEST_SCALE, LARGEST_SCALE = np.float32(2**-17), np.float32(255 * 2**8)
_ROWS = 64  # looked up at a time


def round_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers that float32, float16 and bfloat16 all hold: 8 significant bits, >= 2^-17, < 65504.

    Ties go to even, as bfloat16 rounds. Zero and denormal scales become the smallest one.
    """
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.clip(rounded.view(np.float32), SMALLEST_SCALE, LARGEST_SCALE)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix of `shape` (outputs, inputs).

    Integers: `data` uint8, each stored as q + 2^(bits-1) in a byte, [outputs, inputs], but two 4-bit numbers per
    byte, the lower half first, [outputs, inputs/2]; `scales` float32 [outputs, inputs/group] (or [outputs, 1] per
    channel); the weight is q · scale. Tables: `data` uint8 [outputs, inputs], an index in each byte, but 4-bit ones
    packed as above, [outputs, ⌈inputs/2⌉]; `tables` float32 [groups, 2^bits], ascending, every entry exact in
    float16; the weight is the entry of its output's group. Floats: `data` float16 or float32 [outputs, inputs].
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    data: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    tables: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a format stores, packed to the bit."""
        return self.scheme.nbytes(self.shape)

    def integers(self, start: int = 0, stop: int | None = None) -> NDArray[np.int8]:
        """Rows [start, stop) as int8 [rows, inputs]."""
        rows = self.data[start:stop]
        if self.scheme.bits == 8:
            return (rows ^ 0x80).view(np.int8)
        if self.scheme.bits == 4:
            rows = self._unpack4(rows)
        return rows.view(np.int8) - np.int8(2 ** (self.scheme.bits - 1))

    def indices(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Rows [start, stop) as indices into their groups' tables, uint8 [rows, inputs]."""
        rows = self.data[start:stop]
        return self._unpack4(rows) if self.scheme.bits == 4 else rows

    def _unpack4(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        out = np.empty((len(rows), self.shape[1]), np.uint8)
        out[:, 0::2] = rows & 0xF
        out[:, 1::2] = rows[:, : self.shape[1] // 2] >> 4
        return out

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [rows, inputs]."""
        if self.tables is not None:
            return self._look_up(self.tables, *slice(start, stop).indices(self.shape[0])[:2])
        if self.scales is None:
            return self.data[start:stop].astype(np.float32)
        scales = self.scales[start:stop]
        out = self.integers(start, stop).astype(np.float32)
        groups = out.reshape(*scales.shape, -1)
        groups *= scales[..., None]
        return out

    def _look_up(self, tables: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """Group by group, some rows at a time: numpy widens indices to 8 bytes each before it uses them."""
        out = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        group, row = self.scheme.group or self.shape[0], start
        while row < stop:
            end = min(stop, (row // group + 1) * group, row + _ROWS)
            out[row - start : end - start] = tables[row // group][self.indices(row, end)]
            row = end
        return out

    def digest(self) -> str:
        """SHA-256 of scheme, shape, integers and scales or tables: equal if and only if the weight is."""
        state = hashlib.sha256(f"{self.scheme.name} {self.shape}".encode())
        for part in (self.data, self.scales, self.tables):
            if part is not None:
                state.update(np.ascontiguousarray(part).view(np.uint8).data)
        return state.hexdigest()


def pack(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of so many bits, uint8 [rows, inputs], as `QuantizedTensor.data` has them, [rows, width]."""
    return pack4(numbers) if bits == 4 else numbers


def width(inputs: int, bits: int) -> int:
    """Bytes of a row that `pack` gives."""
    return (inputs + 1) // 2 if bits == 4 else inputs


def pack4(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit numbers, uint8 [rows, inputs] -> [rows, ⌈inputs/2⌉], the first of a pair in the lower half."""
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    pairs = np.ascontiguousarray(numbers).view("<u2")  # one 16-bit operation packs a pair
    return (pairs | (pairs >> 4)).astype(np.uint8)


def vector_digest(values: NDArray[np.float32]) -> str:
    """SHA-256 of a norm's weight or a bias."""
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()
