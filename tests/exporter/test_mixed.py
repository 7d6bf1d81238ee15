"""Recipes of mixed precision: within the average, better than others of their size, readable, exported as they are."""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter import export
from exporter.checkpoint import open_checkpoint
from exporter.quantization.mixed import Mixed, Weight, average, choose, make_recipe, quantize, to_toml
from exporter.quantization.recipe import Recipe, find_recipe, read_recipe
from exporter.quantization.weights import QuantizedWeights, Remembered
from exporter.torch_ops import TorchOps


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weight(name: str, numbers: int, nats: float) -> Weight:
    return Weight(name, numbers, ("int4", "int8"), (4 * numbers, 8 * numbers), (nats, nats / 256))


sizes = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=9)


@given(sizes, st.floats(4, 8))
def test_the_average_is_kept_and_at_least_half_of_the_best_is_won(pairs, target):
    weights = [weight(f"layers.{i}.a", *pair) for i, pair in enumerate(pairs)]
    raised = choose(weights, target)
    assert average(weights, raised) <= target + 1e-9
    total, best = sum(w.numbers for w in weights), 0.0
    for bits in range(1 << len(weights)):
        some = [w for i, w in enumerate(weights) if bits >> i & 1]
        if 4 * sum(w.numbers for w in some) <= (target - 4) * total + 1e-9:
            best = max(best, sum(w.won for w in some))
    assert sum(w.won for w in weights if w.name in raised) >= best / 2 - 1e-9


def test_the_worst_for_each_bit_come_first():
    weights = [weight("a", 10, 0.5), weight("b", 1, 0.1), weight("c", 1, 0.2), weight("d", 4, 0.1)]
    assert choose(weights, 4.5) == {"b", "c"}
    assert choose(weights, 8) == {"a", "b", "c", "d"}
    assert choose(weights, 4) == set()


def test_one_weight_that_is_worth_more_than_many_small_ones_is_taken():
    """The small one has the better rate, and then the large one would not fit."""
    weights = [weight("small", 1, 0.2), weight("large", 10, 1.0), weight("rest", 9, 0.0)]
    assert choose(weights, 6) == {"large"}


def test_kinds_and_layers_that_are_raised_whole_share_a_rule():
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("attention.q", "mlp.down", "mlp.up")]
    weights = [weight("embedding", 9, 0.3), *(weight(name, 1, 0.01 * i) for i, name in enumerate(names, 1))]
    raised = {name for name in names if name.endswith("mlp.down") or name.startswith("layers.1.")}
    raised |= {"embedding", "layers.7.attention.q"}
    recipe = make_recipe(weights, frozenset(raised), 5, ("int4", "int8"), "gptq")
    assert [rule.match for rule in recipe.rules] == [
        "*.mlp.down",
        "layers.1.*",
        "layers.7.attention.q",
        "embedding",
        "*",
    ]
    assert [(rule.scheme, rule.algorithm) for rule in recipe.rules[-2:]] == [
        ("int8", "rtn"),
        ("int4", "gptq"),
    ]
    assert recipe.rules[0].reason == "int4 costs 0.02 to 0.35 nats of KL, place 2 to 36 of 37 by nats a bit"
    everything = make_recipe(weights, frozenset(w.name for w in weights), 8, ("int4", "int8"))
    assert {rule.scheme for rule in everything.rules} == {"int8"}


@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_toml_gives_back_what_was_written(name, reason):
    rules = [{"match": "*", "scheme": "int4", "algorithm": "gptq", "reason": reason}]
    recipe = Recipe.model_validate({"name": name, "rules": rules})
    text = to_toml(Mixed(recipe, (), frozenset(), 4.5, "kl"), name)
    assert Recipe.model_validate(tomllib.loads(text)) == recipe


# on pepper


def held_out_ids(source: Any) -> list[list[int]]:
    from exporter.pepper.questions import held_out
    from exporter.tokenizer import TOKENIZER
    from runtimes.tokenizer import Tokenizer

    tokenizer, asked = Tokenizer(source.path / TOKENIZER), held_out(48)
    turns = [f"<|user|>{one.prompt}<|end|><|assistant|>{one.answer}<|end|>" for one in asked]
    return [
        tokenizer.encode("<|begin|>" + "".join(turns[start : start + 8]), add_special=False)
        for start in range(0, len(turns), 8)
    ]


