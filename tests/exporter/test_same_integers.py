"""The same integers everywhere: what the quantizer found, taken out of each format's file by others' readers.

Readers are the formats' own libraries (onnx, executorch's and coremltools' deserializers, coreai's MLIR); what packs
numbers into bytes is spelled out here once more, from the formats' documents.
"""

import importlib.util
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exporter.architecture import Architecture, read_architecture
from exporter.checkpoint import open_checkpoint
from exporter.formats.onnx import GRAPH, write_onnx
from exporter.formats.onnx_qdq import write_qdq
from exporter.formats.onnx_static import write_static
from exporter.npu.hexagon_torch import calibrate
from exporter.quantization.calibration import calibration_sequences
from exporter.quantization.ranges import Range
from exporter.quantization.recipe import Recipe, calibrated
from exporter.quantization.scheme import Scheme, parse_scheme
from exporter.quantization.streaming import quantize_layers
from exporter.quantization.tensor import QuantizedTensor, pack4, round_scales
from exporter.quantization.weights import QuantizedWeights
from exporter.staging import Staging
from runtimes.bundle import Tokens

CONTEXT = 64
Numbers = tuple[NDArray[Any], NDArray[np.float32]]  # integers and scales, or indices and tables


class Stage:
    """What the quantization stage found, once, for all formats; `activations` are a format's own business."""

    def __init__(self, arch: Architecture, weights: QuantizedWeights) -> None:
        self.arch = arch
        self.matrices = {name: weights.matrix(name) for name, _ in arch.matrices()}
        self._vectors = {name: weights.vector(name) for name, _ in arch.vectors()}
        self._activations: Any = "float32"

    def with_activations(self, activations: str) -> "Stage":
        other = object.__new__(Stage)
        other.__dict__ = {**self.__dict__, "_activations": activations}
        return other

    def scheme(self, name: str) -> Scheme:
        return replace(self.matrices[name].scheme, activations=self._activations)

    def matrix(self, name: str) -> QuantizedTensor:
        return replace(self.matrices[name], scheme=self.scheme(name))

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._vectors[name]

    def numbers(self) -> dict[str, Numbers]:
        return {name: numbers(matrix) for name, matrix in self.matrices.items()}


def numbers(matrix: QuantizedTensor) -> Numbers:
    if matrix.tables is not None:
        return matrix.indices(), matrix.tables
    assert matrix.scales is not None
    return matrix.integers(), matrix.scales


def same(found: dict[str, Numbers], wanted: dict[str, Numbers]) -> None:
    assert found.keys() == wanted.keys()
    for name, (integers, scales) in wanted.items():
        theirs, factors = found[name]
        assert theirs.shape == integers.shape, name
        assert np.array_equal(theirs, integers), name
        assert factors.size == scales.size, name
        bits = np.ascontiguousarray(factors.reshape(scales.shape), np.float32).view(np.uint32)
        assert np.array_equal(bits, scales.view(np.uint32)), name


@pytest.fixture(scope="module")
def stage(checkpoints, tmp_path_factory) -> Callable[[str, str, str], Stage]:
    """`stage(family, scheme, algorithm)`, of two layers, once each."""
    made: dict[tuple[str, str, str], Stage] = {}
    folders: dict[str, Path] = {}

    def quantize(family: str, scheme: str, algorithm: str) -> Stage:
        key = (family, scheme, algorithm)
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            checkpoints.write(folders[family], family, num_hidden_layers=2)
        if key not in made:
            with open_checkpoint(folders[family]) as source:
                decisions = Recipe.uniform(scheme, algorithm).resolve(source.architecture)
                weights = QuantizedWeights(source, decisions)
                if calibrated(decisions):
                    texts = calibration_sequences(source, CONTEXT, most=512)
                    work = Staging(tmp_path_factory.mktemp("work"), "")
                    found = quantize_layers(source, decisions, texts, CONTEXT, work)
                    weights = QuantizedWeights(source, decisions, found=found)
                made[key] = Stage(source.architecture, weights)
        return made[key]

    return quantize


