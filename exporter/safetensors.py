"""Read tensors from safetensors files, slice by slice, trusting nothing in the header.

Plain positioned reads: a memory map of a whole checkpoint would count as the process's memory, and the
library's numpy reader does not know bfloat16. Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import CheckpointError

_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}
_OTHER = {"F64", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "U32", "U64"}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: `offset` bytes into `file`, row-major, dtype F32, F16 or BF16 (or one not readable)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file; CheckpointError for anything that breaks the format.

    The data must be covered exactly: no overlap, no hole, nothing beyond the end, nothing left over.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{path} is cut off or not a safetensors file: download it again")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a broken header ({error}): download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a broken header (not a table): download it again")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    end = start
    for tensor, stop in sorted(tensors.values(), key=lambda pair: (pair[0].offset, pair[1])):
        if tensor.offset != end:
            how = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.name} {how}: the file is damaged, download it again"
            )
        end = stop
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes where its header describes {end}: it is cut off or damaged, download it again"
        )
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{key!r} stands twice")
        table[key] = value
    return table


def _entry(path: Path, name: str, entry: Any, start: int) -> tuple[StoredTensor, int]:
    """Check one header entry; returns the tensor and where its bytes end in the file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: the header's entry for {name} is malformed: download it again"
        ) from None
    if (
        any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**63 for n in numbers)
        or begin > end
    ):
        raise CheckpointError(
            f"{path}: the header's entry for {name} has impossible numbers: download it again"
        )
    if not isinstance(dtype, str) or (dtype not in _WIDTH and dtype not in _OTHER):
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {dtype!r}: download it again")
    count = 1
    for n in shape:
        count *= n
    if dtype in _WIDTH and count * _WIDTH[dtype] != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and {dtype} does not fit its {end - begin} bytes: "
            "the file is damaged, download it again"
        )
    return StoredTensor(name, path, dtype, tuple(shape), start + begin), start + end


class SafetensorsReader:
    """Positioned reads from several files; safe to call from many threads."""

    def __init__(self, tensors: Iterable[StoredTensor]) -> None:
        self._files = {path: os.open(path, os.O_RDONLY) for path in {t.file for t in tensors}}

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as stored: float32, float16, or uint16 that holds bfloat16's bits."""
        width = _WIDTH[tensor.dtype]
        columns = 1
        for n in tensor.shape[1:]:
            columns *= n
        out = np.empty(
            (stop - start, *tensor.shape[1:]), {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
        )
        view, offset = memoryview(out.data).cast("B"), tensor.offset + start * columns * width
        while view:
            done = os.preadv(self._files[tensor.file], [view], offset)
            if not done:
                raise CheckpointError(
                    f"{tensor.file} ended while {tensor.name} was read: it changed meanwhile"
                )
            view, offset = view[done:], offset + done
        return out


def to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """What `SafetensorsReader.rows` gives, as float32; exact for all three dtypes."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
