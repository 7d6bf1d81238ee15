"""Sessions on Qualcomm's NPU, through ONNX Runtime's QNN provider.

On Linux x86-64 the package onnxruntime-qnn holds Qualcomm's compiler and a simulator of the NPU, so the same calls
compile for a phone's chip, and run what was compiled, on a laptop.
Options: https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from runtimes.errors import EngineError
from runtimes.extras import require
from runtimes.folders import cache_folder
from runtimes.quiet import quiet

EXTRA = "hexagon"
LIBRARY = "onnxruntime_qnn"
PROVIDER = "QNNExecutionProvider"
# The provider leaves these to the CPU unless told otherwise.
_AFFINITY = {"op_type": {"GroupQueryAttention": "htp"}}
# In a graph's metadata: the scales of its 4-bit blocks are 1 to 16 times one number for each output, as QNN's low-power
# block quantization has them; other scales would be rounded to that.
LOW_POWER = "gochu.low_power_blocks"
_KEPT, _NODES = "graph.onnx", "nodes.json"
_VERBOSE, _FATAL = 0, 4  # log severities; what goes wrong comes as an exception
_REFUSAL = re.compile(
    r"Validation FAILED [^\n]*\n\s*Operator type: (?P<op>\S+) Node name: (?P<name>\S+)[^\n]*\n"
    r"(?:\s*Operator type: [^\n]*\n)*\s*REASON : (?P<reason>[^\n]*)"
)


@dataclass(frozen=True)
class Chip:
    """A chip as QNN knows it: its number, and the generation of its NPU (v75)."""

    soc_model: int
    arch: str


@dataclass(frozen=True)
class Node:
    """An operation of a graph and what runs it."""

    name: str
    op: str
    provider: str


def simulated() -> bool:
    """Whether the NPU of this machine's sessions is a simulated one."""
    return platform.machine().lower() in ("x86_64", "amd64")


def version() -> str:
    """Name and version of the package."""
    return f"onnxruntime-qnn {metadata.version('onnxruntime-qnn')}"


@dataclass(frozen=True)
class Refusal:
    """An operation that the NPU does not take, and QNN's reason."""

    name: str
    op: str
    reason: str


def open_session(
    graph: Path,
    chip: Chip,
    *,
    binary: Path | None = None,
    share: Literal["", "first", "last"] = "",
    cpu_ops: bool = True,
) -> Any:
    """An onnxruntime session of a static graph on a chip's NPU.

    `binary`: also write what was compiled, as an ONNX file beside which the context binary lies (NAME_qnn.bin).
    `share`: store weights that the graphs of several sessions have in common once, in the first one's binary; they
    must be opened after each other in one process. `cpu_ops`: leave to the CPU what the NPU refuses, else it is an
    error. EngineError with QNN's own words if it fails.
    """
    session, _, reason = _try(graph, chip, binary, share, cpu_ops, _FATAL)
    if session is None:
        raise EngineError(
            f"QNN could not take {graph.name} for chip {chip.soc_model} ({chip.arch}): {reason}"
        )
    return session


def open_kept(graph: Path, chip: Chip, content: str) -> tuple[Any, list[Node]]:
    """As `open_session`, and what of the graph runs where. What is compiled is kept in the user's cache folder, and
    loaded from there the next time.

    `content`: tells all bytes of the graph and its weights from others, as their checksums do.
    """
    key = hashlib.sha256(json.dumps([content, chip.soc_model, chip.arch, version()]).encode()).hexdigest()
    kept = cache_folder() / "htp-simulator" / key
    if (kept / _NODES).is_file():
        placed = json.loads((kept / _NODES).read_text(encoding="utf-8"))
        return open_session(kept / _KEPT, chip), [Node(**node) for node in placed]
    work = kept.with_name(f"{key}.{os.getpid()}.partial")
    work.mkdir(parents=True, exist_ok=True)
    try:
        session = open_session(graph, chip, binary=work / _KEPT)
        found = nodes(session)
        if (work / _KEPT).is_file():  # else nothing of it is on the NPU
            (work / _NODES).write_text(json.dumps([asdict(node) for node in found]), encoding="utf-8")
            with contextlib.suppress(OSError):  # another process was quicker
                work.rename(kept)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return session, found


def refusals(graph: Path, chip: Chip) -> list[Refusal]:
    """What of a graph the NPU does not take, as QNN's log tells; the graph is compiled once more for that."""
    _, said, _ = _try(graph, chip, None, "", True, _VERBOSE)
    return [
        Refusal(*(part.strip() for part in match.group("name", "op", "reason")))
        for match in _REFUSAL.finditer("\n".join(said))
    ]


def _try(
    graph: Path,
    chip: Chip,
    binary: Path | None,
    share: Literal["", "first", "last"],
    cpu_ops: bool,
    severity: int,
) -> tuple[Any, list[str], str]:
    """A session or None, the lines that were logged, and why there is none."""
    ort, devices = _register()
    options = ort.SessionOptions()
    options.log_severity_level = severity
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not cpu_ops:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if binary is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(binary))
        options.add_session_config_entry("ep.context_embed_mode", "0")
    if share:
        options.add_session_config_entry("ep.share_ep_contexts", "1")
    if share == "last":
        options.add_session_config_entry("ep.stop_share_ep_contexts", "1")
    with tempfile.TemporaryDirectory(prefix="gochu-qnn-") as folder, quiet(stdout=True) as said:
        affinity = Path(folder) / "affinity.json"
        affinity.write_text(json.dumps(_AFFINITY), encoding="ascii")
        provider = {
            "backend_path": require(LIBRARY, EXTRA).get_qnn_htp_path(),
            "soc_model": str(chip.soc_model),
            "htp_arch": chip.arch.removeprefix("v"),
            "enable_htp_fp16_precision": "1",  # floating point on the NPU is float16
            "op_affinity": str(affinity),
            "enable_block_quant_weight_optimization": str(int(_has_low_power_blocks(graph))),
        }
        options.add_provider_for_devices(devices, provider)
        try:
            session, reason = ort.InferenceSession(str(graph), options), ""
        except Exception as error:  # its own kinds have no common base
            session, reason = None, " ".join(str(error).split())[:600]
    return session, said, reason


def _has_low_power_blocks(graph: Path) -> bool:
    model = require("onnx", EXTRA).load(graph, load_external_data=False)
    return any(entry.key == LOW_POWER for entry in model.metadata_props)


def open_on_cpu(graph: Path) -> Any:
    """An onnxruntime session of a graph that the NPU has no part in, computed as it is written.

    Optimized, products by 4-bit weights would round activations to int8.
    """
    ort = require("onnxruntime", EXTRA)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise EngineError(
            f"{graph} cannot be loaded ({' '.join(str(error).split())[:300]}); export the bundle again"
        ) from None


def nodes(session: Any) -> list[Node]:
    """What runs where, of a session that `open_session` made."""
    return [
        Node(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


@lru_cache
def _register() -> tuple[Any, list[Any]]:
    """onnxruntime with the provider's library loaded, once in a process, and the provider's devices."""
    ort, qnn = require("onnxruntime", EXTRA), require(LIBRARY, EXTRA)
    with quiet(stdout=True):
        ort.set_default_logger_severity(_FATAL)
        ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise EngineError(f"{version()} finds no device of Qualcomm's on this machine, nor its simulator")
    return ort, devices
