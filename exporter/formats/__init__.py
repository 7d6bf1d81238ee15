"""The formats that a bundle's variants can have, and what each takes; nothing heavy is imported here."""

from dataclasses import dataclass

from exporter.errors import RecipeError, UsageError
from exporter.quantization.recipe import Fit
from exporter.quantization.scheme import Scheme


@dataclass(frozen=True)
class Format:
    """`libraries`: what must be installed to write it, which `extra` brings. `schemes`: what is offered, the best
    first. `fit`: the nearest scheme that its products take, and why it differs ("" if it does not)."""

    name: str
    engine: str
    extra: str
    libraries: tuple[str, ...]
    schemes: tuple[str, ...]
    fit: Fit


def _any(scheme: Scheme) -> tuple[Scheme, str]:
    return scheme, ""


def _xnnpack(scheme: Scheme) -> tuple[Scheme, str]:
    """8 bits per output channel and 4 bits in groups of a multiple of 32, activations in 8 bits; or float32.

    Source: pytorch/executorch, backends/xnnpack/operators/node_visitor.py (get_per_channel_dtype).
    """
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


FORMATS = {
    format.name: format
    for format in (
        Format("onnx", "onnxruntime", "onnx", ("onnx",), ("fp16", "int8", "int4", "int4-g128"), _any),
        Format(
            "executorch", "executorch", "executorch", ("executorch",), ("int8", "int4", "int4-g128"), _xnnpack
        ),
    )
}


def find_format(name: str) -> Format:
    """A format by its name; UsageError names those there are."""
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]
