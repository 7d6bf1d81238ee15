"""Compile static graphs for a chip's NPU: what `exporter.npu.hexagon` runs in a process of its own.

QNN may end the process, and gives memory back only with it. `python -m exporter.npu.hexagon_compile` reads a job as
JSON from standard input and prints what it made as JSON.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NoReturn

import onnx

from exporter.npu.hexagon import Graph, Job, Operation, Result, compiled_name
from runtimes import measuring, memory, qnn
from runtimes.errors import EngineError


def run(job: Job) -> Result:
    """Compile the graphs one after the other, in sessions that share their weights."""
    chip = qnn.Chip(job.soc_model, job.arch)
    try:
        result = _compile(job)
    except EngineError as error:
        refused = _reasons(job, chip)
        if not refused:
            raise
        return Result(files=(), reasons=refused, error=str(error))
    if all(operation.on for operation in result.operations):
        return result
    return result.model_copy(update={"reasons": _reasons(job, chip)})


def _reasons(job: Job, chip: qnn.Chip) -> dict[str, str]:
    """Why operations of the graphs are not on the NPU, by type."""
    found = [refusal for graph in job.graphs for refusal in qnn.refusals(Path(graph.path), chip)]
    return {refusal.op: refusal.reason for refusal in found}


def _compile(job: Job) -> Result:
    start = perf_counter()
    folder, chip = Path(job.folder), qnn.Chip(job.soc_model, job.arch)
    operations: list[Operation] = []
    for graph, session in _sessions(job, chip):
        operations += [
            Operation(graph=graph.name, name=node.name, op=node.op, on=node.provider == qnn.PROVIDER)
            for node in qnn.nodes(session)
        ]
    part = "" if job.part is None else f"-{job.part}"
    paths = [folder / compiled_name(job.chip, graph.name) for graph in job.graphs]
    versions = _name(paths, f"{job.chip}-hexagon{part}")
    if not versions:
        _why(job, chip)
    return Result(
        files=tuple(sorted(path.name for path in folder.iterdir())),
        operations=tuple(operations),
        sdk=min(versions),
        seconds=perf_counter() - start,
        peak_memory=memory.peak_rss(),
    )


def _sessions(job: Job, chip: qnn.Chip) -> Iterator[tuple[Graph, Any]]:
    """Each graph with its session."""
    for i, graph in enumerate(job.graphs):
        place: Literal["", "first", "last"] = ""
        if job.share and len(job.graphs) > 1:
            place = "last" if i == len(job.graphs) - 1 else "first"
        binary = Path(job.folder) / compiled_name(job.chip, graph.name)
        yield graph, qnn.open_session(Path(graph.path), chip, binary=binary, share=place)


def _why(job: Job, chip: qnn.Chip) -> NoReturn:
    """EngineError with QNN's words: it left all of a graph to the CPU, and says why only if that is forbidden."""
    for graph in job.graphs:
        qnn.open_session(Path(graph.path), chip, cpu_ops=False)
    raise EngineError(f"QNN made nothing of {', '.join(graph.name for graph in job.graphs)} for {job.chip}")


def _name(paths: Sequence[Path], stem: str) -> set[str]:
    """Give binaries short names, in the files that refer to them too; returns the versions of the SDK."""
    versions: set[str] = set()
    names: dict[str, str] = {}
    for path in paths:
        if not path.is_file():
            continue  # nothing of it is on the NPU
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            found = {attribute.name: attribute for attribute in node.attribute}
            if "ep_cache_context" not in found:  # not QNN's, or a further part of a context
                continue
            versions.add(found["ep_sdk_version"].s.decode().removeprefix("v"))
            binary = found["ep_cache_context"].s.decode()
            if binary not in names:
                names[binary] = f"{stem}.bin" if not names else f"{stem}-{len(names)}.bin"
                path.with_name(binary).rename(path.with_name(names[binary]))
            found["ep_cache_context"].s = names[binary].encode()
        path.write_bytes(model.SerializeToString())
    return versions


if __name__ == "__main__":
    sys.exit(measuring.answer(Job, run))
