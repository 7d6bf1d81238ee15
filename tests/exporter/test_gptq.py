"""GPTQ: against the paper's algorithm written plainly, never worse than rounding, and what it refuses."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import hessian, matrix

from exporter.errors import CheckpointError, RecipeError
from exporter.quantization import gptq
from exporter.quantization import hessian as hessian_module
from exporter.quantization.gptq import quantize_gptq
from exporter.quantization.hessian import output_error
from exporter.quantization.rtn import mse_scales, quantize_mse
from exporter.quantization.scheme import Scheme, parse_scheme
from exporter.quantization.tensor import round_scales

SCHEMES = ["int4", "int4-g128", "int4-g16", "int8", "int8-channel", "w4a16", "int3-g128"]
ORDERS = [False, True]


def weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, inputs)) * 0.02).astype(np.float32)


def loss(w: np.ndarray, quantized: np.ndarray, h: torch.Tensor) -> np.ndarray:
    """Each output's mean squared error, in float64."""
    error = w.astype(np.float64) - quantized
    return ((error @ h.double().numpy()) * error).sum(1)


def plain_gptq(w: np.ndarray, h: torch.Tensor, scheme: Scheme, act_order: bool) -> np.ndarray:
    """Each output as it is served best: rounded to nearest, or by `fed_back` at one of the scales that are tried."""
    tensor = quantize_mse(matrix(w), scheme)[0]
    starts, best = [tensor.scales], tensor.dequantize()
    if (act_order or scheme.group is None) and scheme.bits < 8:
        largest = np.abs(w.reshape(*tensor.scales.shape, -1)).max(-1)
        starts += [
            round_scales((share * largest / (2 ** (scheme.bits - 1) - 0.5)).astype(np.float32))
            for share in (0.85, 0.95, 1.05)
        ]
    for start in starts:
        made = fed_back(w, h, scheme, act_order, start)
        best = np.where((loss(w, made, h) < loss(w, best, h))[:, None], made, best)
    return best


def fed_back(
    w: np.ndarray, h: torch.Tensor, scheme: Scheme, act_order: bool, start: np.ndarray
) -> np.ndarray:
    """The paper's first form, in float64: after each input, its row and column leave the inverse Hessian. Scales are
    found when a group is reached, but for inputs out of order and a group of all `start` says them."""
    inputs = w.shape[1]
    size, high = scheme.group or inputs, 2 ** (scheme.bits - 1) - 1
    diagonal = torch.diag(h.double())
    inverse = torch.linalg.inv(h.double() + 0.01 * diagonal.mean() * torch.eye(inputs)).numpy()
    left, made = w.astype(np.float64), np.zeros(w.shape)
    static = act_order or scheme.group is None
    order = sorted(range(inputs), key=lambda i: -diagonal[i]) if act_order else range(inputs)
    scales: dict[int, np.ndarray] = {}
    for i in order:
        group = slice(i // size * size, (i // size + 1) * size)
        if i // size not in scales:
            values = np.ascontiguousarray(left[:, group].T, np.float32)
            found = start[:, i // size] if static else mse_scales(values, scheme)
            scales[i // size] = found.astype(np.float64)
        scale = scales[i // size]
        made[:, i] = np.clip(np.rint(left[:, i] / scale), -high - 1, high) * scale
        error = (left[:, i] - made[:, i]) / inverse[i, i]
        left -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return made


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", ORDERS)
def test_integers_are_those_of_the_plain_algorithm(scheme, act_order):
    w, h, parsed = weights(24, 384), hessian(384), parse_scheme(scheme)
    (tensor, error, worst), note = quantize_gptq(matrix(w), parsed, h, act_order=act_order)
    same = tensor.dequantize() == plain_gptq(w, h, parsed, act_order).astype(np.float32)
    # Float32 against float64: of 8-bit steps one may fall on the other side, and then those after it in its output
    assert same.all() if parsed.bits < 8 else same.mean() > 0.99
    assert note == ""
    wide = w.astype(np.float64) - tensor.dequantize()
    assert error == pytest.approx((wide**2).sum() / (w.astype(np.float64) ** 2).sum(), rel=1e-4)
    assert worst == pytest.approx(np.abs(wide).max(), rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_on_the_inputs_is_far_below_roundings(scheme):
    w, h, parsed = weights(24, 384), hessian(384), parse_scheme(scheme)
    rounded = loss(w, quantize_mse(matrix(w), parsed)[0].dequantize(), h).sum()
    for act_order in ORDERS:
        (tensor, _, _), _ = quantize_gptq(matrix(w), parsed, h, act_order=act_order)
        assert loss(w, tensor.dequantize(), h).sum() < (0.4 if act_order else 0.75) * rounded


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 32), (7, 64), (16, 256)]),
    st.sampled_from(["int4", "int4-g16", "int8", "int8-channel", "int3"]),
    st.sampled_from([2, 30, 300]),
    st.integers(0, 20),
    st.booleans(),
)
@settings(max_examples=60)
def test_no_output_is_ever_worse_than_rounded(seed, shape, scheme, tokens, dead, act_order):
    """Few tokens, whose Hessian is singular, and dead inputs too."""
    w, h, parsed = weights(*shape, seed), hessian(shape[1], seed, tokens, dead), parse_scheme(scheme)
    (tensor, error, _), _ = quantize_gptq(matrix(w), parsed, h, act_order=act_order)
    rounded = loss(w, quantize_mse(matrix(w), parsed)[0].dequantize(), h)
    assert (loss(w, tensor.dequantize(), h) <= rounded * (1 + 1e-4) + 1e-9).all()
    assert np.isfinite(error)


@pytest.mark.parametrize("inputs", [1, 63, 300])
def test_what_is_done_by_parts_is_what_the_whole_matrix_gives(monkeypatch, inputs):
    monkeypatch.setattr(gptq, "_SOLVED", 16)
    monkeypatch.setattr(hessian_module, "_COLUMNS", 50)
    h = hessian(inputs)
    factor, _ = gptq._factor("w", h)
    damped = h.double() + 0.01 * h.diagonal().mean().double() * torch.eye(inputs)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.double() @ damped @ factor.T.double(), torch.eye(inputs).double(), rtol=0, atol=1e-4
    )
    w = weights(5, inputs)
    expected = loss(w, np.zeros_like(w), h)
    np.testing.assert_allclose(output_error(torch.from_numpy(w), h).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["int4", "int4-g128", "int4-g16", "w4a16"])
