"""Orthogonal matrices that spread every number over all places, generated from a seed and never stored.

A Hadamard matrix H has entries ±1 and orthogonal rows. Q = diag(signs) H / √n, its signs random, is what QuaRot
(Ashkboos et al. 2024, arxiv.org/abs/2404.00456, section 3) rotates with. H is the Kronecker product of one of Paley's
(R. Paley, On Orthogonal Matrices, 1933), of the smallest order that takes in all odd factors of n, and Sylvester's of a
power of two. Where Paley made none that small, the odd factor gets the cosine transform, which is orthogonal too.

All is done by sums of float32 rows in a fixed order: the same bits on every machine, however many rows at a time.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_LARGEST = 128  # order of Paley's that is tried: its product costs so many operations for each number
_NUMBERS = 1 << 20  # that are turned at a time


class Hadamard:
    """The Q of an order and a seed.

    >>> q = Hadamard(12).columns(np.eye(12, dtype=np.float32))
    >>> np.allclose(q @ q.T, np.eye(12), atol=1e-6), np.allclose(abs(q), 12**-0.5)
    (True, True)
    """

    def __init__(self, order: int, seed: int = 0) -> None:
        self.order = order
        self._factor = _odd_part(order)
        digest = hashlib.shake_256(f"{order} {seed}".encode()).digest(-(-order // 8))
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:order]
        size = 1 / math.sqrt(order // len(self._factor))
        self._signs = np.where(bits, np.float32(size), np.float32(-size))[:, None]

    def columns(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x Q for each `order` columns of x [rows, columns]: what a weight becomes whose input is turned."""
        out = np.empty(x.shape, np.float32)
        step = max(1, _NUMBERS // x.shape[1])
        for start in range(0, len(x), step):
            part = np.array(x[start : start + step].T, np.float32, order="C")
            out[start : start + step] = self._turn(part).T
        return out

    def rows(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Qᵀ x for each `order` rows of x [rows, columns]: what a weight becomes whose output is turned."""
        out = np.empty(x.shape, np.float32)
        step = max(1, _NUMBERS // len(x))
        for start in range(0, x.shape[1], step):
            part = np.array(x[:, start : start + step], np.float32, order="C")
            out[:, start : start + step] = self._turn(part)
        return out

    def _turn(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Qᵀ x of [rows, columns], which is overwritten."""
        odd, columns = len(self._factor), x.shape[1]
        power = self.order // odd
        # What is infinite or NaN becomes NaN: whoever quantizes it says so
        with np.errstate(invalid="ignore", over="ignore"):
            x.reshape(-1, self.order, columns)[...] *= self._signs
            half = 1
            while half < power:
                pairs = x.reshape(-1, 2, half * columns)
                difference = pairs[:, 0] - pairs[:, 1]
                pairs[:, 0] += pairs[:, 1]
                pairs[:, 1] = difference
                half *= 2
            if odd == 1:
                return x
            parts = x.reshape(-1, odd, power * columns)
            out = np.zeros_like(parts)
            for i in range(odd):
                for j in range(odd):
                    out[:, i] += parts[:, j] * self._factor[j, i]
        return out.reshape(x.shape)


def _odd_part(order: int) -> NDArray[np.float32]:
    """The orthogonal factor of `order` that is left beside a power of two, [1, 1] if it is one."""
    odd = order // (order & -order)
    size = odd
    while odd > 1 and size <= _LARGEST and order % size == 0:
        if (made := _paley(size)) is not None:
            return made / np.float32(math.sqrt(size))
        size *= 2
    places = np.arange(odd)
    cosines = np.cos(np.pi / odd * (places + 0.5) * places[:, None]) * math.sqrt(2 / odd)
    cosines[0] = math.sqrt(1 / odd)
    return cosines.astype(np.float32)


def _paley(order: int) -> NDArray[np.float32] | None:
    """A Hadamard matrix of q + 1, for a prime q of 3 mod 4, or of 2 (q + 1), for one of 1 mod 4; None of others."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        q = order - 1
        around = np.ones((order, order), np.float32)
        around[1:, 0] = -1
        around[1:, 1:] = _residues(q)
        np.fill_diagonal(around, 1)
        return around
    q = order // 2 - 1
    if q % 4 != 1 or not _is_prime(q):
        return None
    around = np.ones((q + 1, q + 1), np.float32)
    around[1:, 1:] = _residues(q)
    np.fill_diagonal(around, 0)
    on, off = np.array([[1, 1], [1, -1]], np.float32), np.array([[1, -1], [-1, -1]], np.float32)
    return np.kron(around, on) + np.kron(np.eye(q + 1, dtype=np.float32), off)


def _residues(q: int) -> NDArray[np.float32]:
    """Whether i - j is a square modulo q: 1, -1 if it is none, 0 if it is zero."""
    kinds = np.full(q, -1, np.float32)
    kinds[np.arange(1, q) ** 2 % q] = 1
    kinds[0] = 0
    return kinds[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
