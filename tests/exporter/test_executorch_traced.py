"""The decoder through executorch's partitioners: the arithmetic, and what is written.

Vulkan and Core ML do not run on this machine: their verbs run here in torch, and of their programs it is checked
that nothing is left outside of the delegate and that they hold the quantizer's own numbers.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("executorch", reason="executorch is not installed")

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import GateFailed, MissingExtra, RecipeError, UsageError
from exporter.formats import executorch_traced_ops
from exporter.formats.executorch_residency import program_residency
from exporter.formats.executorch_traced import (
    DELEGATES,
    Traced,
    _partition,
    quietly,
    register_operators,
    write_traced,
)
from exporter.pepper import checkpoint_path
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights
from exporter.residency import heavy_elsewhere, require_resident
from exporter.torch_ops import TorchOps

CONTEXT = 64
TOKENS = torch.randint(0, 512, (1, 30), generator=torch.Generator().manual_seed(3))
METHODS = {"get_max_seq_len": CONTEXT, "get_eos_ids": [1, 2]}


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    with quietly():
        register_operators()


def quantized(checkpoint: Checkpoint, scheme: str) -> QuantizedWeights:
    return QuantizedWeights(checkpoint, Recipe.uniform(scheme).resolve(checkpoint.architecture))


def last_logits(run: Any, any_length: bool) -> np.ndarray:
    """Logits [steps, vocab] after a prefill of 20 tokens (in one or in single ones), and of each token after it."""
    first = [TOKENS[:, :20]] if any_length else TOKENS[:, :20].split(1, 1)
    at, steps = 0, []
    for piece in (*first, *TOKENS[:, 20:].split(1, 1)):
        steps.append(np.asarray(run(piece, torch.tensor([at])))[0, -1])
        at += piece.shape[1]
    return np.stack(steps[len(first) - 1 :])


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest error as a share of the logits' range."""
    return float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_the_verbs_agree_with_the_reference(family, scheme, checkpoints, monkeypatch):
    """Each delegate's, with float activations: prefill, then on with the KV cache, over windows and softcaps."""
    monkeypatch.setattr(executorch_traced_ops, "round_per_token", lambda x: x)
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        arch = checkpoint.architecture
        reference = TorchOps(arch, quantized(checkpoint, scheme), CONTEXT, rounded=0)
        theirs = last_logits(lambda piece, _: reference.run(piece), any_length=True)
        for ops in {delegate.ops for delegate in DELEGATES.values()}:
            ours = last_logits(Traced(ops, arch, quantized(checkpoint, scheme), CONTEXT), ops.any_length)
            assert error(ours, theirs) < 1e-4, ops.__name__


def test_a_rotary_embedding_that_vulkan_has_no_kernel_for(checkpoints, tmp_path):
    checkpoints.write(tmp_path, "llama-biases", head_dim=12)
    with open_checkpoint(tmp_path) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, "fp32")
        reference = TorchOps(arch, weights, CONTEXT)
        theirs = last_logits(lambda piece, _: reference.run(piece), any_length=True)
        ours = last_logits(Traced(DELEGATES["vulkan"].ops, arch, weights, CONTEXT), any_length=True)
    assert error(ours, theirs) < 1e-4


def test_buffers_are_made_without_a_word(checkpoints, recwarn, capfd):
    """Outside of `quietly`, so that a progress bar goes on; and without computing anything."""
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, "int4")
        for ops in {delegate.ops for delegate in DELEGATES.values()}:
            caches = [
                held for name, held in Traced(ops, arch, weights, CONTEXT).named_buffers() if "cache" in name
            ]
            assert len(caches) == 2 * arch.layers
            assert not any(cache.any() for cache in caches)
    assert [str(warning.message) for warning in recwarn] == []
    assert capfd.readouterr() == ("", "")


