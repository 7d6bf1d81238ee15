"""Lookup tables that follow a calibration text: against the optimum of their weighted error, and layer by layer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from linear_problems import matrix

from exporter.checkpoint import open_checkpoint
from exporter.errors import RecipeError
from exporter.plan import make_plan
from exporter.quantization import streaming
from exporter.quantization.algorithms import TABLE_ALGORITHMS
from exporter.quantization.hessian import importance
from exporter.quantization.palettize import nearest, quantize_kmeans
from exporter.quantization.recipe import Recipe, Rule
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.weights import QuantizedWeights
from exporter.staging import Staging

quantize = TABLE_ALGORITHMS["kmeans-hessian"].from_hessian
assert quantize


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Float32; the first half of the inputs' weights is smaller."""
    w = np.random.default_rng(seed).standard_normal((rows, inputs)) * 0.02
    w[:, : inputs // 2] *= 0.3
    return w.astype(np.float32)


def squares(inputs: int) -> np.ndarray:
    """Mean squares of inputs, the first half far larger; two were never active."""
    made = np.exp(np.random.default_rng(1).standard_normal(inputs))
    made[: inputs // 2] *= 30
    made[[3, inputs - 1]] = 0
    return made


def least_error(values: np.ndarray, counts: np.ndarray, clusters: int) -> float:
    """The optimum, by dynamic programming over every interval of the ascending values."""
    number, total, square = (np.concatenate(([0], np.cumsum(counts * values**power))) for power in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        costs = (square - square[:, None]) - (total - total[:, None]) ** 2 / (number - number[:, None])
    costs[np.tril_indices(len(costs))] = np.inf
    least = np.where(np.arange(len(costs)) == 0, 0, np.inf)
    for _ in range(clusters):
        least = (least[:, None] + costs).min(0)
    return float(least[-1])


@pytest.mark.parametrize("scheme", ["pal4", "pal4-g8", "pal3-g4"])
def test_the_weighted_error_is_near_the_least_there_is(scheme):
    w, diagonal, parsed = weights(16, 40), squares(40), parse_scheme(scheme)
    (tensor, error, worst), note = quantize(matrix(w), parsed, torch.tensor(np.diag(diagonal)).float())
    counts = np.broadcast_to(diagonal + 0.01 * diagonal.mean(), (parsed.group or 16, 40))
    found, plain = tensor.dequantize(), quantize_kmeans(matrix(w), parsed)[0].dequantize()
    total = rounded = 0.0
    for start in range(0, 16, parsed.group or 16):
        rows = slice(start, start + (parsed.group or 16))
        part = w[rows].astype(np.float64)
        order = np.argsort(part, axis=None)
        least = least_error(part.ravel()[order], counts.ravel()[order], 2**parsed.bits)
        lost = (counts * np.square(part - found[rows])).sum()
        assert lost <= 1.01 * least
        total += lost
        rounded += (counts * np.square(part - plain[rows])).sum()
    assert total < 0.8 * rounded  # what it is for
    for row in range(16):  # and every weight is at its nearest entry
        table = tensor.tables[row // (parsed.group or 16)]
        np.testing.assert_array_equal(tensor.indices(row, row + 1)[0], nearest(w[row], table))
    wide = w.astype(np.float64) - found
    assert error == pytest.approx(np.square(wide).sum() / np.square(w.astype(np.float64)).sum(), rel=1e-4)
    assert (worst, note) == (pytest.approx(np.abs(wide).max(), rel=1e-5), "")


@pytest.mark.parametrize("scheme", ["pal4", "pal3-g4"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_inputs_that_are_all_alike_change_nothing(scheme, stored):
    """Nor do those that were never active at all."""
    w = weights(8, 32)
    given = (w.view(np.uint32) >> 16).astype(np.uint16) if stored == "bfloat16" else w.astype(stored)
    plain = quantize_kmeans(matrix(given), parse_scheme(scheme))[0]
    for hessian in (4 * torch.eye(32), torch.zeros(32, 32)):
        (tensor, _, _), _ = quantize(matrix(given), parse_scheme(scheme), hessian)
        np.testing.assert_allclose(tensor.tables, plain.tables, rtol=1e-3)
        np.testing.assert_array_equal(tensor.data, plain.data)


def test_importance_is_the_diagonal_damped():
    np.testing.assert_allclose(
        importance("w", torch.diag(torch.tensor([0.0, 2, 4]))), [0.01, 1, 1.99], atol=0.01
    )
    np.testing.assert_array_equal(importance("w", torch.zeros(3, 3)), [1, 1, 1])
    with pytest.raises(RecipeError, match=r"^the inputs of w became NaN or infinite on the"):
        importance("w", torch.full((3, 3), torch.nan))


def test_layer_by_layer_tables_are_kept_and_come_back(checkpoints, tmp_path: Path):
    rules = (
        Rule(match="layers.1.*", scheme="pal4-g8", algorithm="kmeans-hessian"),
        Rule(match="layers.2.mlp.up", scheme="int4", algorithm="gptq"),
        Rule(match="embedding", scheme="pal6", algorithm="kmeans-hessian"),
        Rule(match="*", scheme="pal4"),
    )
    ids = [list(range(start, start + 60)) for start in (5, 100, 200)]
    runs = []
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        decisions = Recipe(name="r", rules=rules).resolve(source.architecture)
        for _ in range(2):  # the second reads all of the first's steps
            found = streaming.quantize_layers(source, decisions, ids, 64, Staging(tmp_path, "x"))
            made = QuantizedWeights(source, decisions, found=found)
            for name in decisions:
                made.matrix(name)
            runs.append([(report.digest, report.algorithm, report.error) for report in made.reports])
        assert runs[0] == runs[1]
        plain = QuantizedWeights(source, Recipe.uniform("pal4-g8").resolve(source.architecture))
        tensor = made.matrix("layers.1.mlp.down")
        assert tensor.tables.shape == (source.architecture.hidden // 8, 16)
        assert tensor.digest() != plain.matrix("layers.1.mlp.down").digest()
    assert {algorithm for _, algorithm, _ in runs[0]} == {"kmeans", "kmeans-hessian", "gptq"}


def test_tables_and_scales_are_not_confused():
    with open_checkpoint("pepper") as source:
        arch = source.architecture
        for scheme, algorithm, says in (
            ("pal4", "gptq", "gptq finds scales, and pal4 has none: use one of kmeans, kmeans-hessian"),
            (
                "int4",
                "kmeans-hessian",
                "kmeans-hessian finds lookup tables, and int4 has none: use one of rtn",
            ),
        ):
            with pytest.raises(RecipeError, match=f"^{says}"):
                Recipe.uniform(scheme, algorithm).resolve(arch)
        plan = make_plan(arch, scheme="pal4", format="coreml")
    (said,) = [choice for choice in plan.choices if choice.topic == "algorithm"]
    assert said.value == "kmeans"
    assert "what the default means for lookup tables" in said.reason
