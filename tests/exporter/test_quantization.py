"""Integers and scales: the portable grid, packing, the search for scales, and what the quantizer says of its error."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from exporter.checkpoint import Matrix
from exporter.errors import CheckpointError, RecipeError
from exporter.formats import DELEGATES, FORMATS
from exporter.quantization import rtn
from exporter.quantization.recipe import Decision
from exporter.quantization.scheme import Scheme, fit_scheme, parse_scheme
from exporter.quantization.tensor import LARGEST_SCALE, SMALLEST_SCALE, QuantizedTensor, pack4, round_scales
from exporter.quantization.weights import QuantizedWeights
from exporter.safetensors import to_float32

# All numbers of the grid: bfloat16's between the two ends
GRID = (np.arange(0x3700, 0x4780, dtype=np.uint32) << 16).view(np.float32)


def matrix(values: np.ndarray, name: str = "w") -> Matrix:
    return Matrix(name, values.shape, lambda start, stop: values[start:stop])


def weights(rows: int, inputs: int, seed: int = 0, kind: str = "normal") -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "normal":
        return (random.standard_normal((rows, inputs)) * 0.02).astype(np.float32)
    if kind == "heavy":
        return (random.standard_t(2.5, (rows, inputs)) * 0.01).astype(np.float32)
    return random.uniform(-1, 1, (rows, inputs)).astype(np.float32)


# scales


def test_the_grid_ends_where_it_says():
    assert GRID[0] == SMALLEST_SCALE == 2**-17
    assert GRID[-1] == LARGEST_SCALE == 65280


def test_the_grid_is_exact_in_every_float_format():
    np.testing.assert_array_equal(GRID.astype(np.float16).astype(np.float32), GRID)
    np.testing.assert_array_equal(torch.from_numpy(GRID).bfloat16().float().numpy(), GRID)
    np.testing.assert_array_equal(round_scales(GRID), GRID)


@given(
    nps.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(0, float(np.finfo(np.float32).max), width=32)
    )
)
def test_scales_go_to_the_nearest_of_the_grid_and_keep_their_order(scales):
    rounded = round_scales(scales)
    assert np.isin(rounded, GRID).all()
    wide = scales.astype(np.float64)
    nearest = np.abs(GRID[None].astype(np.float64) - wide[:, None]).min(1)
    np.testing.assert_array_equal(np.abs(rounded - wide), nearest)
    order = np.argsort(scales, kind="stable")
    assert (np.diff(rounded[order]) >= 0).all()


def test_ties_between_scales_go_to_even():
    low, high = GRID[1000], GRID[1001]
    even = low if (low.view(np.uint32) >> 16) % 2 == 0 else high
    assert round_scales(np.array([(low + high) / 2], np.float32))[0] == even


# packing


@given(
    nps.arrays(
        np.uint8,
        st.tuples(st.integers(1, 5), st.integers(1, 20).map(lambda n: 2 * n)),
        elements=st.integers(0, 15),
    )
)
def test_pack_and_unpack(biased):
    packed = pack4(biased)
    assert packed.shape == (biased.shape[0], biased.shape[1] // 2)
    np.testing.assert_array_equal(packed & 0xF, biased[:, 0::2])  # the first of a pair in the lower half
    np.testing.assert_array_equal(packed >> 4, biased[:, 1::2])
    tensor = QuantizedTensor("w", Scheme(4), biased.shape, packed, np.ones((len(biased), 1), np.float32))
    np.testing.assert_array_equal(tensor.integers(), biased.astype(np.int8) - 8)


SCHEMES = ["int4", "int4-g128", "int4-g16", "int8", "int8-g64", "int8-channel", "int3", "int3-channel"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("quantize", [rtn.quantize_mse, rtn.quantize_absmax])
def test_integers_and_scales_mean_the_weights(scheme, quantize):
    """Against a slow reference: each weight is its integer times its group's scale, and no integer is nearer."""
    w = weights(6, 256, kind="heavy")
    parsed = parse_scheme(scheme)
    tensor, error, worst = quantize(matrix(w), parsed)
    q, group = tensor.integers(), parsed.group or 256
    low, high = -(2 ** (parsed.bits - 1)), 2 ** (parsed.bits - 1) - 1
    assert tensor.shape == w.shape
    assert tensor.scales.shape == (6, 256 // group)
    assert np.isin(tensor.scales, GRID).all()
    assert q.min() >= low
    assert q.max() <= high
    dequantized = tensor.dequantize()
    for row in range(6):
        for column in range(256):
            scale = float(tensor.scales[row, column // group])
            assert dequantized[row, column] == np.float32(scale * q[row, column])
            distances = [abs(float(w[row, column]) - scale * i) for i in range(low, high + 1)]
            assert distances[int(q[row, column]) - low] <= min(distances) + 1e-6 * scale
    wide = w.astype(np.float64) - dequantized
    assert error == pytest.approx((wide**2).sum() / (w.astype(np.float64) ** 2).sum(), rel=1e-4)
    assert worst == pytest.approx(np.abs(wide).max(), rel=1e-5)
    np.testing.assert_array_equal(tensor.dequantize(2, 5), dequantized[2:5])
    np.testing.assert_array_equal(tensor.integers(2, 5), q[2:5])


def error_of(w: np.ndarray, q: np.ndarray) -> float:
    return float(((w.astype(np.float64) - q) ** 2).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform"])
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_beats_absmax_and_is_near_the_best_there_is(kind, group, bits):
    w = weights(16, 256, seed=group, kind=kind)
    scheme, half = Scheme(bits, group, "int8"), 2 ** (bits - 1)
    searched = rtn.quantize_mse(matrix(w), scheme)[0].dequantize()
    plain = rtn.quantize_absmax(matrix(w), scheme)[0].dequantize()
    best = 0.0
    for values in w.reshape(-1, group).astype(np.float64):
        top = np.abs(values).max()
        scales = GRID[(top / (2 * half) <= GRID) & (top / (0.3 * half) >= GRID)].astype(np.float64)
        integers = np.clip(np.rint(values[None] / scales[:, None]), -half, half - 1)
        best += ((values[None] - integers * scales[:, None]) ** 2).sum(1).min()
    assert best <= error_of(w, searched) <= 1.06 * best
    assert error_of(w, searched) < 0.95 * error_of(w, plain)


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-channel", "fp16", "fp32"])
def test_blocks_and_threads_change_nothing(monkeypatch, scheme):
    w = weights(37, 128)
    found = []
    for block, count in ((1 << 17, 2), (128, 4), (1000, 1), (1, 3)):
        monkeypatch.setattr(rtn, "_BLOCK", block)
        pool = ThreadPoolExecutor(count)
        monkeypatch.setattr(rtn, "threads", lambda pool=pool: pool)
        tensor, error, worst = rtn.quantize_mse(matrix(w), parse_scheme(scheme))
        found.append((tensor.digest(), pytest.approx(error, rel=1e-5), worst))
    assert all(other == found[0] for other in found)


def test_bfloat16_and_float16_quantize_as_their_float32_values():
    half = weights(8, 64).astype(np.float16)
    bits = (weights(8, 64).view(np.uint32) >> 16).astype(np.uint16)
    for stored in (half, bits):
        direct = rtn.quantize_mse(matrix(stored), parse_scheme("int4"))[0]
        widened = rtn.quantize_mse(matrix(to_float32(stored)), parse_scheme("int4"))[0]
        assert direct.digest() == widened.digest()


def test_zeros_stay_zeros():
    w = weights(4, 64)
    w[1] = 0
    w[2, :32] = 0
    for scheme in ("int4", "int8", "int8-channel"):
        tensor, _, _ = rtn.quantize_mse(matrix(w), parse_scheme(scheme))
        assert not tensor.dequantize()[1].any()
        assert not tensor.dequantize()[2, :32].any()
        assert np.isfinite(tensor.scales).all()
    tensor, error, worst = rtn.quantize_mse(matrix(np.zeros((4, 64), np.float32)), parse_scheme("int4"))
    assert (error, worst) == (0, 0)


@pytest.mark.parametrize("magnitude", [1e-5, 1e-3, 1.0, 1e3, 4e5])
def test_magnitudes_that_the_grid_holds(magnitude):
    """The relative error is that of the shape of the weights, not of their size, but for the smallest scales."""
    w = weights(8, 64, kind="uniform") * np.float32(magnitude)
    _, error, _ = rtn.quantize_mse(matrix(w), parse_scheme("int4"))
    assert error < (0.01 if magnitude > 1e-4 else 0.7)


def test_values_below_the_grid_become_zero_and_the_error_says_so():
    w = np.full((2, 32), 1e-9, np.float32)
    tensor, error, worst = rtn.quantize_mse(matrix(w), parse_scheme("int4"))
    assert not tensor.dequantize().any()
    assert error == pytest.approx(1)
    assert worst == pytest.approx(1e-9)


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-channel", "fp16"])
@pytest.mark.parametrize("value", [1e-9, 1e-25, 1e-44])
def test_the_error_of_what_becomes_zero_is_1_however_small_it_is(scheme, value):
    """The squares of the smaller ones are zero in float32, as if nothing had been there."""
    w = np.full((2, 32), value, np.float32)
    for stored, error in ((w, 1), (np.zeros_like(w), 0)):
        tensor, found, _ = rtn.quantize_mse(matrix(stored), parse_scheme(scheme))
        assert not tensor.dequantize().any()
        assert found == pytest.approx(error)


class OneWeight:
    """A checkpoint of one matrix."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def matrix(self, name: str) -> Matrix:
        return matrix(self.values, name)


def quantized(w: np.ndarray, scheme: str, algorithm: str = "rtn") -> QuantizedWeights:
    checkpoint: Any = OneWeight(w)
    return QuantizedWeights(checkpoint, {"w": Decision(parse_scheme(scheme), algorithm)})


@pytest.mark.parametrize("algorithm", ["rtn", "rtn-absmax"])
@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-channel", "fp16"])
def test_a_matrix_that_would_be_lost_is_refused(scheme, algorithm):
    w = weights(8, 64) * np.float32(1e-8)
    with pytest.raises(RecipeError, match=rf'^w would not survive {scheme} .*match = "w", scheme = "fp32"$'):
        quantized(w, scheme, algorithm).matrix("w")
    exact = quantized(w, "fp32", algorithm)
    np.testing.assert_array_equal(exact.matrix("w").dequantize(), w)
    assert exact.reports[0].error == 0


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-channel", "fp16"])
def test_a_matrix_of_zeros_or_with_a_few_lost_rows_is_not(scheme):
    for w in (np.zeros((8, 64), np.float32), weights(8, 64) * np.float32([[1], [1e-9]] * 4)):
        made = quantized(w, scheme)
        made.matrix("w")
        assert made.reports[0].error < 0.01


@pytest.mark.parametrize("algorithm", ["rtn", "rtn-absmax"])
@pytest.mark.parametrize("scheme", ["int4", "int4-g128"])
def test_rounding_alone_is_never_refused(scheme, algorithm):
    """The worst case: one weight in each group sets the scale, and all others lie just below half a step."""
    w = np.full((4, 256), 0.49, np.float32)
    w[:, ::128] = 7
    w[:, 32::32] = 7 if scheme == "int4" else w[:, 32::32]
    quantized(w, scheme, algorithm).matrix("w")


def test_an_export_says_which_matrix_would_be_lost_and_how_to_keep_it(checkpoints, gochu, tmp_path):
    model = checkpoints.write(tmp_path / "checkpoint", "qwen2")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-7
    model.save_pretrained(tmp_path / "checkpoint")
    command = ("export", tmp_path / "checkpoint", "-o", tmp_path / "out")
    code, out, err = gochu(*command, "--scheme", "int4")
    assert (code, out) == (3, "")
    said = err.splitlines()[-1]
    assert "layers.1.mlp.down would not survive int4" in said
    assert not (tmp_path / "out").exists()
    rule = "\n".join(said.partition("first rule is ")[2].split(", "))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "r"\n[[rules]]\n{rule}\n[[rules]]\nmatch = "*"\nscheme = "int4"', encoding="utf-8"
    )
    code, _, err = gochu(*command, "--recipe", recipe)
    assert code == 0, err


@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-channel"])
@pytest.mark.parametrize("value", [1e8, 3e38])
def test_values_above_the_grid_are_refused(scheme, value):
    w = weights(4, 64)
    w[3, 5] = value
    with pytest.raises(RecipeError, match="w has weights above"):
        rtn.quantize_mse(matrix(w), parse_scheme(scheme))


def test_values_above_float16_are_refused():
    w = weights(4, 64)
    w[0, 0] = -70000
    with pytest.raises(RecipeError, match="float16 cannot hold"):
        rtn.quantize_mse(matrix(w), parse_scheme("fp16"))
    assert rtn.quantize_mse(matrix(w), parse_scheme("fp32"))[0].dequantize()[0, 0] == -70000


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int8-channel", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(scheme, value):
    w = weights(64, 64)
    w[63, 63] = value
    with pytest.raises(CheckpointError, match="w has NaN or infinite values"):
        rtn.quantize_mse(matrix(w), parse_scheme(scheme))
    bits = (w.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        rtn.quantize_mse(matrix(bits), parse_scheme(scheme))


def test_fp16_and_fp32_are_conversions():
    w = weights(5, 30)
    tensor, error, worst = rtn.quantize_mse(matrix(w), parse_scheme("fp16"))
    np.testing.assert_array_equal(tensor.dequantize(), w.astype(np.float16).astype(np.float32))
    assert 0 < error < 1e-6
    assert worst == np.abs(w - tensor.dequantize()).max()
    tensor, error, worst = rtn.quantize_mse(matrix(w), parse_scheme("fp32"))
    np.testing.assert_array_equal(tensor.data, w)
    assert (error, worst) == (0, 0)


def test_a_digest_is_of_the_weight():
    scheme = parse_scheme("int4")
    w = weights(4, 64)
    tensor = rtn.quantize_mse(matrix(w), scheme)[0]
    assert tensor.digest() == rtn.quantize_mse(matrix(w, "another name"), scheme)[0].digest()
    data = tensor.data.copy()
    data[3, 31] ^= 1
    scales = tensor.scales.copy()
    scales[3, 1] *= 2
    reshaped = (8, 32), tensor.data.reshape(8, 16), tensor.scales.reshape(8, 1)
    others: list[Any] = [
        QuantizedTensor("w", scheme, tensor.shape, data, tensor.scales),
        QuantizedTensor("w", scheme, tensor.shape, tensor.data, scales),
        QuantizedTensor("w", scheme, *reshaped),
    ]
    assert len({tensor.digest(), *(other.digest() for other in others)}) == 4


@given(
    nps.arrays(np.float32, (2, 32), elements=st.floats(-100000, 100000, width=32, allow_subnormal=True)),
    st.sampled_from(["int4", "int4-g16", "int8", "int8-channel"]),
)
def test_any_weights_quantize_to_finite_numbers_with_true_figures(w, scheme):
    tensor, error, worst = rtn.quantize_mse(matrix(w), parse_scheme(scheme))
    assert np.isfinite(tensor.dequantize()).all()
    wide = np.abs(w.astype(np.float64) - tensor.dequantize())
    assert worst == pytest.approx(wide.max(), rel=1e-4, abs=1e-12)
    assert 0 <= error <= 1.0001


# schemes


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("fp32", Scheme(32)),
        ("fp16", Scheme(16)),
        ("int8", Scheme(8, 32, "int8")),
        ("int4", Scheme(4, 32, "int8")),
        ("int4-g128", Scheme(4, 128, "int8")),
        ("int8-channel", Scheme(8)),
        ("int3", Scheme(3, 32, "int8")),
        ("int3-g128", Scheme(3, 128, "int8")),
        ("int3-channel", Scheme(3)),
    ],
)
def test_scheme_names(name, scheme):
    assert parse_scheme(name) == scheme
    assert scheme.name == name


@pytest.mark.parametrize(
    "name", ["", "int5", "int3-g7", "int4-g7", "int4-g0", "int4-channel", "INT4", "int4 ", "fp8", "int4-g"]
)
def test_unknown_schemes_are_refused(name):
    with pytest.raises(RecipeError, match="use one of fp32, fp16, int8, int4, int4-g128"):
        parse_scheme(name)


@pytest.mark.parametrize(
    ("scheme", "inputs", "becomes"),
    [
        ("int4", 4096, "int4"),
        ("int4-g128", 896, "int4-g128"),
        ("int4-g128", 4864, "int4-g128"),
        ("int4-g128", 8960 + 64, "int4-g64"),
        ("int4-g128", 96, "int4"),
        ("int4", 48, "int4-g16"),
        ("int8", 48, "int8-g16"),
        ("int4", 200, "int8-channel"),
        ("int8", 200, "int8-channel"),
        ("fp16", 199, "fp16"),
        ("int8-channel", 199, "int8-channel"),
    ],
)
def test_groups_that_do_not_divide_become_smaller_never_coarser(scheme, inputs, becomes):
    fitted, why = fit_scheme(parse_scheme(scheme), (199, inputs))
    assert fitted.name == becomes
    assert (why == "") == (scheme == becomes)
    if why:
        assert str(inputs) in why
    if fitted.group:
        assert inputs % fitted.group == 0


def test_bytes_are_those_of_the_arrays():
    for name in ("fp32", "fp16", "int8", "int4", "int4-g128", "int8-channel"):
        scheme = parse_scheme(name)
        tensor = rtn.quantize_absmax(matrix(weights(4, 256)), scheme)[0]
        arrays = [tensor.data, *([tensor.scales] if tensor.scales is not None else [])]
        assert scheme.nbytes((4, 256)) == tensor.nbytes == sum(array.nbytes for array in arrays)


@given(nps.arrays(np.uint8, (3, 7), elements=st.integers(0, 7)), st.integers(0, 3), st.integers(0, 3))
def test_3_bits_lie_in_a_byte_each_and_are_counted_as_3(biased, start, stop):
    tensor = QuantizedTensor("w", Scheme(3), (3, 7), biased, np.full((3, 1), 0.5, np.float32))
    np.testing.assert_array_equal(tensor.integers(start, stop), biased[start:stop].astype(np.int8) - 4)
    np.testing.assert_array_equal(tensor.dequantize(), (biased.astype(np.float32) - 4) / 2)
    assert tensor.nbytes == 8 + 3 * 4  # 63 bits, and the scales


@pytest.mark.parametrize("scheme", ["int3", "int3-g128", "int3-channel"])
def test_no_format_takes_3_bits_and_each_says_what_it_takes(scheme):
    parsed = parse_scheme(scheme)
    for format in (*FORMATS.values(), *DELEGATES.values()):
        with pytest.raises(RecipeError, match=r": use (int4|pal3|fp16)|takes fp16 only") as refused:
            format.fit(parsed)
        assert str(refused.value).count("\n") == 0


def test_each_bit_less_loses_more():
    w = weights(32, 256, kind="heavy")
    lost = [rtn.quantize_mse(matrix(w), parse_scheme(f"int{bits}"))[1] for bits in (8, 4, 3)]
    assert 10 * lost[0] < lost[1] < 0.35 * lost[2]
