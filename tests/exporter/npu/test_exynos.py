"""The Exynos pre-check: its table against the installed package, its counts against the real partitioner, its
rewrites against the reference."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import profiles
from exporter.checkpoint import open_checkpoint
from exporter.decoder import decoder
from exporter.errors import MissingExtra, PlanRefused, UsageError
from exporter.npu.exynos import lower, pieces, precheck, quantize, residency, route, rows, table, why_not
from exporter.npu.exynos_ops import ExynosOps
from exporter.npu.exynos_record import Operation, Value, record
from exporter.npu.exynos_torch import ExynosDecoder, TorchGraph, app_inputs, rotary_tables
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights
from exporter.torch_ops import TorchOps

FAMILIES = ("llama-llama3-rope", "qwen2", "gemma2", "phi3-partial-rotary")
SAMSUNG = "executorch.backends.samsung"
BOUND = 1e-4  # of the logits' range
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed"
)


@pytest.fixture
def architecture(checkpoints) -> Callable[[str], Any]:
    return lambda name: (
        open_checkpoint("pepper" if name == "pepper" else checkpoints.folder(name)).architecture
    )


@pytest.fixture
def weights(checkpoints) -> Callable[[str], QuantizedWeights]:
    """The float32 weights of a tiny checkpoint."""

    def make(name: str) -> QuantizedWeights:
        checkpoint = open_checkpoint(checkpoints.folder(name))
        return QuantizedWeights(checkpoint, Recipe.uniform("fp32").resolve(checkpoint.architecture))

    return make


def tokens(count: int) -> Tensor:
    return torch.randint(0, 512, (1, count), generator=torch.Generator().manual_seed(count))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the range of the reference's logits."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


# the table and the installed package


def backend_file(path: str) -> ast.Module:
    spec = importlib.util.find_spec("executorch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0], "backends/samsung", path)
    return ast.parse(file.read_text(encoding="utf-8"))


def assigned(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    """What is assigned to `name` anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            yield node.value


def members(tree: ast.AST, enum: str) -> list[str]:
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == enum]
    return [ast.unparse(node.targets[0]) for node in found.body if isinstance(node, ast.Assign)]


@needs_executorch
def test_the_table_is_that_of_the_installed_package():
    """An update of executorch fails here: read its backend again, and say in exynos.toml which version it was."""
    spec = importlib.util.find_spec("executorch")
    builders = Path(spec.submodule_search_locations[0], "backends/samsung/builders").glob("op_*.py")
    targets: set[str] = set()
    for file in builders:
        for value in assigned(backend_file(f"builders/{file.name}"), "target"):
            found = ast.literal_eval(value)
            targets |= {found} if isinstance(found, str) else set(found)
    data = table()
    assert importlib.metadata.version("executorch") == data["package"]["version"]
    assert sorted(targets) == data["operators"]["targets"]


@needs_executorch
def test_what_the_partitioner_takes_besides():
    (supported,) = assigned(backend_file("partition/enn_partitioner.py"), "SUPPORTED_OPS")
    assert isinstance(supported, ast.List)
    names = {ast.unparse(item).removeprefix("exir_ops.edge.") for item in supported.elts}
    assert sorted(names) == table()["partitioner"]["targets"]


@needs_executorch
def test_what_the_partitioner_lets_be_decomposed_has_a_builder():
    """Once the backend keeps them whole itself, `lower` need not."""
    (kept,) = assigned(backend_file("partition/enn_partitioner.py"), "ops_not_to_decompose")
    assert isinstance(kept, ast.List)
    names = {ast.unparse(item).removeprefix("torch.ops.") for item in kept.elts}
    data = table()
    assert "aten.linear.default" in names
    assert data["partitioner"]["decomposed"]
    assert not names & set(data["partitioner"]["decomposed"])
    assert set(data["partitioner"]["decomposed"]) < set(data["operators"]["targets"])


