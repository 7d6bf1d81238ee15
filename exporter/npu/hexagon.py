"""Qualcomm's Hexagon NPU: its rules as data (`hexagon.toml`), how a model is split, and graphs compiled per chip.

The compiler is Qualcomm's own, inside the package onnxruntime-qnn (Linux x86-64, Windows). What it made for a chip is
kept in the user's cache folder by the content of what it was given, so nothing is compiled twice.
"""

import hashlib
import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field

from exporter.architecture import Architecture
from exporter.errors import GateFailed, PlanRefused
from exporter.quantization.scheme import Scheme
from exporter.residency import Tally
from profiles import Chip
from runtimes import measuring, qnn
from runtimes.bundle import EntryPoint, Residency, Strict, file_sha256
from runtimes.folders import cache_folder
from runtimes.memory import available

ACCELERATOR = "Hexagon"
PORTABLE, QUANTIZED = "portable", "quantized"
LOW_POWER = "low-power blocks"


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """`hexagon.toml`: limits, routes, features, and their sources."""
    return tomllib.loads((files("exporter.npu") / "hexagon.toml").read_text(encoding="utf-8"))


def route(scheme: Scheme) -> str:
    """How weights of a scheme reach the NPU: as they are, in float16, or with quantized activations."""
    return QUANTIZED if scheme.activations == "uint16" else PORTABLE


def common_route(schemes: Iterable[Scheme]) -> str:
    """The quantized route if one matrix asks for it."""
    return QUANTIZED if any(route(scheme) == QUANTIZED for scheme in schemes) else PORTABLE


def takes(arch: str, kind: str, what: str) -> bool:
    """Whether an NPU of generation `arch` ("v75") takes a route or a feature ("routes", "features")."""
    (rule,) = (rule for rule in table()[kind] if rule["id"] == what)
    return int(arch.removeprefix("v")) >= int(rule["from"])


def reason(kind: str, what: str) -> str:
    """What the table says of a route or a feature."""
    (rule,) = (rule for rule in table()[kind] if rule["id"] == what)
    return str(rule["says"])


def npu(chip: Chip, scheme: Scheme | None = None) -> qnn.Chip:
    """A chip as QNN knows it; PlanRefused if it has no Hexagon NPU that is known, or none that takes the scheme."""
    found = chip.npu
    if found is None or found.kind != "hexagon":
        raise PlanRefused(
            f"{chip.name} has no Hexagon NPU: take a phone with a Snapdragon chip, or another delegate",
            "hexagon-npu",
        )
    if found.soc_model is None:
        raise PlanRefused(
            f"{chip.name}: its number in Qualcomm's SDK is not known, so nothing can be compiled for it",
            "hexagon-known",
        )
    if scheme is not None and not takes(found.arch, "routes", route(scheme)):
        raise PlanRefused(
            f"{scheme.name} cannot run on the NPU of {chip.name} ({found.arch}): {reason('routes', route(scheme))}; "
            "use w8a16 or w4a16",
            "hexagon-fp16",
        )
    if scheme is not None and scheme.low_power and not takes(found.arch, "features", LOW_POWER):
        raise PlanRefused(
            f"{scheme.name} cannot run on the NPU of {chip.name} ({found.arch}): {reason('features', LOW_POWER)}; "
            f"use w4a16-g{scheme.group} or w4a16"
        )
    return qnn.Chip(found.soc_model, found.arch)


# sizes and splits


def binary_bytes(
    arch: Architecture, schemes: Mapping[str, Scheme], layers: range | None = None, head: bool = True
) -> int:
    """What a context binary with these layers, and the head or not, will take on disk."""
    return _binary(_stored(arch, schemes), range(arch.layers) if layers is None else layers, head)


def _binary(stored: Sequence[int], layers: range, head: bool) -> int:
    """The same, of the bytes that each layer stores, and last the head."""
    figures = table()["binary"]
    held = sum(stored[layers.start : layers.stop]) + (stored[-1] if head else 0)
    return int(figures["overhead"] + figures["per_layer"] * len(layers) + figures["factor"] * held)


def _stored(arch: Architecture, schemes: Mapping[str, Scheme]) -> list[int]:
    """Bytes of each layer's matrices on the NPU, and last of the head."""
    found = [0] * (arch.layers + 1)
    for name, shape in arch.matrices():
        layer = _layer(name)
        if layer is not None:
            found[layer] += stored_bytes(schemes[name], shape)
        elif name == ("embedding" if arch.tied else "head"):
            found[-1] += stored_bytes(schemes[name], shape)
    return found


