"""Core ML packages through the pipeline: written, read back, evaluated off-Mac, held against the reference."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools", reason="coremltools is not installed")

from exporter import export
from exporter.architecture import read_architecture
from exporter.checkpoint import open_checkpoint
from exporter.errors import GateFailed, RecipeError
from exporter.formats import coreml_ops, find_delegate
from exporter.formats.coreml import MilOps, write_coreml
from exporter.formats.coreml_ane import AneOps
from exporter.formats.coreml_weights import read_weights
from exporter.quantization.recipe import Recipe
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.tensor import vector_digest
from exporter.quantization.weights import QuantizedWeights
from exporter.torch_ops import TorchOps
from runtimes.bundle import Bundle
from runtimes.engines import open_engine
from runtimes.mil.package import open_package

CONTEXT = 96
SCHEMES = {"gpu": ("fp16", "int8", "int4", "pal4-g8"), "ane": ("fp16", "int8", "pal4-g8")}
CASES = [(delegate, scheme) for delegate, schemes in SCHEMES.items() for scheme in schemes]


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory) -> Callable[[str, str, str], Bundle]:
    """`made(family, delegate, scheme)`: a bundle, without the gate, once."""
    bundles: dict[tuple[str, str, str], Bundle] = {}
    root = tmp_path_factory.mktemp("coreml")

    def bundle(family: str, delegate: str, scheme: str) -> Bundle:
        key = (family, delegate, scheme)
        if key not in bundles:
            source = family if family == "pepper" else checkpoints.folder(family)
            bundles[key] = export(
                source, root / "-".join(key), delegate=delegate, scheme=scheme, context=CONTEXT, verify=False
            )
        return bundles[key]

    return bundle


@pytest.mark.parametrize(("delegate", "scheme"), CASES)
def test_packages_agree_with_the_reference(family, delegate, scheme, made):
    """A prefill of 40 tokens and 32 steps with the cache: the error is float16's, as a share of the logits' range.

    Random weights amplify each rounding: over many prompts a step in a thousand passes 1 %. So do some where only
    the results of the decoder's verbs are rounded to float16, which leaves out what happens within attention.
    """
    bundle = made(family, delegate, scheme)
    arch = read_architecture(json.loads(bundle.file("config.json").read_text()))
    (variant,) = bundle.manifest.variants
    weights = read_weights(bundle, variant, arch)
    for report in (r for r in bundle.manifest.tensors if len(r.shape) == 2):
        assert weights.matrix(report.name).digest() == report.digest, report.name
    tokens = np.random.default_rng(5).integers(0, arch.vocab, 72)
    engine = open_engine(bundle, threads=1)
    ours = np.stack([engine.prefill(tokens[:40].tolist()), *(engine.decode(int(t)) for t in tokens[40:])])
    theirs = TorchOps(arch, weights, CONTEXT).run(torch.from_numpy(tokens[None]))[0, 39:].numpy()
    error = np.abs(ours - theirs).max(-1) / np.ptp(theirs)
    assert error.max() < 0.01
    assert error.mean() < 0.005
    gaps = (theirs.max(-1) - theirs[np.arange(len(theirs)), ours.argmax(-1)]) / np.ptp(theirs)
    assert gaps.max() < 0.01  # the same token, but for near-ties


@pytest.mark.parametrize(("delegate", "scheme"), CASES)
def test_a_trained_model_says_the_same(delegate, scheme, made, tmp_path):
    """pepper: within 0.5 % of the range, the same greedy tokens, through the gate."""
    bundle = export("pepper", tmp_path / "out", delegate=delegate, scheme=scheme, context=128)
    checks = {check.name: check for check in bundle.manifest.gate.checks}
    assert bundle.manifest.gate.status == "passed"
    assert checks["logits"].figures["largest"] < 0.005
    assert checks["tokens"].figures["same"] == checks["tokens"].figures["steps"] == 4 * 64
    assert ("rules" in checks) == (delegate == "ane")


@pytest.mark.parametrize("name", ["gemma2", "phi3-partial-rotary"])
def test_on_the_gpu_only_products_round_to_float16(name, made):
    """The residual stream, norms and softmax are float32; products of matrices and the KV cache are float16."""
    bundle = made(name, "gpu", "int4")
    package = open_package(bundle.file("model.mlpackage"))
    for function in package.functions.values():
        kinds: dict[str, set[str]] = {}
        for operation in function.operations:
            kinds.setdefault(operation.type, set()).update(kind.dtype.name for _, kind in operation.outputs)
        assert all(kinds[type] == {"fp16"} for type in ("linear", "matmul", "slice_update"))
        assert all(kinds[type] == {"fp32"} for type in ("rsqrt", "softmax", "mul", "reduce_mean"))
        assert kinds["add"] == {"fp32", "int32"}
        assert {kind.dtype.name for kind in function.states.values()} == {"fp16"}
    arch = read_architecture(json.loads(bundle.file("config.json").read_text()))
    weights = read_weights(bundle, bundle.manifest.variants[0], arch)
    norms = [report for report in bundle.manifest.tensors if report.name.endswith("_norm")]
    assert len(norms) > arch.layers
    assert all(vector_digest(weights.vector(norm.name)) == norm.digest for norm in norms)


@pytest.mark.parametrize(
    ("name", "scheme"), [("gemma2", "int4"), ("llama-biases", "int8"), ("qwen2", "fp16")]
)
def test_coremltools_own_loader_finds_the_same_types(name, scheme, made):
    """It builds each operation of the GPU's layout anew, which checks its arguments, and infers what comes out."""
    load = importlib.import_module("coremltools.converters.mil.frontend.milproto.load").load
    tools = importlib.import_module("coremltools")
    path = made(name, "gpu", scheme).file("model.mlpackage")
    model = tools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    for function in open_package(path).functions.values():
        built = program.functions[function.name].operations
        inferred = {out.name: (out.dtype.__name__, tuple(out.shape)) for o in built for out in o.outputs}
        declared = {
            value: (kind.dtype.name, kind.shape) for o in function.operations for value, kind in o.outputs
        }
        floats = {value: found for value, found in declared.items() if found[0].startswith("fp")}
        assert floats == {value: inferred[value] for value in floats}