class Copied(torch.nn.Module):
    """A copy between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.clone(self.first(x)))


def test_what_is_taken_and_removed_is_no_operator(sdk):
    lowered = lower(torch.export.export(Copied(), (torch.ones(1, 8),)), "E9965")
    ran = residency(lowered, "E9965")
    assert (ran.ops, ran.ops_on, ran.elsewhere) == (2, 2, ())
    assert sdk.graphs == [["FC", "FC"]]
    assert set(table()["partitioner"]["removed"]) < set(table()["partitioner"]["targets"])


@needs_executorch
def test_chips_and_types_are_those_of_the_installed_package():
    chips = members(backend_file("serialization/compile_options.py"), "SamsungChipset")
    assert [name for name in chips if not name.startswith("UNDEFINED")] == table()["chips"]["names"]
    types = table()["types"]
    (mapping,) = assigned(backend_file("builders/utils.py"), "DATA_TYPE_STR_MAPPING")
    assert sorted(ast.unparse(key).removeprefix("torch.") for key in mapping.keys) == types["tensors"]
    assert members(backend_file("quantizer/qconfig.py"), "Precision") == types["quantizer"]
    (named,) = assigned(backend_file("serialization/enn_graph_schema.py"), "type_str_affine_table")
    assert [ast.unparse(key).removeprefix("torch.") for key in named.keys] == types["graph"]


def test_each_table_of_facts_has_a_source():
    tables = {name: value for name, value in table().items() if name != "rewrites"}
    assert all("source" in facts for facts in tables.values())


def test_an_operator_without_a_rewrite_is_said_to_have_none():
    package = "{name} {version}".format(**table()["package"])
    assert why_not("aten.erf.default") == f"no builder in {package}, and no rewrite is known"
    assert why_not("aten.mul.Tensor") == why_not("aten.addmm.default") == ""


def test_a_rewrite_is_for_what_the_table_lacks():
    for rewrite in table()["rewrites"]:
        assert all(rewrite["by"] in why_not(target) for target in rewrite["lacks"])


def test_a_rewrite_is_for_what_would_be_called(architecture):
    """Every rewrite is for an operator that the decoder without rewrites calls, and the one with them does not."""
    lacked = {target for rewrite in table()["rewrites"] for target in rewrite["lacks"]}
    plain, rewritten = (
        {op.target for op in record(architecture("qwen2"), length=1, past=7, rewrites=rewrites).operations}
        for rewrites in (False, True)
    )
    assert lacked <= plain
    assert not lacked & rewritten


def test_what_the_alternative_has_besides_is_lacked():
    alternative = table()["alternative"]
    assert len(alternative["lacks"]) == len(alternative["operators"])
    assert all("no builder" in why_not(target) for target in alternative["lacks"])


# the pre-check


@pytest.mark.parametrize("name", ["pepper", *FAMILIES])
def test_rewrites_bring_the_whole_model_to_the_npu(name, architecture):
    arch = architecture(name)
    before, after = (precheck(arch, "E9965", rewrites=rewrites) for rewrites in (False, True))
    assert after.macs_share == 1
    if arch.attention_softcap:  # which ExecuTorch's fused attention cannot do: its products are in the table
        assert before.macs_share == 1
    else:
        assert 0.5 < before.macs_share < 1
    lacked = 2 if arch.attention_softcap else 3  # of each layer: two updates of the cache, fused attention
    assert before.ops - before.ops_on == lacked * arch.layers
    assert (
        before.bytes_share == after.bytes_share == 1
    )  # the linears are in the table: attention is what is not
    assert after.ops_on == after.ops
    assert not after.left
    assert after.pieces == 1 < arch.layers < before.pieces
    assert before.macs == after.macs  # fused attention counts the same products


@pytest.mark.parametrize("name", ["pepper", *FAMILIES])
def test_without_rewrites_what_is_left_is_what_the_table_lacks(name, architecture):
    arch = architecture(name)
    report = precheck(arch, "E9955", rewrites=False)
    called = Counter(op.target for op in record(arch, length=1, past=report.past, rewrites=False).operations)
    known = set(table()["operators"]["targets"])
    assert {left.target: left.count for left in report.left} == {
        target: count for target, count in called.items() if target not in known
    }
    assert report.ops - report.ops_on == sum(left.count for left in report.left)
    assert report.macs - report.macs_on == sum(left.macs for left in report.left)
    fused = {} if arch.attention_softcap else {"llama.custom_sdpa.default": arch.layers}
    assert {left.target: left.count for left in report.left} == {
        "llama.update_cache.default": 2 * arch.layers,
        **fused,
    }
    gated = {"silu": "aten.sigmoid.default", "gelu_tanh": "aten.tanh.default"}[arch.activation]
    assert gated in called
    assert gated in known
    assert all("Gochu writes" in left.reason for left in report.left)


def test_multiply_adds_and_bytes_are_those_of_the_architecture(architecture):
    arch = architecture("llama-llama3-rope")
    report = precheck(arch, "E9965", context=100, length=4)
    linears = sum(4 * rows * columns for name, (rows, columns) in arch.matrices() if name != "embedding")
    head = arch.vocab * arch.hidden  # of the last token only
    attention = arch.layers * 2 * 4 * arch.heads * 100 * arch.head_dim
    assert report.macs == linears + head + attention
    matrices = sum(
        rows * columns + 4 * rows for _, (rows, columns) in arch.matrices()
    )  # the head is the embedding
    assert report.weight_bytes == matrices + sum(4 * length for _, length in arch.vectors())
    cache = 2 * arch.layers * arch.kv_heads * arch.head_dim * 100
    given = 4 + 4 + 4 * 100  # tokens, their positions, the mask
    assert report.passed_bytes == 2 * (cache + given + arch.vocab)


@pytest.mark.parametrize(
    ("sides", "needs", "expected"),
    [
        ("nnn", [[], [0], [1]], 1),
        ("ncn", [[], [0], [1]], 2),
        ("ncnn", [[], [0], [], [1, 2]], 2),  # the third fits either graph
        (
            "ncncn",
            [[], [0], [], [], [1, 3]],
            2,
        ),  # both of the CPU's operators come between the same two graphs
        ("cc", [[], [0]], 0),
    ],
)
def test_graphs_are_as_few_as_the_order_allows(sides, needs, expected):
    ops = [Operation("", tuple(Value((1,), operation=i) for i in inputs), (1,), 0) for inputs in needs]
    assert pieces(ops, [side == "n" for side in sides]) == expected


def test_the_prediction_is_called_one(architecture):
    report = precheck(architecture("qwen2"), "E9965", rewrites=False)
    assert "prediction" in report.prediction.accelerator
    assert (report.prediction.ops, report.prediction.ops_on) == (report.ops, report.ops_on)
    assert "llama.custom_sdpa.default" in report.prediction.elsewhere


def test_rows_show_what_is_left(architecture):
    shown = rows(precheck(architecture("pepper"), "E9965", rewrites=False))
    left = "on the CPU: llama.custom_sdpa.default"
    assert any(what == left and "softmax" in why for what, _, why in shown)
    assert any("prediction" in why for _, _, why in shown)
    assert any(what == "in the app" for what, _, _ in rows(precheck(architecture("pepper"), "E9965")))


def test_what_cannot_be_asked(architecture):
    arch = architecture("pepper")
    with pytest.raises(PlanRefused, match="E9955 and E9965"):
        precheck(arch, "E9945")
    with pytest.raises(UsageError, match="do not fit"):
        precheck(arch, "E9965", context=16, length=17)


# the rewrites, in numbers


class Numbers(TorchGraph):
    """A graph without a module: constants are made when they are asked for."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Module(), {})

    def numbers(self, *values: float) -> Tensor:
        return torch.tensor(values)


