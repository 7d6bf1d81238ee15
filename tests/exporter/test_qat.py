"""Quantization-aware training: the right gradients, from gptq-descent's integers, cut off and taken up,
better than those."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter import export
from exporter.architecture import sources
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.plan import make_plan
from exporter.quantization import qat, training
from exporter.quantization.calibration import calibration_sequences
from exporter.quantization.latents import FakeQuantize, Latent
from exporter.quantization.recipe import Recipe, Rule, calibrated, starting
from exporter.quantization.rtn import quantize_mse
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.streaming import quantize_layers
from exporter.quantization.tensor import QuantizedTensor, round_scales
from exporter.quantization.weights import Found, QuantizedWeights, Remembered, SourceWeights, not_found
from exporter.staging import Staging
from exporter.torch_ops import TorchOps

IDS = [[0, *range(5, 90)], [0, *range(200, 240)], [], [0, 9, 8, 7], [0, *range(300, 330)]]
SCHEMES = ("int4", "int4-g128", "int8", "w4a16", "int8-channel")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "훈련.txt"
    path.write_text("\n\n".join(f"{i} 더하기 {i}는 {2 * i}이에요." for i in range(12)), encoding="utf-8")
    return path


def run(
    source: Checkpoint,
    recipe: Recipe,
    work: Path,
    steps: int,
    ids: Sequence[Sequence[int]] = IDS,
    **more: Any,
) -> tuple[QuantizedWeights, QuantizedWeights]:
    """The weights that training starts from, and the trained ones."""
    decisions = recipe.resolve(source.architecture)
    first, found, stage = starting(decisions), not_found, started(work)
    if calibrated(first):
        found = quantize_layers(source, first, ids, 96, stage)
    new = qat.train(source, decisions, found, ids, 96, steps, stage, **more)
    return QuantizedWeights(source, first, found=found), QuantizedWeights(source, decisions, found=new)


def started(work: Path) -> Staging:
    work.mkdir(exist_ok=True)
    return Staging(work, "x")


def digests(source: Checkpoint, weights: QuantizedWeights) -> dict[str, str]:
    return {name: weights.matrix(name).digest() for name, _ in source.architecture.matrices()}


# gradients


def test_gradients_go_straight_through_the_rounding():
    """Loss Σ a·ŵ: a latent's gradient is a times its scale, a scale's Σ a·q, that of its logarithm times the scale."""
    random = np.random.default_rng(0)
    a = random.standard_normal((4, 64)).astype(np.float32)
    latents = torch.tensor(random.uniform(-8.4, 7.4, (4, 64)).astype(np.float32), requires_grad=True)
    scales = torch.tensor(random.uniform(0.01, 0.1, (4, 2)).astype(np.float32), requires_grad=True)
    values = FakeQuantize.apply(latents, scales)
    (torch.from_numpy(a) * values).sum().backward()
    q, s = np.rint(latents.detach().numpy()), np.repeat(scales.detach().numpy(), 32, 1)
    np.testing.assert_array_equal(values.detach().numpy(), q * s)
    np.testing.assert_array_equal(latents.grad.numpy(), a * s)
    np.testing.assert_allclose(scales.grad.numpy(), (a * q).reshape(4, 2, 32).sum(-1), rtol=1e-4, atol=1e-5)


def quantized(scheme: str, rows: int = 6, inputs: int = 128) -> tuple[QuantizedTensor, np.ndarray]:
    w = (np.random.default_rng(1).standard_normal((rows, inputs)) * 0.02).astype(np.float32)
    from exporter.checkpoint import Matrix

    tensor, _, _ = quantize_mse(Matrix("w", w.shape, lambda start, stop: w[start:stop]), parse_scheme(scheme))
    return tensor, w


@pytest.mark.parametrize("scheme", SCHEMES)
def test_latents_start_where_they_round_to_the_integers_nearest_to_the_weights(scheme):
    """Also to integers that are not the nearest: as GPTQ's are not."""
    tensor, w = quantized(scheme)
    tensor.data[::2] = tensor.data[1::2]  # of another output
    latent = Latent(tensor, w)
    assert latent.quantized().digest() == tensor.digest()
    exact = w / np.repeat(tensor.scales, w.shape[1] // tensor.scales.shape[1], 1)
    distance = np.abs(latent.latents.detach().numpy() - tensor.integers())
    inside = np.abs(exact - tensor.integers()) <= 0.49
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(latent.latents.detach().numpy()[inside], exact[inside], rtol=1e-5)
    np.testing.assert_allclose(distance[~inside], 0.49, rtol=1e-4)


def test_scales_stay_on_the_grid_and_latents_within_the_bits():
    tensor, w = quantized("int4")
    latent = Latent(tensor, w)
    with torch.no_grad():
        latent.logs += 0.013
        latent.latents[:, ::2] = 100.0
        latent.latents[:, 1::2] = -100.0
    latent.keep_within()
    made = latent.quantized()
    assert set(made.integers()[:, ::2].ravel()) == {7}
    assert set(made.integers()[:, 1::2].ravel()) == {-8}
    np.testing.assert_array_equal(made.scales, round_scales(tensor.scales * np.exp(np.float32(0.013))))
    assert (made.scales != tensor.scales).all()
    np.testing.assert_array_equal(latent.values().detach().numpy(), made.dequantize())
    latent.values().sum().backward()  # each latent's gradient is its scale; a logarithm's passes the grid
    exact = tensor.scales * np.exp(np.float32(0.013))
    np.testing.assert_allclose(latent.logs.grad.numpy(), exact * (16 * 7 - 16 * 8), rtol=1e-5)


def test_the_loss_and_its_gradients_are_those_of_transformers(family, checkpoints, tmp_path, monkeypatch):
    """KL divergence of a float model's predictions from those of one with the quantized weights; the logits of few
    tokens in memory at once, and sequences padded."""
    monkeypatch.setattr(qat, "LOGITS", 512 * 50)
    teacher = checkpoints.model(family)
    scheme = ("int4", "w4a16", "int8")[sum(map(ord, family)) % 3]
    with open_checkpoint(checkpoints.folder(family)) as source:
        arch = source.architecture
        decisions = Recipe.uniform(scheme, "qat").resolve(arch)
        first = starting(decisions)
        stage = started(tmp_path / "work")
        ids = [sequence[:64] for sequence in IDS if sequence]
        found = quantize_layers(source, first, ids, 64, stage)
        qat._run_teacher(source, ids, 64, stage, lambda *_: None)
        trained = qat._Run(source, decisions, found, ids, 64, 10, stage.folder, lambda *_: None)
        values = {name: latent.values().detach() for name, latent in trained.latents.items()}
        scales = {name: latent.scales().detach() for name, latent in trained.latents.items()}
        loss = trained.step(range(len(ids)))
        student = copy.deepcopy(teacher)
        parameters = dict(student.named_parameters())
        assert set(values) == {name for name, _ in arch.matrices()}
        for name, value in values.items():
            place = sources(arch)[name]
            parameters[place.tensor].data[place.start : place.start + place.rows] = value
        expected, tokens = torch.zeros(()), sum(map(len, ids))
        for sequence in ids:
            with torch.no_grad():
                goal = teacher(torch.tensor([sequence])).logits.log_softmax(-1)
            said = student(torch.tensor([sequence])).logits.log_softmax(-1)
            expected = expected + (goal.exp() * (goal - said)).sum() / tokens
        expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-3)
    for name, latent in trained.latents.items():
        place = sources(arch)[name]
        gradient = parameters[place.tensor].grad[place.start : place.start + place.rows]
        theirs = gradient * scales[name].repeat_interleave(gradient.shape[1] // scales[name].shape[1], 1)
        largest = float(theirs.abs().max())
        assert largest > 0
        torch.testing.assert_close(latent.latents.grad, theirs, rtol=1e-2, atol=2e-3 * largest)


# training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_steps_give_the_weights_it_starts_from(scheme, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        start, made = run(source, Recipe.uniform(scheme, "qat"), tmp_path, 0)
        assert digests(source, start) == digests(source, made)
        first = Recipe.uniform(scheme, "gptq-descent").resolve(source.architecture)
        found = quantize_layers(source, first, IDS, 96, started(tmp_path / "first"))
        assert digests(source, QuantizedWeights(source, first, found=found)) == digests(source, made)
    report = next(report for report in made.reports if report.name == "layers.1.mlp.up")
    before = next(report for report in start.reports if report.name == "layers.1.mlp.up")
    assert (report.algorithm, before.algorithm, report.note) == ("qat", "gptq-descent", before.note)
    assert report.error == pytest.approx(before.error, rel=1e-4)
    assert report.max_error == pytest.approx(before.max_error, rel=1e-4)


def test_only_what_the_recipe_says_is_trained(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(qat, "RATE", 0.005)
    rules = (
        Rule(match="layers.1.mlp.*", scheme="int4", algorithm="qat"),
        Rule(match="head", scheme="int4", algorithm="qat"),
        Rule(match="layers.0.*", scheme="int8", algorithm="gptq"),
        Rule(match="embedding", scheme="fp16", algorithm="qat"),
        Rule(match="*", scheme="int4"),
    )
    with open_checkpoint(checkpoints.folder("llama-biases")) as source:
        start, made = run(source, Recipe(name="some", rules=rules), tmp_path, 8)
        before, after = digests(source, start), digests(source, made)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"layers.1.mlp.gate", "layers.1.mlp.up", "layers.1.mlp.down", "head"}


def test_only_the_embedding_can_be_trained(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(qat, "RATE", 0.05)
    rules = (
        Rule(match="embedding", scheme="int4", algorithm="qat"),
        Rule(match="*", scheme="int8", algorithm="rtn"),
    )
    with open_checkpoint(checkpoints.folder("llama-biases")) as source:
        start, made = run(source, Recipe(name="some", rules=rules), tmp_path, 8)
        before, after = digests(source, start), digests(source, made)
    assert {name for name in before if before[name] != after[name]} == {"embedding"}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def never_stopped(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests that 12 steps end with."""
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(checkpoints.folder("qwen2")) as source:
        patch.setattr(qat, "RATE", 0.05)
        start, made = run(source, Recipe.uniform("int4", "qat"), tmp_path_factory.mktemp("whole"), 12)
        found = digests(source, made)
        assert found != digests(source, start)
    return found


@pytest.mark.parametrize(("stopped", "damaged"), [(2, False), (9, False), (9, True), (12, False)])
def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(
    stopped, damaged, never_stopped, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(qat, "RATE", 0.05)
    recipe, done = Recipe.uniform("int4", "qat"), list[int]()

    def stopping(what: str, count: int, total: int) -> None:
        if what.startswith("train"):
            assert total == 12
            done.append(count)
            if count == stopped:
                raise Stop

    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        with pytest.raises(Stop):
            run(source, recipe, tmp_path / "cut", 12, progress=stopping)
        saved = {2: 1, 9: 8, 12: 10}[stopped]  # after every tenth
        states = sorted((tmp_path / "cut").rglob("trained.*.npz"))
        assert [path.name for path in states] == [f"trained.{saved}.npz"]
        if damaged:
            states[0].write_bytes(states[0].read_bytes()[:-8] + b"\0" * 8)
        first = 1 if damaged else saved + 1
        done.clear()
        stopped = 0
        _, again = run(source, recipe, tmp_path / "cut", 12, progress=stopping)
        assert done == list(range(first, 13))
        assert never_stopped == digests(source, again)
        done.clear()
        _, once_more = run(source, recipe, tmp_path / "cut", 12, progress=stopping)
        assert done == []
        assert never_stopped == digests(source, once_more)
    left = sorted(path.name for path in (tmp_path / "cut" / ".work").iterdir())
    assert left == [".progress.json", "trained.npz"]


def test_a_loss_that_is_no_number_is_one_sentence(checkpoints, text, gochu, tmp_path):
    model = checkpoints.write(tmp_path / "checkpoint", "qwen2")
    model.model.norm.weight.data *= 1e38
    model.save_pretrained(tmp_path / "checkpoint")
    recipe = tmp_path / "recipe.toml"  # GPTQ of the head would refuse its inputs before
    rules = [
        '[[rules]]\nmatch = "layers.*"\nscheme = "int4"\nalgorithm = "qat"\n',
        '[[rules]]\nmatch = "*"\nscheme = "int8"\n',
    ]
    recipe.write_text('name = "layers"\n' + "".join(rules), encoding="utf-8")
    command = ["export", tmp_path / "checkpoint", "--recipe", recipe, "--calibration", text]
    code, out, err = gochu(*command, "-o", tmp_path / "out")
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "the loss became NaN or infinite at training step 1: the float model's predictions" in err
    assert not (tmp_path / "out").exists()


def test_training_that_makes_it_worse_is_dropped(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(qat, "RATE", 10.0)
    ids = [[0, *range(start, start + 20)] for start in range(5, 200, 10)]
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        start, made = run(source, Recipe.uniform("int4", "qat"), tmp_path, 4, ids)
        assert digests(source, start) == digests(source, made)
    notes = {report.note for report in made.reports}
    assert len(notes) == 1
    assert notes.pop().endswith("on text kept aside: what it started from is kept")


def test_an_eighth_of_the_text_is_kept_aside():
    ids = [[0] * (1 + i % 5) for i in range(50)]
    learned, aside = ({place for batch in part for place in batch} for part in qat._parts(ids))
    assert aside == {7, 15, 23, 31, 39, 47}
    assert learned | aside == set(range(50))
    assert not learned & aside


def test_too_few_tokens_are_refused(checkpoints, tmp_path):
    rules = (Rule(match="embedding", scheme="int4", algorithm="qat"), Rule(match="*", scheme="int8"))
    with (
        open_checkpoint(checkpoints.folder("qwen2")) as source,
        pytest.raises(RecipeError, match="has 4 tokens"),
    ):
        run(source, Recipe(name="r", rules=rules), tmp_path, 5, [[0, 9, 8, 7], []])


# plans and bundles


def test_every_family_passes_the_gate(family, checkpoints, text, tmp_path):
    bundle = export(
        checkpoints.folder(family),
        tmp_path / "out",
        scheme=("int4", "int4-g128", "int8")[sum(map(ord, family)) % 3],
        algorithm="qat",
        context=64,
        calibration=text,
        qat_steps=2,
    )
    manifest = bundle.manifest
    assert manifest.gate.status == "passed"
    by_name = {tensor.name: tensor for tensor in manifest.tensors}
    for name in ("embedding", "layers.2.attention.o"):
        assert by_name[name].algorithm == "qat"
        assert "training changed " in by_name[name].note
    said = {choice.topic: choice for choice in manifest.plan}
    assert "1308.3432" in said["algorithm"].reason
    assert said["training"].value.startswith("2 steps, ")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.fixture(scope="module")
def arch() -> Any:
    with open_checkpoint("pepper") as source:
        return source.architecture


def test_a_plan_says_what_training_takes(arch):
    plan = make_plan(arch, scheme="int4", algorithm="qat")
    assert plan.training is not None
    assert plan.training.steps == training.STEPS
    weights = sum(rows * columns for _, (rows, columns) in arch.matrices())
    assert plan.training.for_weights == weights * 16 + weights // 32 * 20
    choice = next(choice for choice in plan.choices if choice.topic == "training")
    assert choice.value == f"{training.STEPS} steps, about 955 MB of memory on this computer"
    assert ("calibration", "the text that is shipped") in [(c.topic, c.value) for c in plan.choices]
    other = make_plan(arch, scheme="int4", algorithm="qat", qat_steps=7)
    assert (plan.fingerprint()["training_steps"], other.fingerprint()["training_steps"]) == (
        training.STEPS,
        7,
    )
    assert make_plan(arch, scheme="int4", algorithm="gptq").fingerprint()["training_steps"] is None


def test_steps_that_nothing_needs_are_refused(arch, gochu, tmp_path):
    code, _, err = gochu(
        "export", "pepper", "--algorithm", "gptq", "--qat-steps", "5", "-o", tmp_path / "out"
    )
    assert code == 2
    assert "--qat-steps is for --algorithm qat: drop it, or ask for that" in err
    with pytest.raises(UsageError, match="-1 training steps were asked for"):
        make_plan(arch, scheme="int4", algorithm="qat", qat_steps=-1)
    with pytest.raises(RecipeError, match="qat finds scales, and pal4 has none"):
        make_plan(arch, scheme="pal4", algorithm="qat", delegate="ane")
    assert make_plan(arch, scheme="fp16", algorithm="qat").training is None


def test_too_little_memory_is_refused_before_anything_is_done(monkeypatch, gochu, tmp_path):
    monkeypatch.setattr(training, "available", lambda: 100_000_000)
    code, out, err = gochu(
        "export", "pepper", "--scheme", "int4", "--algorithm", "qat", "-o", tmp_path / "out"
    )
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "16 bytes for each trained weight, and 100 MB are free here: use --algorithm gptq" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(training, "available", lambda: None)
    training.Training(1, 10**15, 1).refuse_if_too_large()
    monkeypatch.setattr(training, "available", lambda: 9)
    with pytest.raises(PlanRefused):
        training.Training(1, 10, 1).refuse_if_too_large()


# what it is for


def test_less_is_lost_than_with_gptq(tmp_path):
    """Mean KL divergence from the float model on questions that pepper never saw."""
    from exporter.pepper.questions import held_out
    from exporter.tokenizer import TOKENIZER
    from runtimes.tokenizer import Tokenizer

    with open_checkpoint("pepper") as source:
        arch, tokenizer = source.architecture, Tokenizer(source.path / TOKENIZER)
        turns = [f"<|user|>{one.prompt}<|end|><|assistant|>{one.answer}<|end|>" for one in held_out(80)]
        held = [tokenizer.encode(f"<|begin|>{turn}", add_special=False) for turn in turns]
        decisions = Recipe.uniform("int4-g128", "qat").resolve(arch)
        stage, first = started(tmp_path), starting(decisions)
        found = quantize_layers(source, first, calibration_sequences(source, 512), 512, stage)
        sequences = calibration_sequences(source, 512, most=8192, training=True)
        assert sum(map(len, sequences)) == 8192
        trained = qat.train(source, decisions, found, sequences, 512, 48, stage)

        def log_probabilities(weights: Any) -> torch.Tensor:
            kept = Remembered(weights)
            return torch.cat(
                [
                    TorchOps(arch, kept, 512, rounded=0).run(torch.tensor([ids]))[0].log_softmax(-1)
                    for ids in held
                ]
            )

        reference = log_probabilities(SourceWeights(source))

        def divergence(given: Any, found: Found) -> float:
            made = log_probabilities(QuantizedWeights(source, given, found=found))
            return float((reference.exp() * (reference - made)).sum(-1).mean())

        assert divergence(decisions, trained) < 0.9 * divergence(first, found)
