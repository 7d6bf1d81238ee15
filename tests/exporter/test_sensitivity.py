"""What quantizing one weight alone costs: by both measures, for every family, taken up again, in bounded pieces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.errors import RecipeError, UsageError
from exporter.quantization import sensitivity, states
from exporter.quantization.calibration import calibration_sequences
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights
from exporter.staging import Staging

IDS = [*([0, *range(start, start + 63)] for start in (5, 100, 200)), [0, *range(300, 330)]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def effects(
    source: Any, work: Path, *ways: Recipe, measure: str = "hessian", ids: Sequence[Any] = IDS
) -> Any:
    work.mkdir(exist_ok=True)
    decisions = [way.resolve(source.architecture) for way in ways]
    return sensitivity.measure_effects(source, decisions, ids, Staging(work, "x"), measure)


def ranks(costs: Any) -> Any:
    return np.argsort(np.argsort([cost[0] for cost in costs.values()]))


def test_on_pepper_the_hessian_orders_weights_as_kl_does(tmp_path):
    ways = Recipe.uniform("int4"), Recipe.uniform("int8")
    with open_checkpoint("pepper") as source:
        ids = calibration_sequences(source, 512, None, 384)
        hessian = effects(source, tmp_path / "hessian", *ways, ids=ids)
        kl = effects(source, tmp_path / "kl", ways[0], measure="kl", ids=ids)
    assert np.corrcoef(ranks(hessian), ranks(kl))[0, 1] > 0.9
    for name, (coarse, fine) in hessian.items():
        assert 0 < fine < coarse / 50, name  # 16 times finer: about 256 times less
        assert kl[name][0] / 4 < coarse < 4 * kl[name][0], name


def test_kl_is_that_of_transformers(family, checkpoints, tmp_path):
    """With one weight of each kind quantized in transformers' own model."""
    model, way = checkpoints.model(family), Recipe.uniform("int4")
    with open_checkpoint(checkpoints.folder(family)) as source:
        found = effects(source, tmp_path / "work", way, measure="kl")
        quantized = QuantizedWeights(source, way.resolve(source.architecture))
        names = {"embedding": "model.embed_tokens", "layers.1.attention.o": "model.layers.1.self_attn.o_proj"}
        names["layers.2.mlp.down"] = "model.layers.2.mlp.down_proj"
        with torch.no_grad():
            before = [model(torch.tensor([ids])).logits.log_softmax(-1) for ids in IDS]
            for ours, theirs in names.items():
                weight = model.get_submodule(theirs).weight
                exact = weight.detach().clone()
                weight.copy_(torch.from_numpy(quantized.matrix(ours).dequantize()))
                after = [model(torch.tensor([ids])).logits.log_softmax(-1) for ids in IDS]
                weight.copy_(exact)
                lost = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True))
                assert found[ours][0] == pytest.approx(lost / sum(map(len, IDS)), rel=1e-2)


def test_every_weight_of_every_family_costs_something(family, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder(family)) as source:
        found = effects(source, tmp_path / "work", Recipe.uniform("int4"), Recipe.uniform("fp32"))
        assert list(found) == [name for name, _ in source.architecture.matrices()]
    assert all(coarse > 0 and exact == 0 for coarse, exact in found.values())


def test_it_is_the_mean_of_squared_gradients_times_errors(checkpoints, monkeypatch, tmp_path):
    """Of transformers' model and its own backward pass, for the tokens that were drawn."""
    drawn: list[torch.Tensor] = []
    original = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda *given, **more: drawn.append(original(*given, **more)) or drawn[-1]
    )
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        way = Recipe.uniform("int4")
        found = effects(source, tmp_path / "work", way)
        quantized = QuantizedWeights(source, way.resolve(source.architecture))
        model, name = checkpoints.model("qwen2"), "layers.0.mlp.down"
        linear, seen = model.model.layers[0].mlp.down_proj, dict[str, torch.Tensor]()
        error = torch.from_numpy(quantized.matrix(name).dequantize()) - linear.weight.detach()
    hook = linear.register_full_backward_hook(lambda _, __, gradient: seen.update(gradient=gradient[0][0]))
    inputs = linear.register_forward_hook(lambda _, given, __: seen.update(x=given[0][0].detach()))
    total, labels = 0.0, torch.cat(drawn)
    for ids in IDS:
        chosen, labels = labels[: len(ids)], labels[len(ids) :]
        logits = model(torch.tensor([ids])).logits[0]
        logits.log_softmax(-1).gather(1, chosen).sum().backward()
        total += float((seen["gradient"] * (seen["x"] @ error.T)).square().sum())
    hook.remove()
    inputs.remove()
    model.zero_grad()
    assert found[name][0] == pytest.approx(total / 2 / sum(map(len, IDS)), rel=1e-2)