@pytest.mark.parametrize("act_order", ORDERS)
def test_blocks_change_nothing(monkeypatch, scheme, act_order):
    w, h = weights(24, 256), hessian(256)
    found = []
    for block, at_once in ((128, 1 << 23), (16, 256 * 7), (1 << 20, 1)):
        monkeypatch.setattr(gptq, "BLOCK", block)
        monkeypatch.setattr(gptq, "_AT_ONCE", at_once)
        (tensor, error, _), _ = quantize_gptq(matrix(w), parse_scheme(scheme), h, act_order=act_order)
        found.append(tensor.digest())
        assert error == pytest.approx(
            loss(w, tensor.dequantize(), torch.eye(256)).sum() / (w**2).sum(), rel=1e-4
        )
    assert len(set(found)) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", ORDERS)
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(scheme, act_order):
    w, parsed = weights(8, 128), parse_scheme(scheme)
    nearest = quantize_mse(matrix(w), parsed)[0]
    high = 2 ** (parsed.bits - 1) - 1
    for h in (torch.eye(128), torch.diag(torch.arange(128.0)), torch.zeros(128, 128)):
        (tensor, _, _), note = quantize_gptq(matrix(w), parsed, h, act_order=act_order)
        scales = tensor.scales.repeat(128 // tensor.scales.shape[1], 1)
        np.testing.assert_array_equal(tensor.integers(), np.clip(np.rint(w / scales), -high - 1, high))
        assert (loss(w, tensor.dequantize(), h) <= loss(w, nearest.dequantize(), h) * (1 + 1e-6)).all()
        assert note == ""


@pytest.mark.parametrize("act_order", ORDERS)
def test_inputs_that_were_never_used_keep_their_nearest_integers(act_order):
    w, h = weights(8, 128), hessian(128, dead=40)
    unused = h.diagonal().numpy() == 0
    assert unused.sum() == 40
    (tensor, _, _), _ = quantize_gptq(matrix(w), Scheme(8), h, act_order=act_order)
    nearest = quantize_mse(matrix(w), Scheme(8))[0]
    np.testing.assert_array_equal(tensor.integers()[:, unused], nearest.integers()[:, unused])
    assert (tensor.integers() != nearest.integers()).any()


def test_zeros_stay_zeros():
    (tensor, error, worst), _ = quantize_gptq(
        matrix(np.zeros((4, 64), np.float32)), parse_scheme("int4"), hessian(64)
    )
    assert not tensor.dequantize().any()
    assert (error, worst) == (0, 0)


def indefinite(least: float) -> torch.Tensor:
    """A matrix with mean diagonal 1, whose least eigenvalue is `least`."""
    values = torch.ones(64, dtype=torch.float64)
    values[0], values[1:] = least, (64 - least) / 63
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double())[0]
    return ((basis * values) @ basis.T).float()


@pytest.mark.parametrize(("least", "damping"), [(-0.005, ""), (-0.05, "0.1"), (-0.5, "1")])
def test_damping_rises_until_it_is_enough_and_is_told(least, damping):
    (tensor, _, _), note = quantize_gptq(matrix(weights(8, 64)), parse_scheme("int4"), indefinite(least))
    assert note == (f"GPTQ's Hessian needed damping {damping}" if damping else "")
    assert np.isfinite(tensor.dequantize()).all()


def test_a_hessian_that_is_none_is_refused():
    quantize = partial(quantize_gptq, matrix(weights(8, 64)), parse_scheme("int4"))
    with pytest.raises(
        RecipeError, match=r"^the Hessian of w's inputs is not positive definite even with 1 times"
    ):
        quantize(indefinite(-3))
    for value in (np.nan, np.inf):
        h = hessian(64)
        h[5, 6] = value
        with pytest.raises(
            RecipeError, match=r"^the inputs of w became NaN or infinite on the calibration text"
        ):
            quantize(h)


@pytest.mark.parametrize(("value", "error"), [(np.nan, CheckpointError), (1e8, RecipeError)])
def test_weights_that_cannot_be_held_are_refused_as_elsewhere(value, error):
    w = weights(8, 64)
    w[3, 3] = value
    with pytest.raises(error, match="w has "):
        quantize_gptq(matrix(w), parse_scheme("int4"), hessian(64))
