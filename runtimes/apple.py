"""Core ML on Apple's own hardware: which processors may compute, which operation gets which, what its tools say.

Written against coremltools 9.0 and tried with stand-ins alone: it has never run on a Mac or an iPhone.
"""

import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtimes.bundle import Bundle, Variant
from runtimes.engines import named_variant
from runtimes.errors import BundleError, GochuError, TargetError, UsageError
from runtimes.extras import require
from runtimes.mil.library import EXTRA
from runtimes.quiet import quiet

ENGINE = "coreml"
NEURAL_ENGINE = "Neural Engine"
COMPUTE_UNITS = {  # coremltools' name, and ours for people
    "cpu": ("CPU_ONLY", "CPU"),
    "gpu": ("CPU_AND_GPU", "CPU and GPU"),
    "ane": ("CPU_AND_NE", f"CPU and {NEURAL_ENGINE}"),
    "all": ("ALL", f"CPU, GPU and {NEURAL_ENGINE}"),
}
_PROCESSORS = {
    "MLCPUComputeDevice": "CPU",
    "MLGPUComputeDevice": "GPU",
    "MLNeuralEngineComputeDevice": NEURAL_ENGINE,
}
_LONGEST = 200  # characters of what a tool says

Plan = Mapping[str, Mapping[str, str]]  # function -> operation, by `operation_key` -> processor


def require_macos(target: str) -> None:
    """TargetError on any other system."""
    if sys.platform != "darwin":
        raise TargetError(
            f"target {target} needs a Mac, since Apple's tools run nowhere else, and this is {sys.platform}: run this "
            "command on a Mac, or measure what this machine makes of the bundle with --on host"
        )


def choose(bundle: Bundle, name: str | None, target: str) -> Variant:
    """The variant named, or the first for Core ML; UsageError if that is another engine's, BundleError without one."""
    variants = bundle.manifest.variants
    chosen = named_variant(bundle, name) if name else next((v for v in variants if v.engine == ENGINE), None)
    if chosen is None:
        raise BundleError(
            f"{bundle.path} has no variant for Core ML, and target {target} measures no other; "
            "export one with --format coreml"
        )
    if chosen.engine != ENGINE:
        raise UsageError(
            f"variant {chosen.name} runs on {chosen.engine}, and target {target} measures Core ML; "
            "name another variant, or measure it with --on host"
        )
    return chosen


def compute_units(variant: Variant, asked: str | None = None) -> str:
    """A key of `COMPUTE_UNITS`: the one asked for, else what the variant was made for.

    What was made for the GPU is kept from the Neural Engine, which takes some of its weights for others in silence
    (exporter/npu/ane.toml, rule `blockwise`).
    """
    if asked is None:
        return variant.delegate if variant.delegate in COMPUTE_UNITS else "all"
    if asked not in COMPUTE_UNITS:
        raise UsageError(f"there are no compute units {asked!r}; there are {', '.join(COMPUTE_UNITS)}")
    return asked


def compute_plan(path: Path, units: str) -> Plan:
    """Which processor of this Mac Core ML prefers for each operation of a package.

    coremltools' MLComputePlan (macOS 14.4 or newer); constants have no processor and are left out.
    """
    with quiet():
        tools = require("coremltools", EXTRA)
        plans = importlib.import_module("coremltools.models.compute_plan")
        compiled = tools.models.utils.compile_model(str(path))
        allowed = tools.ComputeUnit[COMPUTE_UNITS[units][0]]
        plan = plans.MLComputePlan.load_from_path(compiled, compute_units=allowed)
    found: dict[str, dict[str, str]] = {}
    for name, function in plan.model_structure.program.functions.items():
        found[name] = {}
        for operation in function.block.operations:
            if usage := plan.get_compute_device_usage_for_mlprogram_operation(operation):
                inputs = (binding.name for each in operation.inputs.values() for binding in each.bindings)
                key = operation_key((output.name for output in operation.outputs), filter(None, inputs))
                found[name][key] = processor(usage.preferred_compute_device)
    return found


def operation_key(outputs: Iterable[str], inputs: Iterable[str]) -> str:
    """What Core ML's plan and a package's file both call an operation: its results, or what it takes if it has none."""
    return ",".join(outputs) or ",".join(sorted(inputs))


def processor(device: Any) -> str:
    """The name of one of coremltools' compute devices."""
    return next(
        (_PROCESSORS[kind.__name__] for kind in type(device).__mro__ if kind.__name__ in _PROCESSORS), "?"
    )


@contextmanager
def step(doing: str, advice: str, secret: str = "") -> Iterator[None]:
    """TargetError with what Apple's tools said, in one sentence, without the `secret`.

    coremltools raises Exception itself, classes of its own that it does not export, and whatever Core ML threw.
    """
    try:
        yield
    except GochuError:
        raise
    except Exception as error:
        raise TargetError(f"{doing} failed ({words(error, secret)}); {advice}") from None


def words(error: BaseException, secret: str = "") -> str:
    """What Apple's tools say, in one line.

    coremltools keeps devicectl's words as bytes, and of xcodebuild's, which are many, nothing: those are still in the
    error of the process that it answers.
    """
    said = getattr(error, "message", None) or ""
    if not said and isinstance(error.__context__, subprocess.CalledProcessError):
        said = error.__context__.output or b""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    text = text or str(error) or type(error).__name__
    telling = [line for line in text.splitlines() if "error:" in line.lower()]
    text = " ".join((telling[0] if telling else text).split())
    if secret:
        text = text.replace(secret, "***")
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
