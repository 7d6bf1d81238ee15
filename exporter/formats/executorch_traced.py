"""ExecuTorch by the long way: the decoder through torch.export and executorch's own partitioners.

For delegates whose compilers take nothing but exported programs: Vulkan (GPUs of Android phones), Core ML
(iPhones), Qualcomm's and MediaTek's NPUs; and XNNPACK, as the reference for what `formats.executorch` writes
outright. Lowering takes seconds for each layer and holds the model in memory, a byte for each weight.

Core ML and the NPUs run one token at a time: their compilers want fixed shapes, and a method for prompts would
have a KV cache of its own, since executorch keeps the buffers of methods apart. `enable_dynamic_shape` says so to
the LLM runner (pytorch/executorch, extension/llm/runner), which then feeds a prompt token by token.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.errors import MissingExtra, RecipeError, UsageError
from exporter.formats.executorch_residency import program_residency
from exporter.formats.executorch_traced_ops import StaticOps, TracedOps, VulkanOps
from exporter.quantization.scheme import Scheme
from exporter.quantization.weights import Weights
from exporter.residency import require_resident
from runtimes import extras
from runtimes.bundle import EntryPoint, Residency, TensorSpec
from runtimes.quiet import quiet

METHOD = "forward"
CHUNK = 512  # tokens that can be given at once, where their number is free
_OPERATORS = (  # modules that define, when they are imported, what the verbs call
    "executorch.backends.vulkan.custom_ops_lib",
    "executorch.exir.passes._quant_patterns_and_replacements",
    "executorch.extension.llm.custom_ops.custom_ops",
    "executorch.kernels.quantized",
    "torchao.quantization.quant_primitives",
)
_QNN_LIBRARY = Path("lib", "x86_64-linux-clang", "libQnnHtp.so")


class Traced(nn.Module):
    """forward(tokens int64 [1, length], start_pos int64 [1]) -> logits float32 [1, 1, vocab] of the last token."""

    def __init__(self, ops: type[TracedOps], arch: Architecture, weights: Weights, context: int) -> None:
        super().__init__()
        self.arch, self.ops = arch, ops(arch, weights, context, self)
        fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)  # it computes nothing
        with fake, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # executorch's operators use what torch deprecates
            self(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        self.ops.begin(tokens, start_pos)
        return decoder(self.ops, self.arch, tokens)


@dataclass(frozen=True)
class Settings:
    """What a delegate's compiler is told.

    `half`: compute in float16. `chip`: an NPU's chip by its maker's code. `methods`: constant methods.
    """

    half: bool
    chip: str
    methods: dict[str, Any]


Lower = Callable[[Traced], Any]  # to an executorch EdgeProgramManager


@dataclass(frozen=True)
class Delegate:
    """`backend`: what a .pte calls it. `ops`: the verbs as it takes them.

    `holds(scheme, shape)`: whether a product by a matrix [outputs, inputs] keeps its integers and scales; `takes`
    says so in words. `lowering`: finds the compiler (MissingExtra if it is not there) and sets it up.
    """

    backend: str
    ops: type[TracedOps]
    holds: Callable[[Scheme, tuple[int, int]], bool]
    takes: str
    lowering: Callable[[Settings], Lower]


def write_traced(
    arch: Architecture,
    weights: Weights,
    context: int,
    folder: Path,
    delegate: str,
    metadata: dict[str, Any],
    chip: str = "",
) -> tuple[EntryPoint, Residency]:
    """Write model.<delegate>.pte into `folder`; returns its entry point, and what the delegate computes of it.

    `metadata`: constant methods and what they return. `chip`: for NPUs, its maker's code (SM8650, mt6991). Raises
    UsageError for a delegate or chip that is not known, MissingExtra where a compiler is not installed,
    RecipeError for a scheme that the delegate cannot hold exactly, GateFailed where it leaves a heavy operation.
    """
    chosen = find_delegate(delegate)
    _check_schemes(arch, weights, delegate, chosen)
    methods = metadata | {"enable_dynamic_shape": chosen.ops.any_length}
    with quietly():
        lower = chosen.lowering(Settings(_half(arch, weights), chip, methods))
        register_operators()
    module = Traced(chosen.ops, arch, weights, context)
    file = folder / f"model.{delegate}.pte"
    with quietly():
        program = lower(module)
        found = program_residency(
            program.exported_program(), delegate, chosen.backend, context, module.ops.stored
        )
        require_resident(found)
        with open(file, "wb") as out:
            program.to_executorch().write_to_file(out)
    length = f"length <= {min(CHUNK, context)}" if chosen.ops.any_length else 1
    entry = EntryPoint(
        name=METHOD,
        file=file.name,
        inputs=(
            TensorSpec(name="tokens", dtype="int64", shape=(1, length)),
            TensorSpec(name="start_pos", dtype="int64", shape=(1,)),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 1, arch.vocab)),),
    )
    return entry, found


def find_delegate(name: str) -> Delegate:
    """A delegate by its name; UsageError says which there are."""
    if name in DELEGATES:
        return DELEGATES[name]
    if name == "mps":
        raise UsageError("executorch has given its delegate for Metal (mps) up for Core ML: use coreml")
    raise UsageError(f"there is no delegate {name!r} to trace for: use one of {', '.join(DELEGATES)}")


def export(module: Traced) -> Any:
    """The torch.export.ExportedProgram of any number of tokens, or of one where the verbs take no other."""
    free, most = module.ops.any_length, min(CHUNK, module.ops.context)
    shapes = {"tokens": {1: torch.export.Dim("length", min=1, max=most)}, "start_pos": None}
    inputs = (torch.zeros(1, 2 if free else 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return torch.export.export(module, inputs, dynamic_shapes=shapes if free else None, strict=False)


def register_operators() -> None:
    """Make known to torch the operators that the verbs call."""
    for module in _OPERATORS:
        importlib.import_module(module)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """`quiet`, also about what the libraries log and print; errors are raised all the same."""
    disabled, level = logging.root.manager.disable, logging.root.level
    logging.disable(logging.CRITICAL)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        logging.root.setLevel(level)  # executorch's partitioners set it when they are imported


def _check_schemes(arch: Architecture, weights: Weights, name: str, delegate: Delegate) -> None:
    """RecipeError for the first weight that the delegate cannot hold exactly."""
    for weight, shape in arch.matrices():
        scheme = weights.scheme(weight)
        if not delegate.holds(scheme, shape):
            raise RecipeError(
                f"{weight} {list(shape)} is {scheme.name}, which ExecuTorch's {name} cannot hold exactly: it takes "
                f"{delegate.takes}; choose one of those, or another format"
            )


def _half(arch: Architecture, weights: Weights) -> bool:
    """Whether float16 is enough: no weight asks for float32, and the model's values stay in its range.

    Those of models that normalise what they add to the residual stream (Gemma 2) do not: they were trained in
    bfloat16, whose range is float32's.
    """
    return not arch.post_norms and all(weights.scheme(name).bits != 32 for name, _ in arch.matrices())


# delegates


def _partition(partitioners: list[Any], methods: dict[str, Any], module: Traced) -> Any:
    """Lower to the first partitioner that takes an operation."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    return to_edge_transform_and_lower(
        export(module),
        partitioner=partitioners,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=methods,
    )


