"""Lookup tables: every weight becomes the nearest of 2^bits numbers, which k-means finds for each group of outputs.

A table for some output channels is found from exactly their weights; one table for a whole weight from a histogram
of it, so that the weight is never in memory: two passes over its rows.

Where the inputs of a weight are known on a text, an error costs as much as its input's mean square: the diagonal of the
Hessian weighs each weight's share in its table, as SqueezeLLM's k-means is weighed by the loss's own second derivatives
(Kim et al. 2023, arxiv.org/abs/2306.07629, 4.1). The nearest entry is still the best one.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Matrix
from exporter.errors import RecipeError
from exporter.quantization.kmeans import cluster
from exporter.quantization.rtn import Quantized, not_finite
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor, pack, width
from exporter.quantization.threads import threads
from exporter.safetensors import to_float32

_BLOCK = 1 << 16  # weights at a time: what the processor's caches hold
_COARSE = 12  # bits of a float32 that a histogram leaves out
_LARGEST = 65504  # of float16

Figures = tuple[float, float, float]  # Σ(w-q)², Σw², max|w-q|
Floats = NDArray[np.float64]
Histogram = tuple[
    Floats, NDArray[np.int64] | Floats
]  # ascending values, and how often or how much each counts


def quantize_kmeans(matrix: Matrix, scheme: Scheme, importance: Floats | None = None) -> Quantized:
    """The nearest entries of tables with nearly the least squared error (see `quantization.kmeans`).

    `importance`: what an error in each input's weights counts, float64 [inputs], all above zero; None: the same.
    Ties go to the lower entry. A table with fewer different entries than it has room for repeats its last, which no
    weight then uses. RecipeError for weights that float16 cannot hold.
    """
    outputs, inputs = matrix.shape
    tables = np.empty((outputs // scheme.group if scheme.group else 1, 2**scheme.bits), np.float32)
    data = np.empty((outputs, width(inputs, scheme.bits)), np.uint8)
    rows = scheme.group or max(1, _BLOCK // inputs)
    step = rows * max(1, _BLOCK // (rows * inputs))
    if not scheme.group:
        tables[0] = _table(_whole_histogram(matrix, importance), scheme.bits)

    def block(start: int) -> Figures:
        stored = matrix.rows(start, min(start + step, outputs))
        return _total(part(start + row, stored[row : row + rows]) for row in range(0, len(stored), rows))

    def part(start: int, stored: NDArray[Any]) -> Figures:
        if scheme.group:
            tables[start // scheme.group] = _table(_histogram(matrix.name, stored, importance), scheme.bits)
        table, weights = tables[start // (scheme.group or outputs)], to_float32(stored)
        indices = nearest(weights, table)
        data[start : start + len(stored)] = pack(indices, scheme.bits)
        return _figures(weights, table[indices])

    squared, power, worst = _total(threads().map(block, range(0, outputs, step)))
    tensor = QuantizedTensor(matrix.name, scheme, matrix.shape, data, tables=tables)
    return tensor, squared / power if power else float(worst > 0), worst


def nearest(weights: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Indices of the nearest entries of an ascending table, the lower one of two as near; uint8, as `weights`.

    Only the last entry may be repeated. The index is how many of the middles between entries a weight is above:
    exact, and quicker than a search, which processors cannot predict.
    """
    entries = np.unique(table.astype(np.float64))
    middles = (entries[1:] + entries[:-1]) / 2  # exact
    limits = middles.astype(np.float32)  # then rounded down: the same float32 weights are above
    limits = np.where(limits > middles, np.nextafter(limits, np.float32(-np.inf)), limits)
    indices = np.zeros(weights.shape, np.uint8)
    above = np.empty(weights.shape, np.bool_)
    for limit in limits:
        np.greater(weights, limit, out=above)
        indices += above.view(np.uint8)
    return indices


def _table(histogram: Histogram, bits: int) -> NDArray[np.float32]:
    """2^bits ascending numbers that float16 holds, the last repeated where fewer are needed."""
    centres = cluster(*histogram, 2**bits)
    entries = np.unique(centres.astype(np.float16)) + np.float16(0)  # and no -0
    return np.pad(entries.astype(np.float32), (0, 2**bits - len(entries)), mode="edge")


def _histogram(name: str, stored: NDArray[Any], importance: Floats | None) -> Histogram:
    """The values among weights [rows, inputs] as they are stored; those that no table can hold are refused."""
    kind = np.uint16 if stored.dtype == np.float16 else stored.dtype  # integers are sorted faster
    bits = stored.reshape(-1).view(kind)
    if importance is None:
        bits = np.sort(bits)
    else:
        places = np.argsort(bits, kind="stable")
        bits = bits[places]
    starts = np.concatenate(([0], np.flatnonzero(bits[1:] != bits[:-1]) + 1, [len(bits)]))
    values = to_float32(bits[starts[:-1]].view(stored.dtype)).astype(np.float64)
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise not_finite(name)
    if largest > _LARGEST:
        raise RecipeError(
            f"{name} has weights above {_LARGEST}, which a table of float16 cannot hold: use int8, int4 or fp32"
        )
    if importance is None:
        counts = np.diff(starts)
    else:
        counts = np.add.reduceat(importance[places % len(importance)], starts[:-1])
    order = np.argsort(values, kind="stable")
    return values[order], counts[order]


def _whole_histogram(matrix: Matrix, importance: Floats | None) -> Histogram:
    """The values of a whole weight, by the upper 20 bits of their float32: all bits that float16 and bfloat16 have.

    Float32 values that share those, 2^-11 of their size apart at most, stand there as their mean.
    """
    outputs, inputs = matrix.shape
    step = max(1, 8 * _BLOCK // inputs)

    def block(start: int) -> tuple[NDArray[Any], Histogram]:
        stored = matrix.rows(start, min(start + step, outputs))
        values, counts = _histogram(matrix.name, stored, importance)
        places = values.astype(np.float32).view(np.uint32) >> _COARSE
        starts = np.concatenate(([0], np.flatnonzero(places[1:] != places[:-1]) + 1))
        return places[starts], (np.add.reduceat(values * counts, starts), np.add.reduceat(counts, starts))

    sums, counts = (np.zeros(1 << (32 - _COARSE)) for _ in range(2))
    for places, (some_sums, some_counts) in threads().map(block, range(0, outputs, step)):
        sums[places] += some_sums
        counts[places] += some_counts
    present = counts > 0
    values, counts = sums[present] / counts[present], counts[present]
    order = np.argsort(values, kind="stable")
    return values[order], counts[order]


def _figures(weights: NDArray[np.float32], found: NDArray[np.float32]) -> Figures:
    """Of weights and what was found for them, which is overwritten."""
    error = np.subtract(weights, found, out=found).reshape(-1)
    flat = weights.reshape(-1)
    return float(error @ error), float(flat @ flat), float(np.abs(error, out=error).max())


def _total(figures: Iterable[Figures]) -> Figures:
    """The figures of all parts together."""
    squared, power, worst = zip(*figures, strict=True)
    return sum(squared), sum(power), max(worst)
