"""Round to nearest: the integers that are nearest once the scales are chosen.

Two ways to choose a scale: `absmax` maps the largest weight of a group to the largest integer; `mse`
looks for the scale whose rounded group has the least squared error. For integers q, the best scale is
Σqw / Σq², and the error left is Σw² - (Σqw)² / Σq²; so a few starting scales are tried, and the one whose
integers explain most of the group wins with the scale that suits them best (weighted least squares as in
llama.cpp's Q4_0, github.com/ggml-org/llama.cpp, ggml-quants.c, make_qx_quants).
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Matrix
from exporter.errors import CheckpointError, RecipeError
from exporter.quantization.lattice import on_lattice
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import LARGEST_SCALE, QuantizedTensor, pack, round_scales, width
from exporter.quantization.threads import threads
from exporter.safetensors import to_float32

Quantized = tuple[QuantizedTensor, float, float]  # with its relative squared error and largest error
_BLOCK = 1 << 19  # weights at a time: smaller blocks wait for the interpreter, larger ones for memory
_TRIALS = (1.05, 0.98, 0.92, 0.87, 0.82, 0.76, 0.70)  # starting scales, in absmax / largest integer
_MORE_TRIALS = (
    0.64,
    0.58,
    0.52,
    0.46,
    0.40,
    0.34,
)  # where the largest is far out: it is of many, or steps are large
_LARGE, _FEW = 256, 7


def quantize_mse(matrix: Matrix, scheme: Scheme) -> Quantized:
    """Round to nearest with the scales of least squared error (floats are only converted)."""
    return quantize_nearest(matrix, scheme, least_error(scheme))


def mse_scales(w: NDArray[np.float32], scheme: Scheme) -> NDArray[np.float32]:
    """Scales [n] as `quantize_mse` finds them, of groups that lie across the columns of `w` [group, n].

    The weights must be finite, and such that the scales can hold them.
    """
    high = 2 ** (scheme.bits - 1) - 1
    scales = np.empty(w.shape[1], np.float32)
    step = max(1, _BLOCK // len(w))
    for start in range(0, len(scales), step):
        part = w[:, start : start + step]
        absmax = np.maximum(part.max(axis=0), -part.min(axis=0))
        scales[start : start + step] = least_error(scheme)(part, absmax, -high - 1, high)
    return scales


def quantize_absmax(matrix: Matrix, scheme: Scheme) -> Quantized:
    """Round to nearest with absmax scales: the quickest."""
    return quantize_nearest(matrix, scheme, _absmax)


def least_error(scheme: Scheme) -> Callable[..., NDArray[np.float32]]:
    """How the scales of least squared error are chosen; of 8 bits absmax's are as good."""
    return _absmax if scheme.bits == 8 else _search


