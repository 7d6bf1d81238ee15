"""What is written for the Hexagon NPU beside the CPU's ONNX graph: static graphs by the route that the scheme takes."""

from collections.abc import Callable
from pathlib import Path

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint
from exporter.formats import onnx_qdq
from exporter.formats.onnx import DATA, GRAPH
from exporter.formats.onnx_static import CHUNK, write_embedding, write_static
from exporter.formats.onnx_weights import OnnxWeights
from exporter.npu.hexagon import QUANTIZED
from exporter.npu.hexagon_plan import Compilation
from exporter.quantization.calibration import MOST, calibration_sequences, require_tokens
from runtimes.bundle import EntryPoint

SHARE = 4  # a chunk is at most this part of the context: more of a prompt's last chunk would be padding
WORK = (
    400e9  # parameters times tokens that ranges are found on, a minute or so; no fewer tokens than two chunks
)


def write_hexagon(
    source: Checkpoint,
    arch: Architecture,
    compilation: Compilation,
    context: int,
    folder: Path,
    progress: Callable[[str, int, int], None],
) -> tuple[tuple[EntryPoint, ...], list[str]]:
    """Write the graphs; returns their entry points and the names of the files that hold their weights.

    `arch` is that of the weights as they were prepared. All are over the integers of the CPU's graph: as they lie in
    its file, or laid out anew where the NPU's values are integers too. RecipeError if the calibration text cannot be
    used or left a value unseen.
    """
    parts, chunk = compilation.parts, chunk_length(context)
    weights = OnnxWeights(folder / GRAPH)
    if compilation.route != QUANTIZED:
        progress("write graphs for the NPU", 0, 0)
        return write_static(arch, weights, context, folder, chunk, parts), [DATA]
    from exporter.npu.hexagon_torch import calibrate

    progress("find ranges of activations", 0, 0)
    most = int(min(MOST, max(2 * CHUNK, WORK / arch.parameters)))
    sequences = calibration_sequences(source, context, compilation.calibration, most, progress)
    require_tokens(map(len, sequences))
    ranges = calibrate(arch, weights, sequences, context, chunk)
    progress("write graphs for the NPU", 0, 0)
    entries = onnx_qdq.write_qdq(arch, weights, ranges, context, folder, chunk, parts)
    hidden = next(spec for entry in entries for spec in entry.inputs if spec.name == "hidden")
    return (write_embedding(arch, weights, folder, hidden), *entries), [onnx_qdq.DATA]


def chunk_length(context: int) -> int:
    """Tokens that `prefill` takes at once."""
    return max(1, min(CHUNK, context // SHARE))
