"""Half-quadratic quantization: never worse than rounding in its own error, better where it is meant to be."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from linear_problems import matrix

from exporter.errors import CheckpointError, RecipeError
from exporter.quantization import rtn
from exporter.quantization.hqq import POWER, quantize_hqq
from exporter.quantization.rtn import quantize_mse
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.tensor import QuantizedTensor, round_scales

SCHEMES = ["int4", "int4-g16", "int4-g128", "int8", "w4a16", "int3"]


def heavy(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Float32 weights, a few of them far out."""
    return (np.random.default_rng(seed).standard_t(2.5, (rows, inputs)) * 0.01).astype(np.float32)


def by_group(w: np.ndarray, tensor: QuantizedTensor) -> np.ndarray:
    """Σ|error|ᵖ of each group, in float64."""
    error = np.abs(w.astype(np.float64) - tensor.dequantize())
    assert tensor.scales is not None
    return (error.reshape(*tensor.scales.shape, -1) ** POWER).sum(-1)


@given(
    st.one_of(
        nps.arrays(np.float32, (2, 128), elements=st.floats(-1000, 1000, width=32)),
        st.integers(0, 10**6).map(lambda seed: heavy(2, 128, seed)),
    ),
    st.sampled_from(SCHEMES),
)
@settings(max_examples=60)
def test_no_group_is_ever_worse_than_rounded_in_its_own_error(w, scheme):
    tensor, error, worst = quantize_hqq(matrix(w), parse_scheme(scheme))
    rounded = by_group(w, quantize_mse(matrix(w), parse_scheme(scheme))[0])
    assert (by_group(w, tensor) <= rounded * (1 + 1e-5) + 1e-12).all()
    np.testing.assert_array_equal(round_scales(tensor.scales), tensor.scales)
    steps = w.astype(np.float64).reshape(*tensor.scales.shape, -1) / tensor.scales[..., None]
    half = 2 ** (tensor.scheme.bits - 1)
    nearest = np.clip(np.rint(steps), -half, half - 1).reshape(w.shape)
    assert (np.abs(tensor.integers() - nearest) <= (np.abs(steps % 1 - 0.5) < 1e-3).reshape(w.shape)).all()
    wide = w.astype(np.float64) - tensor.dequantize()
    assert worst == pytest.approx(np.abs(wide).max(), rel=1e-4, abs=1e-12)
    assert 0 <= error <= 1.0001


@pytest.mark.parametrize("scheme", ["int4", "int4-g128", "w4a16"])
def test_where_outliers_are_far_out_most_weights_are_met_better(scheme):
    w = heavy(32, 512)
    found, rounded = (
        quantize(matrix(w), parse_scheme(scheme))[0] for quantize in (quantize_hqq, quantize_mse)
    )
    assert by_group(w, found).sum() < 0.99 * by_group(w, rounded).sum()
    median = [np.median(np.abs(w - tensor.dequantize())) for tensor in (found, rounded)]
    assert median[0] < 0.99 * median[1]


@pytest.mark.parametrize("scheme", ["int4", "w4a16"])
def test_blocks_and_threads_change_nothing(monkeypatch, scheme):
    w, found = heavy(37, 128), []
    for block, count in ((1 << 17, 2), (128, 4), (1000, 1)):
        monkeypatch.setattr(rtn, "_BLOCK", block)
        with ThreadPoolExecutor(count) as pool:
            monkeypatch.setattr(rtn, "threads", lambda pool=pool: pool)
            found.append(quantize_hqq(matrix(w), parse_scheme(scheme))[0].digest())
    assert len(set(found)) == 1


def test_floats_are_converted_and_what_cannot_be_held_is_refused():
    w = heavy(4, 32)
    np.testing.assert_array_equal(quantize_hqq(matrix(w), parse_scheme("fp32"))[0].data, w)
    for value, error in ((np.nan, CheckpointError), (1e8, RecipeError)):
        w[3, 3] = value
        with pytest.raises(error, match="w has "):
            quantize_hqq(matrix(w), parse_scheme("int4"))
