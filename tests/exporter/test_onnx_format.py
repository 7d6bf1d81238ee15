"""The ONNX graph against the reference on the integers read back from its file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporter.checkpoint import Checkpoint, Matrix, open_checkpoint
from exporter.formats.onnx import DATA, GRAPH, write_onnx
from exporter.formats.onnx_weights import OnnxWeights
from exporter.quantization.recipe import Recipe, Rule
from exporter.quantization.rtn import quantize_mse
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.tensor import vector_digest
from exporter.quantization.weights import QuantizedWeights
from exporter.torch_ops import TorchOps, round_by_group
from runtimes.bundle import TensorReport

CONTEXT = 64
SCHEMES = ("fp32", "fp16", "int8", "int4", "int4-g128", "int8-channel")
FLOAT = 1e-5  # of the logits' range; 4e-6 is the largest seen
TOKENS = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(3))


class Graph:
    """An exported graph, run with a KV cache that grows."""

    def __init__(self, folder: Path, float_activations: bool = False) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        path = folder / GRAPH
        if float_activations:
            model = onnx.load(path, load_external_data=False)
            for node in model.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = 1
            path = folder / "float.onnx"
            onnx.save(model, path)
        self._session = ort.InferenceSession(str(path), options)
        self._past: dict[str, np.ndarray] = {}
        self._seen = 0

    def run(self, tokens: torch.Tensor) -> np.ndarray:
        """Logits [batch, length or 1, vocab]."""
        batch, length = tokens.shape
        if not self._past:
            for spec in self._session.get_inputs()[2:]:
                self._past[spec.name] = np.zeros((batch, spec.shape[1], 0, spec.shape[3]), np.float32)
        self._seen += length
        logits, *present = self._session.run(
            None,
            {
                "input_ids": tokens.numpy(),
                "attention_mask": np.ones((batch, self._seen), np.int64),
                **self._past,
            },
        )
        self._past = dict(zip(self._past, present, strict=True))
        return logits


def write(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path, context: int = CONTEXT, last_only: bool = False
) -> dict[str, TensorReport]:
    """Write the graph; returns the quantizer's reports."""
    arch = checkpoint.architecture
    weights = QuantizedWeights(checkpoint, recipe.resolve(arch))
    write_onnx(arch, weights, context, folder, last_only=last_only)
    return {report.name: report for report in weights.reports}


def reference(
    checkpoint: Checkpoint, folder: Path, rounded: int | None = 0, context: int = CONTEXT
) -> TorchOps:
    return TorchOps(checkpoint.architecture, OnnxWeights(folder / GRAPH), context, rounded=rounded)


def in_pieces(run: Any, tokens: torch.Tensor = TOKENS) -> np.ndarray:
    """Logits of a prefill of 20 tokens, then of single ones: [tokens, vocab]."""
    pieces: Iterable[torch.Tensor] = [tokens[:, :20], *tokens[:, 20:].split(1, 1)]
    return np.concatenate([np.asarray(run(piece))[0] for piece in pieces])


def errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Largest error at each token, as a share of the logits' range."""
    return np.abs(ours - theirs).max(-1) / (theirs.max() - theirs.min())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_graph_agrees_with_the_reference(family, scheme, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        reports = write(checkpoint, Recipe.uniform(scheme), tmp_path)
        stored = OnnxWeights(tmp_path / GRAPH)
        arch = checkpoint.architecture
        assert set(reports) == {n for n, _ in arch.matrices()} | {n for n, _ in arch.vectors()}
        for name, report in reports.items():
            digest = (
                vector_digest(stored.vector(name)) if len(report.shape) == 1 else stored.matrix(name).digest()
            )
            assert digest == report.digest, name
        exact = in_pieces(reference(checkpoint, tmp_path).run)
        assert errors(in_pieces(Graph(tmp_path, float_activations=True).run), exact).max() < FLOAT
        rounded = in_pieces(reference(checkpoint, tmp_path, rounded=None).run)
    as_it_runs = in_pieces(Graph(tmp_path).run)
    noise = errors(rounded, exact)
    if not noise.any():
        assert errors(as_it_runs, exact).max() < FLOAT
        return
    # The same rounding, until a value beside a rounding boundary falls to the other side (then it spreads, also
    # to later tokens through the KV cache): so some tokens agree fully, and none is off by more than rounding.
    off = errors(as_it_runs, rounded)
    assert off.min() < 1e-6
    assert off.max() < 2 * noise.max()
    assert off.mean() < noise.mean()


@pytest.mark.parametrize("scheme", ["int4", "int4-g128", "int8", "int8-g64"])
def test_activations_are_rounded_as_the_kernel_does(scheme, tmp_path):
    """One product, many inputs: MatMulNBits at accuracy level 4 against `round_by_group`."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(5)
    w = random.standard_normal((48, 256)).astype(np.float32)
    x = (random.standard_normal((400, 256)) * random.uniform(0.01, 10, (400, 1))).astype(np.float32)

    parsed = parse_scheme(scheme)
    tensor = quantize_mse(Matrix("w", w.shape, lambda i, j: w[i:j]), parsed)[0]
    data = tensor.data.reshape(48, 256 // parsed.group, -1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=256,
        N=48,
        bits=parsed.bits,
        block_size=parsed.group,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [400, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [400, 48])],
        [numpy_helper.from_array(data, "w"), numpy_helper.from_array(tensor.scales.ravel(), "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    y = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    rounded = round_by_group(torch.from_numpy(x), parsed.group).numpy().astype(np.float64)
    expected = rounded @ tensor.dequantize().T.astype(np.float64)
    off = np.abs(y - expected).max(-1) / np.abs(expected).max(-1)
    assert np.mean(off < 1e-6) > 0.98  # the rest: a value on a rounding boundary
    assert off.max() < 0.01
    unrounded = x.astype(np.float64) @ tensor.dequantize().T.astype(np.float64)
    assert np.median(np.abs(y - unrounded).max(-1) / np.abs(unrounded).max(-1)) > 1e-3


MIXED = {
    "*.attention.q": "int8",
    "*.attention.k": "int4",
    "*.attention.v": "fp16",
    "*.attention.o": "int8-channel",
    "*.mlp.gate": "int4-g128",
    "*.mlp.up": "fp32",
    "layers.0.mlp.down": "int8-g64",
    "embedding": "int8",
    "*": "int4",
}


def test_a_recipe_that_mixes_schemes(family, checkpoints, tmp_path):
    recipe = Recipe(name="mixed", rules=tuple(Rule(match=m, scheme=s) for m, s in MIXED.items()))
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        reports = write(checkpoint, recipe, tmp_path)
        assert {reports[f"layers.1.attention.{x}"].scheme for x in "qkv"} == {"int8", "int4", "fp16"}
        exact = in_pieces(reference(checkpoint, tmp_path).run)
    assert errors(in_pieces(Graph(tmp_path, float_activations=True).run), exact).max() < FLOAT


@pytest.mark.parametrize("scheme", SCHEMES)
def test_last_only_is_the_last_row(scheme, checkpoints, tmp_path):
    full, last = tmp_path / "full", tmp_path / "last"
    for name in ("gemma2", "qwen2"):
        with open_checkpoint(checkpoints.folder(name)) as checkpoint:
            for folder, last_only in ((full, False), (last, True)):
                folder.mkdir(exist_ok=True)
                write(checkpoint, Recipe.uniform(scheme), folder, last_only=last_only)
        everything = Graph(full, float_activations=True).run(TOKENS)
        one = Graph(last, float_activations=True).run(TOKENS)
        assert one.shape == (1, 1, 512)
        assert everything.shape == (1, 40, 512)
        assert errors(one[0], everything[0, -1:]).max() < FLOAT


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_shares_the_embeddings_bytes(scheme, checkpoints, tmp_path):
    checkpoints.write(tmp_path / "checkpoint", "qwen2", vocab_size=20000)
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        reports = write(checkpoint, Recipe.uniform(scheme), tmp_path)
    assert "head" not in reports
    initializers = onnx.load(tmp_path / GRAPH, load_external_data=False).graph.initializer
    held = sum(report.bytes for report in reports.values())
    tables = sum(int(np.prod(tensor.dims)) * 4 for tensor in initializers if tensor.name.startswith("rope."))
    padding = 4096 * len(initializers)
    size = (tmp_path / DATA).stat().st_size
    assert held - 2**14 <= size <= held + tables + padding  # small vectors stay in the graph
    assert size < held + reports["embedding"].bytes  # not twice


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_constant_is_computed_for_each_token(scheme, checkpoints, tmp_path):
    """Weights that the CPU multiplies as float32 are unfolded when the model is loaded."""
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        write(checkpoint, Recipe.uniform(scheme), tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "as-loaded.onnx")
    ort.InferenceSession(str(tmp_path / GRAPH), options)
    graph = onnx.load(tmp_path / "as-loaded.onnx", load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    assert not [node.name for node in graph.node if set(node.input) <= constants]


def test_the_graph_itself_stays_small(checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("phi3-longrope")) as checkpoint:
        write(checkpoint, Recipe.uniform("fp32"), tmp_path)
    assert (tmp_path / GRAPH).stat().st_size < 100_000


def test_external_data_is_aligned_and_does_not_overlap(family, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        write(checkpoint, Recipe.uniform("int4"), tmp_path)
    places = set()
    for tensor in onnx.load(tmp_path / GRAPH, load_external_data=False).graph.initializer:
        if tensor.external_data:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == DATA
            places.add((int(where["offset"]), int(where["length"])))
    end = 0
    for offset, length in sorted(places):
        assert offset >= end
        assert offset % (4096 if length >= 1 << 16 else 64) == 0
        end = offset + length
    assert end == (tmp_path / DATA).stat().st_size


def test_long_and_short_factors_of_longrope(checkpoints, tmp_path):
    """The context that a graph is made for decides; transformers decides by the sequence's length."""
    model = checkpoints.model("phi3-longrope")
    with open_checkpoint(checkpoints.folder("phi3-longrope")) as checkpoint:
        for context, length in ((64, 60), (256, 100)):
            folder = tmp_path / str(context)
            folder.mkdir()
            write(checkpoint, Recipe.uniform("fp32"), folder, context)
            tokens = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(9))
            with torch.no_grad():
                theirs = model(tokens).logits[0].numpy()
            assert errors(in_pieces(Graph(folder).run, tokens), theirs).max() < 1e-4


def test_batches(checkpoints, tmp_path):
    tokens = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(4))
    with open_checkpoint(checkpoints.folder("gemma2")) as checkpoint:
        write(checkpoint, Recipe.uniform("fp32"), tmp_path)
    together, alone = Graph(tmp_path), [Graph(tmp_path) for _ in range(3)]
    for piece in (tokens[:, :16], *tokens[:, 16:].split(1, 1)):
        logits = together.run(piece)
        for row, graph in enumerate(alone):
            assert errors(logits[row], graph.run(piece[row : row + 1])[0]).max() < FLOAT


def test_writing_twice_gives_the_same_bytes(checkpoints, tmp_path):
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        with open_checkpoint(checkpoints.folder("llama-biases")) as checkpoint:
            write(checkpoint, Recipe.uniform("int4"), folder)
        contents.append([(folder / name).read_bytes() for name in (GRAPH, DATA)])
    assert contents[0] == contents[1]