def test_the_head_in_pieces_gives_the_same(checkpoints, monkeypatch, tmp_path):
    with open_checkpoint(checkpoints.folder("gemma2")) as source:
        whole = effects(source, tmp_path / "whole", Recipe.uniform("int4"))
        monkeypatch.setattr(states, "TOKENS", 64)  # the sequences one by one
        one = effects(source, tmp_path / "one", Recipe.uniform("int4"))
        assert [cost for (cost,) in one.values()] == pytest.approx(
            [cost for (cost,) in whole.values()], rel=1e-3
        )
        monkeypatch.setattr(sensitivity, "_LOGITS", 7 * 512)  # other batches draw other tokens
        pieces = effects(source, tmp_path / "pieces", Recipe.uniform("int4"))
    assert np.corrcoef(ranks(pieces), ranks(whole))[0, 1] > 0.9


@pytest.mark.parametrize("measure", ["hessian", "kl"])
def test_what_is_finished_is_not_done_again(measure, checkpoints, monkeypatch, tmp_path):
    way, owner = Recipe.uniform("int4"), sensitivity._Passes if measure == "hessian" else sensitivity
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        expected = effects(source, tmp_path / "fresh", way, measure=measure)
        stopped = "_backward" if measure == "hessian" else "_One"
        original, calls = getattr(owner, stopped), []

        def stop(*given: Any) -> Any:
            calls.append(given)
            if len(calls) == 25:  # of the 22 weights, so in the second batch
                raise KeyboardInterrupt
            return original(*given)

        def stop_in_layer_1(self: Any, i: int, folder: Path) -> Any:
            if i == 1:
                raise KeyboardInterrupt
            return original(self, i, folder)

        monkeypatch.setattr(owner, stopped, stop_in_layer_1 if measure == "hessian" else stop)
        with pytest.raises(KeyboardInterrupt):
            effects(source, tmp_path / "work", way, measure=measure)
        monkeypatch.undo()
        monkeypatch.setattr(sensitivity._Passes, "_head", None)  # which is done
        assert effects(source, tmp_path / "work", way, measure=measure) == expected


@pytest.mark.parametrize("damaged", ["states.1.f32", "gradients.2.f32"])
def test_what_is_damaged_is_done_again(damaged, checkpoints, monkeypatch, tmp_path):
    way = Recipe.uniform("int4")
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        expected = effects(source, tmp_path / "fresh", way)
        original = sensitivity._Passes._backward

        def stop(self: Any, i: int, folder: Path) -> Any:
            if i == 1:
                raise KeyboardInterrupt
            return original(self, i, folder)

        monkeypatch.setattr(sensitivity._Passes, "_backward", stop)
        with pytest.raises(KeyboardInterrupt):
            effects(source, tmp_path / "work", way)
        monkeypatch.undo()
        path = tmp_path / "work" / damaged
        path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8)
        assert effects(source, tmp_path / "work", way) == expected


@pytest.mark.parametrize("measure", ["hessian", "kl"])
def test_progress_rises_to_its_end(measure, checkpoints, tmp_path):
    told: list[tuple[str, int, int]] = []
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        ways = [Recipe.uniform("int4").resolve(source.architecture)]
        work = Staging(tmp_path, "x")
        sensitivity.measure_effects(source, ways, IDS, work, measure, lambda *what: told.append(what))
    done, totals = [count for _, count, _ in told], {total for _, _, total in told}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert len(set(done)) > 10


def test_gptq_loses_less_here_too(tmp_path):
    """What an algorithm finds is what is measured."""
    with open_checkpoint("pepper") as source:
        ids = calibration_sequences(source, 512, None, 512)
        ways = Recipe.uniform("int4", "gptq"), Recipe.uniform("int4")
        found = effects(source, tmp_path / "work", *ways, ids=ids)
    better = [name for name, (gptq, rtn) in found.items() if gptq < rtn and name.startswith("layers.")]
    assert len(better) > 24  # of 28


def test_what_is_refused(checkpoints, monkeypatch, tmp_path):
    way = Recipe.uniform("int4")
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        with pytest.raises(RecipeError, match="has 9 tokens, and 128 are the fewest"):
            effects(source, tmp_path / "work", way, ids=[list(range(9))])
        with pytest.raises(UsageError, match="no measure 'taste': use one of hessian, kl"):
            effects(source, tmp_path / "work", way, measure="taste")
        monkeypatch.setattr(sensitivity, "LARGEST_KL", 1000)
        with pytest.raises(UsageError, match="use --measure hessian"):
            effects(source, tmp_path / "work", way, measure="kl")


@pytest.mark.parametrize("measure", ["hessian", "kl"])
def test_activations_that_become_nan_are_refused(measure, checkpoints, tmp_path):
    model = checkpoints.write(tmp_path / "checkpoint", "qwen2")
    model.model.layers[1].post_attention_layernorm.weight.data *= 1e30
    model.save_pretrained(tmp_path / "checkpoint")
    with (
        open_checkpoint(tmp_path / "checkpoint") as source,
        pytest.raises(RecipeError, match="NaN or infinite on the calibration text") as caught,
    ):
        effects(source, tmp_path / "work", Recipe.uniform("int4"), measure=measure)
    assert "\n" not in str(caught.value)
