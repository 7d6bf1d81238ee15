"""Coordinate descent: against the same steps written plainly, never worse, and an end where no step is left."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import matrix

from exporter.quantization import descent
from exporter.quantization.descent import descend
from exporter.quantization.gptq import quantize_gptq
from exporter.quantization.rtn import quantize_mse
from exporter.quantization.scheme import Scheme, parse_scheme
from exporter.quantization.tensor import round_scales


def problem(inputs: int, outputs: int, seed: int, dead: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """Weights [outputs, inputs], and the Hessian of correlated inputs."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((4 * inputs, inputs)) @ random.standard_normal((inputs, inputs)) / inputs**0.5
    x[:, random.permutation(inputs)[:dead]] = 0
    w = (random.standard_normal((outputs, inputs)) * 0.02).astype(np.float32)
    return w, torch.tensor(x.T @ x / len(x), dtype=torch.float32)


def rounded(w: np.ndarray, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest integers [inputs, outputs] and scales [groups, outputs]."""
    tensor = quantize_mse(matrix(w), scheme)[0]
    return torch.tensor(tensor.integers().T.astype(np.float32)), torch.tensor(tensor.scales.T.copy())


def errors(w: np.ndarray, q: torch.Tensor, scales: torch.Tensor, h: torch.Tensor) -> np.ndarray:
    """Of each output, in float64."""
    size = len(q) // len(scales)
    e = (q.double() * scales.double().repeat_interleave(size, 0)).numpy().T - w
    return ((e @ h.double().numpy()) * e).sum(1)


def plain_sweep(w: np.ndarray, q: np.ndarray, scales: np.ndarray, h: np.ndarray, high: int) -> None:
    """One sweep in float64, each step from the error anew: the integers of a group, then its scale."""
    size = len(q) // len(scales)
    for group, scale in enumerate(scales):
        rows = range(group * size, (group + 1) * size)
        for i in rows:
            slope = h[i] @ (q * np.repeat(scales, size, 0) - w)
            q[i] = np.clip(np.rint(q[i] - slope / h[i, i] / scale), -high - 1, high)
        part, slope = q[rows], (h @ (q * np.repeat(scales, size, 0) - w))[rows]
        curve, slant = (part * (h[np.ix_(rows, rows)] @ part)).sum(0), (part * slope).sum(0)
        change = round_scales((scale - slant / curve).astype(np.float32)) - scale
        scale += np.where(change * (change * curve + 2 * slant) < 0, change, 0)


@pytest.mark.parametrize(
    ("name", "inputs"), [("int4", 256), ("int4-g128", 256), ("int4-g16", 256), ("int8", 256), ("w4a16", 200)]
)
def test_a_sweep_is_the_plain_one(name, inputs):
    scheme, (w, h) = parse_scheme(name), problem(inputs, 12, seed=1)
    q, scales = rounded(w, scheme)
    high = 2 ** (scheme.bits - 1) - 1
    wanted_q, wanted_scales = q.double().numpy(), scales.double().numpy()
    plain_sweep(w.T.astype(np.float64), wanted_q, wanted_scales, h.double().numpy(), high)
    descend(torch.tensor(w.T), q, scales, h, high, sweeps=1)
    assert (q.numpy() == wanted_q).mean() > (0.99 if scheme.bits == 8 else 0.999)  # float32 against float64
    assert (scales.numpy() == wanted_scales).mean() > 0.95


@given(
    st.integers(0, 10**6),
    st.sampled_from([(32, 1), (64, 7), (256, 9)]),
    st.sampled_from(["int4", "int4-g16", "int8", "int8-channel", "w4a16"]),
    st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
def test_no_outputs_error_grows_and_unused_inputs_keep_their_integers(seed, shape, name, dead):
    scheme, (w, h) = parse_scheme(name), problem(*shape, seed, dead)
    q, scales = rounded(w, scheme)
    before, kept = errors(w, q, scales, h), q.clone()
    high = 2 ** (scheme.bits - 1) - 1
    descend(torch.tensor(w.T), q, scales, h, high, sweeps=2)
    assert (errors(w, q, scales, h) <= before * (1 + 1e-4) + 1e-9).all()
    assert torch.equal(q, q.round().clamp(-high - 1, high))
    assert torch.equal(q[h.diagonal() == 0], kept[h.diagonal() == 0])
    np.testing.assert_array_equal(round_scales(scales.numpy()), scales.numpy())


@pytest.mark.parametrize("name", ["int4", "w4a16"])
def test_at_the_end_no_single_step_is_left(name):
    scheme, (w, h) = parse_scheme(name), problem(128, 6, seed=2)
    q, scales = rounded(w, scheme)
    descend(torch.tensor(w.T), q, scales, h, 7, sweeps=60)
    least = errors(w, q, scales, h)
    for i in range(len(q)):
        for step in (-1, 1):
            other = q.clone()
            other[i] = (other[i] + step).clamp(-8, 7)
            assert (errors(w, other, scales, h) >= least * (1 - 1e-5)).all()
    for factor in (1 - 2**-7, 1 + 2**-7):  # a step of the portable grid, or half of one
        for group in range(len(scales)):
            other = scales.clone()
            other[group] = torch.from_numpy(round_scales((scales[group] * factor).numpy()))
            assert (errors(w, q, other, h) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", ["int4", "int4-g128", "int8-channel", "w4a16"])
def test_gptq_with_it_leaves_far_less(name):
    scheme, (w, h) = parse_scheme(name), problem(256, 32, seed=3)

    def left(**how: int) -> float:
        tensor = quantize_gptq(matrix(w), scheme, h, act_order=True, **how)[0][0]
        e = tensor.dequantize().astype(np.float64) - w
        return float(((e @ h.double().numpy()) * e).sum())

    assert left(sweeps=3) < 0.93 * left()


def test_blocks_change_nothing(monkeypatch):
    w, h = problem(256, 8, seed=4)
    found = []
    for block in (128, 32):
        monkeypatch.setattr(descent, "BLOCK", block)
        q, scales = rounded(w, parse_scheme("int4-g128"))
        descend(torch.tensor(w.T), q, scales, h, 7, sweeps=2)
        found.append(errors(w, q, scales, h))
    # Within a group that is a block the scale follows at once, and in several after the last: the same steps
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