def test_the_form_of_gelu_hardly_matters():
    """The backend's builder does not say which form is meant."""
    across = torch.linspace(-30, 30, 600_001)
    forms = [torch.nn.functional.gelu(across, approximate=form) for form in ("tanh", "none")]
    assert 4e-4 < float((forms[0] - forms[1]).abs().max()) < 5e-4


def run(family: Any, weights: QuantizedWeights, ids: Tensor, steps: list[int], context: int) -> Tensor:
    """The last logits of `ids`, given in steps to static graphs, the cache kept as an app would."""
    arch, slots = family, context
    cache = {
        f"past_{kind}.{layer}": np.zeros((1, arch.kv_heads, slots, arch.head_dim), np.float32)
        for kind in "kv"
        for layer in range(arch.layers)
    }
    done, logits = 0, torch.zeros(())
    for length in steps:
        module = ExynosDecoder(arch, weights, length=length, past=slots, context=context)
        given = app_inputs(module.inputs, ids[0, done : done + length].tolist(), cache, done)
        assert {name: value.shape for name, value in given.items()} == module.inputs
        got = dict(zip(module.outputs, module(*map(torch.from_numpy, given.values())), strict=True))
        for name, values in got.items():
            assert tuple(values.shape) == module.recorded.outputs[name].shape
            if name != "logits":
                cache[f"past_{name}"][:, :, done : done + length] = values.numpy()
        done, logits = done + length, got["logits"]
    return logits


