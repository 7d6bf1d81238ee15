"""The quality report against transformers and torch's own divergence, on checkpoints and bundles."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from exporter.checkpoint import open_checkpoint
from exporter.errors import UsageError
from exporter.quality import KINDS, Quality, compare, text_for
from exporter.quality_sides import Wanted, checkpoint_side
from exporter.quantization.calibration import HELD_OUT, TEXTS, calibration_sequences, held_out_sequences
from exporter.tokenizer import read_text_side

TOKENS = 360  # two sequences, each longer than what LongRoPE's short factors are for


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("글") / "시험.txt"
    path.write_text("작은 고추가 맵다. Small peppers are hot.\n\n" * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def noisy(checkpoints, tmp_path_factory):
    """`noisy(family)`: the checkpoint with other weights, as a folder and as the transformers model."""
    made: dict[str, tuple[Path, Any]] = {}

    def other(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp("noisy")
            model = checkpoints.write(folder, family)
            model.load_state_dict(checkpoints.model(family).state_dict())
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter += (
                            0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
                        )
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return other


def sequences(folder: Path, text: Path) -> list[list[int]]:
    with open_checkpoint(folder) as source:
        side = checkpoint_side(source, Wanted(), Path(), lambda *_: None)
        return text_for(side, side, text, TOKENS)


def ratio(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    signal = sum(x.double().square().sum() for x in wanted)
    noise = sum((x.double() - y.double()).square().sum() for x, y in zip(wanted, found, strict=True))
    return float(10 * torch.log10(signal / noise))


def watched(model: Any, ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
    """Logits [1, length, vocab] of each sequence, each layer's output, and what goes into each `down_proj`."""
    seen: dict[str, list[torch.Tensor]] = {"logits": []}

    def note(name: str, value: Any) -> None:
        seen.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value).detach())

    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(lambda _, __, y, i=i: note(f"layer {i}", y)))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, i=i: note(f"down {i}", x[0])))
    with torch.no_grad():
        for sequence in ids:
            note("logits", model(torch.tensor([sequence])).logits)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["gemma2", "llama-biases", "phi3-longrope", "qwen2-window-yarn"])
def test_figures_are_those_of_transformers_and_torch(name, checkpoints, noisy, text):
    folder, model = noisy(name)
    found = compare(checkpoints.folder(name), folder, text=text, tokens=TOKENS)
    ids = sequences(folder, text)
    ours, theirs = watched(checkpoints.model(name), ids), watched(model, ids)
    wanted, got = (torch.cat([x[0, :-1] for x in seen["logits"]]).log_softmax(-1) for seen in (ours, theirs))
    kl = functional.kl_div(got, wanted, reduction="none", log_target=True).sum(-1)
    assert found.tokens == len(kl) == sum(map(len, ids)) - len(ids)
    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl.median == pytest.approx(float(kl.quantile(0.5)), rel=1e-2)
    assert found.kl.p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert found.kl.largest == pytest.approx(float(kl.max()), rel=1e-3)
    same = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    assert found.agreement == pytest.approx(100 * float(same), abs=0.5)
    assert 0 < found.agreement < 100
    targets = torch.tensor([token for sequence in ids for token in sequence[1:]])
    for side, logits in ((found.first, wanted), (found.second, got)):
        loss = functional.cross_entropy(logits, targets)
        assert side.perplexity == pytest.approx(float(loss.exp()), rel=1e-3)
        assert side.bits_per_weight == 32
    for i, layer in enumerate(found.layers):
        assert layer.output_db == pytest.approx(ratio(ours[f"layer {i}"], theirs[f"layer {i}"]), abs=0.05)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    for i in range(len(found.layers)):
        a, b = (m.model.layers[i].mlp.down_proj for m in (checkpoints.model(name), model))
        row, inputs = tensors[f"layers.{i}.mlp.down"], ours[f"down {i}"]
        assert row.weights_db == pytest.approx(ratio([a.weight.detach()], [b.weight.detach()]), abs=0.01)
        with torch.no_grad():
            products = [a(x) for x in inputs], [b(x) for x in inputs]
        assert row.output_db == pytest.approx(ratio(*products), abs=0.05)