# readers


def nibbles(packed: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """uint8 [rows, bytes] -> [rows, columns], the lower half of a byte first."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)[:, :columns]


def onnx_numbers(path: Path, arch: Architecture) -> dict[str, Numbers]:
    """Of MatMulNBits and GatherBlockQuantized, whose numbers count from 2^(bits-1); and of products by plain int8."""
    model, shapes = onnx.load(path), dict(arch.matrices())
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found: dict[str, Numbers] = {}
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MatMulNBits":
            assert len(node.input) == 3  # no zero points
            name, columns, bits = node.input[1], attributes["K"], attributes["bits"]
            stored = held[name].reshape(attributes["N"], -1)
            whole = nibbles(stored, columns) if bits == 4 else stored
            scales = held[node.input[2]].reshape(attributes["N"], -1)
        elif node.op_type == "GatherBlockQuantized":
            name, columns, bits = "embedding", shapes["embedding"][1], attributes["bits"]
            whole = nibbles(held[node.input[0]], columns) if bits == 4 else held[node.input[0]]
            scales = held[node.input[2]]
        elif node.op_type in ("Cast", "Gather") and held.get(node.input[0], np.empty(0)).dtype == np.int8:
            name, whole, bits = node.input[0], held[node.input[0]], 0
            scales = held[factor(model, node)].reshape(-1, 1)
        else:
            continue
        signed = (whole.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8) if bits else whole
        row = 0
        for part in split(name):
            rows = shapes[part][0]
            numbers = signed[row : row + rows], scales[row : row + rows]
            same(
                {part: found.setdefault(part, numbers)}, {part: numbers}
            )  # a tied head's are the embedding's
            row += rows
        assert row == len(signed)
    return found


def factor(model: Any, node: Any) -> str:
    """The scales that what comes of int8 weights is multiplied by: those of all outputs, or of the rows looked up."""
    consumers = {value: other for other in model.graph.node for value in other.input}
    while node.op_type != "Mul":
        last, node = node.output[0], consumers[node.output[0]]
    (other,) = (value for value in node.input if value != last)
    makers = {value: maker for maker in model.graph.node for value in maker.output}
    return makers[other].input[0] if other in makers else other


def split(name: str) -> list[str]:
    """layers.0.attention.q+k+v: names that lie below each other."""
    prefix, _, last = name.rpartition(".")
    return [f"{prefix}.{part}" if prefix else part for part in last.split("+")]


def qdq_numbers(path: Path) -> dict[str, Numbers]:
    """Of DequantizeLinear on [inputs, outputs] of two's complement, a scale for each output or block of inputs."""
    model = onnx.load(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            integers, scales, zeros = (onnx.numpy_helper.to_array(held[name]) for name in node.input)
            if integers.ndim == 2 and scales.ndim:
                assert not zeros.astype(np.int8).any()
                across = scales if scales.ndim == 2 else scales[None]
                found[node.input[0]] = integers.astype(np.int8).T, across.T
    return found


def pte_numbers(path: Path, arch: Architecture) -> dict[str, Numbers]:
    """Of the data that XNNPACK's weights name (4 bits count from 8, with bfloat16 scales; 8 are signed, with float32
    ones), and of the program's table, whose pairs have the upper half first."""
    from executorch.exir import schema
    from executorch.exir._serialize._program import deserialize_pte_binary

    file, shapes = deserialize_pte_binary(path.read_bytes()), dict(arch.matrices())
    data = {key: file.named_data.buffers[e.buffer_index] for key, e in file.named_data.pte_data.items()}
    found: dict[str, Numbers] = {}
    for key, stored in data.items():
        name = key.partition(":")[0]
        if name not in shapes or name == "embedding" or key.endswith(".scales"):
            continue
        rows, columns = shapes[name]
        integers = np.frombuffer(stored, np.uint8).reshape(rows, -1)
        scales = np.frombuffer(data[f"{key}.scales"], np.uint8)
        if integers.shape[1] == columns:
            found[name] = integers.view(np.int8), scales.view(np.float32).reshape(rows, 1)
        else:
            numbers = (nibbles(integers, columns) - np.uint8(8)).view(np.int8)
            wide = scales.view(np.uint16).astype(np.uint32) << 16
            found[name] = numbers, wide.view(np.float32).reshape(rows, -1)
    plan = file.program.execution_plan[0]
    calls = [i.instr_args for i in plan.chains[0].instructions if isinstance(i.instr_args, schema.KernelCall)]
    (look_up,) = (c for c in calls if "embedding" in plan.operators[c.op_index].name)
    table, scales = (plan.values[index].val for index in look_up.args[:2])
    stored, factors = (  # behind each lies what aligns the next one
        np.frombuffer(file.program.constant_buffer[t.data_buffer_idx].storage, np.uint8)[
            : math.prod(t.sizes) * width
        ]
        for t, width in ((table, 1), (scales, 4))
    )
    rows, columns = shapes["embedding"]
    if plan.operators[look_up.op_index].name.endswith("4bit"):
        swapped = (stored << 4) | (stored >> 4)
        integers = (nibbles(swapped.reshape(rows, -1), columns) - np.uint8(8)).view(np.int8)
    else:
        integers = stored.view(np.int8).reshape(rows, columns)
    heads = [
        bytes(data[key]) for key in data if key.partition(":")[0] == "embedding" and key[-7:] != ".scales"
    ]
    assert heads == [stored.tobytes()] * arch.tied  # the same bytes, which its product takes in that order
    return {**found, "embedding": (integers, factors.view(np.float32).reshape(rows, -1))}


def coreml_numbers(path: Path, arch: Architecture) -> dict[str, Numbers]:
    """Of constexpr_blockwise_shift_scale and constexpr_lut_to_dense, pieces of a weight joined by their first rows."""
    tools = importlib.import_module("coremltools")
    load = importlib.import_module("coremltools.converters.mil.frontend.milproto.load").load
    model = tools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    names = {name.replace(".", "_"): name for name, _ in arch.matrices()}
    found: dict[str, dict[int, Numbers]] = {}
    for operation in program.functions["decode"].operations:
        if operation.op_type == "constexpr_blockwise_shift_scale":
            assert operation.inputs.get("offset") is None
            parts = operation.inputs["data"].val, operation.inputs["scale"].val
        elif operation.op_type == "constexpr_lut_to_dense":
            tables = operation.inputs["lut"].val
            parts = operation.inputs["indices"].val, tables.reshape(len(tables), -1)
        else:
            continue
        whole, piece, row = operation.name, re.fullmatch(r"(.+)_(\d+)", operation.name), 0
        if whole not in names and piece:
            whole, row = piece[1], int(piece[2])
        numbers, factors = parts
        found.setdefault(names[whole], {})[row] = (
            numbers.reshape(len(numbers), -1),
            factors.astype(np.float32),
        )
    joined = {}
    for name, pieces in found.items():
        ordered = [pieces[row] for row in sorted(pieces)]
        starts = np.cumsum([0, *(len(numbers) for numbers, _ in ordered)])
        assert sorted(pieces) == starts[:-1].tolist()
        joined[name] = tuple(np.concatenate(parts) for parts in zip(*ordered, strict=True))
    return joined  # type: ignore[return-value]


def coreai_numbers(path: Path, bits: int) -> Iterator[Numbers]:
    """Of blockwise_shift_scale and lut_to_dense, in the program as MLIR prints it; constants have lost their names."""
    from coreai.authoring import AIModelAsset

    operation = AIModelAsset.load(path).program._module._mlir_module.operation
    text = operation.get_asm()
    blobs = dict(re.findall(r'(resource_\d+): "0x([0-9A-Fa-f]+)"', text))

    def constant(value: Any) -> tuple[NDArray[np.uint8], list[int]]:
        value = value.owner.attributes["value"]
        shape = [int(size) for size in re.search(r"tensor<([\dx]+)x", str(value))[1].split("x")]
        said = re.match(r'dense(?:_resource<(\w+)>|<"0x(\w+)">)', str(value))
        if said is None:
            return np.array(value).view(np.uint8), shape  # so few floats that they are written out
        name, given = said.groups()
        raw = bytes.fromhex(blobs[name])[4:] if name else bytes.fromhex(given)  # behind the alignment
        return np.frombuffer(raw, np.uint8), shape

    def walk(operation: Any) -> Iterator[Any]:
        yield operation
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    yield from walk(inner.operation)

    for each in walk(operation):
        if each.name not in ("coreai.blockwise_shift_scale", "coreai.lut_to_dense"):
            continue
        (stored, (rows, columns, *_)), (factors, shape) = map(constant, list(each.operands)[:2])
        integers = stored.reshape(rows, -1)
        if bits == 4 and integers.shape[1] < columns:
            integers = nibbles(integers, columns)
        if each.name == "coreai.lut_to_dense":
            yield integers, factors.view(np.float16).reshape(shape[0], -1).astype(np.float32)
            continue
        if bits == 4:
            integers = ((integers & 15) ^ 8) - np.uint8(8)  # two's complement
        yield integers.view(np.int8), factors.view(np.float16).reshape(rows, -1).astype(np.float32)


# formats

FAMILIES = ("qwen2", "llama-biases")  # tied and biases of q, k and v; a head of its own, biases, odd sizes
STAGES = [("int4", "rtn"), ("int4", "gptq"), ("int8", "rtn"), ("int8-channel", "gptq")]


@pytest.mark.parametrize(("scheme", "algorithm"), STAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_and_its_static_graphs(name, scheme, algorithm, stage, tmp_path):
    in_onnx(stage(name, scheme, algorithm), tmp_path)


def in_onnx(made: Stage, folder: Path) -> None:
    """In the CPU's graph, and in the static graphs that lie beside it, one for each layer."""
    wanted = made.numbers()
    write_onnx(made.arch, made.with_activations("int8"), CONTEXT, folder)
    same(onnx_numbers(folder / GRAPH, made.arch), wanted)
    parts = [range(i, i + 1) for i in range(made.arch.layers)]
    _, *entries = write_static(made.arch, made, CONTEXT, folder, 16, parts)
    found: dict[str, Numbers] = {}
    for entry in entries:
        if entry.name.startswith("decode"):
            found |= onnx_numbers(folder / entry.file, made.arch)
    same(found, products(made))


def products(made: Stage) -> dict[str, Numbers]:
    """Without the embedding, where it is looked up by another graph."""
    return {key: both for key, both in made.numbers().items() if key != "embedding" or made.arch.tied}


@pytest.mark.parametrize(("scheme", "algorithm"), STAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_of_integers_for_hexagon(name, scheme, algorithm, stage, tmp_path):
    made = stage(name, scheme, algorithm)
    ids = np.random.default_rng(0).integers(3, made.arch.vocab, (2, 24)).tolist()
    in_qdq(made, calibrate(made.arch, made, ids, CONTEXT, 16), tmp_path)


def in_qdq(made: Stage, ranges: Any, folder: Path) -> None:
    found: dict[str, Numbers] = {}
    for entry in write_qdq(made.arch, made.with_activations("uint16"), ranges, CONTEXT, folder, 16):
        found |= qdq_numbers(folder / entry.file)
    same(found, products(made))


@pytest.mark.parametrize(
    ("name", "scheme", "algorithm"),
    [
        ("qwen2", "int4", "rtn"),
        ("phi3-partial-rotary", "int4", "gptq"),
        ("llama-biases", "int8-channel", "gptq"),
        ("qwen2", "int8-channel", "rtn"),
    ],
)
def test_executorch(name, scheme, algorithm, stage, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    found, wanted = in_executorch(stage(name, scheme, algorithm), tmp_path)
    same(found, wanted)


def in_executorch(made: Stage, folder: Path) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    from exporter.formats.executorch import PROGRAM, write_executorch
    from exporter.formats.executorch_runner import runner_methods

    methods = runner_methods(made.arch, Tokens(eos=(1,)), CONTEXT, CONTEXT)
    write_executorch(made.arch, made.with_activations("int8"), CONTEXT, folder, methods)
    return pte_numbers(folder / PROGRAM, made.arch), made.numbers()


@pytest.mark.parametrize(("scheme", "algorithm"), [*STAGES, ("pal4-g8", "kmeans"), ("pal6", "kmeans")])
@pytest.mark.parametrize("name", FAMILIES)
def test_core_ml(name, scheme, algorithm, stage, tmp_path):
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    in_core_ml(stage(name, scheme, algorithm), tmp_path)


def in_core_ml(made: Stage, folder: Path) -> None:
    from exporter.formats.coreml import write_coreml

    write_coreml(made.arch, made, CONTEXT, folder)
    same(coreml_numbers(folder / "model.mlpackage", made.arch), made.numbers())


def test_core_ai(stage, tmp_path):
    pytest.importorskip("coreai_torch", reason="coreai-torch is not installed", exc_type=ImportError)
    from exporter.formats.coreai import ASSET, write_coreai

    made = stage("llama-biases", "int4", "gptq")
    write_coreai(made.arch, made, CONTEXT, tmp_path)
    found = {keyed(*each) for each in coreai_numbers(tmp_path / ASSET, 4)}
    assert found == {keyed(*each) for each in made.numbers().values()}


def keyed(integers: NDArray[Any], scales: NDArray[np.float32]) -> tuple[Any, ...]:
    return integers.shape, integers.tobytes(), np.ascontiguousarray(scales, np.float32).tobytes()


# any numbers


class Wild(Stage):
    """Any integers at any scales that the stage could find, the extremes too, in a decoder of any sizes."""

    def __init__(self, scheme: Scheme, sizes: dict[str, Any], seed: int) -> None:
        random = np.random.default_rng(seed)
        self.arch = read_architecture({**CONFIG, **sizes})
        self._activations = "float32"
        self._vectors = {
            name: random.standard_normal(length).astype(np.float32) for name, length in self.arch.vectors()
        }
        self.matrices = {}
        for name, (rows, columns) in self.arch.matrices():
            stored = random.integers(0, 2**scheme.bits, (rows, columns)).astype(np.uint8)
            stored.flat[:2] = 0, 2**scheme.bits - 1
            data = pack4(stored) if scheme.bits == 4 else stored
            scales = 2.0 ** random.uniform(-18, 17, (rows, columns // scheme.group if scheme.group else 1))
            self.matrices[name] = QuantizedTensor(
                name, scheme, (rows, columns), data, round_scales(scales.astype(np.float32))
            )


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@settings(max_examples=4)
@given(
    scheme=st.sampled_from(["int4", "int4-g64", "int8", "int8-channel"]),
    hidden=st.sampled_from([64, 128, 192]),
    ffn=st.sampled_from([64, 192, 320]),
    vocab=st.integers(70, 300),
    kv_heads=st.sampled_from([1, 2, 4]),
    biased=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_numbers(scheme, hidden, ffn, vocab, kv_heads, biased, tied, seed, tmp_path_factory):
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "num_key_value_heads": kv_heads,
        "attention_bias": biased,
        "mlp_bias": biased,
        "tie_word_embeddings": tied,
    }
    made = Wild(parse_scheme(scheme), sizes, seed)
    folder = tmp_path_factory.mktemp("wild")
    in_onnx(made, folder)
    in_qdq(made, defaultdict(lambda: Range(-1.0, 1.0)), folder)
    if importlib.util.find_spec("coremltools"):
        in_core_ml(made, folder)
    if importlib.util.find_spec("executorch") and scheme != "int8":
        same(*in_executorch(made, folder))