def test_the_rewritten_decoder_says_what_the_reference_says(family, weights, architecture):
    """27 tokens, past every sliding window, in four calls of two static graphs."""
    arch, ids = architecture(family), tokens(27)
    found = run(arch, weights(family), ids, [12, 12, 1, 1, 1], context=48)
    expected = TorchOps(arch, weights(family), 48).run(ids)
    assert error(found, expected[:, -1:]) <= BOUND


class Plain(Numbers):
    """ExecuTorch's own operators for the cache and attention, run at once: the cache is changed in place."""

    def __init__(self, weights: QuantizedWeights, inputs: dict[str, Tensor], arch: Any, context: int) -> None:
        super().__init__()
        self.weights, self.inputs, self.matrices = weights, inputs, dict(arch.matrices())
        self.tables = rotary_tables(arch, context)

    def table(self, name: str) -> Tensor:
        return torch.from_numpy(self.tables[name])

    def weight(self, name: str) -> Tensor:
        found = self.weights.matrix(name).dequantize() if name in self.matrices else self.weights.vector(name)
        return torch.from_numpy(found)

    def call(self, target: str, *args: Any, **kwargs: Any) -> Tensor:
        if target.startswith("llama"):
            args = tuple(int(arg[0]) if arg is self.inputs["start"] else arg for arg in args)
        if target == "llama.update_cache.default":
            torch.ops.llama.update_cache(*args)
            return args[1]
        return super().call(target, *args, **kwargs)


@needs_executorch
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_decoder_says_what_the_reference_says(name, weights, architecture):
    """What is counted without rewrites is a decoder too, in ExecuTorch's operators."""
    importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
    arch, ids = architecture(name), tokens(9)
    recorded = record(arch, length=9, past=7, rewrites=False)
    inputs = {key: torch.zeros(value.shape) for key, value in recorded.inputs.items()}
    seen = torch.arange(16) <= torch.arange(9)[:, None]
    for key in inputs:
        if key.startswith("mask"):
            window = int(key.partition(".")[2] or 16)
            near = torch.arange(16) > torch.arange(9)[:, None] - window
            inputs[key] = torch.where(seen & near, 0.0, -1e4)[None, None]
    inputs |= {
        "tokens": ids,
        "start": torch.tensor([0]),
        "positions": torch.arange(9),
    }
    graph = Plain(weights(name), inputs, arch, 16)
    found = decoder(ExynosOps(graph, arch, length=9, past=7, rewrites=False), arch, ids)
    expected = TorchOps(arch, weights(name), 16).run(ids)
    assert error(found, expected[:, -1:]) <= BOUND


# the real backend, with a stand-in for Samsung's compiler


class StandIn:
    """What ExecuTorch calls of Samsung's SDK, as its files call it. Knows no operator beyond the builders'."""

    def __init__(self) -> None:
        self.options: list[bytes] = []
        self.graphs: list[list[str]] = []
        outer = self

        class EnnWrapper:
            def Init(self, options: bytes) -> None:  # noqa: N802
                outer.options.append(options)

            def Destroy(self) -> None:  # noqa: N802
                pass

            def IsNodeSupportedByBackend(self) -> bool:  # noqa: N802
                return False

            def Compile(self, graph: bytes) -> bytes:  # noqa: N802
                return b"compiled " + graph

        class PyEnnGraphWrapper:
            def __init__(self) -> None:
                self.operators: list[str] = []
                self.tensors = 0

            def DefineOpNode(self, operator: Any) -> None:  # noqa: N802
                self.operators.append(operator.given[1])

            def DefineTensor(self, tensor: Any) -> int:  # noqa: N802
                self.tensors += 1
                return self.tensors

            def FinishBuild(self) -> None:  # noqa: N802
                outer.graphs.append(self.operators)

            def Serialize(self) -> bytes:  # noqa: N802
                return " ".join(self.operators).encode()

            def __getattr__(self, name: str) -> Callable[..., None]:
                return lambda *given: None

        class Written:
            def __init__(self, *given: Any) -> None:
                self.given = given

            def __getattr__(self, name: str) -> Callable[..., None]:
                return lambda *given: None

        self.compiler: dict[str, Any] = {"EnnWrapper": EnnWrapper}
        self.writer: dict[str, Any] = {"PyEnnGraphWrapper": PyEnnGraphWrapper} | dict.fromkeys(
            ("PyEnnOpWrapper", "PyEnnTensorWrapper", "OpParamWrapper"), Written
        )