def test_a_model_against_itself_has_no_error(family, checkpoints, text):
    folder = checkpoints.folder(family)
    found = compare(folder, folder, text=text, tokens=100)
    assert (found.kl.mean, found.kl.largest, found.agreement) == (0, 0, 100)
    assert found.first.perplexity == found.second.perplexity > 1
    assert {tensor.kind for tensor in found.tensors} == set(KINDS)
    assert all(tensor.weights_db is tensor.output_db is None for tensor in found.tensors)
    assert all(layer.output_db is None for layer in found.layers)
    assert found.worst() is None
    assert all(figures == (None, None) for figures in found.by_kind().values())


@pytest.mark.parametrize(
    ("format", "scheme", "name"),
    [
        ("onnx", "int4", "llama-llama3-rope"),
        ("onnx", "int8", "phi3-longrope"),
        ("executorch", "int4", "qwen2"),
    ],
)
def test_a_bundle_is_run_by_its_engine(format, scheme, name, bundles, checkpoints, text):
    """Its figures are those of the reference that rounds as the engine does, not of float activations."""
    if format == "executorch":
        pytest.importorskip("executorch")
    folder, bundle = checkpoints.folder(name), bundles(name, scheme, format=format)
    engine = {"onnx": "onnxruntime"}.get(format, format)
    asked = {"text": text, "tokens": 120}  # no more than the bundle's context: both get one sequence
    found = compare(folder, bundle.path, **asked)
    rounded = compare(folder, scheme=scheme, activations=engine, **asked)
    exact = compare(folder, scheme=scheme, **asked)
    assert abs(found.kl.mean - rounded.kl.mean) < 0.1 * abs(exact.kl.mean - rounded.kl.mean)
    assert found.second.what.startswith(format)
    assert found.tensors == rounded.tensors  # the integers are the same, and so is the reference
    assert found.layers == rounded.layers != exact.layers
    assert found.second.bits_per_weight == pytest.approx(bundle_bits(bundle))


def bundle_bits(bundle: Any) -> float:
    matrices = [report for report in bundle.manifest.tensors if len(report.shape) == 2]
    return 8 * sum(r.bytes for r in matrices) / sum(math.prod(r.shape) for r in matrices)


def test_a_bundle_in_float_is_the_checkpoint(bundles, checkpoints, text):
    bundle = bundles("gemma2", "fp32")
    found = compare(checkpoints.folder("gemma2"), bundle.path, text=text, tokens=200)
    assert 0 < found.kl.mean < 1e-8
    assert found.agreement > 99
    back = compare(bundle.path, bundles("gemma2", "int4").path, text=text, tokens=200)
    there = compare(checkpoints.folder("gemma2"), bundles("gemma2", "int4").path, text=text, tokens=200)
    assert back.kl.mean == pytest.approx(there.kl.mean, rel=1e-3)
    assert back.layers == there.layers
    assert back.tensors == there.tensors  # the head's too, though an engine ran the first model's


def test_fewer_layers_leave_the_figures_by_layer_out(checkpoints, text, tmp_path):
    checkpoints.write(tmp_path, "qwen2", num_hidden_layers=2)
    found = compare(checkpoints.folder("qwen2"), tmp_path, text=text, tokens=200)
    assert found.kl.mean > 0
    assert found.layers == found.tensors == ()
    assert "other shapes" in found.notes[0]


# pepper: what compression costs


@pytest.fixture(scope="module")
def rtn() -> Quality:
    return compare("pepper", scheme="int4", algorithm="rtn-absmax", tokens=600, questions=0)