def test_it_beats_uniform_bits_of_the_same_size_and_random_weights(tmp_path):
    """Mean KL divergence from the float model on questions that pepper never saw."""
    with open_checkpoint("pepper") as source:
        arch, texts = source.architecture, held_out_ids(source)

        def log_p(recipe: Recipe) -> tuple[list[torch.Tensor], int]:
            made = QuantizedWeights(source, recipe.resolve(arch))
            weights = Remembered(made)
            found = [TorchOps(arch, weights, 512, rounded=0).run(torch.tensor([ids]))[0] for ids in texts]
            return [logits.log_softmax(-1) for logits in found], sum(each.bytes for each in made.reports)

        exact, _ = log_p(Recipe.uniform("fp32"))

        def divergence(recipe: Recipe) -> tuple[float, int]:
            found, nbytes = log_p(recipe)
            lost = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(exact, found, strict=True))
            return lost / sum(map(len, texts)), nbytes

        schemes, path = ("int4-g128", "int8-g128"), tmp_path / "r.toml"
        made = quantize(source, path, target_bits=4.75, scheme=schemes[0], raise_to=schemes[1])
        (mixed, its_bytes), (uniform, bytes_) = (
            divergence(read_recipe(path)),
            divergence(Recipe.uniform("int4")),
        )
        assert its_bytes <= bytes_
        assert mixed < 0.8 * uniform
        fewer = choose(made.weights, 4.5)
        assert len(fewer) < len(made.raised)
        sensitive, _ = divergence(make_recipe(made.weights, fewer, 4.5, schemes))
        names = [each.name for each in made.weights]
        for seed in range(2):
            drawn, some = random.Random(seed).sample(names, len(names)), set[str]()
            for name in drawn:
                if average(made.weights, some | {name}) <= 4.5:
                    some.add(name)
            other = make_recipe(made.weights, frozenset(some), 4.5, schemes)
            assert sensitive < divergence(other)[0]


# the command


def test_the_command_writes_what_an_export_takes(gochu, checkpoints, tmp_path):
    file, text = tmp_path / "레시피.toml", tmp_path / "글.txt"
    text.write_text("\n\n".join(f"작은 고추가 맵다. {i} plus {i}." for i in range(14)), encoding="utf-8")
    folder = checkpoints.folder("qwen2")
    options = ("--target-bits", 6.5, "--algorithm", "gptq", "--calibration", text, "-o", file)
    code, out, err = gochu("quantize", folder, *options, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["recipe"] == find_recipe(str(file)).model_dump(mode="json")
    assert [row["nats_per_bit"] for row in said["tensors"]] == sorted(
        (row["nats_per_bit"] for row in said["tensors"]), reverse=True
    )
    assert said["bits"] <= 6.5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, text.name])
    bundle = export(
        folder, tmp_path / "out", recipe=find_recipe(str(file)), context=64, calibration=text, format="onnx"
    )
    assert bundle.manifest.gate.status == "passed"
    exported = {tensor.name: tensor for tensor in bundle.manifest.tensors}
    schemes = {row["tensor"]: row["scheme"] for row in said["tensors"]}
    assert {name: exported[name].scheme for name in schemes} == schemes
    raised = next(row["tensor"] for row in said["tensors"] if row["scheme"] == "int8")
    assert "nats of KL" in exported[raised].note
    code, out, err = gochu("quantize", folder, *options)
    assert (code, out) == (2, "")
    assert "exists already" in err
    before = file.read_bytes()
    code, out, err = gochu("quantize", folder, *options, "--force")
    assert (code, out, file.read_bytes()) == (0, "", before), err
    assert raised in err
    assert "bits a weight" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--target-bits", 3.9),
            "3.9 bits a weight were asked for, but for this model int4 takes 4 and int8 8",
        ),
        (("--target-bits", 8.5), "ask for 4 to 8, or for another --scheme"),
        (("--target-bits", "nan"), "nan bits a weight"),
        (("--target-bits", 5, "--scheme", "int8", "--raise-to", "int4"), "raise to a scheme of more bits"),
        (("--target-bits", 5, "--measure", "taste"), "there is no measure 'taste'"),
    ],
)
def test_what_is_wrong_use(options, says, gochu, tmp_path):
    code, out, err = gochu("quantize", "pepper", *options, "-o", tmp_path / "new" / "r.toml")
    assert (code, out) == (2, "")
    assert err.startswith("gochu: ")
    assert err.count("\n") == 1
    assert says in err
    assert not list(tmp_path.rglob("*.toml"))


def test_a_shape_that_takes_more_bits_counts_with_those(checkpoints, tmp_path):
    """200 inputs take 8 bits per channel, whatever is asked: 4 is below what the model needs."""
    with open_checkpoint(checkpoints.folder("llama-linear-rope")) as source:
        ids = Path(tmp_path / "t.txt")
        ids.write_text("작은 고추가 맵다. 1 plus 1 is 2.\n\n" * 30, encoding="utf-8")
        with pytest.raises(Exception, match=r"int4 takes 4\.\d+ and int8 8"):
            quantize(source, tmp_path / "r.toml", target_bits=4, calibration=ids)
        made = quantize(source, tmp_path / "r.toml", target_bits=5.5, calibration=ids)
    downs = [row for row in made.rows() if row["class"] == "mlp.down"]
    assert {row["scheme"] for row in downs} == {"int8-channel"}
    assert all("which has as many bits" in row["reason"] for row in downs)
    assert not {row["tensor"] for row in downs} & made.raised
