"""Apple's Neural Engine: its rules as data (`ane.toml`), and what they say of a finished Core ML package.

Apple does not document which operations the Neural Engine takes, and Core ML moves what it does not take in silence.
`check` reads a package from disk and holds every operation and weight against the rules: its figures are a
prediction, and called so. `measure` asks Core ML itself, on a Mac.
"""

import math
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.residency import Tally
from profiles import Chip, Device
from runtimes import apple
from runtimes.bundle import Choice, Residency
from runtimes.mil.package import Function, Name, Operation, Package, TensorType, Value, open_package
from runtimes.mil.storage import DTYPES, Constant

ENGINE = apple.NEURAL_ENGINE
_TOKEN = "decode"  # the function that computes one token
_ROW_PRODUCTS = ("linear", "matmul")
_PRODUCTS = ("conv", *_ROW_PRODUCTS)
_PARAMETERS = ("bool", "int32")  # types of axes, shapes and places, which are no weights
_TEXT = next(dtype for dtype in DTYPES if dtype.name == "string")


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """`ane.toml`: rules, operations, types, limits, layouts, and their sources."""
    return tomllib.loads((files("exporter.npu") / "ane.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Limits:
    """What a package must keep to. `axis`: elements along a dimension; `package_bytes`: of weights."""

    rank: int
    axis: int
    last_axis: int
    table_group: int
    states: int
    package_bytes: int


def limits() -> Limits:
    """The Neural Engine's own."""
    return Limits(**{key: value for key, value in table()["limits"].items() if key != "sources"})


# the checker


@dataclass(frozen=True)
class Rule:
    """A rule of `ane.toml`. `source`: who says so."""

    id: str
    effect: str  # "leaves", "package", "wrong", "slow" or "unknown"
    says: str
    source: str


@lru_cache(maxsize=1)
def rules() -> dict[str, Rule]:
    """All rules by their ids."""
    data = table()
    return {row["id"]: Rule(**row | {"source": data["sources"][row["source"]]}) for row in data["rules"]}


@dataclass(frozen=True)
class Finding:
    """Where a rule is broken. `where`: the first of `count` operations of one type in one function, or a state.

    `setup`: nothing that the operation needs comes from the Neural Engine, and it multiplies no matrices; so it is
    done before the Neural Engine starts, and splits nothing.
    """

    rule: Rule
    function: str
    operation: str
    where: str
    found: str
    setup: bool = False
    count: int = 1


@dataclass(frozen=True)
class Report:
    """What the rules say of one package. `residencies`: of each function."""

    package: str
    findings: tuple[Finding, ...]
    residencies: Mapping[str, Residency]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What would leave the Neural Engine or be wrong there; what merely comes before it starts is not."""
        return tuple(f for f in self.findings if f.rule.effect not in ("slow", "unknown") and not f.setup)

    @property
    def unknown(self) -> tuple[Finding, ...]:
        """What no source tells about."""
        return tuple(f for f in self.findings if f.rule.effect == "unknown" and not f.setup)

    @property
    def passed(self) -> bool:
        """Whether nothing is broken, and nothing is unknown."""
        return not self.broken and not self.unknown

    @property
    def prediction(self) -> Residency:
        """Of the function that computes one token, or the only one."""
        return self.residencies.get(_TOKEN) or next(iter(self.residencies.values()))


def check(path: Path, bounds: Limits | None = None) -> Report:
    """Hold a package against the rules, with other limits than the Neural Engine's if `bounds` says so.

    Raises BundleError if it cannot be read, MissingExtra without coremltools.
    """
    package, bounds = open_package(path), bounds or limits()
    residencies, findings = {}, list(_whole(package, bounds))
    for function in package.functions.values():
        judged = _judge(function, bounds)
        findings += judged.findings
        residencies[function.name] = _residency(function, f"{ENGINE} (prediction)", judged.on)
    return Report(path.name, tuple(_merged(findings)), residencies)


def total(residencies: Sequence[Residency]) -> Residency:
    """One model's, whose packages have these."""
    elsewhere: Counter[str] = Counter()
    for one in residencies:
        elsewhere.update(dict(zip(one.elsewhere, one.elsewhere_ops, strict=True)))
    sums = {
        key: sum(getattr(one, key) for one in residencies)
        for key in ("ops", "ops_on", "macs", "macs_on", "weight_bytes", "weight_bytes_on")
    }
    names = sorted(elsewhere)
    return Residency(
        accelerator=residencies[0].accelerator,
        elsewhere=tuple(names),
        elsewhere_ops=tuple(elsewhere[name] for name in names),
        **sums,
    )


def rows(report: Report) -> list[tuple[str, str, str]]:
    """The report as a table: what, how much, why."""
    shown = [(report.package, "", "a prediction from rules; nothing was measured")]
    for name, one in report.residencies.items():
        shown.append((f"{name}: operations on the {ENGINE}", f"{one.ops_on} of {one.ops}", ""))
        shown.append(
            (f"{name}: multiply-adds", _share(one.macs_on, one.macs), f"of {one.macs / 1e6:.1f} million")
        )
        shown.append(
            (
                f"{name}: weights",
                _share(one.weight_bytes_on, one.weight_bytes),
                f"of {one.weight_bytes / 1e6:.1f} MB",
            )
        )
    groups: dict[tuple[str, str, bool], list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault((finding.function, finding.rule.id, finding.setup), []).append(finding)
    for (function, _, setup), same in groups.items():
        rule, count = same[0].rule, sum(finding.count for finding in same)
        where = ", ".join(finding.operation for finding in same)
        shown.append(
            (
                f"{function}: {where}" if function else where,
                f"{count} ({'before it starts' if setup else rule.effect})",
                f"{rule.says}; found {same[0].found} in {same[0].where} ({rule.source})",
            )
        )
    return shown


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _whole(package: Package, bounds: Limits) -> Iterator[Finding]:
    """What concerns a package as a whole."""
    known = rules()
    states = {name: kind for function in package.functions.values() for name, kind in function.states.items()}
    if len(states) > bounds.states:
        yield Finding(known["states"], "", "state", sorted(states)[-1], f"{len(states)} states")
    for name, kind in states.items():
        if kind.dtype.name != "fp16":
            yield Finding(known["state-type"], "", "state", name, kind.dtype.name)
    sizes: dict[Any, int] = {}
    for function in package.functions.values():
        for needed in _Constants(function).weights.values():
            sizes |= needed
    if (size := sum(sizes.values())) > bounds.package_bytes:
        yield Finding(known["bytes"], "", "weights", package.path.name, f"{size / 1e9:.2f} GB")


@dataclass
class _Judged:
    """`on`: the operations that stay, by `apple.operation_key`."""

    on: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def _judge(function: Function, bounds: Limits) -> _Judged:
    judged = _Judged()
    constants = _Constants(function)
    types: dict[str, TensorType] = {**function.inputs, **function.states}
    fed: set[str] = set(function.states)  # values that the Neural Engine gave
    for operation in function.operations:
        types |= dict(operation.outputs)
        if constants.holds(operation):
            continue
        broken = list(_broken(operation, types, constants, bounds))
        off = any(rule.effect in ("leaves", "unknown", "wrong") for rule, _ in broken)
        names = [b.name for bindings in operation.inputs.values() for b in bindings if isinstance(b, Name)]
        setup = off and not _macs(operation, types) and not fed.intersection(names)
        if not off:
            judged.on.add(_key_of(operation))
        if not setup:
            fed |= {name for name, _ in operation.outputs}
        judged.findings += [
            Finding(rule, function.name, operation.type, operation.name, found, setup)
            for rule, found in broken
            if not (off and rule.effect == "slow")
        ]
    return judged


def _broken(
    operation: Operation, types: Mapping[str, TensorType], constants: "_Constants", bounds: Limits
) -> Iterator[tuple[Rule, str]]:
    """The rules that an operation breaks, and how."""
    data, known = table(), rules()
    operations, kinds = data["operations"], data["types"]
    if operation.type in operations["elsewhere"]:
        yield known["operation"], operation.type
    elif operation.type not in operations["native"]:
        yield known["unknown-operation"], operation.type
    elif operation.type in operations["slices"] and not constants.settles(operation.inputs["begin"]):
        yield known["runtime-slice"], "a begin that is computed"
    values = dict(operation.outputs)
    for parameter, bindings in operation.inputs.items():
        if parameter in operations["places"].get(operation.type, ()):
            continue
        for binding in bindings:
            kind = constants.kind(binding)
            if kind is None:
                assert isinstance(binding, Name)
                values[binding.name] = types[binding.name]
            elif kind.dtype.name == kinds["literal"]:
                yield known["literal"], f"{parameter} {_shape(kind)}"
            elif operation.type in _ROW_PRODUCTS and parameter in ("weight", "x", "y"):
                yield known["linear"], f"a constant {_shape(kind)}"
    yield from _limited(values, bounds, kinds["values"], known)
    for weight in constants.compressed(operation):
        yield from _weight(weight, constants, bounds, known)


def _limited(
    values: Mapping[str, TensorType], bounds: Limits, kinds: Sequence[str], known: Mapping[str, Rule]
) -> Iterator[tuple[Rule, str]]:
    """The rules that an operation's values break: each once, by the first value that does."""
    tests: dict[str, Callable[[TensorType], bool]] = {
        "type": lambda kind: kind.dtype.name not in kinds,
        "rank": lambda kind: len(kind.shape) > bounds.rank,
        "shape": lambda kind: None in kind.shape,
        "axis": lambda kind: any(size is not None and size > bounds.axis for size in kind.shape),
        "last-axis": lambda kind: (
            len(kind.shape) > 0 and (kind.shape[-1] or bounds.last_axis) < bounds.last_axis
        ),
    }
    for id, breaks in tests.items():
        if bad := next((kind for kind in values.values() if breaks(kind)), None):
            yield known[id], f"{bad.dtype.name} {_shape(bad)}"


def _weight(
    weight: Operation, constants: "_Constants", bounds: Limits, known: Mapping[str, Rule]
) -> Iterator[tuple[Rule, str]]:
    """The rules that a compressed weight breaks."""
    shape = constants.shape(weight.inputs["lut" if "lut" in weight.inputs else "scale"])
    outputs = weight.outputs[0][1].shape[0] or 1
    if weight.type == "constexpr_blockwise_shift_scale":
        if math.prod(shape[1:]) > 1:
            yield known["blockwise"], f"scales {list(shape)}"
    elif weight.type == "constexpr_lut_to_dense":
        if math.prod(shape[1:-2]) > 1 or shape[-1] > 1:
            yield known["table"], f"tables {list(shape)}"
        elif outputs // shape[0] < bounds.table_group:
            yield known["small-group"], f"{outputs // shape[0]} output channels"


class _Constants:
    """What is settled before a function runs: its constants and compressed weights, and which operations read them."""

    def __init__(self, function: Function) -> None:
        self._fixed: dict[str, Operation] = {}
        self.weights: dict[str, dict[Any, int]] = {}  # of each operation those that it reads, in bytes
        for operation in function.operations:
            if self.holds(operation):
                self._fixed |= {name: operation for name, _ in operation.outputs}
            else:
                self.weights[operation.name] = self._read(operation)

    @staticmethod
    def holds(operation: Operation) -> bool:
        """Whether an operation is one of these, and computes nothing as the function runs."""
        return operation.type == "const" or operation.type.startswith("constexpr_")

    def settles(self, bindings: Sequence[Name | Value]) -> bool:
        """Whether an argument is the same in each call."""
        return all(not isinstance(b, Name) or b.name in self._fixed for b in bindings)

    def kind(self, binding: Name | Value) -> TensorType | None:
        """The type of an argument that is the same in each call; None if it is not."""
        if isinstance(binding, Name):
            operation = self._fixed.get(binding.name)
            return None if operation is None else dict(operation.outputs)[binding.name]
        if isinstance(binding, Constant):
            return TensorType(binding.dtype, binding.shape)
        return TensorType(_TEXT, ())

    def shape(self, bindings: Sequence[Name | Value]) -> tuple[int, ...]:
        """The shape of a constant."""
        kind = self.kind(bindings[0])
        assert kind is not None
        return tuple(size or 0 for size in kind.shape)

    def compressed(self, operation: Operation) -> Iterator[Operation]:
        """The compressed weights among an operation's arguments."""
        for bindings in operation.inputs.values():
            for binding in bindings:
                fixed = self._fixed.get(binding.name) if isinstance(binding, Name) else None
                if fixed is not None and fixed.type != "const":
                    yield fixed

    def _read(self, operation: Operation) -> dict[Any, int]:
        found: dict[Any, int] = {}
        for bindings in operation.inputs.values():
            for binding in bindings:
                if isinstance(binding, Constant):
                    if math.prod(binding.shape) > 1 and binding.dtype.name not in _PARAMETERS:
                        found[binding.key] = binding.raw.nbytes
                elif isinstance(binding, Name) and binding.name in self._fixed:
                    found |= self._read(self._fixed[binding.name])
        return found


def _residency(function: Function, accelerator: str, on: Collection[str]) -> Residency:
    """Count a function's operations, multiply-adds and weights; a weight that two operations read counts once, and on
    the Neural Engine if one of them is there. `on`: the operations there, by `apple.operation_key`."""
    tally, constants = Tally(), _Constants(function)
    types: dict[str, TensorType] = {**function.inputs, **function.states}
    placed: dict[Any, tuple[int, bool]] = {}
    for operation in function.operations:
        types |= dict(operation.outputs)
        if constants.holds(operation):
            continue
        here = _key_of(operation) in on
        for key, size in constants.weights[operation.name].items():
            placed[key] = (size, here or placed.get(key, (0, False))[1])
        tally.add(operation.type, on=here, macs=_macs(operation, types))
    counted = tally.residency(accelerator)
    return counted.model_copy(
        update={
            "weight_bytes": sum(size for size, _ in placed.values()),
            "weight_bytes_on": sum(size for size, here in placed.values() if here),
        }
    )


def _key_of(operation: Operation) -> str:
    bindings = (binding for each in operation.inputs.values() for binding in each)
    names = (b.name for b in bindings if isinstance(b, Name))
    return apple.operation_key((name for name, _ in operation.outputs), names)


def _macs(operation: Operation, types: Mapping[str, TensorType]) -> int:
    """Multiply-adds of a product of matrices, else 0; an unknown dimension counts as 1."""
    if operation.type not in _PRODUCTS:
        return 0
    (binding,) = operation.inputs["x"]
    if not isinstance(binding, Name) or binding.name not in types:
        return 0
    shape = types[binding.name].shape
    depth = shape[1] if operation.type == "conv" else shape[-1]
    return math.prod(size or 1 for size in operation.outputs[0][1].shape) * (depth or 1)


def _merged(findings: Sequence[Finding]) -> Iterator[Finding]:
    """One finding for all operations of a type that break a rule in a function: the first, and how many."""
    groups: dict[tuple[str, str, str, bool], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.function, one.rule.id, one.operation, one.setup), []).append(one)
    for same in groups.values():
        first = same[0]
        yield Finding(
            first.rule, first.function, first.operation, first.where, first.found, first.setup, len(same)
        )


def _shape(kind: TensorType) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in kind.shape) + "]"


# Core ML itself


def measure(path: Path) -> dict[str, Residency]:
    """What Core ML places on this Mac's Neural Engine, for each function of a package; CPU and Neural Engine allowed.

    coremltools' MLComputePlan (macOS 14.4 or newer). Tested against a stand-in only: it has never run on a Mac.
    Raises UsageError elsewhere, MissingExtra without coremltools.
    """
    if sys.platform != "darwin":
        raise UsageError("only Core ML on a Mac can say what runs where: use check for a prediction here")
    package, found = open_package(path), {}
    for name, placed in apple.compute_plan(path, "ane").items():
        on = {key for key, processor in placed.items() if processor == ENGINE}
        found[name] = _residency(package.functions[name], f"{ENGINE} (measured)", on)
    return found


# the plan


def route(target: Device | Chip) -> Choice:
    """Which of the layouts "ane" and "gpu" a device gets, and why; UsageError for one without a Neural Engine."""
    chip = target.soc if isinstance(target, Device) else target
    layouts = table()["layouts"]
    chosen = next((row for row in layouts if chip.id.startswith(tuple(row["chips"]))), None)
    if chosen is None or chip.npu is None or chip.npu.kind != "ane":
        raise UsageError(f"{chip.name} is no Apple chip with a Neural Engine: Core ML is for those")
    others = ", ".join(f"{row['name']} ({row['title']})" for row in layouts if row is not chosen)
    return Choice(
        topic="layout",
        value=chosen["name"],
        reason=f"{chosen['title']}, for {chip.name}: {chosen['reason']}; the alternative: {others}",
    )
