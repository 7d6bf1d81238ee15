"""Exynos: how much of a model the ENN backend would put on Samsung's NPU, and the way there.

The pre-check is arithmetic over shapes against the operator table of ExecuTorch's backend (`exynos.toml`), and its
figures are predictions: what Samsung's compiler makes of a graph that the table allows is not known here. `lower`
calls the real backend, which needs Samsung's SDK.
"""

import importlib
import math
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.architecture import Architecture
from exporter.errors import MissingExtra, PlanRefused, UsageError
from exporter.npu.exynos_record import Operation, Recorder, Value, record, weight_bytes
from profiles import Chip, Device
from runtimes.bundle import Choice, Residency
from runtimes.extras import require

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

CONTEXT = 1024  # tokens in the cache for which one more is counted
EXTRA = "executorch"
_SAMSUNG = "executorch.backends.samsung"
_VALUE_BYTES = 2  # of an activation that passes between CPU and NPU: float16 or int16
_OUTSIDE = (
    "writing each call's keys and values into the KV cache",
    "the attention mask for its positions",
    "choosing the token",
)


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """`exynos.toml`: the backend's chips, operators and types, the SDK, and what Gochu rewrites."""
    return tomllib.loads((files("exporter.npu") / "exynos.toml").read_text(encoding="utf-8"))


def why_not(target: str) -> str:
    """Why an operator stays on the CPU; "" if the backend takes it.

    >>> why_not("aten.erf.default").partition(", ")[2], why_not("aten.mul.Tensor")
    ('and no rewrite is known', '')
    """
    data = table()
    if target in data["operators"]["targets"] or target in data["partitioner"]["targets"]:
        return ""
    reason = f"no builder in {data['package']['name']} {data['package']['version']}"
    rewrite = next((row for row in data["rewrites"] if target in row["lacks"]), None)
    return f"{reason}; Gochu writes {rewrite['by']}" if rewrite else f"{reason}, and no rewrite is known"


# the pre-check


@dataclass(frozen=True)
class Left:
    """Operators of one kind that stay on the CPU."""

    target: str
    count: int
    macs: int
    reason: str


@dataclass(frozen=True)
class Report:
    """What of a model would run on the NPU: a prediction from the backend's operator table.

    `length` tokens after `past` in the cache. `weight_bytes` at int8 per channel; a weight that both sides read
    counts on both. `pieces`: graphs on the NPU, each called once for the tokens. `passed_bytes`: values that enter
    or leave the NPU in one call, 2 bytes each. `outside`: what the app does between calls.
    """

    chip: str
    rewrites: bool
    length: int
    past: int
    ops: int
    ops_on: int
    macs: int
    macs_on: int
    weight_bytes: int
    weight_bytes_on: int
    pieces: int
    passed_bytes: int
    left: tuple[Left, ...]
    outside: tuple[str, ...]

    @property
    def macs_share(self) -> float:
        """Of the multiply-adds, the share on the NPU."""
        return self.macs_on / self.macs

    @property
    def bytes_share(self) -> float:
        """Of the weights' bytes, the share that is read on the NPU."""
        return self.weight_bytes_on / self.weight_bytes

    @property
    def prediction(self) -> Residency:
        """The same as a bundle says it; a prediction, and called so."""
        elsewhere = tuple(left.target for left in self.left)
        return Residency(
            accelerator=f"Exynos NPU {self.chip} (prediction)",
            ops=self.ops,
            ops_on=self.ops_on,
            elsewhere=elsewhere,
        )