def stored_bytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Bytes of a weight on the NPU, where scales and floats are float16."""
    if scheme.is_float:
        return Scheme(16).nbytes(shape)
    scales = shape[0] * (shape[1] // scheme.group if scheme.group else 1)
    return scheme.nbytes(shape) - 2 * scales


def compile_bytes(size: int, route: str) -> int:
    """Memory without a file behind it that compiling a binary of `size` bytes takes, the exporting process's with
    it."""
    figures = table()["compile"][route]
    return int(figures["overhead"] + figures["factor"] * size)


def split(arch: Architecture, schemes: Mapping[str, Scheme], forbidden: bool = False) -> tuple[range, ...]:
    """The layers of each graph: as few graphs as allowed, equally large; the head goes with the last.

    Two things limit a graph: what the NPU addresses, and the memory of the laptop that compiles it. Where a layer or
    the head is larger alone, or splitting is `forbidden`, the second gives way, and the first is PlanRefused.
    """
    limits = table()["limits"]
    most = int(limits["full"] * limits["graph_bytes"])
    stored = _stored(arch, schemes)
    whole = _binary(stored, range(arch.layers), True)
    if forbidden:
        if whole > most:
            raise PlanRefused(
                f"one graph would be {whole / 1e9:.1f} GB, and the NPU takes {most / 1e9:.1f}: allow it to be split, "
                "or quantize to fewer bits",
                "hexagon-graph-bytes",
            )
        return (range(arch.layers),)
    figures = table()["compile"][common_route(schemes.values())]
    laptop = int((limits["compile_bytes"] - figures["overhead"]) / figures["factor"])
    last = arch.layers - 1  # the head is counted with it
    sizes = [_binary(stored, range(i, i + 1), i == last) for i in range(arch.layers)]
    aim = min(most, max(laptop, *sizes))
    for count in range(max(1, whole // aim), arch.layers + 1):
        parts = _balanced(sizes, count)
        if max(_binary(stored, part, part.stop == arch.layers) for part in parts) <= aim:
            return parts
    raise PlanRefused(
        f"a layer alone, or the last with the head, is larger than the {most / 1e9:.1f} GB that the NPU takes: "
        "quantize to fewer bits",
        "hexagon-graph-bytes",
    )


def _balanced(sizes: Sequence[int], count: int) -> tuple[range, ...]:
    """`count` parts that are as equal as whole layers allow."""
    edges, held, total = [0], 0, sum(sizes)
    for i, size in enumerate(sizes):
        aim = total * len(edges) / count
        if len(edges) < count and edges[-1] < i and held + size / 2 > aim:
            edges.append(i)
        held += size
    return tuple(range(a, b) for a, b in zip(edges, [*edges[1:], len(sizes)], strict=True))


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


# compiling


class Graph(Strict):
    """A static graph to compile."""

    name: str
    path: str


class Job(Strict):
    """What a compiling process is told: graphs with the same weights, which lie in one binary if `share`. Names of
    files begin with `chip`, the binary's goes on with `part` if there are several."""

    graphs: tuple[Graph, ...]
    part: int | None
    chip: str
    soc_model: int
    arch: str
    share: bool
    folder: str


class Operation(Strict):
    """An operation of a graph, and whether the NPU computes it."""

    graph: str
    name: str
    op: str
    on: bool


class Result(Strict):
    """What compiling processes made: binaries, and an ONNX file that refers to one for each graph.

    `reasons`: why an operation is not on the NPU, in QNN's words, by its type. Without `files` QNN failed, with
    `error`, and those operations are the likely cause.
    """

    files: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    reasons: dict[str, str] = Field(default_factory=dict)
    error: str = ""
    sdk: str = ""
    seconds: float = 0.0
    peak_memory: int | None = None  # bytes


