"""The gate on ExecuTorch programs: right ones pass with figures that mean something, wrong ones leave no bundle."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("executorch", reason="executorch is not installed")

from exporter import export
from exporter.architecture import read_architecture
from exporter.errors import GateFailed
from exporter.formats import executorch as format
from exporter.formats.executorch import XnnpackOps
from exporter.gate import _cut
from exporter.residency import Tally
from runtimes.bundle import Check

CONTEXT = 128


@pytest.fixture(scope="module")
def passed(checkpoints, tmp_path_factory) -> Callable[[str, str], dict[str, Check]]:
    """`passed(family, scheme)`: the checks of the gate, by name; each export is made once."""
    folder = tmp_path_factory.mktemp("passed")
    made: dict[tuple[str, str], dict[str, Check]] = {}

    def checks(family: str, scheme: str) -> dict[str, Check]:
        if (family, scheme) not in made:
            out = folder / f"{family}-{scheme}"
            source = checkpoints.folder(family)
            gate = export(source, out, scheme=scheme, context=CONTEXT, format="executorch").manifest.gate
            assert gate.status == "passed"
            made[family, scheme] = {check.name: check for check in gate.checks}
        return made[family, scheme]

    return checks


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_right_exports_pass(family, scheme, passed):
    checks = passed(family, scheme)
    tokens = checks["tokens"].figures
    assert (tokens["steps"], tokens["wrong"]) == (4 * 64, 0)
    assert tokens["same"] >= (1 if scheme == "fp32" else 0.97) * tokens["steps"]
    exact = checks["graph" if "graph" in checks else "logits"].figures
    assert 0 < exact["largest"] < 2e-5
    assert ("graph" in checks) == (scheme != "fp32")
    assert "xnnpack computes" in checks["residency"].detail


def test_rounded_activations_choose_the_references_tokens(passed, tiny_names):
    """Over all families: the reference rounds as XNNPACK does, so what differs is what lies beside a boundary."""
    figures = [
        passed(family, scheme)["tokens"].figures for family in tiny_names for scheme in ("int8", "int4")
    ]
    assert sum(f["same"] for f in figures) >= 0.99 * sum(f["steps"] for f in figures)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def fault(name: str) -> Callable[[Any], Any]:
    """Register a function that plants a fault."""

    def register(plant: Any) -> Any:
        FAULTS[name] = plant
        return plant

    return register


def wrap(patch: pytest.MonkeyPatch, verb: str, change: Callable[..., Any]) -> None:
    """Replace a verb; `change(original, self, ...)`."""
    original = getattr(XnnpackOps, verb)
    patch.setattr(XnnpackOps, verb, lambda self, *rest, **more: change(original, self, *rest, **more))


def other_architecture(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """The program, and it alone, is made of another architecture than the checkpoint's."""
    wrap(patch, "__init__", lambda init, self, arch, *rest: init(self, change(arch), *rest))


@fault("keys and values swapped")
def _(patch):
    wrap(patch, "attend", lambda verb, self, q, k, v, layer: verb(self, q, v, k, layer))


@fault("two weights swapped")
def _(patch):
    wrap(patch, "gated", lambda verb, self, gate, up: verb(self, up, gate))


@fault("attention softcap dropped")
def _(patch):
    other_architecture(patch, lambda arch: dataclasses.replace(arch, attention_softcap=0.0))


@fault("window one token too wide")
def _(patch):
    other_architecture(
        patch, lambda arch: dataclasses.replace(arch, windows=tuple(w and w + 1 for w in arch.windows))
    )


@fault("rope turned the other way")
def _(patch):
    tables = XnnpackOps.tables.fget
    assert tables is not None
    patch.setattr(XnnpackOps, "tables", property(lambda self: (tables(self)[0], -tables(self)[1])))


@fault("embedding not scaled")
def _(patch):
    wrap(
        patch,
        "scale",
        lambda verb, self, x, factor: x if factor == self.arch.embedding_scale else verb(self, x, factor),
    )


@fault("the head's inputs not swapped, or floats swapped")
def _(patch):
    def linear(verb: Any, self: XnnpackOps, x: Any, weight: str) -> Any:
        if weight == "embedding":
            x = self._swap_pairs(x)
        return verb(self, x, weight)

    wrap(patch, "linear", linear)


@fault("one integer changed")
def _(patch):
    original = format._part

    def part(tensor: Any, which: str) -> np.ndarray:
        data = original(tensor, which).copy()
        if tensor.name == "layers.1.mlp.down" and which == "data":
            data.reshape(-1).view(np.uint8)[5] ^= 1
        return data

    patch.setattr(format, "_part", part)