def test_activations_are_rounded_once_for_each_token():
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[[1.0], [30], [0.01]]]
    )
    with quietly():
        rounded = executorch_traced_ops.round_per_token(x)
    step = (x.amax(-1) - x.amin(-1)) / 255
    assert ((rounded - x).abs().amax(-1) <= step * 0.51).all()
    assert all(len(row.unique()) > 40 for row in rounded[0])


def small(checkpoints: Any, folder: Path) -> Path:
    """A tiny tied checkpoint of one layer, since lowering takes seconds for each."""
    checkpoints.write(folder / "checkpoint", "qwen2", num_hidden_layers=1)
    return folder / "checkpoint"


def test_xnnpack_runs_what_was_traced(checkpoints, tmp_path):
    from executorch.runtime import Runtime

    with open_checkpoint(small(checkpoints, tmp_path)) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, "int4")
        entry, residency = write_traced(arch, weights, CONTEXT, tmp_path, "xnnpack", METHODS)
        traced = last_logits(Traced(DELEGATES["xnnpack"].ops, arch, weights, CONTEXT), any_length=True)
    program = Runtime.get().load_program(tmp_path / entry.file)
    assert program.load_method("get_eos_ids").execute([]) == [1, 2]
    assert program.load_method("enable_dynamic_shape").execute([]) == [True]
    forward = program.load_method("forward")
    ran = last_logits(lambda *inputs: forward.execute(inputs)[0], any_length=True)
    assert error(ran, traced) < 1e-5
    attention = 2 * CONTEXT * arch.heads * arch.head_dim
    norms = 3 * arch.hidden
    products = sum(
        rows * columns for _, (rows, columns) in arch.matrices()
    )  # the embedding once, as the head
    assert residency.macs == products + norms + attention
    assert residency.macs_on == products + norms
    assert {"llama::custom_sdpa", "quantized_decomposed::embedding_4bit"} < set(residency.elsewhere)


def test_a_product_that_no_partitioner_takes_fails_the_gate(checkpoints, tmp_path):
    with open_checkpoint(small(checkpoints, tmp_path)) as checkpoint:
        arch = checkpoint.architecture
        module = Traced(DELEGATES["xnnpack"].ops, arch, quantized(checkpoint, "fp32"), CONTEXT)
        with quietly():
            program = _partition([], {}, module).exported_program()
    found = program_residency(program, "xnnpack", "XnnpackBackend", CONTEXT, module.ops.stored)
    assert (found.ops_on, found.macs_on, found.weight_bytes_on) == (0, 0, 0)
    assert sum(heavy_elsewhere(found).values()) == 7 + 1 + 3  # the layer's, the head, and three norms
    held = sum(rows * columns * 4 for _, (rows, columns) in arch.matrices())
    assert found.weight_bytes >= held
    with pytest.raises(GateFailed, match="xnnpack leaves"):
        require_resident(found)


