"""The decoder for Core AI: the arithmetic in torch, what is written, and what coreai's own CPU runtime makes of it.

That runtime computes in float16, as an Apple device would; none was there.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coreai_torch", reason="coreai-torch is not installed", exc_type=ImportError)

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import GateFailed, PlanRefused, RecipeError, UsageError
from exporter.formats import coreai
from exporter.formats.coreai import ASSET, CHUNK, STEP, check_asset, graphs, write_coreai
from exporter.gate import verify
from exporter.pepper import checkpoint_path
from exporter.pipeline import export
from exporter.plan import make_plan
from exporter.quantization.recipe import Recipe
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import QuantizedWeights
from exporter.torch_ops import TorchOps
from runtimes.bundle import MANIFEST, Bundle
from runtimes.engines import choose_variant
from runtimes.errors import BundleError

CONTEXT = 128
PROMPT, TOKENS = 64, torch.randint(0, 512, (1, 84), generator=torch.Generator().manual_seed(3))


def quantized(checkpoint: Checkpoint, scheme: str) -> QuantizedWeights:
    return QuantizedWeights(checkpoint, Recipe.uniform(scheme).resolve(checkpoint.architecture))


def blocks() -> list[tuple[str, int, int]]:
    """What Apple's runner asks for: entry point, first token, how many; a block anew for each token after its first."""
    after = range(PROMPT, TOKENS.shape[1])
    steps = [(f"extend_{CONTEXT}_{STEP}", at - at % STEP, at % STEP + 1) for at in after]
    return [(f"prompt_opt_{CONTEXT}_{CHUNK}", 0, PROMPT), *steps]


def inputs(length: int, first: int, count: int, dtype: Any) -> dict[str, np.ndarray]:
    """Those of a block of `length` tokens at `first`, of which `count` are there: as Apple's runner fills them."""
    mask = np.full((1, CONTEXT, 1, length), -40000, dtype)
    for row in range(count):
        mask[0, : first + row + 1, 0, row] = 0
    return {
        "position_ids": np.arange(first, first + length, dtype=np.uint16)[None],
        "in_step": np.array([first], np.int32),
        "causal_mask": mask,
    }


def ids(length: int, first: int, count: int) -> np.ndarray:
    padded = np.zeros((1, length), np.int32)
    padded[:, :count] = TOKENS[:, first : first + count]
    return padded


def reference(arch: Architecture, weights: QuantizedWeights) -> np.ndarray:
    """Logits [steps, vocab] after each token from the prompt on."""
    return TorchOps(arch, weights, CONTEXT, rounded=0).run(TOKENS)[0, PROMPT:].numpy()


def in_torch(arch: Architecture, weights: QuantizedWeights, dtype: torch.dtype) -> np.ndarray:
    """The same of the modules that are traced."""
    parts, steps = graphs(arch, weights, CONTEXT, dtype=dtype), []
    numbers = {torch.float16: np.float16, torch.float32: np.float32}[dtype]
    with torch.no_grad():
        table = parts["load_embeddings"]()
        caches = {name: torch.zeros_like(parts[blocks()[0][0]].inputs()[name]) for name in coreai.STATES}
        for name, first, count in blocks():
            length = parts[name].length
            x = parts[f"gather_embeddings_{length}"](torch.tensor(ids(length, first, count)), table)
            given = {key: torch.tensor(value) for key, value in inputs(length, first, count, numbers).items()}
            steps.append(parts[name](x, **given, **caches, embedding_table=table).numpy())
    return last_rows(steps)


def last_rows(steps: list[np.ndarray]) -> np.ndarray:
    assert steps[0].shape == ()  # a prompt's
    return np.stack(
        [step[0, 0, count - 1] for step, (_, _, count) in zip(steps, blocks(), strict=True) if step.shape]
    )


def in_coreai(path: Path, arch: Architecture) -> np.ndarray:
    """The same of an asset, by coreai's runtime."""
    from coreai.authoring import AIModelAsset

    async def run() -> np.ndarray:
        async with AIModelAsset.load(path).executable() as model:
            steps, functions = [], {name: model.load_function(name) for name in check_asset(path).inputs}
            table = (await functions["load_embeddings"]())["embedding_table"]
            cache = (arch.layers, 1, arch.kv_heads * arch.head_dim, 1, CONTEXT)
            state = {name: array(np.zeros(cache, np.float16)) for name in coreai.STATES}
            for name, first, count in blocks():
                length = int(name.rpartition("_")[2])
                tokens = array(ids(length, first, count))
                found = await functions[f"gather_embeddings_{length}"](
                    {"in_new_token_ids": tokens, "embedding_table": table}
                )
                given = {key: array(value) for key, value in inputs(length, first, count, np.float16).items()}
                given |= {"transformer_input": found["gathered_embeddings"], "embedding_table": table}
                steps.append((await functions[name](given, state))["out_logits"].numpy())
            return last_rows(steps)

    return asyncio.run(run())


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest error as a share of the logits' range."""
    return float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))


