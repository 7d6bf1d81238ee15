"""The gate: right exports pass with figures that mean something, wrong ones leave no bundle."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import export
from exporter.errors import GateFailed
from exporter.formats.onnx import OnnxOps
from exporter.formats.onnx_graph import DataFile, GraphBuilder
from exporter.tokenizer import TextSide


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int4", "int4-g128"])
def test_right_exports_pass(family, scheme, checkpoints, tmp_path):
    gate = export(checkpoints.folder(family), tmp_path / "out", scheme=scheme, context=128).manifest.gate
    assert gate.status == "passed"
    checks = {check.name: check for check in gate.checks}
    tokens = checks["tokens"].figures
    assert tokens["steps"] == 4 * 64
    assert tokens["wrong"] == 0
    assert tokens["same"] >= 0.9 * tokens["steps"]
    exact = checks["graph" if "graph" in checks else "logits"].figures
    assert 0 < exact["largest"] < 2e-5
    if scheme.startswith("int"):
        assert checks["logits"].figures["mean_bound"] < 0.1
    else:
        assert "graph" not in checks


def wrong(name: str) -> Callable[[Any], None]:
    """Register a fault: a function that plants it with monkeypatch."""

    def register(plant: Any) -> Any:
        FAULTS[name] = plant
        return plant

    return register


FAULTS: dict[str, Any] = {}


def after_init(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """The graph, and it alone, is made of another architecture than the checkpoint's."""
    original = OnnxOps.__init__

    def init(self: OnnxOps, arch: Any, *rest: Any, **more: Any) -> None:
        original(self, change(arch), *rest, **more)

    patch.setattr(OnnxOps, "__init__", init)


def wrap(patch: pytest.MonkeyPatch, verb: str, change: Callable[..., Any], owner: type = OnnxOps) -> None:
    """Replace a verb; `change(original, self, ...)`."""
    original = getattr(owner, verb)
    patch.setattr(owner, verb, lambda self, *rest, **more: change(original, self, *rest, **more))


@wrong("two weights swapped")
def _(patch):
    wrap(patch, "gated", lambda verb, self, gate, up: verb(self, up, gate))


@wrong("keys and values swapped")
def _(patch):
    wrap(patch, "attention", lambda verb, self, q, k, v, layer: verb(self, q, v, k, layer))


@wrong("final softcap dropped")
def _(patch):
    wrap(patch, "softcap", lambda verb, self, x, cap: x)


@wrong("attention softcap dropped")
def _(patch):
    after_init(patch, lambda arch: dataclasses.replace(arch, attention_softcap=0.0))


@wrong("windows dropped")
def _(patch):
    after_init(patch, lambda arch: dataclasses.replace(arch, windows=(0,) * arch.layers))


@wrong("window one token too wide")
def _(patch):
    after_init(
        patch, lambda arch: dataclasses.replace(arch, windows=tuple(w and w + 1 for w in arch.windows))
    )


@wrong("rope table of another theta")
def _(patch):
    def slower(arch: Any) -> Any:
        frequencies = tuple(f * 0.9 for f in arch.rope.inv_freq)
        return dataclasses.replace(arch, rope=dataclasses.replace(arch.rope, inv_freq=frequencies))

    after_init(patch, slower)


@wrong("attention scale of the head's size")
def _(patch):
    after_init(patch, lambda arch: dataclasses.replace(arch, attention_scale=arch.head_dim**-0.5))


@wrong("embedding not scaled")
def _(patch):
    wrap(patch, "scale", lambda verb, self, x, factor: x)


@wrong("exact GELU for tanh GELU")
def _(patch):
    def emit(verb: Any, self: GraphBuilder, op: str, *rest: Any, **more: Any) -> Any:
        more.pop("approximate", None)
        return verb(self, op, *rest, **more)

    wrap(patch, "emit", emit, GraphBuilder)


@wrong("one integer changed")
def _(patch):
    def append(verb: Any, self: DataFile, name: str, kind: int, dims: Any, blocks: Any) -> Any:
        if name == "layers.1.mlp.down":
            blocks = [block.copy() for block in blocks]
            blocks[0].reshape(-1).view(np.uint8)[5] ^= 1
        return verb(self, name, kind, dims, blocks)

    wrap(patch, "append", append, DataFile)