def delegates(path: Path) -> tuple[list[str], Any]:
    """Names of the delegates in a .pte, and the whole of it."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    with quietly():
        file = deserialize_pte_binary(path.read_bytes())
    return [delegate.id for delegate in file.program.execution_plan[0].delegates], file


def pepper(delegate: str, folder: Path) -> tuple[Architecture, Any, list[Any], Path]:
    """pepper in int4 for a delegate: architecture, residency, its weights, the file."""
    with open_checkpoint(checkpoint_path()) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, "int4")
        entry, residency = write_traced(arch, weights, 512, folder, delegate, METHODS)
        return arch, residency, [weights.matrix(name) for name, _ in arch.matrices()], folder / entry.file


def test_vulkan_takes_all_of_pepper(tmp_path, capfd):
    """Written only: no GPU here runs it."""
    _, residency, matrices, path = pepper("vulkan", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert residency.elsewhere == ()
    assert residency.ops_on == residency.ops > 100
    assert residency.macs_on == residency.macs > 0
    names, file = delegates(path)
    assert names == ["VulkanBackend"]
    for matrix in matrices:  # constants go by their SHA-256: 4 bits as they are, scales in float16 by groups
        scales = np.ascontiguousarray(matrix.scales.T.astype(np.float16))
        for stored in (matrix.data, scales):
            assert hashlib.sha256(stored.tobytes()).hexdigest() in file.named_data.pte_data, matrix.name
    assert path.stat().st_size < sum(matrix.nbytes for matrix in matrices) + 300_000


def test_core_ml_takes_all_of_pepper(tmp_path, capfd):
    """Written only: Core ML runs on Apple's systems."""
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    arch, residency, matrices, path = pepper("coreml", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert residency.elsewhere == ()
    assert residency.ops_on == residency.ops > 100
    assert residency.macs_on == residency.macs > 0
    names, file = delegates(path)
    assert names == ["CoreMLBackend"]
    found, states = core_ml_weights(file.program.backend_delegate_data[0].data, tmp_path / "package")
    assert len(states) == 2 * arch.layers
    for matrix in matrices:
        key = (matrix.integers().tobytes(), matrix.scales.astype(np.float16).tobytes())
        assert key in found, matrix.name
    assert path.stat().st_size < sum(matrix.nbytes for matrix in matrices) + 500_000


def core_ml_weights(payload: bytes, folder: Path) -> tuple[set[tuple[bytes, bytes]], list[str]]:
    """Integers and scales of each weight in a delegate's package, and names of its states."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load
    from executorch.backends.apple.coreml import executorchcoreml

    folder.mkdir()
    with quietly():
        assert executorchcoreml.unflatten_directory_contents(payload, str(folder))
        model = coremltools.models.MLModel(str(next(folder.rglob("*.mlpackage"))), skip_model_load=True)
        spec = model.get_spec()
        program = load(
            spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir
        )
    (function,) = program.functions.values()
    weights = {
        (op.data.val.astype(np.int8).tobytes(), op.scale.val.astype(np.float16).tobytes())
        for op in function.find_ops(op_type="constexpr_blockwise_shift_scale")
    }
    return weights, [state.name for state in spec.description.state]


@pytest.mark.parametrize(
    ("delegate", "scheme", "takes"),
    [
        ("vulkan", "int8", "fp32, fp16, and int4"),
        ("vulkan", "int8-channel", "fp32, fp16, and int4"),
        ("xnnpack", "fp16", "fp32, int8 per channel"),
        ("xnnpack", "int8", "fp32, int8 per channel"),
    ],
)
def test_a_scheme_that_a_delegate_cannot_hold_is_refused(delegate, scheme, takes, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, scheme)
        with pytest.raises(
            RecipeError, match=f"embedding .* is {scheme}, which ExecuTorch's {delegate}.*{takes}"
        ):
            write_traced(arch, weights, CONTEXT, tmp_path, delegate, METHODS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delegate", ["qualcomm", "mediatek"])
def test_a_makers_compiler_that_is_missing_is_named(delegate, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    if delegate == "mediatek" and importlib.util.find_spec("mtk_converter"):
        pytest.skip("MediaTek's compiler is installed")
    needed = {"qualcomm": "QNN_SDK_ROOT", "mediatek": "mtk_converter"}[delegate]
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, "fp16")
        with pytest.raises(MissingExtra, match=needed) as missing:
            write_traced(arch, weights, CONTEXT, tmp_path, delegate, METHODS)
    assert missing.value.exit_code == 5


@pytest.mark.parametrize(
    ("delegate", "advice"), [("mps", "use coreml"), ("gpu", "use one of xnnpack, vulkan")]
)
def test_other_delegates_are_refused(delegate, advice, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        arch, weights = checkpoint.architecture, quantized(checkpoint, "int4")
        with pytest.raises(UsageError, match=advice):
            write_traced(arch, weights, CONTEXT, tmp_path, delegate, METHODS)