def array(values: np.ndarray) -> Any:
    from coreai.runtime import NDArray

    return NDArray(values)


@pytest.mark.parametrize("scheme", ["fp32", "int4", "pal4-g8"])
def test_the_verbs_agree_with_the_reference(family, scheme, checkpoints):
    """In float32, as the runner calls them: a prompt, then each token in its block, over windows and softcaps."""
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, scheme)
        assert error(in_torch(arch, weights, torch.float32), reference(arch, weights)) < 1e-4


def packed(matrix: QuantizedTensor) -> bytes:
    """Its numbers in coreai's order: two's complement where they have a sign, 4 bits in pairs, the lower first."""
    if matrix.tables is not None:
        return matrix.data.tobytes()
    return (matrix.data ^ (0x88 if matrix.scheme.bits == 4 else 0x80)).tobytes()


def require_own_numbers(path: Path, matrices: list[QuantizedTensor]) -> None:
    """Each weight's integers or indices are there once, as they are, and its scales or tables too."""
    program = (path / "main.mlirb").read_bytes()
    for matrix in matrices:
        assert program.count(packed(matrix)) == 1, matrix.name
        floats = matrix.scales if matrix.tables is None else matrix.tables
        assert floats.astype(np.float16).tobytes() in program, matrix.name
        assert (floats.astype(np.float16) == floats).all()


@pytest.mark.parametrize(
    ("name", "scheme"), [("gemma2", "int8"), ("llama-biases", "pal6-g16"), ("phi3-longrope", "int8-channel")]
)
def test_coreai_computes_what_the_reference_does(name, scheme, checkpoints, tmp_path):
    """Softcaps and windows, biases, a head of its own: as near as torch comes to it in float16."""
    with open_checkpoint(checkpoints.folder(name)) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, scheme)
        write_coreai(arch, weights, CONTEXT, tmp_path)
        theirs = reference(arch, weights)
        half = error(in_torch(arch, weights, torch.float16), theirs)
        if weights.scheme("embedding").bits == 8:
            require_own_numbers(tmp_path / ASSET, [weights.matrix(each) for each, _ in arch.matrices()])
    assert half < 0.01
    assert error(in_coreai(tmp_path / ASSET, arch), theirs) < 2 * half


@pytest.mark.parametrize("scheme", ["int4", "pal4-g8"])
def test_the_asset_of_pepper(scheme, tmp_path, capfd):
    """Apple's entry points, with the quantizer's own numbers, each weight stored once."""
    with open_checkpoint(checkpoint_path()) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, scheme)
        entries = write_coreai(arch, weights, CONTEXT, tmp_path)
        assert capfd.readouterr() == ("", "")
        matrices = [weights.matrix(name) for name, _ in arch.matrices()]
        theirs = reference(arch, weights)
    asset = check_asset(tmp_path / ASSET)
    assert capfd.readouterr() == ("", "")
    assert [entry.name for entry in entries] == [
        "load_embeddings",
        f"gather_embeddings_{STEP}",
        f"gather_embeddings_{CHUNK}",
        f"extend_{CONTEXT}_{STEP}",
        f"prompt_opt_{CONTEXT}_{CHUNK}",
    ]
    for entry in entries:
        assert asset.inputs[entry.name] == {spec.name: coreai_type(spec) for spec in entry.inputs}
        assert asset.outputs[entry.name] == {spec.name: coreai_type(spec) for spec in entry.outputs}
        held = {"key_cache", "value_cache"} if entry.name.startswith(("extend", "prompt")) else set()
        assert set(asset.states[entry.name]) == held
    cache = f"tensor<{arch.layers}x1x{arch.kv_heads * arch.head_dim}x1x{CONTEXT}xf16>"
    assert asset.states[entries[-1].name]["key_cache"] == f"!coreai.handle<{cache}>"
    require_own_numbers(tmp_path / ASSET, matrices)
    assert (tmp_path / ASSET / "main.mlirb").stat().st_size < sum(
        matrix.nbytes for matrix in matrices
    ) + 400_000
    assert "Float32" not in asset.stored
    assert asset.operations["slice_update"] == 2 * 2 * arch.layers
    assert error(in_coreai(tmp_path / ASSET, arch), theirs) < 0.01


