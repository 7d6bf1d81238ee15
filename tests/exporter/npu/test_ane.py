"""The Neural Engine's rules: a planted violation of each is found, and the packages made for it break none."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import profiles
from exporter.checkpoint import open_checkpoint
from exporter.errors import UsageError
from exporter.formats.coreml import write_coreml
from exporter.formats.coreml_ane import write_coreml_ane
from exporter.formats.coreml_program import MilFunction, Package, Var
from exporter.npu import ane
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights
from runtimes.errors import BundleError
from runtimes.mil.package import Name, open_package

CHANNELS, LENGTH = 64, 32
SHAPE = (1, CHANNELS, 1, LENGTH)


def conv(f: MilFunction, x: Var, weight: Any, outputs: int = CHANNELS) -> Var:
    """A convolution of one point."""
    ones = np.ones(2, np.int32)
    return f.op(
        "conv",
        "fp16",
        (1, outputs, *x.shape[2:]),
        x=x,
        weight=weight,
        strides=ones,
        pad_type="valid",
        pad=np.zeros(4, np.int32),
        dilations=ones,
        groups=1,
    )


def kernel(outputs: int = CHANNELS) -> np.ndarray:
    return np.ones((outputs, CHANNELS, 1, 1), np.float16)


def package(path: Path, *plants: Callable[[MilFunction, Var], Var]) -> Path:
    """A convolution, what is planted after it, and another: nothing else is wrong with them."""
    made = Package(path)
    f = made.function("main")
    x = conv(f, f.input("x", "fp16", SHAPE), kernel())
    for plant in plants:
        x = plant(f, x)
    f.output("y", conv(f, x, kernel()))
    made.finish({})
    return path


def edit(path: Path, change: Callable[[Any], None]) -> Path:
    """A package whose program is changed afterwards, where the writer has no way to go wrong."""
    from coremltools.proto import Model_pb2

    file = path / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    change(model.mlProgram.functions["main"])
    file.write_bytes(model.SerializeToString())
    return path


# what is planted: for each rule a way to break it, and the operation that does


def gathered(f: MilFunction, x: Var) -> Var:
    order = np.arange(CHANNELS, dtype=np.int32)
    return f.op("gather", "fp16", x.shape, x=x, indices=order, axis=1, batch_dims=0, validate_indices=False)


def unheard_of(f: MilFunction, x: Var) -> Var:
    return f.op("erf", "fp16", x.shape, x=x)


def sliced(f: MilFunction, x: Var) -> Var:
    """Where the slice begins is known at once, but not a constant."""
    begin = f.op(
        "concat", "int32", (4,), values=[f.const(np.zeros(2, np.int32))] * 2, axis=0, interleave=False
    )
    return f.op("slice_by_size", "fp16", x.shape, x=x, begin=begin, size=np.array(SHAPE, np.int32))


def whole_numbers(f: MilFunction, x: Var) -> Var:
    return f.op("cast", "fp16", x.shape, x=f.op("cast", "int32", x.shape, x=x, dtype="int32"), dtype="fp16")


def literal(f: MilFunction, x: Var) -> Var:
    return f.op("mul", "fp16", x.shape, x=x, y=np.float32(2))


def six_dimensions(f: MilFunction, x: Var) -> Var:
    wide = (1, CHANNELS, 1, 1, 1, LENGTH)
    x = f.op("reshape", "fp16", wide, x=x, shape=np.array(wide, np.int32))
    return f.op("reshape", "fp16", SHAPE, x=x, shape=np.array(SHAPE, np.int32))


def long_axis(f: MilFunction, x: Var) -> Var:
    x = conv(f, x, kernel(1))
    long = (1, 1, 1, 20000)
    x = f.op("tile", "fp16", (1, 1, 625, LENGTH), x=x, reps=np.array((1, 1, 625, 1), np.int32))
    x = f.op("reshape", "fp16", long, x=x, shape=np.array(long, np.int32))
    x = f.op("reduce_mean", "fp16", (1, 1, 1, 1), x=x, axes=np.array([3], np.int32), keep_dims=True)
    return f.op("tile", "fp16", SHAPE, x=x, reps=np.array(SHAPE, np.int32))


def narrow(f: MilFunction, x: Var) -> Var:
    turned = (1, LENGTH, 64, 1)
    x = f.op("reshape", "fp16", turned, x=x, shape=np.array(turned, np.int32))
    return f.op("reshape", "fp16", SHAPE, x=x, shape=np.array(SHAPE, np.int32))


def integers(f: MilFunction, groups: tuple[int, int]) -> Var:
    """Eight-bit weights whose scales are [outputs, groups along the inputs]."""
    shape = (CHANNELS, CHANNELS, 1, 1)
    data = f.package.blob("q", "int8", shape, lambda: np.ones(shape, np.int8))
    scales = f.package.blob("s", "fp16", (*groups, 1, 1), lambda: np.ones(groups, np.float16))
    return f.constexpr("constexpr_blockwise_shift_scale", "fp16", shape, name="w", data=data, scale=scales)


def tables(f: MilFunction, groups: tuple[int, int]) -> Var:
    """Four-bit indices into tables for groups of outputs and inputs."""
    shape = (CHANNELS, CHANNELS, 1, 1)
    indices = f.package.blob("i", "uint4", shape, lambda: np.ones(shape, np.uint8))
    lut = f.package.blob("t", "fp16", (*groups, 1, 1, 16, 1), lambda: np.ones((*groups, 16), np.float16))
    return f.constexpr("constexpr_lut_to_dense", "fp16", shape, name="w", indices=indices, lut=lut)


def linear(f: MilFunction, x: Var) -> Var:
    return f.op("linear", "fp16", x.shape, x=x, weight=np.ones((LENGTH, LENGTH), np.float16))


def states(f: MilFunction, x: Var) -> Var:
    for i in range(3):
        f.read(f.state(f"state_{i}", SHAPE))
    return x


def unknown_length(function: Any) -> None:
    (block,) = function.block_specializations.values()
    first = next(operation for operation in block.operations if operation.type == "conv")
    first.outputs[0].type.tensorType.dimensions[3].unknown.SetInParent()


def wide_state(function: Any) -> None:
    from coremltools.proto import MIL_pb2

    for value in function.inputs:
        if value.type.WhichOneof("type") == "stateType":
            value.type.stateType.wrappedType.tensorType.dataType = MIL_pb2.FLOAT32


def one_state(f: MilFunction, x: Var) -> Var:
    f.read(f.state("state", SHAPE))
    return x


PLANTED: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "operation": ("gather", lambda path: package(path, gathered)),
    "unknown-operation": ("erf", lambda path: package(path, unheard_of)),
    "runtime-slice": ("slice_by_size", lambda path: package(path, sliced)),
    "type": ("cast", lambda path: package(path, whole_numbers)),
    "literal": ("mul", lambda path: package(path, literal)),
    "rank": ("reshape", lambda path: package(path, six_dimensions)),
    "axis": ("reshape", lambda path: package(path, long_axis)),
    "shape": ("conv", lambda path: edit(package(path), unknown_length)),
    "blockwise": ("conv", lambda path: package(path, lambda f, x: conv(f, x, integers(f, (64, 2))))),
    "table": ("conv", lambda path: package(path, lambda f, x: conv(f, x, tables(f, (1, 2))))),
    "small-group": ("conv", lambda path: package(path, lambda f, x: conv(f, x, tables(f, (32, 1))))),
    "linear": ("linear", lambda path: package(path, linear)),
    "last-axis": ("reshape", lambda path: package(path, narrow)),
    "states": ("state", lambda path: package(path, states)),
    "state-type": ("state", lambda path: edit(package(path, one_state), wide_state)),
}


def test_there_is_a_planted_violation_of_every_rule():
    assert {*PLANTED, "bytes"} == set(ane.rules())


def test_a_package_that_breaks_no_rule_has_no_finding(tmp_path):
    report = ane.check(package(tmp_path / "clean.mlpackage"))
    assert report.findings == ()
    assert report.passed
    assert report.prediction.ops == report.prediction.ops_on == 3  # two convolutions and the output's name


@pytest.mark.parametrize(
    "plant",
    [
        lambda f, x: conv(f, x, integers(f, (CHANNELS, 1))),
        lambda f, x: conv(f, x, tables(f, (8, 1))),
        lambda f, x: conv(f, x, tables(f, (1, 1))),
        one_state,
    ],
    ids=["scales per output", "tables for 8 outputs", "one table", "one state"],
)
def test_what_the_neural_engine_takes_is_no_finding(plant, tmp_path):
    assert ane.check(package(tmp_path / "good.mlpackage", plant)).findings == ()


@pytest.mark.parametrize("rule", PLANTED)
def test_each_planted_violation_is_found(rule, tmp_path):
    operation, build = PLANTED[rule]
    report = ane.check(build(tmp_path / "planted.mlpackage"))
    (found,) = [f for f in report.findings if f.rule.id == rule and f.operation == operation]
    assert found.rule.source.count(" ") > 1, "a source says who"
    assert not found.setup
    assert report.passed == (found.rule.effect == "slow")
    reasons = " ".join(reason for _, _, reason in ane.rows(report))
    assert found.rule.says in reasons
    assert found.rule.source in reasons
    if found.rule.effect != "package":
        stays = found.rule.effect == "slow"
        assert (report.prediction.ops_on == report.prediction.ops) == stays


def test_a_package_over_the_limit_of_bytes_is_found(tmp_path):
    path = package(tmp_path / "large.mlpackage")
    size = CHANNELS * CHANNELS * 2  # both convolutions have the same weight
    at = dataclasses.replace(ane.limits(), package_bytes=size + 100)
    over = dataclasses.replace(at, package_bytes=size - 1)
    assert ane.check(path, at).passed
    (found,) = ane.check(path, over).findings
    assert (found.rule.id, found.rule.effect) == ("bytes", "package")


def test_what_comes_before_the_neural_engine_starts_splits_nothing(tmp_path):
    made = Package(tmp_path / "setup.mlpackage")
    f = made.function("main")
    ids = f.input("ids", "int32", (LENGTH,))
    table = np.ones((100, CHANNELS, 1, 1), np.float16)
    rows = f.op(
        "gather",
        "fp16",
        (LENGTH, CHANNELS, 1, 1),
        x=f.const(table),
        indices=ids,
        axis=0,
        batch_dims=0,
        validate_indices=False,
    )
    x = f.op("transpose", "fp16", SHAPE, x=rows, perm=np.array((2, 1, 3, 0), np.int32))
    f.output("y", conv(f, x, kernel(16), 16))
    made.finish({})
    report = ane.check(tmp_path / "setup.mlpackage")
    assert report.passed
    assert {f.operation for f in report.findings if f.setup} == {"gather"}
    found = report.prediction
    assert (found.ops, found.ops_on, found.elsewhere, found.elsewhere_ops) == (4, 3, ("gather",), (1,))
    assert found.macs == found.macs_on == 16 * CHANNELS * LENGTH
    weight = 16 * CHANNELS * 2
    assert (found.weight_bytes, found.weight_bytes_on) == (weight + table.nbytes, weight)


def test_a_product_is_no_setup_wherever_it_stands(tmp_path):
    """The first thing in the program, but half of its work: it must not pass as what comes before."""
    made = Package(tmp_path / "first.mlpackage")
    f = made.function("main")
    f.output("y", conv(f, f.input("x", "fp16", SHAPE), integers(f, (CHANNELS, 2))))
    made.finish({})
    report = ane.check(tmp_path / "first.mlpackage")
    assert not report.passed
    assert report.prediction.macs_on == 0


# our packages


@pytest.fixture
def quantized(checkpoints) -> Callable[[str, str], tuple[Any, QuantizedWeights]]:
    def make(name: str, scheme: str) -> tuple[Any, QuantizedWeights]:
        checkpoint = open_checkpoint(checkpoints.folder(name))
        decisions = Recipe.uniform(scheme).resolve(checkpoint.architecture)
        return checkpoint.architecture, QuantizedWeights(checkpoint, decisions)

    return make


def test_packages_made_for_it_break_no_rule(family, quantized, tmp_path):
    entries = write_coreml_ane(*quantized(family, "int8-channel"), 128, tmp_path)
    report = ane.check(tmp_path / entries[0].file)
    assert report.broken == report.unknown == ()
    assert set(report.residencies) == {"prefill", "decode"}
    for residency in report.residencies.values():
        assert residency.macs_on == residency.macs > 0
        assert "conv" not in residency.elsewhere
    assert report.prediction.accelerator == "Neural Engine (prediction)"
    looked_up = {f.operation for f in report.findings if f.rule.id == "operation"}
    assert looked_up == {"gather"}, "the embedding is looked up on the CPU, and the report says so"


def test_packages_for_the_gpu_are_not_for_it(quantized, tmp_path):
    write_coreml(*quantized("llama-llama3-rope", "int4"), 128, tmp_path)
    report = ane.check(tmp_path / "model.mlpackage")
    assert not report.passed
    assert {"blockwise", "operation"} <= {f.rule.id for f in report.broken}
    assert report.prediction.macs_on < report.prediction.macs / 2


def test_the_figures_of_several_packages_add_up(quantized, tmp_path):
    arch, weights = quantized("gemma2", "fp16")
    whole = ane.check(tmp_path / write_coreml_ane(arch, weights, 64, tmp_path)[0].file).prediction
    bounds = dataclasses.replace(ane.limits(), package_bytes=600_000)
    parts = {e.file for e in write_coreml_ane(arch, weights, 64, tmp_path / "parts", bounds)}
    assert len(parts) > 1
    total = ane.total([ane.check(tmp_path / "parts" / file).prediction for file in sorted(parts)])
    assert total.macs == whole.macs
    assert total.ops - total.ops_on == sum(total.elsewhere_ops)
    shared = arch.vocab * arch.hidden * 2  # tied, and in two packages now
    assert total.weight_bytes >= whole.weight_bytes + shared


# Core ML's own plan


class StandIn:
    """coremltools' MLComputePlan of a package, with all on the Neural Engine but what is `left`."""

    def __init__(self, path: Path, left: set[str]) -> None:
        self._left = left
        functions = {
            name: SimpleNamespace(block=SimpleNamespace(operations=[*map(_planned, function.operations)]))
            for name, function in open_package(path).functions.items()
        }
        self.model_structure = SimpleNamespace(program=SimpleNamespace(functions=functions))

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        devices = importlib.import_module("coremltools.models.compute_device")
        if operation.operator_name.endswith("const") or "constexpr" in operation.operator_name:
            return None
        kind = "CPU" if operation.operator_name.split(".")[1] in self._left else "NeuralEngine"
        device = object.__new__(getattr(devices, f"ML{kind}ComputeDevice"))
        return SimpleNamespace(preferred_compute_device=device)


