"""Observers and ranges, the integers that follow from them, and the texts that they are found on."""

import json
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checkpoint import open_checkpoint
from exporter.errors import RecipeError
from exporter.formats.onnx_qdq import quantize
from exporter.npu.hexagon_ops import MASK, steps
from exporter.npu.hexagon_torch import HIDDEN, calibrate
from exporter.quantization.calibration import LONGEST, TEXTS, calibration_sequences, read_texts
from exporter.quantization.ranges import (
    LeastSquares,
    MinMax,
    Observers,
    Percentile,
    Range,
    Ranges,
    Rule,
)
from exporter.quantization.recipe import Recipe, find_recipe
from exporter.quantization.weights import QuantizedWeights

FINITE = st.floats(-1e6, 1e6, width=32)


def seen(observer, *values):
    for value in values:
        observer.see(np.array(value, np.float32))
    return observer.range()


# integers


@given(FINITE, FINITE, st.sampled_from([8, 16]), st.lists(FINITE, min_size=1))
def test_a_number_within_the_range_is_off_by_a_step_at_most(one, other, bits, numbers):
    low, high = sorted((one, other))
    scale, zero_point = quantization = Range(low, high).quantization(bits)
    assert 0 <= zero_point < 2**bits
    assert scale > 0
    values = np.clip(np.array(numbers, np.float32), min(low, 0), max(high, 0))
    back = (quantize(values, quantization, bits).astype(np.float64) - zero_point) * scale
    assert np.abs(back - values).max() <= scale * 1.01 + 1e-30
    assert quantize(np.zeros(1, np.float32), quantization, bits)[0] == zero_point  # 0 is exact


def test_probabilities_have_zero_point_0():
    assert Range(0.0, 1.0).quantization(16) == (float(np.float32(1 / 65535)), 0)


# observers


def test_min_max_sees_all_and_adds_its_margin():
    assert seen(MinMax(), [1, 2], [[-3, 0]]) == (-3, 2)
    assert seen(MinMax(0.5), [1, 2], [-4]) == (-6, 3)


def test_a_percentile_leaves_out_what_is_rare():
    values = np.random.default_rng(0).standard_normal(100_000)
    low, high = seen(Percentile(99.9), values, [1000, -500])
    assert 3 < high < 4
    assert -4 < low < -3
    assert seen(Percentile(100), values, [1000, -500]) == pytest.approx((-500, 1000), rel=1e-3)


@given(st.lists(st.lists(FINITE, min_size=1), min_size=1, max_size=5), st.floats(50, 100))
def test_a_percentile_lies_within_what_was_seen(values, keep):
    whole, part = seen(MinMax(), *values), seen(Percentile(keep), *values)
    assert whole.low <= part.low <= part.high <= whole.high


@given(st.lists(st.lists(FINITE, min_size=1), min_size=1, max_size=5))
def test_the_order_of_what_is_seen_is_no_matter(values):
    there, back = Percentile(99), Percentile(99)
    assert seen(there, *values) == seen(back, *values[::-1])
    assert there.counts.sum() == sum(map(len, values))


@pytest.mark.parametrize(
    ("kind", "bits"), [("normal", 4), ("laplace", 4), ("laplace", 8), ("outliers", 8), ("positive", 8)]
)
def test_least_squares_is_the_best_range(bits, kind):
    """No range among many, by trying each on the numbers themselves, is off by less; and it beats what was seen."""
    random = np.random.default_rng(3)
    values = {
        "normal": random.standard_normal(5_000),
        "laplace": random.laplace(size=5_000),
        "outliers": np.concatenate((random.standard_normal(5_000), [60, -90])),
        "positive": np.abs(random.standard_normal(5_000)) + 1,
    }[kind].astype(np.float32)

    def error(found):
        scale, zero = found.quantization(bits)
        back = (np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1) - zero) * scale
        return float(np.square(back - values).mean())

    ours, whole = seen(LeastSquares(bits), values), seen(MinMax(), values)
    shares = np.linspace(0.05, 1, 20)
    tried = [Range(whole.low * low, whole.high * high) for low in shares for high in shares]
    assert error(ours) < 1.03 * min(map(error, tried))
    if (kind, bits) == ("laplace", 4):
        assert error(ours) < 0.7 * error(whole)
    assert whole.low <= ours.low < ours.high <= whole.high


@settings(max_examples=20)
@given(st.lists(st.lists(FINITE, min_size=1), min_size=1, max_size=5), st.sampled_from([4, 8, 16]))
def test_least_squares_lies_within_what_was_seen(values, bits):
    whole, part = seen(MinMax(), *values), seen(LeastSquares(bits), *values)
    assert whole.low <= part.low <= part.high <= whole.high


@pytest.mark.parametrize("observer", [MinMax, Percentile, partial(LeastSquares, 8)])
def test_nan_and_infinity_are_not_lost(observer):
    assert any(math.isnan(x) for x in seen(observer(), [1.0], [math.nan, 2.0], [3.0]))
    assert seen(observer(), [1.0], [math.inf]).high == math.inf


def test_the_first_rule_that_matches_wins():
    observers = Observers((Rule("*.keys", Percentile), Rule("*", MinMax)))
    observers.see("a.keys", np.ones(3, np.float32))
    observers.see("b", np.ones(3, np.float32))
    observers.see("c", np.ones(0, np.float32))
    assert [type(each) for each in observers._observers.values()] == [Percentile, MinMax]


# ranges