def coreai_type(spec: Any) -> str:
    kind = {"float16": "Float16", "int32": "Int32", "uint16": "UInt16"}[spec.dtype]
    shape = " × ".join(map(str, spec.shape))
    return f"NDArray ({kind}, {shape})" if shape else f"NDArray ({kind})"


def small(checkpoints: Any, folder: Path) -> Path:
    """A tiny tied checkpoint of one layer."""
    checkpoints.write(folder / "checkpoint", "qwen2", num_hidden_layers=1)
    return folder / "checkpoint"


def test_the_same_model_makes_the_same_asset(checkpoints, tmp_path):
    """In one process: coreai names constants by a hash that it seeds anew in each."""
    with open_checkpoint(small(checkpoints, tmp_path)) as checkpoint:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            write_coreai(checkpoint.architecture, quantized(checkpoint, "int4"), CONTEXT, tmp_path / name)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name / ASSET).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize(
    ("scheme", "context", "kind", "reason"),
    [
        ("fp32", CONTEXT, RecipeError, "embedding .* is fp32, .*float16"),
        ("pal3", CONTEXT, RecipeError, "embedding .* is pal3, .*packs no 3 bits"),
        ("int4", 100, UsageError, "context of 100.*multiple of 64"),
        ("int4", 1 << 17, UsageError, "at most 65536"),
    ],
)
def test_what_cannot_be_held_is_refused(scheme, context, kind, reason, checkpoints, tmp_path):
    with (
        open_checkpoint(checkpoints.folder("qwen2")) as checkpoint,
        pytest.raises(kind, match=reason),
    ):
        write_coreai(checkpoint.architecture, quantized(checkpoint, scheme), context, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_asset_is_refused(checkpoints, tmp_path):
    with open_checkpoint(small(checkpoints, tmp_path)) as checkpoint:
        write_coreai(checkpoint.architecture, quantized(checkpoint, "int4"), CONTEXT, tmp_path)
    asset = tmp_path / ASSET
    program = asset / "main.mlirb"
    whole = program.read_bytes()
    program.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match="damaged"):
        check_asset(asset)
    program.write_bytes(whole)
    check_asset(asset)
    (asset / "metadata.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read by coreai"):
        check_asset(asset)
    (asset / "metadata.json").unlink()
    with pytest.raises(BundleError, match=r"metadata\.json is missing"):
        check_asset(asset)


def test_export_writes_a_bundle_whose_asset_coreai_reads(tmp_path: Path) -> None:
    bundle = export("pepper", tmp_path / "bundle", format="coreai", scheme="int4", context=CONTEXT)
    (variant,) = bundle.manifest.variants
    assert (variant.engine, variant.format, variant.context) == ("coreai", "coreai", CONTEXT)
    assert bundle.manifest.gate is not None
    assert bundle.manifest.gate.status == "unverified"  # nothing here runs it as a phone would
    assert [check.name for check in bundle.manifest.gate.checks if check.passed] == [
        "checksums",
        "tokenizer",
        "asset",
        "not run",
    ]
    with pytest.raises(BundleError, match="engine coreai"):
        choose_variant(bundle)


def test_the_gate_misses_an_entry_point(tmp_path: Path) -> None:
    bundle = export(
        "pepper", tmp_path / "bundle", format="coreai", scheme="int4", context=CONTEXT, verify=False
    )
    manifest = tmp_path / "bundle" / MANIFEST
    manifest.write_text(manifest.read_text("utf-8").replace('"in_step"', '"step"'), "utf-8")
    with pytest.raises(GateFailed, match=f"extend_{CONTEXT}_{STEP}"):
        verify(Bundle.open(bundle.path))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [({"context": 100}, PlanRefused, "ask for 128"), ({"scheme": "fp32"}, RecipeError, "float16")],
)
def test_what_the_runner_cannot_have_is_refused_before_any_work(
    asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    with open_checkpoint("pepper") as checkpoint, pytest.raises(error, match=message):
        make_plan(checkpoint.architecture, format="coreai", **asked)


def test_the_command_does_not_offer_to_run_what_cannot_run(gochu: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    code, _, err = gochu("export", "pepper", "-o", out, "--format", "coreai", "--context", CONTEXT)
    assert code == 0
    assert "gochu inspect" in err.replace("\n", " ")
    assert "gochu run" not in err.replace("\n", " ")
