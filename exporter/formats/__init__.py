"""The formats that a bundle's variants can have, and what each takes; nothing heavy is imported here."""

from dataclasses import dataclass, replace

from exporter.errors import RecipeError, UsageError
from exporter.quantization.recipe import Fit
from exporter.quantization.scheme import Scheme
from runtimes.predict import Backend


@dataclass(frozen=True)
class Format:
    """`libraries`: what must be installed to write it, which `extra` brings. `schemes`: what is offered, the best
    first. `fit`: the nearest scheme that its products take, and why it differs ("" if it does not). `block`: the
    context is a multiple of so many tokens. `backend`: what computes, for a prediction; None: the engine's usual."""

    name: str
    engine: str
    extra: str
    libraries: tuple[str, ...]
    schemes: tuple[str, ...]
    fit: Fit
    block: int = 1
    backend: Backend | None = None


def _onnx(scheme: Scheme) -> tuple[Scheme, str]:
    """Floats, and integers with any scales; where ranges are static, the CPU multiplies floats by the same integers."""
    _refuse_unheld(scheme, "ONNX Runtime")
    return scheme, ""


def _xnnpack(scheme: Scheme) -> tuple[Scheme, str]:
    """8 bits per output channel and 4 bits in groups of a multiple of 32, activations in 8 bits; or float32.

    Source: pytorch/executorch, backends/xnnpack/operators/node_visitor.py (get_per_channel_dtype).
    """
    _refuse_unheld(scheme, "ExecuTorch")
    _refuse_static(scheme, "XNNPACK")
    channel = Scheme(8, None, "int8")
    if scheme.bits == 16:
        raise RecipeError(
            "XNNPACK multiplies by float32, int8 or int4 weights, and fp16 is none of them: use int8 or fp32"
        )
    if scheme.bits == 8 and scheme != channel:
        return channel, "XNNPACK's 8-bit weights have one scale for each output"
    if scheme.bits == 4 and (scheme.group is None or scheme.group % 32):
        return channel, f"XNNPACK's 4-bit groups are multiples of 32, not {scheme.group}: 8 bits per channel"
    return scheme, ""


def _vulkan(scheme: Scheme) -> tuple[Scheme, str]:
    """4 bits, floats; 8 bits only with activations of calibrated ranges (backends/vulkan/patterns)."""
    _refuse_unheld(scheme, "ExecuTorch")
    _refuse_static(scheme, "ExecuTorch's Vulkan delegate")
    if scheme.bits == 8:
        raise RecipeError(
            "executorch's Vulkan delegate keeps no 8-bit weights without calibrated activations: use int4 or fp16"
        )
    return replace(scheme, activations="float32"), ""


def _weights_only(scheme: Scheme) -> tuple[Scheme, str]:
    """Floats and integers; activations are not rounded."""
    _refuse_unheld(scheme, "ExecuTorch")
    _refuse_static(scheme, "ExecuTorch")
    return replace(scheme, activations="float32"), ""


def _half(scheme: Scheme) -> tuple[Scheme, str]:
    """Float16: what an NPU's quantized types ask for, ranges of activations, is not recorded for this route."""
    if scheme.bits != 16:
        raise RecipeError("through ExecuTorch this NPU takes fp16 only: use --scheme fp16")
    return scheme, ""


def _hexagon(scheme: Scheme) -> tuple[Scheme, str]:
    """Floats in 16 bits, integers in groups of what MatMulNBits takes, or per output with 16-bit activations.

    Source: onnxruntime-qnn 2.7.0, tried: exporter/npu/hexagon.toml.
    """
    _refuse_unheld(scheme, "QNN")
    if scheme.bits == 32:
        raise RecipeError("the Hexagon NPU computes in float16: use fp16, or integers")
    if scheme.activations == "uint16":
        return scheme, ""
    if scheme.is_integer and scheme.group not in (32, 64, 128):
        return Scheme(16), f"the NPU's products by {scheme.name} want groups of 32, 64 or 128: float16"
    return scheme, ""


def _refuse_unheld(scheme: Scheme, engine: str) -> None:
    """Tables and 3 bits, where an engine has integers of 4 and 8 bits."""
    if scheme.table:
        raise RecipeError(
            f"{scheme.name} cannot be exported: {engine} has no lookup tables: use int4 or int8"
        )
    if scheme.bits == 3:
        raise RecipeError(
            f"{scheme.name} cannot be exported: {engine} has no 3-bit integers: use int4 or int8, or pal3 for Core ML"
        )


def _refuse_static(scheme: Scheme, engine: str) -> None:
    if scheme.is_static:
        raise RecipeError(
            f"{scheme.name} is for graphs whose values are 16-bit integers, and {engine} takes no such graph: use "
            f"int{scheme.bits}"
        )