@pytest.fixture
def sdk(monkeypatch) -> Iterator[StandIn]:
    """The stand-in under the names of the SDK's modules; what imported it is forgotten afterwards."""
    pytest.importorskip("executorch")
    stand_in, before = StandIn(), set(sys.modules)
    package = ModuleType(f"{SAMSUNG}.python")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name, content in (
        ("PyEnnWrapperAdaptor", stand_in.compiler),
        ("PyGraphWrapperAdaptor", stand_in.writer),
    ):
        module = ModuleType(f"{package.__name__}.{name}")
        module.__dict__.update(content)
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield stand_in
    for name in set(sys.modules) - before:
        if name.startswith(SAMSUNG):
            del sys.modules[name]


def chip_number(options: bytes) -> set[int]:
    """The 4-byte numbers in the compile spec's flatbuffer."""
    return {int.from_bytes(options[i : i + 4], "little") for i in range(0, len(options), 2)}


@pytest.mark.parametrize(("name", "chip"), [("llama-biases", "E9965"), ("gemma2", "E9955")])
def test_the_real_partitioner_takes_what_was_predicted(name, chip, sdk, weights, architecture):
    """Lowered by ExecuTorch's own partitioner and builders: one graph, with the operators that were counted."""
    arch = architecture(name)
    module = ExynosDecoder(arch, weights(name), length=2, past=6, context=8)
    lowered = lower(module.export(), chip)
    ran = residency(lowered, chip)
    predicted = precheck(arch, chip, context=8, length=2)
    assert (ran.ops, ran.ops_on, ran.elsewhere) == (predicted.ops, predicted.ops, ())
    assert len(sdk.graphs) == predicted.pieces == 1
    assert len(sdk.graphs[0]) == predicted.ops
    assert sdk.graphs[0].count("FC") == 7 * arch.layers + 1
    assert sdk.graphs[0].count("RMSNORM") == (4 if arch.post_norms else 2) * arch.layers + 1
    assert sdk.graphs[0].count("SIGMOID") == (arch.layers if arch.activation == "silu" else 0)
    assert sdk.graphs[0].count("TANH") == (arch.layers + 1 if arch.attention_softcap else 0)
    assert sdk.graphs[0].count("GATHER") == 3  # the embedding's rows, and those of the rotary tables
    assert sdk.options
    assert all(int(chip[1:]) in chip_number(options) for options in sdk.options)


class Lacking(torch.nn.Module):
    """Two linears with what the table lacks between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.erf(self.first(x)))


def test_the_real_partitioner_leaves_what_the_table_lacks(sdk):
    lowered = lower(torch.export.export(Lacking(), (torch.ones(1, 8),)), "E9965")
    ran = residency(lowered, "E9965")
    assert (ran.ops, ran.ops_on, ran.elsewhere) == (3, 2, ("aten.erf.default",))
    assert sorted(sdk.graphs) == [["FC"], ["FC"]]


class Squared(torch.nn.Module):
    """The square that rms_norm is decomposed into."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)


def test_what_the_partitioner_takes_may_fail_to_compile(sdk):
    """An integer exponent, as in rms_norm decomposed, which `lower` therefore keeps whole."""
    lowered = lower(torch.export.export(Squared(2.0), (torch.ones(1, 8),)), "E9965")
    assert (residency(lowered, "E9965").ops_on, sdk.graphs) == (1, [["POW"]])
    with pytest.raises(AssertionError, match="float"):
        lower(torch.export.export(Squared(2), (torch.ones(1, 8),)), "E9965")


def test_quantized_by_the_backends_quantizer(sdk, weights, architecture):
    arch = architecture("llama-biases")
    module = ExynosDecoder(arch, weights("llama-biases"), length=1, past=3, context=16)
    program = module.export()
    cache = {name: np.full(shape, 0.5, np.float32) for name, shape in module.inputs.items() if "past" in name}
    given = [app_inputs(module.inputs, [token], cache, 3) for token in (5, 9)]
    samples = [tuple(map(torch.from_numpy, values.values())) for values in given]
    quantized = quantize(program, samples)
    found, expected = quantized.module()(*samples[0])[-1], module(*samples[0])[-1]
    assert 1e-4 < error(found, expected) < 0.05  # int8 activations with one scale per tensor
    linears = 7 * arch.layers + 1
    per_channel = [node for node in quantized.graph.nodes if "quantize_per_channel" in str(node.target)]
    assert len(per_channel) == 2 * linears  # to int8 and back
    ran = residency(lower(quantized, "E9965"), "E9965")
    assert ran.elsewhere == ()
    assert [graph.count("FC") for graph in sdk.graphs] == [linears]