def test_ranges_come_back_from_json():
    ranges = Ranges({"b": Range(-1.5, 2.0), "a": Range(0.0, 1e-9)})
    assert Ranges.from_json(ranges.to_json()) == ranges
    assert list(json.loads(ranges.to_json())) == ["a", "b"]
    for text in ("", "[]", '{"a": 1}', '{"a": [1, "x"]}', '{"a": [1, 2, 3]}'):
        with pytest.raises(RecipeError, match="calibrate the model again"):
            Ranges.from_json(text)


@pytest.mark.parametrize(
    ("range", "message"),
    [
        (Range(math.nan, 1.0), "became NaN or infinite"),
        (Range(0.0, math.inf), "became NaN or infinite"),
        (Range(0.0, 0.0), "was always 0 "),
        (Range(math.inf, -math.inf), "became NaN or infinite"),
    ],
)
def test_a_range_that_is_none_is_refused(range, message):
    with pytest.raises(RecipeError, match=f"x {message}"):
        Ranges({"x": range})["x"]
    with pytest.raises(RecipeError, match="y has no range: calibrate"):
        Ranges({})["y"]


def pepper(sequences, context=64, chunk=16):
    with open_checkpoint("pepper") as checkpoint:
        arch = checkpoint.architecture
        weights = QuantizedWeights(checkpoint, Recipe.uniform("w8a16").resolve(arch))
        return arch, calibrate(arch, weights, sequences, context, chunk)


def test_chunks_do_not_change_ranges():
    ids = [[0, *range(5, 45)], [0, 9, 8, 7]]
    _, whole = pepper(ids, chunk=64)
    for chunk in (16, 1):
        _, pieces = pepper(ids, chunk=chunk)
        assert pieces.ranges.keys() == whole.ranges.keys()
        for step, (low, high) in whole.ranges.items():
            assert pieces[step] == pytest.approx((low, high), rel=0.01, abs=1e-3 * (high - low)), step


def test_the_mask_hides_the_best_score():
    arch, ranges = pepper([[0, *range(5, 45)]])
    assert ranges[MASK].low <= -HIDDEN
    for i in range(arch.layers):
        scores, masked = ranges[steps(i).scores], ranges[steps(i).masked]
        assert scores.high + ranges[MASK].low < scores.low - 15
        assert masked.low == pytest.approx(scores.low + ranges[MASK].low)


def test_nothing_to_calibrate_on_is_refused():
    with pytest.raises(RecipeError, match="no text to calibrate on"):
        pepper([[]])


# texts


def test_pepper_is_calibrated_on_what_it_was_trained_on():
    from exporter.pepper.questions import is_held_out
    from runtimes.tokenizer import Tokenizer

    with open_checkpoint("pepper") as checkpoint:
        sequences = calibration_sequences(checkpoint, 256)
        tokenizer = Tokenizer(checkpoint.path / "tokenizer.json")
    assert 150 < max(map(len, sequences)) <= 256  # longer than a chunk
    assert all(sequence[0] == 0 for sequence in sequences)
    texts = [tokenizer.decode(sequence, skip_special=False) for sequence in sequences]
    prompts = [part.partition("<|end|>")[0] for text in texts for part in text.split("<|user|>")[1:]]
    assert len(prompts) > 60
    assert not any(map(is_held_out, prompts))


def test_other_models_get_what_is_shipped(checkpoints):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        sequences = calibration_sequences(checkpoint, 4096)
        short = calibration_sequences(checkpoint, 64, most=100)
    assert {len(sequence) for sequence in sequences[:-1]} == {LONGEST}
    assert sum(map(len, sequences)) > 3000
    assert list(map(len, short)) == [64, 36]
    assert sum(isinstance(document, str) for document in read_texts(TEXTS)) > 5


def test_a_users_text(checkpoints, tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("하나\n둘\n\nthree", encoding="utf-8")
    assert list(read_texts(plain)) == ["하나\n둘", "three"]
    turn = {"role": "user", "content": "안녕"}
    lines.write_text(f'{{"text": "a"}}\n\n{json.dumps({"messages": [turn]})}\n', encoding="utf-8")
    assert list(read_texts(lines)) == ["a", [turn]]
    with open_checkpoint(checkpoints.folder("gemma2")) as checkpoint:
        assert calibration_sequences(checkpoint, 64, lines)
    for wrong in ('{"text": 1}', "{", "[]", "1", '{"messages": [{"role": "user"}]}', '{"messages": ["a"]}'):
        lines.write_text('{"text": "a"}\n' + wrong, encoding="utf-8")
        with pytest.raises(RecipeError, match="line 2: write"):
            list(read_texts(lines))
    with pytest.raises(RecipeError, match="cannot be read"):
        list(read_texts(tmp_path / "none.txt"))


# recipes


@pytest.mark.parametrize("name", ["hexagon-w8a16", "hexagon-w4a16"])
def test_shipped_recipes_fit_every_family(name, family, checkpoints):
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        decisions = find_recipe(name).resolve(checkpoint.architecture)
    assert {decision.scheme.name for decision in decisions.values()} <= {"w8a16", "w4a16"}
    if name == "hexagon-w4a16":
        assert decisions["layers.0.mlp.down"].scheme.bits == 8
        assert decisions["layers.0.mlp.up"].scheme.bits == 4


def test_a_recipe_that_is_not_shipped(tmp_path):
    with pytest.raises(
        RecipeError,
        match=r"no recipe 'hexagon': use one of .*hexagon-w4a16, hexagon-w4a16-gptq, hexagon-w8a16, .* or a TOML",
    ):
        find_recipe("hexagon")
    (tmp_path / "own.toml").write_text('name = "own"\n[[rules]]\nmatch = "*"\nscheme = "w8a16"\n')
    assert find_recipe(str(tmp_path / "own.toml")).name == "own"
