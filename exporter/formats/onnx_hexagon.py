"""What is written for the Hexagon NPU beside the CPU's ONNX graph: static graphs by the route that the scheme takes."""

from collections.abc import Callable
from pathlib import Path

from exporter.architecture import Architecture
from exporter.formats.onnx import DATA, GRAPH
from exporter.formats.onnx_static import CHUNK, write_static
from exporter.formats.onnx_weights import OnnxWeights
from exporter.plan import Plan
from runtimes.bundle import EntryPoint, KVCache

SHARE = 4  # a chunk is at most this part of the context: more of a prompt's last chunk would be padding


def write_hexagon(
    arch: Architecture, plan: Plan, folder: Path, progress: Callable[[str, int, int], None]
) -> tuple[tuple[EntryPoint, ...], list[str]]:
    """Write the graphs; returns their entry points and the names of the files that hold their weights."""
    weights = OnnxWeights(folder / GRAPH)
    return write_static(arch, weights, plan.context, folder, chunk_length(plan.context), plan.parts), [DATA]


def chunk_length(context: int) -> int:
    """Tokens that `prefill` takes at once."""
    return max(1, min(CHUNK, context // SHARE))


def kv_cache(arch: Architecture, entries: tuple[EntryPoint, ...]) -> KVCache:
    """The cache as the graphs take it."""
    past = next(spec for e in entries for spec in e.inputs if spec.name.startswith("past_key_values"))
    return KVCache(
        layers=arch.layers,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        dtype=past.dtype,
        shared_buffer=False,
    )