def _core_ml_gpu(scheme: Scheme) -> tuple[Scheme, str]:
    """Floats in 16 bits, integers in groups or per channel, tables: constexpr_* in iOS 18's operators."""
    if scheme.bits == 32:
        raise RecipeError("Core ML computes in float16: use fp16, or integers")
    if scheme.is_integer and scheme.bits == 3:
        raise RecipeError(
            f"{scheme.name} cannot be exported: Core ML's integers have 4 or 8 bits: use pal3 (tables) or int4"
        )
    _refuse_static(scheme, "Core ML")
    return replace(scheme, activations="float32"), ""


def _core_ml_ane(scheme: Scheme) -> tuple[Scheme, str]:
    """As the GPU, but no scale for a part of an output: there the Neural Engine gives wrong numbers (npu/ane.toml)."""
    scheme, _ = _core_ml_gpu(scheme)
    if scheme.is_integer and scheme.bits == 8 and scheme.group:
        return replace(
            scheme, group=None
        ), "the Neural Engine takes 8-bit weights with one scale for each output"
    if scheme.is_integer and scheme.group:
        raise RecipeError(
            f"the Neural Engine takes no scales for groups of inputs ({scheme.name}): use pal4-g8 or int8"
        )
    return scheme, ""


def _core_ai(scheme: Scheme) -> tuple[Scheme, str]:
    """Floats in 16 bits, integers, and tables of the sizes that coreai-torch packs."""
    if scheme.bits in (3, 32):
        why = {3: "coreai-torch packs no 3 bits", 32: "its LLMs compute in float16"}[scheme.bits]
        raise RecipeError(
            f"Core AI cannot hold {scheme.name} exactly ({why}): use fp16, int8, int4, or tables of 2, 4, 6 or 8 bits"
        )
    _refuse_static(scheme, "Core AI")
    return replace(scheme, activations="float32"), ""


FORMATS = {
    format.name: format
    for format in (
        Format("onnx", "onnxruntime", "onnx", ("onnx",), ("fp16", "int8", "int4", "int4-g128"), _onnx),
        Format(
            "executorch", "executorch", "executorch", ("executorch",), ("int8", "int4", "int4-g128"), _xnnpack
        ),
        Format("coreml", "coreml", "coreml", ("coremltools",), ("fp16", "int8", "int4"), _core_ml_gpu),
        Format(
            "coreai", "coreai", "coreai", ("coreai_torch", "torch"), ("fp16", "int8", "int4"), _core_ai, 64
        ),
    )
}


@dataclass(frozen=True)
class Delegate:
    """What computes for an engine that hands that on. `title`: for a plan. `schemes`: what is planned, the first
    that is wanted; `fit`: as a format's. `any_length`: a run takes any number of tokens, otherwise one.
    `for_a_chip`: what is compiled runs on the device's chip alone (hexagon's own plan names its chips). `format`:
    whose delegate it is. `backend`: what it computes on, for a prediction."""

    name: str
    title: str
    schemes: tuple[str, ...]
    fit: Fit
    any_length: bool = True
    for_a_chip: bool = False
    format: str = "executorch"
    backend: Backend = "npu"


XNNPACK = "xnnpack"
NEURAL_ENGINE, APPLE_GPU, HEXAGON = "ane", "gpu", "hexagon"
DELEGATES = {
    delegate.name: delegate
    for delegate in (
        Delegate(
            XNNPACK, "CPU (ExecuTorch, XNNPACK)", ("int8", "int4", "int4-g128"), _xnnpack, backend="cpu"
        ),
        Delegate(
            "vulkan",
            "GPU (ExecuTorch, Vulkan)",
            ("int4", "int4-g128", "fp16"),
            _vulkan,
            backend="gpu",
        ),
        Delegate(
            "coreml",
            "Core ML (ExecuTorch)",
            ("int8", "int4", "int4-g128", "fp16"),
            _weights_only,
            False,
            backend="gpu",
        ),
        Delegate("qualcomm", "Hexagon NPU (ExecuTorch, QNN)", ("fp16",), _half, False, True),
        Delegate("mediatek", "APU (ExecuTorch, NeuroPilot)", ("fp16",), _half, False, True),
        Delegate(
            NEURAL_ENGINE, "Neural Engine (Core ML)", ("int8", "pal4-g8"), _core_ml_ane, format="coreml"
        ),
        Delegate(
            HEXAGON,
            "Hexagon NPU (ONNX Runtime, QNN)",
            ("int8", "int4", "int4-g128", "fp16"),
            _hexagon,
            format="onnx",
        ),
        Delegate(
            APPLE_GPU,
            "GPU (Core ML)",
            ("int8", "int4", "int4-g128", "fp16"),
            _core_ml_gpu,
            format="coreml",
            backend="gpu",
        ),
    )
}


def find_format(name: str) -> Format:
    """A format by its name; UsageError names those there are."""
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def find_delegate(name: str) -> Delegate:
    """A delegate by its name; UsageError names those there are."""
    if name == "mps":
        raise UsageError("executorch has given its delegate for Metal (mps) up for Core ML: use coreml")
    if name not in DELEGATES:
        raise UsageError(f"there is no delegate {name!r}: use one of {', '.join(DELEGATES)}")
    return DELEGATES[name]
