"""The fused ONNX graph made static, which Qualcomm's compiler takes whole: the portable route to the Hexagon NPU.

The same verbs and the same bytes as the CPU's graph, beside whose data file these graphs lie. What differs: the
number of tokens and the cache's length are fixed; the embedding is looked up before, by a graph of its own on the
CPU, since the NPU takes no quantized table; nothing is fused that the compiler does not take (the residual's
addition into the norm). `prefill` has no head: the last token of a prompt goes through `decode`, which has.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter import decoder
from exporter.architecture import Architecture
from exporter.formats.onnx import GRAPH, IR, OPSET, OnnxOps, Value, cache_names
from exporter.formats.onnx_graph import DataFile, save
from exporter.formats.onnx_spelled import SpelledGraph, is_fused
from exporter.npu.hexagon_ops import HexagonOps
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, TensorSpec

EMBEDDING = "embedding.onnx"
CHUNK = 128  # tokens that `prefill` takes at once


class StaticOps(OnnxOps):
    """`OnnxOps` without what the HTP does not take; it multiplies in float16."""

    rounds = False

    def add(self, x: Value, y: Value) -> Value:
        return self.g.emit("Add", [self.name(x), self.name(y)])

    def _unpacked(self, x: Value, stored: str, bits: int) -> str:
        """A product by plain floats: the HTP has no FusedMatMul, and a constant's transpose is done once."""
        weight = stored if bits == 32 else self.g.emit("Cast", [stored], to=TensorProto.FLOAT)
        return self.g.emit("MatMul", [self.name(x), self.g.emit("Transpose", [weight], perm=[1, 0])])


def write_static(
    arch: Architecture,
    weights: Weights,
    context: int,
    folder: Path,
    chunk: int = CHUNK,
    parts: Sequence[range] | None = None,
) -> tuple[EntryPoint, ...]:
    """Write graphs beside `folder`'s CPU graph, whose weights they use: the embedding, then prefill and decode.

    `parts`: the layers of each graph, where the model is split; a part's hidden states are the next one's input.
    """
    parts = parts or (range(arch.layers),)
    entries = [write_embedding(arch, weights, folder)]
    for name, length in (("prefill", min(chunk, context)), ("decode", 1)):
        for index, layers in enumerate(parts):
            title = name if len(parts) == 1 else f"{name}.{index}"
            entries.append(_write_part(arch, weights, context, folder, title, length, layers))
    return tuple(entries)


def write_embedding(
    arch: Architecture, weights: Weights, folder: Path, wanted: TensorSpec | None = None
) -> EntryPoint:
    """A graph for the CPU, token ids -> hidden states, over the bytes of the CPU's graph.

    `wanted`: the input that takes them, where that is integers.
    """
    hidden = TensorSpec(name="hidden", dtype="float32", shape=(1, "length", arch.hidden))
    ops = OnnxOps(arch, weights, 0, DataFile.of(folder / GRAPH), last_only=False)
    rows = decoder.embedding(ops, arch, "input_ids")
    if wanted is not None and wanted.scale is not None:
        hidden = wanted.model_copy(update={"shape": hidden.shape})
        zero = ops.g.data.constant("hidden.zero_point", np.array(wanted.zero_point, wanted.dtype))
        rows = ops.g.emit("QuantizeLinear", [ops.name(rows), ops.g.scalar(wanted.scale), zero])
    ops.output(rows, "hidden")
    entry = EntryPoint(
        name="embed",
        file=EMBEDDING,
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=(1, "length")),),
        outputs=(hidden,),
    )
    save(ops.g.model("embedding", entry.inputs, entry.outputs, OPSET, IR), folder / EMBEDDING)
    return entry


def _write_part(
    arch: Architecture, weights: Weights, context: int, folder: Path, name: str, length: int, layers: range
) -> EntryPoint:
    ops = StaticOps(arch, weights, context, DataFile.of(folder / GRAPH), last_only=False)
    if is_fused(arch, context):
        entry = _fused_entry(arch, name, length, context, layers)
        hidden: Value = "hidden"
        for i in layers:
            hidden = decoder.layer(ops, arch, i, hidden)
        if result := [spec.name for spec in entry.outputs if "." not in spec.name]:
            last = layers.stop == arch.layers
            ops.output(decoder.head(ops, arch, hidden) if last else hidden, result[0])
        model = ops.g.model(name, entry.inputs, entry.outputs, OPSET, IR)
    else:
        graph = SpelledGraph(ops)
        head = name.startswith("decode") and layers.stop == arch.layers
        HexagonOps[str](graph, arch, length=length, context=context).run(layers, head)
        model = graph.model(name)
        inputs, outputs = tuple(graph.inputs.values()), tuple(graph.outputs.values())
        entry = EntryPoint(name=name, file=f"{name}.onnx", inputs=inputs, outputs=outputs)
    save(model, folder / entry.file)
    return entry


def _fused_entry(arch: Architecture, name: str, length: int, context: int, layers: range) -> EntryPoint:
    last = layers.stop == arch.layers
    return EntryPoint(
        name=name,
        file=f"{name}.onnx",
        inputs=(
            TensorSpec(name="hidden", dtype="float32", shape=(1, length, arch.hidden)),
            TensorSpec(name="attention_mask", dtype="int64", shape=(1, context)),
            *_cache("past_key_values", arch, context, layers),
        ),
        outputs=(*_result(arch, name, length, last), *_cache("present", arch, context, layers)),
    )


def _result(arch: Architecture, name: str, length: int, last: bool) -> Iterator[TensorSpec]:
    """Logits of a step's last part, hidden states of one that another follows, nothing of a prompt's last."""
    if not last:
        yield TensorSpec(name="hidden_out", dtype="float32", shape=(1, length, arch.hidden))
    elif name.startswith("decode"):
        yield TensorSpec(name="logits", dtype="float32", shape=(1, length, arch.vocab))


def _cache(prefix: str, arch: Architecture, context: int, layers: range) -> list[TensorSpec]:
    shape = (1, arch.kv_heads, context, arch.head_dim)
    names = [name for i in layers for name in cache_names(prefix, i)]
    return [TensorSpec(name=name, dtype="float32", shape=shape) for name in names]