def _planned(operation: Any) -> Any:
    def names(bindings: Any) -> Any:
        return [SimpleNamespace(name=b.name if isinstance(b, Name) else None) for b in bindings]

    inputs = {key: SimpleNamespace(bindings=names(bindings)) for key, bindings in operation.inputs.items()}
    outputs = [SimpleNamespace(name=name) for name, _ in operation.outputs]
    return SimpleNamespace(operator_name=f"ios18.{operation.type}", inputs=inputs, outputs=outputs)


def test_what_a_mac_plans_is_counted_as_measured(quantized, tmp_path, monkeypatch):
    tools = importlib.import_module("coremltools")
    plans = importlib.import_module("coremltools.models.compute_plan")
    write_coreml_ane(*quantized("qwen2", "int8-channel"), 64, tmp_path)
    path = tmp_path / "model.mlpackage"
    asked: list[Any] = []

    def load(compiled: str, compute_units: Any) -> StandIn:
        asked.append((compiled, compute_units))
        return StandIn(path, {"gather", "softmax"})

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(tools.models.utils, "compile_model", lambda source: f"{source}c")
    monkeypatch.setattr(plans, "MLComputePlan", SimpleNamespace(load_from_path=load))
    measured = ane.measure(path)["decode"]
    assert asked == [(f"{path}c", tools.ComputeUnit.CPU_AND_NE)]
    predicted = ane.check(path).prediction
    assert measured.accelerator == "Neural Engine (measured)"
    assert (measured.ops, measured.macs) == (predicted.ops, predicted.macs)
    assert measured.elsewhere == ("gather", "softmax")
    assert measured.elsewhere_ops == (1, 3)
    assert measured.ops_on == measured.ops - 4


