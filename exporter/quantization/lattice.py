"""Low-power block quantization: the scales of an output's groups are 1 to 16 times one number.

What Qualcomm's NPU multiplies by at the speed of one scale for each output (QNN's BLOCKWISE_EXPANSION, AIMET's LPBQ:
quic.github.io/aimet-pages, "Low-power blockwise quantization"): a step's 4 bits expand to 8 when the group's small
integer is multiplied in, and the output's float comes last. onnxruntime-qnn takes the largest of an output's scales
for 16 of these units and rounds all others to whole ones. So here the largest is always 16 units, and others are whole
ones: then nothing is rounded, and the NPU has the same weights as every other reader of the integers and scales.
"""

import numpy as np
from numpy.typing import NDArray

from exporter.quantization.tensor import round_scales

UNITS = 16  # of the largest scale
_SHARES = (1.0, 0.93, 0.86, 0.8)  # of the largest scale, tried for 16 units

Array = NDArray[np.float32]


def on_lattice(w: Array, scales: Array, low: int, high: int) -> Array:
    """Scales [rows, groups] of nearly the least squared error, each row's multiples of one number on the portable grid.

    `w` [group, rows · groups]: groups lie across the columns, as in `quantization.rtn`; `scales` [rows, groups]: what
    each would have alone. In every row one is 16 units at least, and none is more.
    """
    columns = w.reshape(len(w), *scales.shape)
    largest = scales.argmax(1)[:, None]
    top = np.take_along_axis(scales, largest, 1)
    best, least = np.empty_like(scales), np.full(len(scales), np.inf, np.float32)
    for share in _SHARES:
        unit = round_scales(top * np.float32(share / UNITS))
        found, error = _units(columns, scales, unit, largest, low, high)
        better = error < least
        best[better], least[better] = found[better], error[better]
    return best


def snapped(scales: Array, row: Array) -> Array:
    """Scales [rows, groups] in whole units of those that `row` [rows, groups] has, its largest staying as they are."""
    top = row.max(1, keepdims=True)
    unit = top / np.float32(UNITS)
    made = np.clip(np.rint(scales / unit), 1, UNITS) * unit
    return np.where(row == top, row, made).astype(np.float32)


def _units(
    w: Array, scales: Array, unit: Array, largest: NDArray[np.int64], low: int, high: int
) -> tuple[Array, Array]:
    """The best of the whole units around each scale, and the rows' squared errors then; the largest has 16."""
    around = np.clip(np.rint(scales / unit), 1, UNITS)
    np.put_along_axis(around, largest, UNITS, 1)
    found, least = around * unit, np.full_like(scales, np.inf)
    for step in (0, -1, 1):
        tried = np.clip(around + np.float32(step), 1, UNITS)
        np.put_along_axis(tried, largest, UNITS, 1)
        made: Array = tried * unit
        error = w - made * np.clip(np.rint(w / made), low, high)
        squares = np.einsum("ijk,ijk->jk", error, error)
        better = squares < least
        found, least = np.where(better, made, found), np.where(better, squares, least)
    return found, least.sum(1)
