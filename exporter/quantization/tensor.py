"""A quantized weight: the integers and scales that every format stores as they are."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.quantization.scheme import Scheme

SMALLEST_SCALE, LARGEST_SCALE = np.float32(2**-17), np.float32(255 * 2**8)


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

    Integers: `data` uint8 [outputs, inputs·bits/8], each stored as q + 2^(bits-1), two 4-bit numbers per
    byte, the lower half first; `scales` float32 [outputs, inputs/group] (or [outputs, 1] per channel);
    the weight is q · scale. Floats: `data` float16 or float32 [outputs, inputs], `scales` None.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    data: NDArray[Any]
    scales: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def integers(self, start: int = 0, stop: int | None = None) -> NDArray[np.int8]:
        """Rows [start, stop) as int8 [rows, inputs]."""
        rows = self.data[start:stop]
        if self.scheme.bits == 8:
            return (rows ^ 0x80).view(np.int8)
        out = np.empty((len(rows), self.shape[1]), np.int8)
        out[:, 0::2] = rows & 0xF
        out[:, 1::2] = rows >> 4
        out -= 8
        return out

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [rows, inputs]."""
        if self.scales is None:
            return self.data[start:stop].astype(np.float32)
        scales = self.scales[start:stop]
        out = self.integers(start, stop).astype(np.float32)
        groups = out.reshape(*scales.shape, -1)
        groups *= scales[..., None]
        return out

    def digest(self) -> str:
        """SHA-256 of scheme, shape, integers and scales: equal if and only if the weight is."""
        state = hashlib.sha256(f"{self.scheme.name} {self.shape}".encode())
        state.update(np.ascontiguousarray(self.data).view(np.uint8).data)
        if self.scales is not None:
            state.update(np.ascontiguousarray(self.scales).view(np.uint8).data)
        return state.hexdigest()


def pack4(biased: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit numbers q + 8, uint8 [rows, inputs] -> [rows, inputs/2], the first of a pair in the lower half."""
    pairs = np.ascontiguousarray(biased).view("<u2")  # one 16-bit operation packs a pair
    return (pairs | (pairs >> 4)).astype(np.uint8)


def vector_digest(values: NDArray[np.float32]) -> str:
    """SHA-256 of a norm's weight or a bias."""
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()