def precheck(
    arch: Architecture,
    chip: str,
    *,
    context: int = CONTEXT,
    length: int = 1,
    rewrites: bool = True,
) -> Report:
    """Count what would run on the NPU when `length` tokens are computed in a graph for `context` tokens.

    `chip` is the ENN compiler's name ("E9965"). No weight is read. Raises PlanRefused for a chip that the compiler
    does not know, UsageError if no token fits.
    """
    _check_chip(chip)
    past = min(context, arch.context) - length
    if length < 1 or past < 0:
        raise UsageError(
            f"{length} tokens do not fit a context of {min(context, arch.context)}: ask for 1 or more"
        )
    recorder = record(arch, length=length, past=past, rewrites=rewrites)
    ops = recorder.operations
    reasons = [why_not(op.target) for op in ops]
    on = [not reason for reason in reasons]
    return Report(
        chip=chip,
        rewrites=rewrites,
        length=length,
        past=past,
        ops=len(ops),
        ops_on=sum(on),
        macs=sum(op.macs for op in ops),
        macs_on=sum(op.macs for op, here in zip(ops, on, strict=True) if here),
        weight_bytes=_bytes_read(recorder, on, True) + _bytes_read(recorder, on, False),
        weight_bytes_on=_bytes_read(recorder, on, True),
        pieces=pieces(ops, on),
        passed_bytes=_VALUE_BYTES * _passed(recorder, on),
        left=tuple(_left(ops, reasons)),
        outside=_OUTSIDE if rewrites else (),
    )


def _bytes_read(recorder: Recorder, on: Sequence[bool], here: bool) -> int:
    """Bytes of the weights that the operators on one side read."""
    pairs = zip(recorder.operations, on, strict=True)
    names = {value.weight for op, side in pairs if side is here for value in op.inputs if value.weight}
    return sum(weight_bytes(recorder.weights[name]) for name in names)


def pieces(ops: Sequence[Operation], on: Sequence[bool]) -> int:
    """The fewest graphs that the operators on the NPU can be put into.

    An operator comes one stage after the latest that it needs from the other side, the CPU's stages being even and
    the NPU's odd. Those of one stage need nothing of each other through the other side, so they are one graph.
    """
    stages: list[int] = []
    for index, op in enumerate(ops):
        needed = [value.operation for value in op.inputs if value.operation is not None]
        stages.append(max((stages[i] + (on[i] != on[index]) for i in needed), default=int(on[index])))
    return len({stage for stage, here in zip(stages, on, strict=True) if here})


def _passed(recorder: Recorder, on: Sequence[bool]) -> int:
    """Numbers that enter or leave the NPU in a call: each value once, however many operators use it."""
    passing: dict[int | str, Value] = {}
    for op, here in zip(recorder.operations, on, strict=True):
        for value in op.inputs:
            if value.operation is not None and on[value.operation] != here:
                passing[value.operation] = value
            elif value.input and here:
                passing[value.input] = value
    for value in recorder.outputs.values():
        if value.operation is not None and on[value.operation]:
            passing[value.operation] = value
    return sum(math.prod(value.shape) for value in passing.values())


def _left(ops: Sequence[Operation], reasons: Sequence[str]) -> Iterable[Left]:
    """The kinds of operators on the CPU, those with the most work first."""
    kinds: dict[str, list[Operation]] = {}
    for op, reason in zip(ops, reasons, strict=True):
        if reason:
            kinds.setdefault(op.target, []).append(op)
    found = [
        Left(kind, len(same), sum(op.macs for op in same), why_not(kind)) for kind, same in kinds.items()
    ]
    return sorted(found, key=lambda left: (-left.macs, -left.count, left.target))


def rows(report: Report) -> list[tuple[str, str, str]]:
    """The report as a table: what, how much, why."""
    shown = [
        ("chip", report.chip, "a prediction from the backend's operator table; nothing was measured"),
        ("tokens", f"{report.length} after {report.past}", "what one call computes"),
        ("operations on the NPU", f"{report.ops_on} of {report.ops}", ""),
        ("multiply-adds on the NPU", f"{report.macs_share:.1%}", f"of {report.macs / 1e6:.1f} million"),
        ("weights on the NPU", f"{report.bytes_share:.1%}", f"of {report.weight_bytes / 1e6:.1f} MB at int8"),
        (
            "graphs on the NPU",
            str(report.pieces),
            f"{report.passed_bytes / 1e6:.2f} MB enter or leave it in a call",
        ),
    ]
    shown += [(f"on the CPU: {left.target}", str(left.count), left.reason) for left in report.left]
    return shown + [("in the app", "each call", task) for task in report.outside]


# the plan