@wrong("norm offset lost")
def _(patch):
    def vector(verb: Any, self: OnnxOps, names: Any) -> Any:
        original = self.weights
        self.weights = Shifted(original)
        try:
            return verb(self, names)
        finally:
            self.weights = original

    wrap(patch, "vector", vector)


class Shifted:
    """Weights whose vectors lack Gemma's 1."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def vector(self, name: str) -> np.ndarray:
        return self._weights.vector(name) - np.float32(1)


@wrong("another tokenizer")
def _(patch):
    original = TextSide.copy

    def copy(self: TextSide, to: Path) -> None:
        original(self, to)
        path = to / "tokenizer.json"
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
        path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

    patch.setattr(TextSide, "copy", copy)


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_exports_are_caught(fault, scheme, checkpoints, tmp_path, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(GateFailed) as caught:
        export(checkpoints.folder("gemma2"), tmp_path / "out", scheme=scheme, context=128)
    assert "must not be used" in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # no bundle, and nothing that a rerun would take up


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_a_weight_that_was_never_written_is_caught(scheme, checkpoints, tmp_path, monkeypatch):
    after_init(monkeypatch, lambda arch: dataclasses.replace(arch, biases=arch.biases - {"mlp.gate"}))
    with pytest.raises(GateFailed, match=r"integers: layers\.0\.mlp.gate\.bias does not hold"):
        export(checkpoints.folder("llama-biases"), tmp_path / "out", scheme=scheme, context=128)


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_a_bias_that_is_written_but_not_added_is_caught(scheme, checkpoints, tmp_path, monkeypatch):
    def emit(verb: Any, self: GraphBuilder, op: str, inputs: Any, *rest: Any, **more: Any) -> Any:
        return inputs[0] if inputs[-1] == "layers.1.mlp.down.bias" else verb(self, op, inputs, *rest, **more)

    wrap(monkeypatch, "emit", emit, GraphBuilder)
    with pytest.raises(GateFailed, match=r"graph|tokens|logits"):
        export(checkpoints.folder("llama-biases"), tmp_path / "out", scheme=scheme, context=128)


def test_short_factors_where_long_ones_are_due_are_caught(checkpoints, tmp_path, monkeypatch):
    after_init(
        monkeypatch,
        lambda arch: dataclasses.replace(arch, rope=dataclasses.replace(arch.rope, long_inv_freq=None)),
    )
    with pytest.raises(GateFailed):
        export(checkpoints.folder("phi3-longrope"), tmp_path / "out", scheme="int8", context=128)


def test_a_failed_gate_exits_4_and_keeps_the_old_bundle(checkpoints, tmp_path, gochu, monkeypatch):
    out = tmp_path / "out"
    arguments = ["export", checkpoints.folder("gemma2"), "--scheme", "int8", "--context", "128", "-o", out]
    code, _, err = gochu(*arguments)
    assert code == 0, err
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    FAULTS["final softcap dropped"](monkeypatch)
    code, stdout, err = gochu(*arguments, "--force")
    assert code == 4
    assert stdout == ""
    assert err.startswith("gochu: the gate failed at ")
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_without_the_gate_the_bundle_says_so(checkpoints, tmp_path, gochu, monkeypatch):
    FAULTS["final softcap dropped"](monkeypatch)
    out = tmp_path / "out"
    code, stdout, err = gochu(
        "export",
        checkpoints.folder("gemma2"),
        "--scheme",
        "fp16",
        "--context",
        128,
        "-o",
        out,
        "--no-verify",
        "--json",
    )
    assert code == 0, err
    assert json.loads(stdout)["gate"] == {"status": "unverified", "checks": []}
    code, _, err = gochu("verify", out)
    assert code == 4, err


def test_verify_again_later(bundles, gochu):
    code, stdout, err = gochu("verify", bundles("phi3-longrope", "int4").path, "--json")
    assert code == 0, err
    gate = json.loads(stdout)
    assert gate["status"] == "passed"
    assert {check["name"] for check in gate["checks"]} == {
        "checksums",
        "tokenizer",
        "integers",
        "graph",
        "tokens",
        "logits",
    }
