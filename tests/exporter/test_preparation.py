"""What is done to float weights before they are quantized changes nothing that the model says: every family, against
transformers; and what is found on a calibration text is what the papers say, and helps."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter import export
from exporter.checkpoint import Matrix, Source, matrix_of, open_checkpoint
from exporter.errors import RecipeError, UsageError
from exporter.plan import make_plan
from exporter.quantization import streaming
from exporter.quantization.algorithms import ALGORITHMS, Algorithm
from exporter.quantization.awq import POWERS, awq_scales
from exporter.quantization.calibration import calibration_sequences
from exporter.quantization.folding import BEFORE, Linears, Scaled, balanced, before
from exporter.quantization.preparation import finder, prepared
from exporter.quantization.recipe import Decision, Recipe, Rule, read_recipe
from exporter.quantization.rotation import Rotated
from exporter.quantization.rtn import quantize_mse
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.smoothquant import smoothquant_scales
from exporter.quantization.tensor import vector_digest
from exporter.quantization.weights import QuantizedWeights
from exporter.safetensors import to_float32
from exporter.staging import Staging
from exporter.torch_ops import TorchOps
from runtimes.engines import open_engine

ALL = tuple(BEFORE.values())
BOUND = 1e-4  # of the logits' range
IDS = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(48))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def whole(source: Source, name: str) -> Any:
    matrix = source.matrix(name)
    return to_float32(matrix.rows(0, matrix.shape[0]))


def logits(source: Source, recipe: Recipe, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    arch = source.architecture
    return TorchOps(arch, QuantizedWeights(source, recipe.resolve(arch)), 64, **more).run(ids)


def planted(source: Source, low: float, high: float, share: float = 1.0, kinds: Any = ALL) -> Scaled:
    """The same model, its channels scaled by factors of their own between `low` and `high`: a share of them."""
    arch, random, scales = source.architecture, np.random.default_rng(5), dict[str, Any]()
    lengths = {name: shape[0] for name, shape in arch.matrices()} | dict(arch.vectors())
    for i in range(arch.layers):
        for kind in sorted(set(kinds)):
            name = f"layers.{i}.{kind}"
            factors = np.exp(random.uniform(np.log(low), np.log(high), lengths[name]))
            factors[random.random(len(factors)) > share] = 1
            scales[name] = factors.astype(np.float32)
    return Scaled(source, scales)


# exact in float


def scaled(source: Source) -> Scaled:
    return planted(source, 1 / 9, 9)


def both(source: Source) -> Scaled:
    return scaled(Rotated(source))


PREPARED: dict[str, Callable[[Source], Source]] = {"rotated": Rotated, "scaled": scaled, "both": both}


@pytest.mark.parametrize("how", PREPARED)
def test_every_family_says_the_same(how, family, checkpoints):
    with open_checkpoint(checkpoints.folder(family)) as source, torch.no_grad():
        theirs = checkpoints.model(family)(IDS).logits
        changed = PREPARED[how](source)
        ours = logits(changed, Recipe.uniform("fp32"), IDS)
        assert float((ours - theirs).abs().max() / (theirs.max() - theirs.min())) <= BOUND
        others = [
            name
            for name, _ in changed.architecture.matrices()
            if name != "head" and not np.allclose(whole(changed, name), whole(source, name))
        ]
    if how == "rotated" and family == "gemma2":  # whose post norms keep the residual stream as it is
        assert {name.split(".", 2)[-1] for name in others} == {"attention.v", "attention.o"}
        assert changed.architecture.tied
    else:
        assert sum(name.startswith("layers.") for name in others) == 7 * source.architecture.layers
        assert ("embedding" in others) == (how != "scaled" and family != "gemma2")
        assert changed.architecture.tied == (source.architecture.tied and "embedding" not in others)


def test_an_export_says_what_the_checkpoint_said(checkpoints, tmp_path):
    """Rotated and untied, through the file and onnxruntime, against transformers on the checkpoint as it was."""
    folder = checkpoints.folder("llama-llama3-rope")
    bundle = export(folder, tmp_path / "out", scheme="fp32", prepare=("hadamard",), context=64)
    assert bundle.manifest.gate.status == "passed"
    assert bundle.manifest.recipe["prepare"] == ["hadamard"]
    assert "head" in {tensor.name for tensor in bundle.manifest.tensors}
    with torch.no_grad():
        theirs = checkpoints.model("llama-llama3-rope")(IDS[:1]).logits[0, -1].numpy()
    ours = open_engine(bundle).prefill(IDS[0].tolist())
    assert np.abs(ours - theirs).max() <= BOUND * np.ptp(theirs)


class Counting:
    """A source that counts the rows that are read."""

    def __init__(self, source: Source) -> None:
        self.source, self.architecture, self.vector, self.read = source, source.architecture, source.vector, 0

    def matrix(self, name: str) -> Matrix:
        matrix = self.source.matrix(name)

        def rows(start: int, stop: int) -> Any:
            self.read += stop - start
            return matrix.rows(start, stop)

        return Matrix(name, matrix.shape, rows)


def test_weights_are_read_some_rows_at_a_time(checkpoints):
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        counting = Counting(source)
        changed = both(counting)
        for name in ("embedding", "head", "layers.0.attention.q", "layers.0.mlp.up"):
            counting.read = 0
            matrix, expected = changed.matrix(name), whole(changed, name)[3:7]
            assert counting.read == matrix.shape[0]
            np.testing.assert_array_equal(matrix.rows(3, 7), expected)
            assert counting.read == matrix.shape[0] + 4
        for name in ("layers.0.mlp.down", "layers.0.attention.v"):  # rows are sums of others
            matrix, counting.read = changed.matrix(name), 0
            for start in (0, 8, 3):
                np.testing.assert_array_equal(
                    matrix.rows(start, start + 5), whole(both(source), name)[start : start + 5]
                )
            assert counting.read == matrix.shape[0]


# scales


def samples(inputs: int, seed: int = 0) -> np.ndarray:
    """Activations [tokens, inputs], some channels far larger than others."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((400, inputs)) @ random.standard_normal((inputs, inputs)) / inputs**0.5
    x[:, random.permutation(inputs)[: inputs // 16]] *= 20
    return x.astype(np.float32)


def linears(source: Source, names: tuple[str, ...], scheme: str, x: np.ndarray) -> Linears:
    made = Decision(parse_scheme(scheme), "rtn")
    hessian = torch.from_numpy(x.T @ x / len(x))
    peaks = np.abs(x).max(0)
    return Linears(
        source.architecture, tuple(map(source.matrix, names)), (made,) * len(names), hessian, peaks
    )


GROUPS = {
    "attention_norm": ("attention.q", "attention.k", "attention.v"),
    "attention.v": ("attention.o",),
    "mlp.up": ("mlp.down",),
}


def by_head(arch: Any, scales: np.ndarray) -> np.ndarray:
    """Scales of the channels of `v`, again for each query head that shares them."""
    return np.concatenate(
        [
            scales[head // (arch.heads // arch.kv_heads) * arch.head_dim :][: arch.head_dim]
            for head in range(arch.heads)
        ]
    )


@pytest.mark.parametrize("scheme", ["int4", "w4a16"])
@pytest.mark.parametrize("into", GROUPS)
def test_awq_takes_the_power_that_costs_the_outputs_least(into, scheme, checkpoints):
    """Every power, tried on the activations themselves."""
    with open_checkpoint(checkpoints.folder("llama-llama3-rope")) as source:
        arch, names = source.architecture, tuple(f"layers.1.{kind}" for kind in GROUPS[into])
        x = samples(source.matrix(names[0]).shape[1])
        found = awq_scales(linears(source, names, scheme, x))
        size = np.sqrt((x.astype(np.float64) ** 2).mean(0))
        if into == "attention.v":
            size = size.reshape(arch.kv_heads, -1, arch.head_dim).max(1).ravel()
        errors, tried = [], []
        for power in POWERS:
            scales = size**power / np.exp(np.log(size**power).mean())
            wide = by_head(arch, scales) if into == "attention.v" else scales
            error = 0.0
            for name in names:
                w = whole(source, name)
                larger = matrix_of(name, (w * wide).astype(np.float32))
                rounded = quantize_mse(larger, parse_scheme(scheme))[0].dequantize()
                error += float((((x / wide) @ rounded.T - x @ w.T) ** 2).sum())
            errors.append(error)
            tried.append(scales)
    best = int(np.argmin(errors))
    assert best > 0
    assert errors[best] < 0.98 * errors[0]
    np.testing.assert_allclose(found, tried[best], rtol=1e-4)


def test_awq_leaves_what_it_cannot_help(checkpoints):
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        even = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0].astype(np.float32)
        names = ("layers.0.mlp.gate", "layers.0.mlp.up")
        assert awq_scales(linears(source, names, "int4", even)) is None
        exact = linears(source, names, "fp16", samples(64))
        assert awq_scales(exact) is None


@pytest.mark.parametrize("into", GROUPS)
def test_smoothquant_shares_outliers(into, checkpoints):
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        arch, names = source.architecture, tuple(f"layers.1.{kind}" for kind in GROUPS[into])
        x = samples(source.matrix(names[0]).shape[1])
        found = smoothquant_scales(linears(source, names, "int8", x))
        wide = by_head(arch, found) if into == "attention.v" else found
        heavy = np.max([np.abs(whole(source, name) * wide).max(0) for name in names], 0)
        active = np.abs(x / wide).max(0)
        if into == "attention.v":
            heavy, active = (
                each.reshape(arch.kv_heads, -1, arch.head_dim).max(1).ravel() for each in (heavy, active)
            )
    np.testing.assert_allclose(active / heavy, (active / heavy)[0], rtol=1e-4)  # alike in every channel
    assert np.exp(np.log(found).mean()) == pytest.approx(1, abs=1e-5)


def test_channels_that_were_never_active_keep_their_weights():
    scales = balanced(np.array([0, 4, np.inf, 1, np.nan], np.float32))
    np.testing.assert_allclose(scales, [1, 2, 1, 0.5, 1], rtol=1e-6)
    assert balanced(np.zeros(3, np.float32)).tolist() == [1, 1, 1]
    wild = balanced(np.array([1e-30, 1e30], np.float32))
    np.testing.assert_allclose(wild, [1e-4, 1e4], rtol=1e-3)


# found layer by layer


TEXT = [[0, *range(start, start + 95)] for start in (5, 100, 200)]


def find(
    folder: Any, work: Path, prepare: tuple[str, ...], recipe: Recipe
) -> tuple[streaming.FoundWeights, dict[str, str]]:
    """What a run over `TEXT` finds, and the digests of all weights."""
    work.mkdir(exist_ok=True)
    with open_checkpoint(folder) as source:
        weights = prepared(source, prepare)
        decisions = recipe.resolve(weights.architecture)
        found = streaming.quantize_layers(
            weights, decisions, TEXT, 96, Staging(work, "x"), preparation=finder(prepare)
        )
        made = QuantizedWeights(Scaled(weights, found.scales), decisions, found=found)
        for name in decisions:
            made.matrix(name)
        for name, _ in weights.architecture.vectors():
            made.vector(name)
        return found, {report.name: report.digest for report in made.reports}


def test_hessians_are_those_of_the_scaled_inputs(checkpoints, monkeypatch, tmp_path):
    """Of the first layer, whose inputs transformers gives."""
    seen = dict[str, torch.Tensor]()

    def remember(matrix: Any, scheme: Any, hessian: torch.Tensor) -> Any:
        seen[matrix.name] = hessian.clone()
        return quantize_mse(matrix, scheme), ""

    monkeypatch.setitem(ALGORITHMS, "gptq", Algorithm("recorded", from_hessian=remember))
    folder, model = checkpoints.folder("llama-llama3-rope"), checkpoints.model("llama-llama3-rope")
    rules = (Rule(match="embedding", scheme="fp32"), Rule(match="*", scheme="int4", algorithm="gptq"))
    found, _ = find(folder, tmp_path / "work", ("awq",), Recipe(name="r", rules=rules))
    inputs = dict[str, list[torch.Tensor]]()
    layer = model.model.layers[0]
    for kind, theirs in (("attention.o", layer.self_attn.o_proj), ("mlp.down", layer.mlp.down_proj)):
        monkeypatch.setattr(
            theirs,
            "forward",
            lambda x, kind=kind, run=theirs.forward: inputs.setdefault(kind, []).append(x[0]) or run(x),
        )
    with torch.no_grad():
        for ids in TEXT:
            model(torch.tensor([ids]))
    for kind, parts in inputs.items():
        scales = found.scales[f"layers.0.{BEFORE[kind]}"]
        assert scales.std() > 0.02
        if kind == "attention.o":
            with open_checkpoint(folder) as source:
                scales = by_head(source.architecture, scales)
        x = torch.cat(parts) / torch.from_numpy(scales)
        expected = x.T @ x / len(x)
        atol = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(seen[f"layers.0.{kind}"], expected, rtol=1e-3, atol=atol)


def test_what_is_found_is_of_the_scaled_weights(checkpoints, tmp_path):
    folder = checkpoints.folder("qwen2")
    rules = (Rule(match="embedding", scheme="int8"), Rule(match="*", scheme="int8", algorithm="gptq"))
    found, _ = find(folder, tmp_path / "work", ("smoothquant",), Recipe(name="r", rules=rules))
    with open_checkpoint(folder) as source:
        changed = Scaled(source, found.scales)
        for name in (f"layers.{i}.{kind}" for i in range(3) for kind in BEFORE):
            (tensor, error, _), _ = found(name)
            expected, before_it = whole(changed, name), whole(source, name)
            assert np.abs(tensor.dequantize() - expected).mean() < 0.015 * np.abs(expected).mean()
            assert np.abs(before_it - expected).mean() > 0.03 * np.abs(expected).mean()
            assert error < 1e-3


@pytest.mark.parametrize(
    ("algorithm", "damaged"), [("rtn", ""), ("gptq", "scales.0.npz"), ("rtn", "scales.1.npz")]
)
def test_a_run_that_was_cut_off_ends_the_same(algorithm, damaged, checkpoints, monkeypatch, tmp_path):
    folder, prepare, recipe = (
        checkpoints.folder("qwen2"),
        ("hadamard", "awq"),
        Recipe.uniform("int4", algorithm),
    )
    expected, digests = find(folder, tmp_path / "fresh", prepare, recipe)
    assert {name.split(".")[1] for name in expected.scales} == {"0", "1", "2"}
    original = streaming._quantize

    def stop_in_the_last(source: Any, layer: Any, hessians: Any, file: Path) -> Any:
        if file.name == "layer.2.npz":
            raise KeyboardInterrupt
        return original(source, layer, hessians, file)

    monkeypatch.setattr(streaming, "_quantize", stop_in_the_last)
    with pytest.raises(KeyboardInterrupt):
        find(folder, tmp_path / "work", prepare, recipe)
    monkeypatch.undo()
    assert not (tmp_path / "work" / "scales.2.npz").exists()
    if damaged:
        path = tmp_path / "work" / damaged
        path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    again, same = find(folder, tmp_path / "work", prepare, recipe)
    assert same == digests
    assert sorted(again.scales) == sorted(expected.scales)
    for name, scales in expected.scales.items():
        np.testing.assert_array_equal(again.scales[name], scales)


EXPORTS = {
    "qwen2": (("awq",), "int4", "gptq"),
    "gemma2": (("hadamard", "smoothquant"), "int8", "rtn"),
    "phi3-partial-rotary": (("hadamard", "awq"), "int4", "rtn"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_bundles_pass_the_gate(name, checkpoints, tmp_path):
    prepare, scheme, algorithm = EXPORTS[name]
    text = tmp_path / "보정.txt"
    text.write_text("\n\n".join(f"작은 고추가 맵다. {i} plus {i}." for i in range(30)), encoding="utf-8")
    bundle = export(
        checkpoints.folder(name),
        tmp_path / "out",
        scheme=scheme,
        algorithm=algorithm,
        prepare=prepare,
        context=64,
        calibration=text,
    )
    assert bundle.manifest.gate.status == "passed"
    said = {choice.value: choice.reason for choice in bundle.manifest.plan if choice.topic == "preparation"}
    assert tuple(said) == prepare
    digests = {tensor.name: tensor.digest for tensor in bundle.manifest.tensors}
    with open_checkpoint(checkpoints.folder(name)) as source:
        norm = prepared(source, prepare).vector("layers.0.mlp_norm")
    assert digests["layers.0.mlp_norm"] != vector_digest(norm)  # the scales that were found are folded in
    assert ("only the heads' values are turned" in said.get("hadamard", "")) == (name == "gemma2")
    assert {path.name for path in tmp_path.iterdir()} == {"out", text.name}


# what it is for


@pytest.fixture
def pepper() -> Iterator[Any]:
    """The embedded model and some of its calibration text: for scales, and other sequences to be measured on."""
    with open_checkpoint("pepper") as source:
        sequences = calibration_sequences(source, 128)
        yield source, sequences[:6], torch.tensor([ids[:48] for ids in sequences if len(ids) >= 48][-8:])


def divergence(found: torch.Tensor, reference: torch.Tensor) -> float:
    reference, found = reference.log_softmax(-1), found.log_softmax(-1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("prepare", "scheme", "kinds", "factor", "times"),
    [
        ("awq", "int4", ALL, 30, 3),
        ("smoothquant", "int8", ("attention_norm", "mlp_norm"), 100, 10),
        ("hadamard", "int8", ("attention_norm", "mlp_norm"), 100, 10),
    ],
)
def test_outliers_cost_far_less(prepare, scheme, kinds, factor, times, pepper, tmp_path):
    """Of channels planted with outliers, in a model that is otherwise as it was: at 4 bits those of the activations
    make tiny weights matter, and where activations are rounded, one scale for each token has to reach them."""
    source, sequences, ids = pepper
    reference = logits(source, Recipe.uniform("fp32"), ids)
    spoilt, recipe = planted(source, 1 / factor, 1 / factor, 1 / 32, kinds), Recipe.uniform(scheme)
    exact = logits(spoilt, Recipe.uniform("fp32"), ids)
    assert divergence(exact, reference) < 1e-6
    rounding: dict[str, Any] = {"rounded": 0} if prepare == "awq" else {"engine": "executorch"}
    better: Source = prepared(spoilt, (prepare,))
    if finding := finder((prepare,)):
        decisions = recipe.resolve(source.architecture)
        work = Staging(tmp_path, "x")
        found = streaming.quantize_layers(spoilt, decisions, sequences, 128, work, preparation=finding)
        better = Scaled(spoilt, found.scales)
    lost, left = (divergence(logits(each, recipe, ids, **rounding), reference) for each in (spoilt, better))
    assert left < lost / times


# asked for


def test_a_plan_says_what_is_done_and_what_it_costs():
    with open_checkpoint("pepper") as source:
        arch = source.architecture
    plain = make_plan(arch, scheme="int8")
    turned = make_plan(arch, scheme="int8", prepare=("hadamard",))
    assert turned.fingerprint() != plain.fingerprint()
    assert "preparation" not in {choice.topic for choice in plain.choices}
    (said,) = (choice for choice in turned.choices if choice.topic == "preparation")
    more = parse_scheme("int8").nbytes((arch.vocab, arch.hidden))
    assert f"{more / 1e6:.1f} MB more" in said.reason
    assert turned.prediction.file.value - plain.prediction.file.value == pytest.approx(more, rel=0.05)
    assert not turned.calibrates
    scaled = make_plan(arch, scheme="int8", prepare=("smoothquant",))
    assert scaled.calibrates
    assert [choice.value for choice in scaled.choices if choice.topic == "calibration"] == [
        "the text that is shipped"
    ]


def test_a_recipe_may_say_it(tmp_path, gochu):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'name = "돌림"\nprepare = ["hadamard"]\n[[rules]]\nmatch = "*"\nscheme = "int4"\n', encoding="utf-8"
    )
    recipe = read_recipe(path)
    assert recipe.prepare == ("hadamard",)
    with open_checkpoint("pepper") as source:
        arch = source.architecture
    assert "head" in make_plan(arch, recipe=recipe).decisions
    with pytest.raises(UsageError, match="says itself what it prepares"):
        make_plan(arch, recipe=recipe, prepare=("awq",))
    plain = Recipe.uniform("int4")
    assert make_plan(arch, recipe=plain, prepare=("awq",)).recipe.prepare == ("awq",)
    code, out, _ = gochu("plan", "pepper", "--recipe", path, "--json")
    assert (code, '"hadamard"' in out) == (0, True)


@pytest.mark.parametrize(
    ("prepare", "scheme", "says"),
    [
        ("haddamard", "int4", "there is no preparation 'haddamard': use one of hadamard, awq, smoothquant"),
        (
            "awq,smoothquant",
            "int4",
            "awq and smoothquant set the scales of the same channels: use one of them",
        ),
        ("awq, hadamard, awq", "int4", "prepare names awq twice"),
        ("awq", "fp16", "awq is for weights that become integers, and no layer has any here: drop it"),
        ("smoothquant", "int8-channel", "smoothquant is for schemes that round activations .*: drop it"),
    ],
)
def test_what_makes_no_sense_is_refused(prepare, scheme, says, gochu):
    code, out, err = gochu("plan", "pepper", "--scheme", scheme, "--prepare", prepare)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert re.search(says, err)


@pytest.mark.parametrize("prepare", ["awq", "smoothquant"])
def test_activations_that_become_nan_are_refused(prepare, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as source:
        scales = {"layers.1.mlp_norm": np.full(64, 1e-36, np.float32)}
        broken, decisions = Scaled(source, scales), Recipe.uniform("int4").resolve(source.architecture)
        broken.matrix = source.matrix  # type: ignore[method-assign]
        with pytest.raises(RecipeError, match=r"the inputs of layers\.1\.mlp\.\w+ became NaN or infinite"):
            streaming.quantize_layers(
                broken, decisions, TEXT, 96, Staging(tmp_path, "x"), preparation=finder((prepare,))
            )


def test_names_of_what_feeds_a_linear():
    assert before("layers.12.attention.k") == "layers.12.attention_norm"
    assert before("layers.0.mlp.down") == "layers.0.mlp.up"
    assert [before(name) for name in ("embedding", "head", "layers.0.mlp_norm")] == [
        "embedding",
        "head",
        "layers.0.mlp_norm",
    ]