def quantize_nearest(matrix: Matrix, scheme: Scheme, choose: Callable[..., NDArray[np.float32]]) -> Quantized:
    """The nearest integers at the scales that `choose` finds, of groups [group, n] that lie across columns, from the
    largest weight of each [n] and the ends of the integers (floats are only converted).

    Row blocks are worked on in parallel; each is independent of the others.
    """
    outputs, inputs = matrix.shape
    if scheme.is_integer:
        groups = inputs // scheme.group if scheme.group else 1
        data = np.empty((outputs, width(inputs, scheme.bits)), np.uint8)
        scales: NDArray[np.float32] | None = np.empty((outputs, groups), np.float32)
    else:
        data, scales = np.empty(matrix.shape, np.float16 if scheme.bits == 16 else np.float32), None

    def block(start: int) -> tuple[float, float, float]:
        stop = min(start + step, outputs)
        stored = matrix.rows(start, stop)
        if scales is None:
            return _convert(matrix.name, stored, data[start:stop])
        packed, scales[start:stop], figures = _round(matrix.name, stored, scheme, choose)
        data[start:stop] = packed
        return figures

    step = max(1, _BLOCK // inputs)
    figures = np.array(list(threads().map(block, range(0, outputs, step))))
    squared, power, worst = figures[:, 0].sum(), figures[:, 1].sum(), figures[:, 2].max()
    tensor = QuantizedTensor(matrix.name, scheme, matrix.shape, data, scales)
    # Squares of values below 1e-23 are zero in float32: then none of them is left, or all are kept
    return tensor, float(squared / power) if power else float(worst > 0), float(worst)


def _convert(name: str, stored: NDArray[Any], out: NDArray[Any]) -> tuple[float, float, float]:
    """Store floats as floats; Σ(w-q)², Σw², max|w-q|."""
    weights = to_float32(stored)
    largest = np.abs(weights).max(initial=0)
    if not np.isfinite(largest):
        raise not_finite(name)
    if largest > np.finfo(out.dtype).max:
        raise RecipeError(
            f"{name} has weights above 65504, which float16 cannot hold: use int8, int4 or fp32"
        )
    out[...] = weights
    difference = out.astype(np.float32)  # then subtracted in place: twice as fast as mixing dtypes
    difference -= weights
    flat, difference = weights.ravel(), difference.ravel()
    return float(difference @ difference), float(flat @ flat), float(np.abs(difference).max(initial=0))


def _round(
    name: str, stored: NDArray[Any], scheme: Scheme, choose: Callable[..., NDArray[np.float32]]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], tuple[float, float, float]]:
    """Scales and packed integers of a row block [rows, inputs], and its error figures as `_convert`.

    Groups lie across the columns here, [group, number of groups]: a sum over a group is then a sum of
    long vectors, which is what processors and numpy do fast.
    """
    rows, inputs = stored.shape
    size = scheme.group or inputs
    across = stored.reshape(-1, size).T
    w = _scratch(0, across.shape)
    if stored.dtype == np.uint16:  # bfloat16: the upper half of a float32
        bits = w.view(np.uint32)
        np.copyto(bits, across)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(w, across)
    top, bottom = w.max(axis=0), w.min(axis=0)
    absmax = np.maximum(top, -bottom)
    if not np.isfinite(absmax).all():
        raise not_finite(name)
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if absmax.max() > LARGEST_SCALE * high:
        raise RecipeError(
            f"{name} has weights above {LARGEST_SCALE * high:.0f}, which {scheme.bits} bits with portable scales "
            "cannot hold: use fp32"
        )
    scales = choose(w, absmax, low, high)
    if scheme.low_power:
        scales = on_lattice(w, scales.reshape(rows, -1), low, high).reshape(-1)
    q = rounded(w, scales, low, high, _scratch(1, w.shape))
    error = np.multiply(q, scales, out=_scratch(2, w.shape))
    np.subtract(w, error, out=error)
    flat, flat_error = w.ravel(), error.ravel()
    figures = (
        float(flat_error @ flat_error),
        float(flat @ flat),
        float(max(error.max(initial=0), -error.min(initial=0))),
    )
    q -= low
    biased = np.ascontiguousarray(q.astype(np.uint8).T).reshape(rows, inputs)
    return pack(biased, scheme.bits), scales.reshape(rows, -1), figures


def rounded(
    w: NDArray[np.float32], scales: NDArray[np.float32], low: int, high: int, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The integers (as float32) nearest to w / scales. [group, n], scales [n]."""
    np.multiply(w, np.float32(1) / scales, out=out)
    np.rint(out, out=out)
    return np.clip(out, low, high, out=out)


def _absmax(w: NDArray[np.float32], absmax: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
    return round_scales(absmax / np.float32(high))


def _search(w: NDArray[np.float32], absmax: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
    """Scales [n] of least squared error for groups [group, n]; see the module's text."""
    best = round_scales(absmax / np.float32(high))
    explained = np.full_like(absmax, -1)
    far_out = len(w) > _LARGE or high < _FEW
    for trial in (*_TRIALS, *_MORE_TRIALS) if far_out else _TRIALS:
        q = rounded(w, np.maximum(absmax * np.float32(trial / high), 1e-30), low, high, _scratch(1, w.shape))
        qw = np.einsum("ij,ij->j", q, w)
        qq = np.einsum("ij,ij->j", q, q)
        score = qw * qw / np.maximum(qq, np.float32(1e-30))
        better = score > explained
        np.copyto(explained, score, where=better)
        np.copyto(best, qw / np.maximum(qq, np.float32(1e-30)), where=better)
    return round_scales(best)


def not_finite(name: str) -> CheckpointError:
    """What is raised for weights that are no numbers."""
    return CheckpointError(f"{name} has NaN or infinite values: the checkpoint is damaged, download it again")


_local = threading.local()


def _scratch(which: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One of this thread's buffers, its contents undefined: allocating anew for each block costs page faults."""
    size = int(np.prod(shape))
    buffers: dict[int, NDArray[np.float32]] = _local.__dict__.setdefault("buffers", {})
    if which not in buffers or buffers[which].size < size:
        buffers[which] = np.empty(size, np.float32)
    return buffers[which][:size].reshape(shape)
