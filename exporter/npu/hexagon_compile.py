"""Compile static graphs for a chip's NPU: what `exporter.npu.hexagon` runs in a process of its own.

QNN may end the process, and gives memory back only with it. `python -m exporter.npu.hexagon_compile` reads a job as
JSON from standard input and prints what it made as JSON.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import onnx

from exporter.npu.hexagon import Graph, Job, Operation, Result
from runtimes import measuring, memory, qnn
from runtimes.errors import EngineError


def run(job: Job) -> Result:
    """Compile all graphs; those of a group one after the other in sessions that share their weights."""
    start = perf_counter()
    folder, chip = Path(job.folder), qnn.Chip(job.soc_model, job.arch)
    operations: list[Operation] = []
    versions: set[str] = set()
    for group, members in groupby(sorted(job.graphs, key=lambda graph: graph.group), lambda g: g.group):
        graphs = list(members)
        for graph, session in _sessions(graphs, chip, job.share, folder):
            operations += [
                Operation(graph=graph.name, name=node.name, op=node.op, on=node.provider == qnn.PROVIDER)
                for node in qnn.nodes(session)
            ]
        stem = "" if len(job.graphs) == len(graphs) else f"-{group}"
        versions |= _name(graphs, folder, f"hexagon{stem}")
    if not versions:
        raise EngineError(f"the NPU takes no part of {', '.join(graph.name for graph in job.graphs)}")
    return Result(
        files=tuple(sorted(path.name for path in folder.iterdir())),
        operations=tuple(operations),
        sdk=min(versions),
        seconds=perf_counter() - start,
        peak_memory=memory.peak_rss(),
    )


def _sessions(
    graphs: Sequence[Graph], chip: qnn.Chip, share: bool, folder: Path
) -> Iterator[tuple[Graph, Any]]:
    """Each graph with its session; all of them stay open until the last is made, for what they share."""
    opened = []
    for i, graph in enumerate(graphs):
        place: Literal["", "first", "last"] = ""
        if share and len(graphs) > 1:
            place = "last" if i == len(graphs) - 1 else "first"
        session = qnn.open_session(Path(graph.path), chip, binary=folder / f"{graph.name}.onnx", share=place)
        opened.append(session)
        yield graph, session


def _name(graphs: Sequence[Graph], folder: Path, stem: str) -> set[str]:
    """Give binaries short names, in the files that refer to them too; returns the versions of the SDK."""
    versions: set[str] = set()
    names: dict[str, str] = {}
    for graph in graphs:
        path = folder / f"{graph.name}.onnx"
        if not path.is_file():
            continue  # nothing of it is on the NPU
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            if node.op_type != "EPContext":
                continue
            found = {attribute.name: attribute for attribute in node.attribute}
            versions.add(found["ep_sdk_version"].s.decode().removeprefix("v"))
            binary = found["ep_cache_context"].s.decode()
            if binary not in names:
                names[binary] = f"{stem}.bin" if not names else f"{stem}-{len(names)}.bin"
                (folder / binary).rename(folder / names[binary])
            found["ep_cache_context"].s = names[binary].encode()
        path.write_bytes(model.SerializeToString())
    return versions


if __name__ == "__main__":
    sys.exit(measuring.answer(Job, run))
