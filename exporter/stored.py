"""The weights that a bundle's files hold, whatever their format."""

from typing import TYPE_CHECKING

from exporter.architecture import read_architecture
from exporter.checkpoint import read_json
from runtimes import extras
from runtimes.bundle import Bundle, Variant

if TYPE_CHECKING:
    from exporter.quantization.weights import Weights


def is_quantized(variant: Variant) -> bool:
    """Whether the values that flow through the graphs are integers."""
    sources = variant.compiled.sources if variant.compiled else ()
    return any(spec.scale is not None for entry in sources for spec in entry.inputs)


def stored_weights(bundle: Bundle, variant: Variant) -> "Weights":
    """The weights as the variant's own files hold them; there are readers for what runs here or in a simulator."""
    path = bundle.file(variant.entry_points[0].file)
    arch = read_architecture(read_json(bundle.file("config.json"), required=True))
    if variant.format == "coreml":
        from exporter.formats.coreml_weights import read_weights

        return read_weights(bundle, variant, arch)
    if variant.format == "onnx":
        from exporter.formats.onnx import GRAPH
        from exporter.formats.onnx_qdq_weights import QdqWeights
        from exporter.formats.onnx_weights import OnnxWeights

        if variant.compiled is None:
            return OnnxWeights(path)
        graphs = {e.name: bundle.file(e.file) for e in variant.compiled.sources}
        steps = [graph for name, graph in graphs.items() if name.startswith("decode")]
        if is_quantized(variant):
            return QdqWeights(steps, OnnxWeights(bundle.file(GRAPH)))
        return OnnxWeights(*steps, graphs["embed"])
    extras.require("executorch.exir", "executorch")
    from exporter.formats.executorch_weights import ExecuTorchWeights

    return ExecuTorchWeights(path, arch)