# glibc keeps what QNN frees, 0.4 GB of 3.3 for a model of 0.5 B; these make it give that back.
_FRUGAL = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def compile_graphs(
    entries: Sequence[EntryPoint],
    data: Sequence[str],
    chips: Sequence[Chip],
    folder: Path,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Result]:
    """Compile `folder`'s static graphs, several chips at once as memory allows; files go into `folder`. Returns a
    result for each chip.

    `data`: the weight files beside the graphs. EngineError with QNN's own words if one fails; what others made for
    the cache stays there.
    """
    parts: dict[int, list[Graph]] = {}
    for entry in entries:
        if entry.name != "embed":
            graph = Graph(name=entry.name, path=str((folder / entry.file).resolve()))
            parts.setdefault(_part(entry.name), []).append(graph)
    size = sum((folder / name).stat().st_size for name in data)
    content = {name: file_sha256(folder / name) for name in (*(e.file for e in entries), *data)}

    def compile_part(chip: Chip, part: int) -> Result:
        graphs, number = tuple(parts[part]), part if len(parts) > 1 else None
        given = [content[name] for name in (*(Path(graph.path).name for graph in graphs), *data)]
        return _compile(graphs, number, given, chip, folder, progress)

    tasks = [(chip, part) for chip in chips for part in sorted(parts)]
    with ThreadPoolExecutor(_workers(len(tasks), size // len(parts))) as pool:
        results = list(pool.map(compile_part, *zip(*tasks, strict=True)))
    return [_together(results[i : i + len(parts)]) for i in range(0, len(results), len(parts))]


def _workers(tasks: int, size: int) -> int:
    """Processes at once: two threads' worth of work each, and memory for eight times the weights."""
    memory = available()
    fitting = tasks if memory is None else int(memory // (1_000_000_000 + 8 * size))
    return max(1, min(tasks, (os.cpu_count() or 2) // 2, fitting))


def _compile(
    graphs: tuple[Graph, ...],
    part: int | None,
    content: Sequence[str],
    chip: Chip,
    folder: Path,
    progress: Callable[[str], None],
) -> Result:
    """Compile graphs of one part for a chip, in a process of its own: QNN gives memory back only with it."""
    target = npu(chip)
    share = takes(target.arch, "features", "shared weights")
    names = [graph.name for graph in graphs]
    key = json.dumps([names, part, content, chip.id, target.soc_model, target.arch, share, qnn.version()])
    kept = cache_folder() / "hexagon" / hashlib.sha256(key.encode()).hexdigest()
    if not (kept / "result.json").is_file():
        progress(f"compile for {chip.name}" + (f", part {part + 1}" if part is not None else ""))
        work = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            job = Job(
                graphs=graphs,
                part=part,
                chip=chip.id,
                soc_model=target.soc_model,
                arch=target.arch,
                share=share,
                folder=str(work),
            )
            said = measuring.run_apart("exporter.npu.hexagon_compile", job, _FRUGAL)
            _require_made(Result.model_validate_json(said), chip)
            (work / "result.json").write_text(said, encoding="utf-8")
            shutil.rmtree(kept, ignore_errors=True)
            work.rename(kept)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    result = Result.model_validate_json((kept / "result.json").read_text(encoding="utf-8"))
    for name in result.files:
        shutil.copyfile(kept / name, folder / name)
    return result


def _together(parts: Sequence[Result]) -> Result:
    """The results of all parts for a chip as one."""
    peaks = [part.peak_memory for part in parts if part.peak_memory is not None]
    return Result(
        files=tuple(name for part in parts for name in part.files),
        operations=tuple(operation for part in parts for operation in part.operations),
        reasons={op: why for part in parts for op, why in part.reasons.items()},
        sdk=min(part.sdk for part in parts),
        seconds=sum(part.seconds for part in parts),
        peak_memory=max(peaks, default=None),
    )


def _require_made(result: Result, chip: Chip) -> None:
    """GateFailed if operations that the NPU refuses kept QNN from compiling anything."""
    if not result.files:
        refused = "; ".join(f"{op} ({why})" for op, why in result.reasons.items())
        raise GateFailed(
            f"nothing can be compiled for {chip.name}, since its NPU refuses {refused}; QNN ended with: {result.error}"
        )


def compiled_name(chip: str, graph: str) -> str:
    """The file that says which binary holds a graph, compiled for a chip."""
    return f"{chip}-{graph}.onnx"


def _part(name: str) -> int:
    """prefill.1 and decode.1 have the weights of part 1."""
    return int(name.partition(".")[2] or 0)


# residency


def residency(result: Result, graphs: Mapping[str, Path]) -> Residency:
    """How much of the graphs the NPU computes: operations of all; products and weights of `decode` alone.

    `graphs`: the static graphs by their names.
    """
    tally = Tally()
    costs = {
        (name, node): cost
        for name, path in graphs.items()
        if name.startswith("decode")
        for node, cost in _costs(path)
    }
    for operation in result.operations:
        macs, nbytes = costs.get((operation.graph, operation.name), (0, 0))
        tally.add(operation.op, operation.on, macs, nbytes)
    found = tally.residency(ACCELERATOR)
    return found.model_copy(update={"reasons": tuple(result.reasons.get(op, "") for op in found.elsewhere)})


def _costs(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Multiply-adds for a token, and bytes of the weights, of each product by constant weights."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    sizes = {
        tensor.name: (
            math.prod(tensor.dims),
            next((int(e.value) for e in tensor.external_data if e.key == "length"), len(tensor.raw_data)),
        )
        for tensor in model.graph.initializer
    }
    made = {node.output[0]: node for node in model.graph.node}

    def weight(name: str) -> tuple[int, int] | None:
        """Elements and bytes of what a constant comes from, through casts, transposes and dequantization."""
        while name not in sizes:
            if name not in made or made[name].op_type not in ("Cast", "Transpose", "DequantizeLinear"):
                return None
            name = made[name].input[0]
        return sizes[name]

    for node in model.graph.node:
        found = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            yield node.name, (found["K"].i * found["N"].i, sizes[node.input[1]][1])
        elif node.op_type in ("MatMul", "Gemm") and (constant := weight(node.input[1])):
            yield node.name, constant