def _xnnpack(settings: Settings) -> Lower:
    return functools.partial(_partition, [_xnnpack_partitioner()], settings.methods)


def _xnnpack_partitioner() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _vulkan(settings: Settings) -> Lower:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    partitioners = [VulkanPartitioner({"force_fp16": settings.half}), _xnnpack_partitioner()]
    return functools.partial(_partition, partitioners, settings.methods)


def _core_ml(settings: Settings) -> Lower:
    extras.check("coremltools", "coreml")
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    precision = coremltools.precision.FLOAT16 if settings.half else coremltools.precision.FLOAT32
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,  # the first with states and with scales of blocks
        compute_precision=precision,
        compute_unit=coremltools.ComputeUnit.ALL,
    )
    partitioners = [CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=True)]
    return functools.partial(_partition, partitioners, settings.methods)


def _qualcomm(settings: Settings) -> Lower:
    """As executorch lowers to QNN (backends/qualcomm/utils/utils.py), in float16."""
    root = os.environ.get("QNN_SDK_ROOT", "")
    if not (Path(root) / _QNN_LIBRARY).is_file():  # executorch would download the SDK as it is imported
        raise MissingExtra(
            f"Qualcomm's AI Engine Direct SDK is not there: install it and set QNN_SDK_ROOT to its folder, in which "
            f"{_QNN_LIBRARY} lies (and LD_LIBRARY_PATH to that library's folder)"
        )
    extras.check("cpuinfo", "qualcomm")
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )

    chip = settings.chip.upper()
    _check_chip(chip, [name for name in QcomChipset.__members__ if name != "UNKNOWN_SM"])
    specs = generate_qnn_executorch_compiler_spec(
        soc_model=QcomChipset[chip], backend_options=generate_htp_compiler_spec(use_fp16=True)
    )

    def lower(module: Traced) -> Any:
        exported = export(module)
        return to_edge_transform_and_lower_to_qnn(
            exported.module(), exported.example_inputs[0], specs, constant_methods=settings.methods
        )

    return lower