def test_only_a_mac_can_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(UsageError, match="use check for a prediction"):
        ane.measure(tmp_path)


def test_what_is_no_package_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"Manifest\.json"):
        ane.check(tmp_path)


# the data, and the plan


def test_the_rules_name_operations_and_sources_that_there_are():
    registry = importlib.import_module("coremltools.converters.mil.mil.ops.registry").SSAOpRegistry
    known = set(registry.core_ops) | {"write_state"}  # in a file, what the builder calls coreml_update_state
    data = ane.table()
    native, elsewhere = set(data["operations"]["native"]), set(data["operations"]["elsewhere"])
    assert not native & elsewhere
    assert native | elsewhere <= known
    assert set(data["operations"]["slices"]) | set(data["operations"]["places"]) <= native
    named = {row["source"] for kind in ("rules", "layouts") for row in data[kind]}
    named |= {source for kind in ("operations", "types", "limits") for source in data[kind]["sources"]}
    assert named <= set(data["sources"])
    assert {rule.effect for rule in ane.rules().values()} == {"leaves", "package", "wrong", "slow", "unknown"}


def test_a_chips_get_its_layout_and_m_chips_the_gpus():
    layouts = {}
    for device in profiles.devices():
        if device.soc.vendor == "Apple":
            choice = ane.route(device)
            assert choice.topic == "layout"
            assert device.soc.name in choice.reason
            layouts[device.os, choice.value] = choice.reason
    assert set(layouts) == {("ios", "ane"), ("ios", "gpu"), ("macos", "gpu")}  # iPads have A and M chips
    assert "gpu (the GPU's layout)" in layouts["ios", "ane"]
    assert "ane (the Neural Engine's layout)" in layouts["macos", "gpu"]
    with pytest.raises(UsageError, match="no Apple chip"):
        ane.route(profiles.find("Galaxy S25"))