@fault("one scale changed")
def _(patch):
    original = format._part

    def part(tensor: Any, which: str) -> np.ndarray:
        data = original(tensor, which).copy()
        if tensor.name == "layers.1.mlp.down":
            data.reshape(-1).view(np.uint8)[-1] ^= 1
        return data

    patch.setattr(format, "_part", part)


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
@pytest.mark.parametrize("name", FAULTS)
def test_wrong_exports_are_caught(name, scheme, checkpoints, tmp_path, monkeypatch):
    FAULTS[name](monkeypatch)
    with pytest.raises(GateFailed) as caught:
        export(
            checkpoints.folder("gemma2"),
            tmp_path / "out",
            scheme=scheme,
            context=CONTEXT,
            format="executorch",
        )
    assert "must not be used" in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # no bundle, and nothing that a rerun would take up


def test_a_product_on_portable_kernels_is_caught(checkpoints, tmp_path, monkeypatch):
    original = Tally.add

    def add(self: Tally, op: str, on: bool, *rest: Any, **more: Any) -> None:
        original(self, op, on and op != "aten::linear", *rest, **more)

    monkeypatch.setattr(Tally, "add", add)
    with pytest.raises(GateFailed, match="residency: xnnpack leaves aten::linear to portable kernels"):
        export(
            checkpoints.folder("qwen2"), tmp_path / "out", scheme="int4", context=CONTEXT, format="executorch"
        )


def test_verify_again_later(bundles, gochu):
    bundle = bundles("phi3-longrope", "int4", CONTEXT, "executorch")
    code, stdout, err = gochu("verify", bundle.path, "--json")
    assert code == 0, err
    names = [check["name"] for check in json.loads(stdout)["checks"]]
    assert names == "checksums tokenizer residency integers graph tokens logits".split()


LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("changes", "layers", "vocab"),
    [
        ({"hidden_size": 256, "intermediate_size": 704, "vocab_size": 4096}, 16, 4096),
        ({}, 4, 8192),
        ({"hidden_size": 8192, "intermediate_size": 28672}, 2, 8192),
    ],
)
def test_the_twin_is_cut_to_a_size_that_fits(changes, layers, vocab):
    cut = _cut(read_architecture(LLAMA_1B | changes))
    assert (cut.layers, cut.vocab, len(cut.windows)) == (layers, vocab, layers)


def test_a_bundle_that_cannot_run_here_says_so(checkpoints, tmp_path, gochu):
    """Float16 for a GPU: XNNPACK has no such products, so there is no variant for the CPU."""
    out = tmp_path / "out"
    code, stdout, err = gochu(
        "export",
        checkpoints.folder("qwen2"),
        "--delegate",
        "vulkan",
        "--scheme",
        "fp16",
        "--context",
        64,
        "-o",
        out,
    )
    assert code == 0, err
    assert "no variant of this bundle can run on this machine" in " ".join(err.split())
    code, stdout, err = gochu("inspect", out, "--json")
    manifest = json.loads(stdout)
    assert manifest["gate"]["status"] == "unverified"
    names = [check["name"] for check in manifest["gate"]["checks"]]
    assert names == ["checksums", "tokenizer", "residency", "not run"]
    (variant,) = manifest["variants"]
    assert (variant["delegate"], variant["residency"]["macs"]) == ("vulkan", variant["residency"]["macs_on"])
    code, _, err = gochu("run", out, "--prompt", "1")
    assert (code, "computes through vulkan" in err) == (3, True)


@pytest.mark.parametrize(
    ("delegate", "code", "words"),
    [
        ("qualcomm", 5, "QNN_SDK_ROOT"),
        ("mediatek", 5, "NeuroPilot"),
        ("mps", 2, "use coreml"),
        ("vulkan", 3, "use int4 or fp16"),
    ],
)
def test_a_delegate_that_cannot_be_had(delegate, code, words, checkpoints, tmp_path, gochu):
    scheme = "int8" if delegate == "vulkan" else "fp16"
    device = "vivo X200" if delegate == "mediatek" else "galaxy-s24-snapdragon"
    arguments = ["--device", device, "--scheme", scheme, "-o", tmp_path / "out"]
    found, stdout, err = gochu("export", checkpoints.folder("qwen2"), "--delegate", delegate, *arguments)
    assert (found, stdout, words in err) == (code, "", True), err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