def route(target: Device | Chip, arch: Architecture | None = None, context: int = CONTEXT) -> Choice:
    """Whether the ENN backend can serve a device, and why; with a model, how much of it the NPU would run.

    Raises UsageError for a chip that is no Exynos.
    """
    chip = target.soc if isinstance(target, Device) else target
    npu = chip.npu
    if npu is None or npu.kind != "exynos":
        raise UsageError(f"{chip.name} has no Exynos NPU: ask for a chip that has one")
    data = table()
    known, other, package = " and ".join(data["chips"]["names"]), data["alternative"], data["package"]
    if npu.enn_chip is None or npu.enn_chip not in data["chips"]["names"]:
        gpu = f"the GPU ({chip.gpu.name})" if chip.gpu else "the GPU"
        return Choice(
            topic="npu",
            value="not used",
            reason=f"Samsung's ENN compiler, through {package['name']} {package['version']}, takes {known} and "
            f"has no name for the {chip.name}; {other['name']} lists {' and '.join(other['chips'])} only: the CPU "
            f"through XNNPACK runs the model, or {gpu} through Vulkan",
        )
    alternative = (
        f"{other['name']} lists {npu.enn_chip} and has {', '.join(other['operators'])} besides"
        if npu.enn_chip in other["chips"]
        else f"{other['name']} does not list {npu.enn_chip}, only {' and '.join(other['chips'])}"
    )
    return Choice(
        topic="npu",
        value=f"possible: ENN for {npu.enn_chip}",
        reason=f"needs {data['sdk']['name']} ({data['sdk']['variable']}); "
        + (f"{_shares(arch, npu.enn_chip, context)}; " if arch else "")
        + f"never run on the chip: without it the CPU through XNNPACK; the alternative: {alternative}",
    )


def _shares(arch: Architecture, chip: str, context: int) -> str:
    after, before = (precheck(arch, chip, context=context, rewrites=rewrites) for rewrites in (True, False))
    return (
        f"predicted on the NPU: {after.macs_share:.0%} of the multiply-adds and {after.bytes_share:.0%} of the weights "
        f"in {_graphs(after.pieces)}, with what the backend lacks rewritten ({before.macs_share:.0%} and "
        f"{before.bytes_share:.0%} in {_graphs(before.pieces)} otherwise), and with the KV cache outside the graph "
        f"{after.passed_bytes / 1e6:.1f} MB enter or leave the NPU for a token at {after.past + after.length} tokens"
    )


def _graphs(count: int) -> str:
    return f"{count} graph{'s' if count != 1 else ''}"


# the real backend


def lower(program: "ExportedProgram", chip: str) -> Any:
    """Give a program (see exynos_torch.py) to ExecuTorch's ENN backend, which compiles what it takes for `chip`.

    Its own partitioner, passes and compile spec; returns its EdgeProgramManager. One thing the partitioner is told
    besides: to keep whole what the backend has a builder for, but lets be decomposed (`decomposed` in exynos.toml).
    So a program must call rms_norm as an operator: from a torch.nn.RMSNorm, the backend looks for the pieces.
    Types are the program's: float32, which the compiler is said to compute in float16, or int8 after `quantize`.
    This has been tested against a stand-in for Samsung's compiler only: it has never run with the SDK, nor has its
    result on a phone.

    Raises:
        MissingExtra: ExecuTorch or Samsung's SDK is not installed; the message says what to do.
        PlanRefused: the compiler does not know the chip.
    """
    _check_chip(chip)
    exir = require("executorch.exir", EXTRA)
    _require_sdk()
    partition = require(f"{_SAMSUNG}.partition.enn_partitioner", EXTRA)
    options = require(f"{_SAMSUNG}.serialization.compile_options", EXTRA)
    utils = require(f"{_SAMSUNG}.utils.export_utils", EXTRA)
    kept = [_operator(target) for target in table()["partitioner"]["decomposed"]]

    class KeepingWhole(partition.EnnPartitioner):  # type: ignore[name-defined]
        def ops_to_not_decompose(self, program: Any) -> Any:
            operators, accepted = super().ops_to_not_decompose(program)
            return [*operators, *kept], accepted

    spec = options.gen_samsung_backend_compile_spec(chip)
    return exir.to_edge_transform_and_lower(
        {"forward": program},
        partitioner={"forward": [KeepingWhole([spec])]},
        compile_config=utils.get_edge_compile_config(),
    )


