"""Weights of a Core ML program, compressed or not: some rows of them at a time.

A weight of several hundred megabytes is never whole in float32: who multiplies by it asks for blocks of rows. What
was decompressed is kept, in the dtype that the program declares for it, as long as a budget of bytes allows.
Semantics: coremltools' iOS 18 operations constexpr_* (converters/mil/mil/ops/defs/iOS18/compression.py).
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from runtimes.mil.storage import Constant

BLOCK = 1 << 18  # elements decompressed at once: their float32 stays in a core's cache
TORCH = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,  # torch has no arithmetic for these two: the next that holds all their values
    "uint32": torch.int64,
}


class Weight(Protocol):
    """A constant tensor of at least one dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...]: a part along the first dimension."""
        ...


class Stored:
    """A weight as it lies in the file, or already in memory."""

    def __init__(self, constant: Constant) -> None:
        self._constant = constant
        self.shape, self.dtype = constant.shape, TORCH[constant.dtype.name]

    def rows(self, start: int, stop: int) -> Tensor:
        return _as_torch(self._constant.rows(start, stop), self.dtype)


class Computed:
    """A tensor that an operation gave, where a weight is wanted."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.shape, self.dtype = tuple(values.shape), values.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self._values[start:stop]


class ShiftScale:
    """constexpr_blockwise_shift_scale: scale * (data - offset), one scale for each block along every dimension.

    The product of a float16 scale and an integer of at most 8 bits is exact in float32, and rounded once. ValueError
    if the shapes do not fit.
    """

    def __init__(self, data: Weight, scale: Weight, offset: Weight | None = None) -> None:
        self._data, self._scale, self._offset = data, scale, offset
        self.shape, self.dtype = data.shape, scale.dtype
        self._block = _block_shape(data.shape, scale.shape)
        if offset is not None and offset.shape != scale.shape:
            raise ValueError(f"offsets {list(offset.shape)} for scales {list(scale.shape)}")

    def rows(self, start: int, stop: int) -> Tensor:
        sizes = [size for pair in zip(self._scale.shape[1:], self._block[1:], strict=True) for size in pair]
        values = self._data.rows(start, stop).float().reshape(stop - start, *sizes)
        if self._offset is not None:
            values = values - self._spread(self._offset, start, stop)
        return (values * self._spread(self._scale, start, stop)).to(self.dtype).reshape(-1, *self.shape[1:])

    def _spread(self, table: Weight, start: int, stop: int) -> Tensor:
        """[rows or 1, blocks, 1, blocks, 1, ...]: one value for each row and block, to be broadcast."""
        block = self._block[0]
        values = table.rows(start // block, -(-stop // block)).float()
        values = values.reshape(len(values), *(size for blocks in table.shape[1:] for size in (blocks, 1)))
        if block > 1 and len(values) > 1:
            values = values.repeat_interleave(block, 0)[start % block :][: stop - start]
        return values


class LookUp:
    """constexpr_lut_to_dense: each index stands for an entry of its group's table, a number or a vector of some.

    `lut`: [groups along each dimension of `indices`..., entries, vector]; `vector_axis`: the dimension along which
    a vector's numbers lie. ValueError if the shapes do not fit.
    """

    def __init__(self, indices: Weight, lut: Weight, vector_axis: int = 0) -> None:
        groups, (entries, vector) = lut.shape[:-2], lut.shape[-2:]
        self._indices, self._axis, self._vector = indices, vector_axis % len(indices.shape), vector
        self._block = _block_shape(indices.shape, groups)
        self._strides = [entries * math.prod(groups[i + 1 :]) for i in range(len(groups))]
        self._table, self._entries = lut, entries
        shape = list(indices.shape)
        shape[self._axis] *= vector
        self.shape, self.dtype = tuple(shape), lut.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        step = self._vector if self._axis == 0 else 1  # rows that one row of indices gives
        first, last = start // step, -(-stop // step)
        indices = self._indices.rows(first, last).int()
        if int(indices.max()) >= self._entries:
            raise ValueError(f"index {int(indices.max())} into a table of {self._entries}")
        for axis, (block, stride) in enumerate(zip(self._block, self._strides, strict=True)):
            begin, end = (first, last) if axis == 0 else (0, indices.shape[axis])
            group = torch.arange(begin, end, dtype=torch.int32) // block * stride
            indices = indices + group.reshape(-1, *[1] * (indices.dim() - axis - 1))
        entries = self._entry_rows.index_select(0, indices.reshape(-1)).reshape(*indices.shape, self._vector)
        values = entries.movedim(-1, self._axis + 1).flatten(self._axis, self._axis + 1)
        return values[start - first * step : stop - first * step]

    @cached_property
    def _entry_rows(self) -> Tensor:
        return whole(self._table).reshape(-1, self._vector)


class Sparse:
    """constexpr_sparse_to_dense: the next of the values where `mask` is 1, else 0.

    Where a row's values begin is known only when all rows before are counted, so it is held whole once asked for.
    """

    def __init__(self, nonzero_data: Weight, mask: Weight) -> None:
        self._values, self._mask = nonzero_data, mask
        self.shape, self.dtype = mask.shape, nonzero_data.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self._dense[start:stop]

    @cached_property
    def _dense(self) -> Tensor:
        mask, values = whole(self._mask).bool(), whole(self._values)
        if int(mask.sum()) != len(values):
            raise ValueError(f"{len(values)} values for a mask of {int(mask.sum())} ones")
        dense = torch.zeros(self.shape, dtype=self.dtype)
        dense[mask] = values
        return dense


class Budget:
    """Bytes that may still be used for decompressed weights."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there is that much left; it is taken then."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Kept:
    """A compressed weight that is decompressed once if the budget allows, and else each time."""

    def __init__(self, source: Weight, budget: Budget) -> None:
        self.source, self._budget = source, budget
        self.shape, self.dtype = source.shape, source.dtype
        self._values: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        if self._values is None and self._budget.take(math.prod(self.shape) * self.dtype.itemsize):
            self._values = torch.empty(self.shape, dtype=self.dtype)
            for first, last in blocks(self):
                self._values[first:last] = self.source.rows(first, last)
        return self.source.rows(start, stop) if self._values is None else self._values[start:stop]


def blocks(weight: Weight) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of pieces of about `BLOCK` elements."""
    count = weight.shape[0]
    step = max(1, BLOCK // max(1, math.prod(weight.shape[1:])))
    return ((start, min(start + step, count)) for start in range(0, count, step))


def whole(weight: Weight) -> Tensor:
    """All rows."""
    return weight.rows(0, weight.shape[0])


def select(weight: Weight, indices: Tensor) -> Tensor:
    """[*indices.shape, *weight.shape[1:]]: the rows that `indices` name; IndexError if there is no such row.

    An embedding's rows are few: they are not worth decompressing all of it.
    """
    source = weight.source if isinstance(weight, Kept) else weight
    wanted, places = indices.reshape(-1).unique(return_inverse=True)
    rows = wanted.tolist()
    if rows and not 0 <= rows[0] <= rows[-1] < source.shape[0]:
        raise IndexError(f"a row of {rows[0]} to {rows[-1]} is not among {source.shape[0]}")
    found = torch.cat([source.rows(row, row + 1) for row in rows])
    return found[places].reshape((*indices.shape, *source.shape[1:]))


def tensor(constant: Constant) -> Tensor:
    """A constant as a tensor, over the same memory if torch has its dtype."""
    return _as_torch(constant.read(), TORCH[constant.dtype.name])


def _as_torch(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(values)).to(dtype)


def _block_shape(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    """Elements that share a value, along each dimension."""
    if len(shape) != len(groups) or any(g < 1 or size % g for size, g in zip(shape, groups, strict=True)):
        raise ValueError(f"{list(groups)} groups do not divide a tensor {list(shape)}")
    return tuple(size // g for size, g in zip(shape, groups, strict=True))
