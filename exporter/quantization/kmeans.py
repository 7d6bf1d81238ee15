"""k-means in one dimension: the few numbers that stand for many with nearly the least squared error.

In one dimension a cluster is an interval, and dynamic programming over where intervals end finds the best ones
(Wang and Song, Ckmeans.1d.dp, The R Journal 3/2, 2011). Over all values of each of a model's thousands of groups
that would take hours; so it runs over bins, and Lloyd's iterations over all values follow, which can only lower
the error (Least squares quantization in PCM, doi.org/10.1109/TIT.1982.1056489). The bins are narrow where the
clusters will be: the best ones are as wide as density^(-1/3) (Panter and Dite, doi.org/10.1109/JRPROC.1951.230248),
so a path that grows with density^(1/3) is cut into equal parts, about as many for each cluster.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_BINS, _PER_CLUSTER = 256, 8  # bins in all or for each cluster, whichever is more
_EXACT = 4  # values for each cluster (or _BINS in all) up to which each value is a bin
_WIDE = 4  # times the bins of an average cluster: wider ones are tried if one of these is among the best
_ITERATIONS = 100

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def cluster(values: Floats, counts: Integers | Floats, clusters: int) -> Floats:
    """Centres, ascending, at most `clusters`, of nearly the least Σ count · (value - nearest centre)².

    `values` [n], finite and ascending; each is there `counts` [n] times, at least once, or counts so much, more than
    nothing. Up to `clusters` values are
    their own centres; up to 256 (or 4 for each cluster) are clustered at the optimum.
    """
    if len(values) <= clusters:
        return values
    middle = values[len(values) // 2]  # far from zero, differences of sums of squares would lose digits
    values = values - middle
    moments = _running(np.stack((counts, counts * values, counts * values**2)))
    edges = _bins(values, counts, clusters)
    ends = edges[_partition(moments[:, edges], clusters)]
    return middle + _lloyd(values, moments, ends)


def _running(values: Floats) -> Floats:
    """Sums of the first 0, 1, ... n values: [..., n] -> [..., n + 1]."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def _bins(values: Floats, counts: Integers | Floats, clusters: int) -> Integers:
    """Where bins begin among `values`, and the end."""
    if len(values) <= max(_BINS, _EXACT * clusters):
        return np.arange(len(values) + 1)
    bins = min(max(_BINS, _PER_CLUSTER * clusters), len(values) * 3 // 4)  # most of them will hold a value
    steps = np.cbrt(np.diff(values) ** 2 * (counts[1:] + counts[:-1]))
    steps /= steps.max()
    # A gap needs no bins within: one so wide that it would hold some is shortened to the width of one
    while (short := np.minimum(steps, steps.sum() / bins)).sum() < 0.99 * steps.sum():
        steps = short
    path = _running(short)
    places = (path * (bins / path[-1])).astype(np.int64)
    return np.concatenate(([0], np.flatnonzero(np.diff(places)) + 1, [len(values)]))


def _partition(moments: Floats, clusters: int) -> Integers:
    """The best way to part bins into `clusters` intervals: the edges [clusters + 1] where they begin and end.

    `moments` [3, edges]: number, sum and sum of squares of all values below each edge.
    """
    bins = moments.shape[1] - 1
    widest = min(bins, _WIDE * bins // clusters)
    while True:
        ends = _narrow_partition(moments, clusters, widest)
        if widest == bins or np.diff(ends).max() < widest:
            return ends
        widest = min(bins, 2 * widest)


def _narrow_partition(moments: Floats, clusters: int, widest: int) -> Integers:
    """`_partition` among those where no interval is wider than `widest` bins."""
    bins = moments.shape[1] - 1

    def before(rows: NDArray[Any]) -> NDArray[Any]:
        """[..., widest + edges] -> [..., widest, edges]: line i has what lies widest - i places before each edge."""
        return sliding_window_view(rows, bins + 1, axis=-1)[..., :widest, :]

    # Before the first edge there is nothing: a number below zero keeps the division from failing
    padding = np.tile([[-1.0], [0.0], [0.0]], widest)
    number, total, square = moments[:, None] - before(np.concatenate((padding, moments), axis=1))
    spread = moments[2, -1] - moments[1, -1] ** 2 / moments[0, -1]
    costs = ((square - total**2 / number) / spread).astype(np.float32)  # of the interval between both edges
    # The least error of all below each edge (and infinitely much before the first) in 0, 1, ... clusters
    errors = np.full((clusters + 1, widest + bins + 1), np.inf, np.float32)
    errors[0, widest] = 0
    earlier, sums = before(errors), np.empty_like(costs)
    for i in range(clusters):
        errors[i + 1, widest:] = np.add(earlier[i], costs, out=sums).min(axis=0)
    ends = [bins]
    for i in reversed(range(clusters)):
        end = ends[-1]
        ends.append(end - widest + int(np.argmin(earlier[i, :, end] + costs[:, end])))
    return np.array(ends[::-1])


def _lloyd(values: Floats, moments: Floats, ends: Integers) -> Floats:
    """Centres of the clusters between `ends`, which move until each value is in the cluster of its nearest centre."""
    centres = values
    for _ in range(_ITERATIONS):
        number, total = np.diff(moments[:2, ends], axis=1)
        centres = total[number > 0] / number[number > 0]
        middles = (centres[1:] + centres[:-1]) / 2
        moved = np.concatenate(([0], np.searchsorted(values, middles, "right"), [len(values)]))
        if np.array_equal(moved, ends):
            break
        ends = moved
    return centres