def test_both_functions_share_their_weights(checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("llama-biases")) as checkpoint:
        arch = checkpoint.architecture
        decisions = Recipe.uniform("int8").resolve(arch, find_delegate("gpu").fit)
        asked: list[str] = []

        class Counted(QuantizedWeights):
            def matrix(self, name: str) -> Any:
                asked.append(name)
                return super().matrix(name)

        write_coreml(arch, Counted(checkpoint, decisions), CONTEXT, tmp_path)
    assert sorted(asked) == sorted(name for name, _ in arch.matrices())
    weights = tmp_path / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    stored = sum(parse_scheme("int8").nbytes(shape) for _, shape in arch.matrices())
    assert weights.stat().st_size < 1.15 * stored


def test_coremltools_opens_a_package_and_leaves_it_as_it_is(family, made):
    """It writes the table of contents anew when it opens one: a bundle must still be what was exported."""
    tools = pytest.importorskip("coremltools")
    bundle = made(family, "gpu", "int8")
    tools.models.MLModel(str(bundle.path / "model.mlpackage"), skip_model_load=True, function_name="decode")
    bundle.verify_checksums()


def test_the_same_plan_writes_the_same_bytes(checkpoints, tmp_path):
    written = []
    for name in ("a", "b"):
        bundle = export(
            checkpoints.folder("gemma2"),
            tmp_path / name,
            delegate="ane",
            scheme="int8",
            context=64,
            verify=False,
        )
        written.append({entry.path: entry.sha256 for entry in bundle.manifest.files})
    assert written[0] == written[1]


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, type], None]] = {}


def fault(name: str) -> Callable[[Any], Any]:
    def register(plant: Any) -> Any:
        FAULTS[name] = plant
        return plant

    return register


def wrap(patch: pytest.MonkeyPatch, ops: type, verb: str, change: Callable[..., Any]) -> None:
    original = getattr(ops, verb)
    patch.setattr(ops, verb, lambda self, *rest, **more: change(original, self, *rest, **more))


@fault("gate and up swapped")
def _(patch, ops):
    wrap(patch, ops, "gated", lambda verb, self, gate, up: verb(self, up, gate))


@fault("windows dropped")
def _(patch, ops):
    wrap(patch, ops, "mask", lambda verb, self, window: verb(self, 0))


@fault("softcaps dropped")
def _(patch, ops):
    patch.setattr(ops, "softcap", lambda self, x, cap: x)


@fault("embedding not scaled")
def _(patch, ops):
    def scale(verb: Any, self: Any, x: Any, factor: float) -> Any:
        return x if factor == self.arch.embedding_scale else verb(self, x, factor)

    wrap(patch, ops, "scale", scale)


@fault("one scale changed")
def _(patch, ops):
    exact = coreml_ops._exact

    def changed(numbers: Any, rows: slice) -> Any:
        values = exact(numbers, rows).copy()
        values.reshape(-1)[0] *= 2
        return values

    patch.setattr(coreml_ops, "_exact", changed)


@pytest.mark.parametrize(("delegate", "ops"), [("gpu", MilOps), ("ane", AneOps)])
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_exports_are_caught(name, delegate, ops, checkpoints, tmp_path, monkeypatch):
    FAULTS[name](monkeypatch, ops)
    with pytest.raises(GateFailed, match="must not be used"):
        export(
            checkpoints.folder("gemma2"), tmp_path / "out", delegate=delegate, scheme="int8", context=CONTEXT
        )
    assert list(tmp_path.iterdir()) == []


def test_an_iphone_gets_the_neural_engine(gochu, tmp_path: Path):
    out = tmp_path / "out"
    code, stdout, err = gochu("export", "pepper", "--device", "iPhone 16 Pro", "-o", out, "--json")
    assert code == 0, err
    found = json.loads(stdout)
    reasons = {choice["topic"]: choice for choice in found["plan"]}
    assert [v["name"] for v in found["variants"]] == ["coreml-ane-int8"]
    assert reasons["backend"]["value"] == "Neural Engine (Core ML)"
    assert "never run on Apple's hardware" in reasons["backend"]["reason"]
    code, stdout, _ = gochu("run", out, "--prompt", "삼백이십을 숫자로 쓰면?")
    assert (code, stdout) == (0, "320\n")


def test_float32_is_refused():
    with pytest.raises(RecipeError, match="Core ML computes in float16"):
        find_delegate("gpu").fit(parse_scheme("fp32"))
