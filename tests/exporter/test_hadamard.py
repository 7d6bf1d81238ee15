"""Hadamard matrices: orthogonal, even, of every order that models have, and the same bits however they are applied."""

import numpy as np
import pytest

from exporter.quantization.hadamard import Hadamard

# Sylvester's, and Paley's first and second kind times one of Sylvester's
EVEN = [1, 2, 64, 12, 20, 24, 28, 36, 60, 80, 96, 576, 896]
UNEVEN = [3, 14, 25, 200, 262]  # an odd factor that Paley has no matrix for, of a size worth its sums


@pytest.mark.parametrize("order", EVEN + UNEVEN)
def test_rows_are_orthogonal(order):
    q = Hadamard(order).columns(np.eye(order, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(order), atol=4e-6)
    np.testing.assert_allclose(q.T @ q, np.eye(order), atol=4e-6)
    even = np.allclose(abs(q), order**-0.5, atol=1e-6)
    assert even == (order in EVEN)


@pytest.mark.parametrize("order", [12, 64, 200, 896])
def test_columns_and_rows_are_one_matrix(order):
    random = np.random.default_rng(0)
    hadamard = Hadamard(order)
    q = hadamard.columns(np.eye(order, dtype=np.float32))
    x = random.standard_normal((5, 2 * order)).astype(np.float32)
    kept = x.copy()
    columns = hadamard.columns(x)
    for half in (slice(0, order), slice(order, 2 * order)):  # each head by itself
        np.testing.assert_allclose(columns[:, half], x[:, half] @ q, atol=1e-4)
    np.testing.assert_array_equal(hadamard.rows(np.ascontiguousarray(x.T)), columns.T)
    np.testing.assert_array_equal(x, kept)


def test_it_is_the_same_bits_however_many_rows_there_are(monkeypatch):
    x = np.random.default_rng(0).standard_normal((40, 224)).astype(np.float32)
    whole = Hadamard(224).columns(x)
    np.testing.assert_array_equal(
        np.concatenate([Hadamard(224).columns(x[i : i + 3]) for i in range(0, 40, 3)]), whole
    )
    monkeypatch.setattr("exporter.quantization.hadamard._NUMBERS", 1000)
    np.testing.assert_array_equal(Hadamard(224).columns(x), whole)
    np.testing.assert_array_equal(Hadamard(224).rows(x.T), whole.T)


def test_signs_follow_from_order_and_seed():
    """Written down: other signs would give other integers than were measured."""
    ones = np.ones((1, 16), np.float32)
    first = Hadamard(16).columns(ones)[0] * 4
    assert first.tolist() == [-2, -2, 2, 2, 6, -2, 2, 10, -2, 6, -6, 2, -2, -2, 2, 2]
    assert Hadamard(16, seed=1).columns(ones)[0].tolist() != (first / 4).tolist()


def test_outliers_are_spread():
    x = np.zeros((1, 896), np.float32)
    x[0, 5] = 100
    assert abs(Hadamard(896).columns(x)).max() < 4


def test_what_is_no_number_stays_none():
    x = np.ones((2, 24), np.float32)
    x[0, 3], x[1, 3] = np.nan, np.inf
    assert not np.isfinite(Hadamard(24).columns(x)).any()
