"""Lookup tables: near the least error there is, every weight at its nearest entry, and nothing else changed by them."""

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from exporter.architecture import read_architecture
from exporter.checkpoint import Matrix, open_checkpoint
from exporter.decoder import decoder
from exporter.errors import CheckpointError, RecipeError
from exporter.formats import DELEGATES
from exporter.plan import make_plan
from exporter.quantization import palettize
from exporter.quantization.algorithms import find_algorithm
from exporter.quantization.kmeans import cluster
from exporter.quantization.palettize import nearest, quantize_kmeans
from exporter.quantization.recipe import Recipe, Rule
from exporter.quantization.scheme import SCHEMES, Scheme, fit_scheme, parse_scheme
from exporter.quantization.tensor import QuantizedTensor, pack4
from exporter.quantization.weights import FloatWeights, QuantizedWeights
from exporter.safetensors import to_float32
from exporter.torch_ops import TorchOps

BITS: tuple[Any, ...] = (2, 3, 4, 6, 8)


def matrix(values: np.ndarray, name: str = "w") -> Matrix:
    return Matrix(name, values.shape, lambda start, stop: values[start:stop])


def weights(rows: int, inputs: int, kind: str = "normal", seed: int = 0) -> np.ndarray:
    """Float32 weights as models have them, and as they should not."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal((rows, inputs))
    made = {
        "normal": lambda: normal * 0.02,
        "heavy": lambda: random.standard_t(1.5, normal.shape) * 0.01,
        "laplace": lambda: random.laplace(size=normal.shape),
        "uniform": lambda: random.uniform(-1, 1, normal.shape),
        "outliers": lambda: normal * np.where(random.random(normal.shape) < 1e-3, 50, 1),
        "one outlier": lambda: np.where(np.arange(normal.size).reshape(normal.shape) == 7, 30000, normal),
        "sparse": lambda: normal * (random.random(normal.shape) < 0.4),
        "far from zero": lambda: 100 + normal * 0.5,
        "rows of many sizes": lambda: normal * np.exp(random.standard_normal((rows, 1))),
    }[kind]()
    return made.astype(np.float32)


KINDS = (
    "normal",
    "heavy",
    "laplace",
    "uniform",
    "outliers",
    "one outlier",
    "sparse",
    "far from zero",
    "rows of many sizes",
)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def error_of(values: np.ndarray, counts: np.ndarray, centres: np.ndarray) -> float:
    """Σ count · (value - nearest centre)², by looking at every pair."""
    return float((counts * np.square(values[:, None] - centres[None]).min(1)).sum())


def least_error(values: np.ndarray, counts: np.ndarray, clusters: int) -> float:
    """The optimum, by dynamic programming over every interval of the ascending values."""
    values = values - values.mean()
    number, total, square = (np.concatenate(([0], np.cumsum(counts * values**power))) for power in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        costs = (square - square[:, None]) - (total - total[:, None]) ** 2 / (number - number[:, None])
    costs[np.tril_indices(len(costs))] = np.inf  # costs[i, j]: of one cluster for values i ... j-1
    least = np.full(len(costs), np.inf)
    least[0] = 0
    best = np.inf
    for _ in range(clusters):
        least = (least[:, None] + costs).min(0)
        best = min(best, least[-1])
    return float(best)


# k-means


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=9, unique=True),
    st.lists(st.integers(1, 50), min_size=9, max_size=9),
    st.integers(1, 5),
)
def test_few_values_are_clustered_at_the_optimum(numbers, counts, clusters):
    """Against all ways to part them."""
    values, often = np.sort(np.array(numbers, np.float64)), np.array(counts[: len(numbers)])
    centres = cluster(values, often, clusters)
    best = np.inf
    for cuts in combinations(range(1, len(values)), min(clusters, len(values)) - 1):
        ends = [0, *cuts, len(values)]
        slices = [slice(*pair) for pair in pairwise(ends)]
        means = np.array([np.average(values[s], weights=often[s]) for s in slices])
        best = min(best, error_of(values, often, means))
    assert len(centres) <= clusters
    assert (np.diff(centres) > 0).all()
    assert error_of(values, often, centres) == pytest.approx(best, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("clusters", "above"), [(4, 1.001), (16, 1.003), (64, 1.01)])
def test_many_values_are_clustered_near_the_optimum(kind, clusters, above):
    for seed, round_off in ((1, 0xFFFF0000), (2, 0xFFFFFFFF)):  # as bfloat16 and as float32
        sample = weights(16, 1 << 10 if seed == 1 else 1 << 7, kind, seed).reshape(-1)
        rounded = (sample.view(np.uint32) & np.uint32(round_off)).view(np.float32)
        values, counts = np.unique(rounded.astype(np.float64), return_counts=True)
        centres = cluster(values, counts, clusters)
        found, least = error_of(values, counts, centres), least_error(values, counts, clusters)
        assert least * (1 - 1e-6) <= found <= least * above
        mine = np.abs(values[:, None] - centres).argmin(1)
        means = np.bincount(mine, counts * values) / np.bincount(mine, counts)
        np.testing.assert_allclose(centres, means, rtol=1e-6, atol=1e-6 * np.abs(centres).max())


def test_gaps_take_no_bins_from_where_the_values_are():
    """Twelve values thousands of standard deviations apart, which need a cluster each, and all others between 16."""
    close, far = weights(64, 64).reshape(-1) * 5e-3, np.geomspace(1, 100, 12)
    values = np.sort(np.concatenate((close, far)).astype(np.float64))
    counts = np.ones(len(values), np.int64)
    found = error_of(values, counts, cluster(values, counts, 28))
    assert found <= 1.003 * least_error(values, counts, 28)


def test_a_cluster_may_be_of_most_values():
    """200 of 256 values lie so close that a few of 64 clusters hold them."""
    close = np.random.default_rng(0).uniform(0, 1e-3, 200)
    values, counts = np.sort(np.concatenate((close, np.arange(1, 57)))), np.ones(256, np.int64)
    found = error_of(values, counts, cluster(values, counts, 64))
    assert found == pytest.approx(least_error(values, counts, 64), rel=1e-4)


def test_the_centres_do_not_depend_on_where_or_how_large_the_values_are():
    values, counts = np.unique(np.round(weights(16, 256).astype(np.float64), 4), return_counts=True)
    centres = cluster(values, counts, 16)
    np.testing.assert_allclose(cluster(values * 2.0**-100, counts, 16), centres * 2.0**-100)
    np.testing.assert_allclose(cluster(values + 1e4, counts, 16), centres + 1e4, rtol=1e-7)


@given(
    st.lists(st.floats(-65504, 65504, width=32, allow_subnormal=True), min_size=1, max_size=600, unique=True),
    st.sampled_from([4, 16, 64]),
)
@settings(max_examples=60)
def test_any_values_have_centres_among_them(numbers, clusters):
    values = np.sort(np.array(numbers, np.float64))
    centres = cluster(values, np.ones(len(values), np.int64), clusters)
    assert 1 <= len(centres) <= clusters
    assert (np.diff(centres) >= 0).all()
    slack = 1e-9 * np.abs(values).max()
    assert centres[0] >= values[0] - slack
    assert centres[-1] <= values[-1] + slack


# the nearest entry

HALVES = st.floats(-65504, 65504, width=16, allow_subnormal=True)


@given(
    nps.arrays(np.float32, (3, 7), elements=st.floats(-65504, 65504, width=32, allow_subnormal=True)),
    st.lists(HALVES, min_size=1, max_size=16),
)
def test_each_weight_gets_its_nearest_entry(w, entries):
    entries_once = np.unique(np.array(entries, np.float32))
    middles = (entries_once[1:] + entries_once[:-1]) / 2
    w[0, : len(middles)] = middles[:7]  # ties, or as near as float32 comes
    table = np.pad(entries_once, (0, 16 - len(entries_once)), mode="edge")
    indices = nearest(w, table)
    assert indices.max() < len(entries_once)
    distances = np.abs(w[..., None].astype(np.float64) - table.astype(np.float64))
    np.testing.assert_array_equal(
        np.take_along_axis(distances, indices[..., None].astype(np.int64), -1)[..., 0], distances.min(-1)
    )


def test_ties_go_to_the_lower_entry():
    table = np.array([-2, -1, 1, 3, 3, 3], np.float32)
    w = np.array([[-1.5, 0, 2, 3, 4]], np.float32)
    np.testing.assert_array_equal(nearest(w, table), [[0, 1, 2, 3, 3]])


def test_a_middle_that_float32_cannot_hold_parts_the_weights_around_it():
    table = np.array(
        [2**-24, 1024], np.float32
    )  # their middle, 512 + 2^-25, lies between 512 and the next float32
    w = np.array([[512, np.nextafter(np.float32(512), np.float32(1024))]], np.float32)
    np.testing.assert_array_equal(nearest(w, table), [[0, 1]])
    np.testing.assert_array_equal(nearest(-w, -table[::-1]), [[1, 0]])


# tensors


@given(st.data())
def test_indices_come_back_and_mean_entries(data):
    bits, rows, inputs = data.draw(st.sampled_from(BITS)), 8, data.draw(st.integers(1, 9))
    group = data.draw(st.sampled_from([None, 4, 8]))
    indices = data.draw(nps.arrays(np.uint8, (rows, inputs), elements=st.integers(0, 2**bits - 1)))
    groups = rows // group if group else 1
    tables = np.arange(groups * 2**bits, dtype=np.float32).reshape(groups, -1)
    packed = pack4(indices) if bits == 4 else indices
    tensor = QuantizedTensor("w", Scheme(bits, group, table=True), (rows, inputs), packed, tables=tables)
    if bits == 4:
        assert packed.shape == (rows, math.ceil(inputs / 2))
        np.testing.assert_array_equal(packed[:, : inputs // 2] >> 4, indices[:, 1::2])
        np.testing.assert_array_equal(packed & 0xF, indices[:, 0::2])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    np.testing.assert_array_equal(tensor.indices(start, stop), indices[start:stop])
    expected = np.array(
        [[tables[row // (group or rows)][index] for index in indices[row]] for row in range(rows)]
    )
    np.testing.assert_array_equal(tensor.dequantize(), expected)
    np.testing.assert_array_equal(tensor.dequantize(start, stop), expected[start:stop])
    np.testing.assert_array_equal(tensor.dequantize(start), expected[start:])


@pytest.mark.parametrize(
    "scheme", ["pal2", "pal3-g4", "pal4", "pal4-g8", "pal4-g16", "pal6", "pal6-g16", "pal8"]
)
@pytest.mark.parametrize("kind", ["normal", "heavy", "sparse"])
def test_what_a_quantized_weight_is(scheme, kind):
    w, parsed = weights(32, 97, kind), parse_scheme(scheme)
    tensor, error, worst = quantize_kmeans(matrix(w), parsed)
    assert tensor.tables is not None
    assert tensor.scales is None
    assert tensor.tables.dtype == np.float32
    assert tensor.tables.shape == (32 // (parsed.group or 32), 2**parsed.bits)
    np.testing.assert_array_equal(tensor.tables.astype(np.float16).astype(np.float32), tensor.tables)
    assert (np.diff(tensor.tables) >= 0).all()
    found = tensor.dequantize()
    wide = w.astype(np.float64)
    for row in range(32):
        table = tensor.tables[row // (parsed.group or 32)].astype(np.float64)
        closest = np.abs(wide[row, :, None] - table).min(1)
        np.testing.assert_array_equal(np.abs(wide[row] - found[row]), closest)
    assert error == pytest.approx(np.square(wide - found).sum() / np.square(wide).sum(), rel=1e-4)
    assert worst == pytest.approx(np.abs(wide - found).max(), rel=1e-5)


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g16", "pal6-g16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_near_the_least_there_is(scheme, kind):
    """Float16 entries and all; and of float32 weights, whose histogram is coarse if one table is for all."""
    w, parsed = weights(32, 64, kind), parse_scheme(scheme)
    tensor, _, _ = quantize_kmeans(matrix(w), parsed)
    found = tensor.dequantize()
    rows = parsed.group or 32
    for row in range(0, 32, rows):
        part = w[row : row + rows].astype(np.float64)
        least = least_error(*np.unique(part, return_counts=True), 2**parsed.bits)
        rounding = part.size * np.square(np.abs(part).max() * 2.0**-11) if kind == "far from zero" else 0
        assert np.square(part - found[row : row + rows]).sum() <= 1.01 * least + rounding


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g4", "pal6"])
def test_blocks_and_threads_change_nothing(monkeypatch, scheme):
    w = bfloat16(weights(36, 64))
    found = []
    for block, count in ((1 << 16, 2), (64, 4), (1000, 1), (1, 3)):
        monkeypatch.setattr(palettize, "_BLOCK", block)
        with ThreadPoolExecutor(count) as pool:
            monkeypatch.setattr(palettize, "threads", lambda pool=pool: pool)
            tensor, error, worst = quantize_kmeans(matrix(w), parse_scheme(scheme))
        found.append((tensor.digest(), pytest.approx(error, rel=1e-5), worst))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g8"])
def test_bfloat16_and_float16_quantize_as_their_float32_values(scheme):
    for stored in (weights(8, 64).astype(np.float16), bfloat16(weights(8, 64))):
        direct = quantize_kmeans(matrix(stored), parse_scheme(scheme))[0]
        widened = quantize_kmeans(matrix(to_float32(stored)), parse_scheme(scheme))[0]
        assert direct.digest() == widened.digest()


def test_a_table_is_its_groups_alone():
    w = bfloat16(weights(32, 64, "rows of many sizes"))
    whole = quantize_kmeans(matrix(w), parse_scheme("pal4-g8"))[0]
    assert whole.tables is not None
    for group in range(4):
        alone = quantize_kmeans(matrix(w[8 * group : 8 * group + 8]), parse_scheme("pal4"))[0]
        np.testing.assert_array_equal(whole.tables[group], alone.tables[0])
        np.testing.assert_array_equal(whole.data[8 * group : 8 * group + 8], alone.data)


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g4"])
@pytest.mark.parametrize("count", [1, 2, 15, 16])
def test_no_more_values_than_entries_are_exact(scheme, count):
    values = np.random.default_rng(count).standard_normal(count).astype(np.float16).astype(np.float32)
    w = np.random.default_rng(0).choice(values, (8, 50))
    tensor, error, worst = quantize_kmeans(matrix(w), parse_scheme(scheme))
    np.testing.assert_array_equal(tensor.dequantize(), w)
    assert (error, worst) == (0, 0)
    for row in range(8):  # the entries that fill the table are not used
        table = tensor.tables[row // (tensor.scheme.group or 8)]
        assert tensor.indices()[row].max() < len(np.unique(table))


@pytest.mark.parametrize("scheme", ["pal4", "pal8-g4"])
def test_zeros_of_both_signs_are_zero(scheme):
    w = np.zeros((8, 10), np.float32)
    plus = quantize_kmeans(matrix(w), parse_scheme(scheme))
    minus = quantize_kmeans(matrix(-w), parse_scheme(scheme))
    assert plus[0].digest() == minus[0].digest()
    assert plus[1:] == minus[1:] == (0, 0)
    assert not np.signbit(minus[0].tables).any()


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g4"])
def test_what_float16_cannot_tell_from_zero_is_lost_and_said(scheme):
    _, error, worst = quantize_kmeans(matrix(np.full((4, 8), 1e-9, np.float32)), parse_scheme(scheme))
    assert error == pytest.approx(1)
    assert worst == pytest.approx(1e-9)


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g8", "pal8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(scheme, value):
    w = weights(64, 64)
    w[63, 63] = value
    for stored in (w, w.astype(np.float16), bfloat16(w)):
        with pytest.raises(CheckpointError, match="w has NaN or infinite values"):
            quantize_kmeans(matrix(stored), parse_scheme(scheme))


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g4"])
def test_values_above_float16_are_refused(scheme):
    w = weights(4, 64)
    w[3, 5] = -65504
    assert quantize_kmeans(matrix(w), parse_scheme(scheme))[0].dequantize()[3, 5] == -65504
    w[3, 5] = -65536
    with pytest.raises(RecipeError, match="w has weights above 65504, which a table of float16 cannot hold"):
        quantize_kmeans(matrix(w), parse_scheme(scheme))


def test_a_digest_is_of_indices_and_tables():
    tensor = quantize_kmeans(matrix(weights(8, 32)), parse_scheme("pal4-g4"))[0]
    assert tensor.tables is not None
    data, tables = tensor.data.copy(), tensor.tables.copy()
    data[7, 15] ^= 16
    tables[1, 15] *= 2
    others = [
        QuantizedTensor("w", tensor.scheme, tensor.shape, data, tables=tensor.tables),
        QuantizedTensor("w", tensor.scheme, tensor.shape, tensor.data, tables=tables),
        QuantizedTensor("w", Scheme(4, 8, table=True), tensor.shape, tensor.data, tables=tensor.tables),
    ]
    assert len({tensor.digest(), *(other.digest() for other in others)}) == 4
    renamed = QuantizedTensor("v", tensor.scheme, tensor.shape, tensor.data, tables=tensor.tables)
    assert renamed.digest() == tensor.digest()


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g16"])
def test_memory_does_not_grow_with_the_weight(scheme):
    """A weight of 32 MB in bfloat16, made row by row: beside its 8 MB of indices there is the histogram, and blocks."""
    source = bfloat16(weights(64, 1024))
    big = Matrix("w", (16384, 1024), lambda start, stop: source[np.arange(start, stop) % 64])
    tracemalloc.start()
    tensor, _, _ = quantize_kmeans(big, parse_scheme(scheme))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensor.data.nbytes == 8 << 20
    assert peak - tensor.data.nbytes < 36 << 20


# schemes and recipes


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("pal2", Scheme(2, table=True)),
        ("pal3", Scheme(3, table=True)),
        ("pal4", Scheme(4, table=True)),
        ("pal4-g8", Scheme(4, 8, table=True)),
        ("pal6-g16", Scheme(6, 16, table=True)),
        ("pal8-g64", Scheme(8, 64, table=True)),
    ],
)
def test_scheme_names(name, scheme):
    assert parse_scheme(name) == scheme
    assert scheme.name == name
    assert (scheme.is_integer, scheme.is_float) == (False, False)
    assert scheme != Scheme(scheme.bits, scheme.group)
    assert name not in SCHEMES


@pytest.mark.parametrize(
    "name", ["pal", "pal1", "pal5", "pal16", "pal4-g", "pal4-g7", "pal4-g1", "pal4-channel"]
)
def test_unknown_tables_are_refused(name):
    with pytest.raises(RecipeError, match="for lookup tables pal4 or pal4-g16"):
        parse_scheme(name)


@pytest.mark.parametrize(
    ("scheme", "outputs", "becomes"),
    [
        ("pal4-g16", 896, "pal4-g16"),
        ("pal4-g16", 1000, "pal4-g8"),
        ("pal6-g16", 20, "pal6-g4"),
        ("pal4-g8", 7, "pal4"),
        ("pal4", 7, "pal4"),
    ],
)
def test_groups_divide_the_outputs(scheme, outputs, becomes):
    fitted, why = fit_scheme(parse_scheme(scheme), (outputs, 199))
    assert fitted.name == becomes
    assert (why == "") == (scheme == becomes)
    if why:
        assert f"{outputs} outputs" in why


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        ("pal4", 16 * 9 * 4 / 8 + 16 * 2),
        ("pal4-g4", 16 * 9 * 4 / 8 + 4 * 16 * 2),
        ("pal6-g8", 16 * 9 * 6 / 8 + 2 * 64 * 2),
        ("pal8", 16 * 9 + 256 * 2),
        ("pal3", 16 * 9 * 3 / 8 + 8 * 2),
    ],
)
def test_bytes_are_those_that_a_format_stores(scheme, size):
    tensor = quantize_kmeans(matrix(weights(16, 9)), parse_scheme(scheme))[0]
    assert tensor.nbytes == parse_scheme(scheme).nbytes((16, 9)) == size
    assert parse_scheme("pal3").nbytes((1, 3)) == 2 + 16  # 9 bits are two bytes


ARCH = read_architecture(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 204,
        "vocab_size": 100,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
)


def recipe(*rules: tuple[str, str]) -> Recipe:
    return Recipe(name="test", rules=tuple(Rule(match=match, scheme=scheme) for match, scheme in rules))


def test_a_recipe_mixes_tables_and_integers():
    decisions = recipe(("embedding", "int8"), ("layers.0.*", "pal6"), ("*", "pal4-g8")).resolve(ARCH)
    found = {name: (decision.scheme.name, decision.algorithm) for name, decision in decisions.items()}
    assert found["embedding"] == ("int8", "rtn")
    assert found["layers.0.mlp.down"] == ("pal6", "kmeans")
    assert found["layers.1.mlp.down"] == ("pal4-g8", "kmeans")
    assert found["layers.1.mlp.up"] == ("pal4-g4", "kmeans")
    assert decisions["layers.1.mlp.up"].note == "204 outputs are no multiple of 8: groups of 4"


@pytest.mark.parametrize(
    ("scheme", "algorithm", "says"),
    [
        ("int4", "kmeans", "kmeans finds lookup tables, and int4 has none: use one of rtn, rtn-absmax"),
        ("fp16", "kmeans", "kmeans finds lookup tables, and fp16 has none"),
        ("pal4", "gptq", "gptq finds scales, and pal4 has none: use one of kmeans"),
        ("pal4", "rtn-absmax", "rtn-absmax finds scales, and pal4 has none: use one of kmeans"),
        ("pal4", "magic", "there is no algorithm 'magic': use one of kmeans"),
    ],
)
def test_algorithms_that_do_not_find_what_the_scheme_needs(scheme, algorithm, says):
    with pytest.raises(RecipeError, match=says):
        Recipe.uniform(scheme, algorithm).resolve(ARCH)
    with pytest.raises(RecipeError, match=says):
        find_algorithm(algorithm, parse_scheme(scheme))


def test_round_to_nearest_never_makes_a_table():
    with pytest.raises(RecipeError, match="rtn finds scales, and pal4 has none"):
        find_algorithm("rtn", parse_scheme("pal4"))
    assert Recipe.uniform("pal4", "kmeans").resolve(ARCH) == Recipe.uniform("pal4").resolve(ARCH)


@pytest.mark.parametrize("format", ["onnx", "executorch"])
@pytest.mark.parametrize("scheme", ["pal4", "pal6-g4", "pal8"])
def test_formats_without_tables_refuse_them(format, scheme):
    says = rf"^{scheme} cannot be exported: .* has no lookup tables: use int4 or int8 \[weights-fit\]$"
    with pytest.raises(RecipeError, match=says):
        make_plan(ARCH, format=format, scheme=scheme)
    with pytest.raises(RecipeError, match=says):
        make_plan(ARCH, format=format, recipe=recipe(("layers.*", scheme), ("*", "int8")))


@pytest.mark.parametrize("delegate", ["xnnpack", "vulkan", "coreml", "qualcomm", "mediatek"])
def test_delegates_of_executorch_refuse_them(delegate):
    with pytest.raises(RecipeError, match=r"has no lookup tables|takes fp16 only"):
        DELEGATES[delegate].fit(parse_scheme("pal4-g8"))


def test_an_export_that_cannot_hold_tables_says_so(gochu, tmp_path):
    code, out, err = gochu("export", "pepper", "--scheme", "pal4-g8", "-o", tmp_path / "out")
    assert (code, out) == (3, "")
    assert "has no lookup tables: use int4 or int8" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


# pepper


@pytest.fixture(scope="module")
def pepper():
    with open_checkpoint("pepper") as checkpoint:
        yield checkpoint


def test_reports_tell_of_tables(pepper):
    decisions = recipe(("embedding", "int8"), ("*", "pal4-g8")).resolve(pepper.architecture)
    made = QuantizedWeights(pepper, decisions)
    tensors = [made.matrix(name) for name in ("embedding", "layers.0.mlp.up")]
    first, second = made.reports
    assert (first.scheme, first.algorithm) == ("int8", "rtn")
    assert (second.scheme, second.algorithm) == ("pal4-g8", "kmeans")
    assert second.bytes == tensors[1].nbytes == 512 * 256 // 2 + 512 // 8 * 16 * 2
    assert second.digest == tensors[1].digest()
    assert 0 < first.error < second.error < 0.02


def test_more_bits_and_smaller_groups_lose_less(pepper):
    """Of the whole model, relative: 4 bits lose about a hundredth, as a Gaussian's best 16 levels do (Max, 1960:
    0.0095), and 2 more bits a sixteenth of that."""
    lost, power = {}, 0.0
    for scheme in ("pal3", "pal4", "pal4-g16", "pal4-g8", "pal6", "pal6-g16", "pal8"):
        made = QuantizedWeights(pepper, Recipe.uniform(scheme).resolve(pepper.architecture))
        squared = power = 0.0
        for name, shape in pepper.architecture.matrices():
            w = to_float32(pepper.matrix(name).rows(0, shape[0])).astype(np.float64)
            squared += np.square(w - made.matrix(name).dequantize()).sum()
            power += np.square(w).sum()
        lost[scheme] = squared / power
    assert 0.03 > lost["pal4"] > lost["pal4-g16"] > lost["pal4-g8"] > 0.008
    assert lost["pal3"] > 3 * lost["pal4"]
    assert lost["pal4-g8"] / 16 < lost["pal6"] < lost["pal4-g8"] / 10
    assert lost["pal8"] < lost["pal6-g16"] / 8
    assert lost["pal6-g16"] < lost["pal6"]


def test_the_reference_computes_with_tables(pepper):
    """What is said on the tables is what is said on the float32 weights that they stand for."""
    arch = pepper.architecture
    made = QuantizedWeights(pepper, recipe(("embedding", "pal8"), ("*", "pal4-g16")).resolve(arch))
    tokens = torch.tensor([[3, 14, 15, 92, 65]])

    def logits(weights: Any) -> torch.Tensor:
        return decoder(TorchOps(arch, weights, 16), arch, tokens)

    torch.testing.assert_close(logits(made), logits(FloatWeights(made, arch)))
