"""Hidden states of a text in a file, of which a batch is in memory: all tokens behind each other, float32 [tokens,
hidden], as they cross from one layer to the next."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TOKENS = 1024  # that go through a layer together, where their sequences are of one length


def batches(lengths: Iterable[int]) -> Iterator[slice]:
    """The places of sequences in a row that are of one length, about `TOKENS` tokens of them.

    >>> list(batches([512, 512, 512, 7]))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    start = 0
    for length, same in groupby(lengths):
        end, most = start + len(list(same)), max(1, TOKENS // length)
        for first in range(start, end, most):
            yield slice(first, min(first + most, end))
        start = end


def write(file: Path, states: Iterable[Tensor]) -> None:
    """Write batches of hidden states, float32 [..., hidden], one behind the other."""
    with open(file, "wb") as out:
        for x in states:
            out.write(x.numpy().tobytes())


def read(file: Path, hidden: int, lengths: Sequence[int]) -> Iterator[Tensor]:
    """What `write` wrote of sequences of these lengths, in batches [sequences, length, hidden] (see `batches`)."""
    states, row = np.memmap(file, np.float32, "r").reshape(-1, hidden), 0
    for some in batches(lengths):
        count, length = some.stop - some.start, lengths[some.start]
        part = states[row : row + count * length].reshape(count, length, hidden)
        yield torch.from_numpy(part.copy())
        row += count * length