def _operator(target: str) -> Any:
    """torch's operator by its name in the table."""
    namespace, name, overload = target.split(".")
    return getattr(getattr(getattr(require("torch", EXTRA).ops, namespace), name), overload)


def quantize(program: "ExportedProgram", samples: Sequence[tuple["Tensor", ...]]) -> "ExportedProgram":
    """Linears with int8 weights per output channel and int8 inputs and outputs per tensor, their ranges found on
    `samples`; all else stays float, between quantize and dequantize operators, which the backend has.

    By the annotations of the backend's own quantizer, for linears only: given the whole decoder, it makes sums and
    products share one range with their first operand, so the mask's -1e4 leaves a step that rounds all else to 0
    (and x * x, which shares with itself, it cannot annotate at all; this decoder has none). The scales are its own:
    these are not the integers of Gochu's other formats. It knows no other precision, 16-bit activations included.
    Needs ExecuTorch, not the SDK.
    """
    require("executorch.exir", EXTRA)
    backend = require(f"{_SAMSUNG}.quantizer", EXTRA)
    annotators = require(f"{_SAMSUNG}.quantizer.annotator", EXTRA).OP_ANNOTATOR
    config = require(f"{_SAMSUNG}.quantizer.qconfig", EXTRA)
    pt2e = require("torchao.quantization.pt2e.quantize_pt2e", EXTRA)
    torch = require("torch", EXTRA)
    linear = _operator("aten.linear.default")
    int8 = config.get_quant_config(config.Precision.A8W8, is_per_channel=True)

    class LinearsOnly(backend.EnnQuantizer):  # type: ignore[name-defined]
        def annotate(self, model: Any) -> Any:
            for node in model.graph.nodes:
                if node.target is linear:
                    annotators[linear](node, int8)
            return model

    prepared = pt2e.prepare_pt2e(program.module(), LinearsOnly())
    for sample in samples:
        prepared(*sample)
    converted = pt2e.convert_pt2e(prepared, fold_quantize=False)
    quantized: ExportedProgram = torch.export.export(converted, samples[0])
    return quantized


def residency(lowered: Any, chip: str) -> Residency:
    """Which operators of a lowered program the NPU's graphs hold: what the partitioner did, not a prediction.

    Copies that the backend takes and removes (`removed` in exynos.toml) count as none.
    """
    outside, inside = [], 0
    removed = table()["partitioner"]["removed"]
    module = lowered.exported_program().graph_module
    for node in module.graph.nodes:
        if node.op == "get_attr" and hasattr(found := getattr(module, node.target), "original_module"):
            graph = found.original_module.graph_module.graph
            inside += sum(_computes(inner) and inner.target.__name__ not in removed for inner in graph.nodes)
        elif _computes(node):
            outside.append(node.target.__name__)
    return Residency(
        accelerator=f"Exynos NPU {chip}",
        ops=inside + len(outside),
        ops_on=inside,
        elsewhere=tuple(sorted(set(outside))),
    )


def _computes(node: Any) -> bool:
    """Whether a graph's node is an operator: neither a call of the NPU nor the reading of its results."""
    return node.op == "call_function" and node.target.__name__ not in ("executorch_call_delegate", "getitem")


def _check_chip(chip: str) -> None:
    known = table()["chips"]["names"]
    if chip not in known:
        raise PlanRefused(f"the ENN compiler has no chip {chip!r}: it takes {' and '.join(known)}")


def _require_sdk() -> None:
    """MissingExtra unless the bindings of Samsung's compiler, which its SDK's libraries are behind, can be loaded."""
    sdk = table()["sdk"]
    try:
        for module in sdk["modules"]:
            importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{_missing(sdk)} ({error})") from None


def _missing(sdk: dict[str, Any]) -> str:
    root = os.environ.get(sdk["variable"])
    if not root:
        found = f"{sdk['variable']} is not set"
    elif not Path(root).is_dir():
        found = f"{sdk['variable']} names {root!r}, which is not a folder"
    else:
        found = f"{sdk['variable']} names {root!r}, but its bindings do not load"
    return (
        f"{sdk['name']} is not installed: {found}; download it from {sdk['page']}, set {sdk['variable']} to its folder "
        f"and LD_LIBRARY_PATH to the {sdk['libraries']} in it, and run {sdk['build']} in ExecuTorch's source"
    )