def test_a_better_algorithm_is_seen_to_be_better(rtn):
    found = compare("pepper", scheme="int4", algorithm="gptq", tokens=600, questions=20)
    assert found.kl.mean < 0.8 * rtn.kl.mean
    assert found.agreement > rtn.agreement
    down, before = ({t.name: t for t in quality.tensors}["layers.1.mlp.down"] for quality in (found, rtn))
    assert down.weights_db < before.weights_db + 1  # GPTQ is not after these ...
    assert down.output_db > before.output_db + 2  # ... but after those
    assert found.first.answers.right >= 18
    assert abs(found.second.answers.right - found.first.answers.right) <= 2
    assert found.text == "held out"


def test_answers_are_what_the_bundle_says(bundles):
    """By the engine as by `gochu score`, and by the reference as by the engine, on the same float weights."""
    from exporter.pepper.questions import held_out
    from exporter.quality_answers import answer_all
    from exporter.quality_sides import Side, open_side
    from runtimes.generate import load

    bundle, prompts = bundles("pepper", "fp32"), [question.prompt for question in held_out(12)]
    with load(bundle.path) as model:
        said = {prompt: model.generate(prompt, max_tokens=32).text for prompt in prompts}
    stack: Any = None
    side = open_side(bundle.path, Wanted(), stack, Path())
    assert isinstance(side, Side)
    assert answer_all(side, prompts) == said
    with open_checkpoint("pepper") as source:
        assert answer_all(checkpoint_side(source, Wanted(), Path(), lambda *_: None), prompts) == said


def test_prompts_of_one_length_go_together_and_keep_their_places():
    from exporter.quality_answers import by_length

    batches = by_length([[1, 2], [3], [4, 5], [6]])
    found = {tuple(places): batch.tolist() for places, batch in batches}
    assert found == {(0, 2): [[1, 2], [4, 5]], (1, 3): [[3], [6]]}


def test_an_answer_ends_where_it_should(checkpoints):
    """As transformers' own greedy search, at most so long and without the token that ends it."""
    from exporter.quality_answers import greedy
    from exporter.quantization.weights import SourceWeights
    from exporter.torch_ops import TorchOps

    model, prompts = checkpoints.model("qwen2"), [[5, 6, 7], [8, 9], [10, 11, 12]]
    whole = [
        model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[
            0, len(ids) :
        ]
        for ids in prompts
    ]
    stop = int(whole[2][3])  # ends one of two that go together
    expected = []
    for made in whole:
        ids = made.tolist()
        expected.append(ids[: ids.index(stop)] if stop in ids else ids)
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        weights, arch = SourceWeights(source), source.architecture
        found = dict(greedy(lambda: TorchOps(arch, weights, 64, rounded=0), prompts, {stop}, 8))
    assert [found[place] for place in range(3)] == expected
    assert len(expected[2]) <= 3 < len(expected[0])


def test_what_judges_does_not_calibrate():
    """No line of the shipped text stands in the other, and pepper's questions are others."""
    pieces = [
        {piece.strip() for piece in path.read_text(encoding="utf-8").replace(".", "\n").split("\n")}
        for path in (HELD_OUT, TEXTS)
    ]
    assert not {piece for piece in pieces[0] & pieces[1] if len(piece) > 20}
    with open_checkpoint("pepper") as source:
        judged = held_out_sequences(read_text_side(source), "pepper", 512)
        assert not {tuple(s) for s in judged} & {tuple(s) for s in calibration_sequences(source, 512)}
        assert sum(map(len, judged)) >= 16_384


# wrong use


def one_sentence(caught: Any) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nothing to compare"),
        ({"algorithm": "gptq"}, "give --scheme or --recipe"),
        ({"scheme": "int4", "activations": "abacus"}, "use one of float, onnxruntime, executorch"),
        ({"scheme": "int4", "algorithm": "gptq", "tokens": 20}, "the text has 20 tokens"),
        ({"scheme": "int4", "variant": "onnx-int4"}, "has no variants"),
    ],
)
def test_what_cannot_be_compared(arguments, said, checkpoints, monkeypatch):
    monkeypatch.setattr("exporter.quantization.streaming.quantize_layers", pytest.fail)  # it is known before
    with pytest.raises(UsageError) as caught:
        compare(checkpoints.folder("qwen2"), **arguments)
    assert said in one_sentence(caught)