def _mediatek(settings: Settings) -> Lower:
    for package in ("mtk_converter", "mtk_neuron"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"{package} is not installed: it is a wheel of MediaTek's NeuroPilot Express SDK; get that and "
                "install its wheels with pip"
            )
    from executorch.backends.mediatek.partitioner import NeuropilotPartitioner
    from executorch.backends.mediatek.preprocess import SUPPORTED_PLATFORM_CONFIGS
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    _check_chip(settings.chip, sorted(SUPPORTED_PLATFORM_CONFIGS))
    partitioner = NeuropilotPartitioner([CompileSpec("platform-config", settings.chip.encode())])
    return functools.partial(_partition, [partitioner, _xnnpack_partitioner()], settings.methods)


def _check_chip(chip: str, known: list[str]) -> None:
    if chip not in known:
        raise UsageError(f"there is no chip {chip!r} to compile for: use one of {', '.join(known)}")


def _xnnpack_holds(scheme: Scheme, shape: tuple[int, int]) -> bool:
    if scheme.bits == 4:
        return scheme.group is not None and scheme.group % 32 == 0
    return scheme.bits == 32 or (scheme.bits == 8 and scheme.group is None)


def _vulkan_holds(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Kernels: et_vk.linear_q4gsw, et_vk.embedding_q4gsw (backends/vulkan/runtime/graph/ops/impl)."""
    outputs, inputs = shape
    return not scheme.is_integer or (scheme.bits == 4 and outputs % 4 == 0 and inputs % 32 == 0)


def _any(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return True


def _half_only(scheme: Scheme, shape: tuple[int, int]) -> bool:
    return scheme.bits == 16


DELEGATES = {
    "xnnpack": Delegate(
        "XnnpackBackend",
        TracedOps,
        _xnnpack_holds,
        "fp32, int8 per channel, and int4 in groups of a multiple of 32",
        _xnnpack,
    ),
    "vulkan": Delegate(
        "VulkanBackend",
        VulkanOps,
        _vulkan_holds,
        "fp32, fp16, and int4 where the outputs are a multiple of 4 and the inputs of 32",
        _vulkan,
    ),
    "coreml": Delegate("CoreMLBackend", StaticOps, _any, "every scheme", _core_ml),
    "qualcomm": Delegate("QnnBackend", StaticOps, _half_only, "fp16", _qualcomm),
    "mediatek": Delegate("NeuropilotBackend", StaticOps, _half_only, "fp16", _mediatek),
}
