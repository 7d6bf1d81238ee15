"""Clipping on a Hessian: never worse than rounding within a group, near the best scale, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import hessian, matrix

from exporter.errors import CheckpointError, RecipeError
from exporter.quantization import clip
from exporter.quantization.clip import quantize_clip
from exporter.quantization.rtn import quantize_mse
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.tensor import QuantizedTensor, round_scales

SCHEMES = ["int4", "int4-g128", "int4-g16", "int8", "w4a16", "int3-channel"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, inputs)) * 0.02).astype(np.float32)


def by_group(w: np.ndarray, found: np.ndarray, h: torch.Tensor, size: int) -> np.ndarray:
    """Each group's e H eᵀ, H damped by a hundredth of its mean diagonal, in float64, [outputs, groups]."""
    wide = h.double().numpy()
    wide = wide + (0.01 * (np.diag(wide).mean() or 1.0)) * np.eye(len(wide))
    error = w.astype(np.float64) - found
    slices = [slice(i, i + size) for i in range(0, w.shape[1], size)]
    return np.stack([((error[:, s] @ wide[s, s]) * error[:, s]).sum(1) for s in slices], 1)


def losses(w: np.ndarray, tensor: QuantizedTensor, h: torch.Tensor) -> np.ndarray:
    return by_group(w, tensor.dequantize(), h, tensor.scheme.group or w.shape[1])


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 32), (7, 64), (5, 256)]),
    st.sampled_from(["int4", "int4-g16", "int8", "int8-channel", "int3"]),
    st.sampled_from([2, 300]),
    st.integers(0, 20),
)
@settings(max_examples=40)
def test_no_group_is_ever_worse_than_rounded(seed, shape, scheme, tokens, dead):
    w, h, parsed = weights(*shape, seed), hessian(shape[1], seed, tokens, dead), parse_scheme(scheme)
    (tensor, error, worst), note = quantize_clip(matrix(w), parsed, h)
    rounded = losses(w, quantize_mse(matrix(w), parsed)[0], h)
    assert (losses(w, tensor, h) <= rounded * (1 + 1e-4) + 1e-12).all()
    np.testing.assert_array_equal(round_scales(tensor.scales), tensor.scales)
    steps = w.reshape(*tensor.scales.shape, -1) / tensor.scales[..., None]
    half = 2 ** (parsed.bits - 1)
    np.testing.assert_array_equal(
        tensor.integers(), np.clip(np.rint(steps), -half, half - 1).reshape(w.shape)
    )
    wide = w.astype(np.float64) - tensor.dequantize()
    assert error == pytest.approx(np.square(wide).sum() / np.square(w.astype(np.float64)).sum(), rel=1e-4)
    assert (worst, note) == (pytest.approx(np.abs(wide).max(), rel=1e-5), "")


@pytest.mark.parametrize(("scheme", "share"), [("int4", 0.9), ("int4-g128", 0.8), ("w4a16", 0.8)])
def test_much_less_is_lost_than_by_rounding(scheme, share):
    w, h, parsed = weights(16, 256), hessian(256), parse_scheme(scheme)
    rounded = losses(w, quantize_mse(matrix(w), parsed)[0], h).sum()
    assert losses(w, quantize_clip(matrix(w), parsed, h)[0][0], h).sum() < share * rounded


@pytest.mark.parametrize("scheme", ["int4", "int4-g128"])
def test_the_error_is_near_the_least_that_any_scale_has(scheme):
    w, h, parsed = weights(8, 256), hessian(256), parse_scheme(scheme)
    found = losses(w, quantize_clip(matrix(w), parsed, h)[0][0], h).sum()
    grouped = w.reshape(8, -1, parsed.group)
    top, least = np.abs(grouped).max(-1, keepdims=True), np.full(grouped.shape[:2], np.inf)
    for share in np.linspace(0.3, 1.1, 200):
        scales = round_scales((top * share / 7).astype(np.float32))
        made = (np.clip(np.rint(grouped / scales), -8, 7) * scales).reshape(w.shape)
        least = np.minimum(least, by_group(w, made, h, parsed.group))
    assert least.sum() * 0.999 <= found <= 1.1 * least.sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_change_nothing(monkeypatch, scheme):
    w, h, found = weights(24, 256), hessian(256), []
    for at_once in (1 << 22, 256 * 7):
        monkeypatch.setattr(clip, "_AT_ONCE", at_once)
        found.append(quantize_clip(matrix(w), parse_scheme(scheme), h)[0][0].digest())
    assert len(set(found)) == 1


def test_zeros_stay_zeros():
    (tensor, error, worst), _ = quantize_clip(
        matrix(np.zeros((4, 64), np.float32)), parse_scheme("int4"), hessian(64)
    )
    assert not tensor.dequantize().any()
    assert (error, worst) == (0, 0)


def test_what_is_not_finite_is_refused():
    w, h = weights(4, 64), hessian(64)
    h[5, 6] = np.inf
    with pytest.raises(RecipeError, match=r"^the inputs of w became NaN or infinite on the calibration text"):
        quantize_clip(matrix(w), parse_scheme("int4"), h)
    for value, error in ((np.nan, CheckpointError), (1e8, RecipeError)):
        w[3, 3] = value
        with pytest.raises(error, match="w has "):
            quantize_clip(matrix(w), parse_scheme("int4"), hessian(64))