def test_a_text_that_calibrates_does_not_judge(checkpoints, text, tmp_path):
    same = tmp_path / "copy.txt"
    same.write_bytes(text.read_bytes())
    with pytest.raises(UsageError, match=r"copy\.txt cannot judge what it calibrated"):
        compare(checkpoints.folder("qwen2"), scheme="int4", algorithm="gptq", calibration=text, text=same)


def test_a_bundle_is_not_quantized(bundles, checkpoints):
    with pytest.raises(UsageError, match="is a bundle, whose weights and activations are what they are"):
        compare(checkpoints.folder("qwen2"), bundles("qwen2").path, scheme="int8")


def test_strangers(checkpoints, text, tmp_path):
    with pytest.raises(UsageError, match="512 tokens in one, 768 in the other"):
        compare(checkpoints.folder("qwen2"), "pepper", text=text)
    checkpoints.write(tmp_path, "qwen2")
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(UsageError, match="do not belong together") as caught:
        compare(checkpoints.folder("qwen2"), tmp_path, text=text)
    assert "the same text becomes other tokens" in one_sentence(caught)


# the command line


def test_the_command(gochu, checkpoints, tmp_path, text):
    pytest.importorskip("matplotlib")
    report, drawn, folder = tmp_path / "보고.json", tmp_path / "그림.svg", checkpoints.folder("qwen2")
    asked = ["quality", folder, "--scheme", "int4", "--text", text, "--tokens", 200]
    code, out, err = gochu(*asked, "--out", report, "--plot", drawn, "--json")
    assert code == 0, err
    assert Quality.model_validate_json(out) == Quality.model_validate_json(report.read_text("utf-8"))
    found = json.loads(out)
    assert found["text"] == "시험.txt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["그림.svg", "보고.json"]
    svg = drawn.read_text(encoding="utf-8")
    assert all(f">{kind}<" in svg for kind in KINDS)
    code, out, err = gochu(*asked)
    assert (code, out) == (0, "")
    worst = Quality.model_validate(found).worst()
    assert all(part in err for part in ("KL divergence", f"{worst.output_db:.1f}", worst.name, "mlp.down"))


def test_a_stopped_run_goes_on(gochu, checkpoints, tmp_path, text, monkeypatch):
    """The layers that GPTQ had finished are not done again, and the report is the same."""
    from exporter import quality
    from exporter.quantization import streaming

    out, folder = tmp_path / "report.json", checkpoints.folder("llama-biases")
    asked = ["quality", folder, "--scheme", "int4", "--algorithm", "gptq", "--text", text, "--tokens", 200]
    code, whole, err = gochu(*asked, "--json")
    assert code == 0, err
    with monkeypatch.context() as patch:
        patch.setattr(quality, "compare_sides", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, _ = gochu(*asked, "--out", out)
        assert code != 0
    assert not out.exists()
    monkeypatch.setattr(streaming, "_quantize", None)  # nothing is left to quantize
    code, _, err = gochu(*asked, "--out", out)
    assert code == 0, err
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--plot", "quality.gif", "neither .png nor .svg"),
        ("--out", "no/such/folder.json", "is not a folder"),
    ],
)
def test_where_nothing_can_be_written(option, value, said, gochu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = gochu("quality", "pepper", "--scheme", "int4", option, value)
    assert (code, out) == (2, "")
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "extra"), [("torch", "onnx"), ("onnx", "onnx")])
def test_what_is_not_installed_is_named(module, extra, gochu, bundles, checkpoints, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    code, out, err = gochu("quality", checkpoints.folder("qwen2"), bundles("qwen2").path)
    assert (code, out) == (5, "")
    assert err.startswith(f"gochu: {module} is not installed")
    assert f"gochu[{extra}]" in err