class Masked(torch.nn.Module):
    """A linear's result, masked; or multiplied by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.first(x)
        return scores * scores if mask is None else scores + mask


def test_why_the_backends_quantizer_is_asked_for_linears_only():
    """Given a whole graph, it rounds what is masked to multiples of the mask's step, and x * x is too much for it."""
    pytest.importorskip("executorch")
    quantizer = importlib.import_module(f"{SAMSUNG}.quantizer").EnnQuantizer
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    mask = torch.tensor([[0.0, 0, 0, 0, -1e4, -1e4, -1e4, -1e4]])
    prepared = pt2e.prepare_pt2e(
        torch.export.export(Masked(), (torch.ones(1, 8), mask)).module(), quantizer()
    )
    expected = prepared(torch.ones(1, 8), mask)
    found = pt2e.convert_pt2e(prepared, fold_quantize=False)(torch.ones(1, 8), mask)
    assert expected[0, :4].abs().min() > 0
    assert found[0, :4].tolist() == [0, 0, 0, 0]
    with pytest.raises(RecursionError):
        pt2e.prepare_pt2e(torch.export.export(Masked(), (torch.ones(1, 8),)).module(), quantizer())


@needs_executorch
@pytest.mark.parametrize(
    ("root", "found"),
    [(None, "is not set"), ("no/such/folder", "is not a folder"), (".", "do not load")],
)
def test_without_the_sdk_the_error_says_what_to_install(root, found, monkeypatch):
    monkeypatch.delenv("EXYNOS_AI_LITECORE_ROOT", raising=False)
    if root:
        monkeypatch.setenv("EXYNOS_AI_LITECORE_ROOT", root)
    program = torch.export.export(Lacking(), (torch.ones(1, 8),))
    with pytest.raises(MissingExtra, match=found) as caught:
        lower(program, "E9965")
    assert caught.value.exit_code == 5
    for part in ("LiteCore", "EXYNOS_AI_LITECORE_ROOT", "LD_LIBRARY_PATH", "build.sh", "https://"):
        assert part in str(caught.value)
    with pytest.raises(PlanRefused, match="E9945"):
        lower(program, "E9945")


# the plan


@pytest.mark.parametrize(
    ("device", "value", "parts"),
    [
        (
            "galaxy-s26-exynos",
            "possible: ENN for E9965",
            ("lists E9965", "100% of the multiply-adds", "1 graph,", "MB"),
        ),
        ("galaxy-z-flip7", "possible: ENN for E9955", ("does not list E9955", "100% of the multiply-adds")),
        ("galaxy-s24-exynos", "not used", ("Exynos 2400", "XNNPACK", "Xclipse 940", "Vulkan", "LiteRT")),
        ("galaxy-s25-fe", "not used", ("Exynos 2400", "E9955 and E9965")),
        ("galaxy-s22-exynos", "not used", ("Exynos 2200",)),
    ],
)
def test_the_route_of_each_phone(device, value, parts, architecture):
    found = route(profiles.find(device), architecture("pepper"))
    assert (found.topic, found.value) == ("npu", value)
    assert all(part in found.reason for part in parts)


def test_the_route_without_a_model_names_no_share():
    reason = route(profiles.find("galaxy-s26-exynos").soc).reason
    assert "%" not in reason
    assert "EXYNOS_AI_LITECORE_ROOT" in reason
    assert "never run" in reason


def test_other_phones_have_no_such_route():
    with pytest.raises(UsageError, match="Snapdragon"):
        route(profiles.find("galaxy-s24-ultra"))


def test_a_large_model_is_checked_without_its_weights(architecture):
    """The pre-check knows shapes only: a model of billions of weights costs what a small one does."""
    arch = dataclasses.replace(
        architecture("llama-llama3-rope"), layers=32, hidden=4096, ffn=14336, vocab=128256, windows=(0,) * 32
    )
    report = precheck(arch, "E9965", context=4096)
    assert report.weight_bytes > 5e9
    assert math.isclose(report.macs_share, 1)
