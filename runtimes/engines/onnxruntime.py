"""Run an ONNX variant with ONNX Runtime on the CPU.

The KV cache is allocated once, [1, kv_heads, context, head_dim] for each layer's key and value, and bound as
past *and* present: GroupQueryAttention then writes the new rows in place, and the length of the attention
mask says how many rows count (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
So nothing is copied from step to step, and going back to an earlier position is forgetting a number.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, Choice, Variant
from runtimes.errors import BundleError, EngineError
from runtimes.extras import require
from runtimes.session import Session

CHUNK = 512  # tokens fed at once: bounds the activations of a long prompt
LOGITS_LIMIT = 1 << 24  # values; a graph that returns logits of all tokens gets shorter chunks
CLOCK = "ONNX Runtime's profiler counts whole microseconds"
_FATAL = 4  # log severity: what goes wrong comes as an exception, not on the user's screen


class OnnxRuntimeEngine(Session):
    """The verbs of `runtimes.engines.Engine` over an ONNX Runtime session.

    EngineError if the variant's files are damaged. `trace`: have the session note when each operator begins and ends;
    `write_trace` then saves it.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        choice: Choice,
        *,
        context: int,
        threads: int,
        exact: bool = False,
        trace: bool = False,
    ) -> None:
        ort = require("onnxruntime", "run")
        kv = variant.kv_cache
        if not kv.shared_buffer:
            raise BundleError(
                f"variant {variant.name} does not share its KV cache's buffers; export it again"
            )
        self.choice = choice
        self.context = context
        self.vocab = bundle.manifest.model.vocab
        self.threads = threads
        self.runs = 0  # of the graph, since it was loaded
        self._version = f"onnxruntime {ort.__version__}"
        self._name = variant.name

        ort.set_default_logger_severity(_FATAL)
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # shapes change with each token; a plan for each would pile up
        if trace:
            self._notes = tempfile.TemporaryDirectory(prefix="gochu-trace-")
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._notes.name) / "trace")
        path = bundle.file(variant.entry_points[0].file)
        if exact:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
            )
        try:
            graph = _float_activations(path) if exact else str(path)
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime cannot load variant {variant.name} ({_brief(error)}); export the bundle again"
            ) from None
        names = [f"{i}.{part}" for i in range(kv.layers) for part in ("key", "value")]
        _check_graph(session, variant, names)

        self._cache = {
            name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, kv.kv_heads, context, kv.head_dim), dtype=kv.dtype)
            )
            for name in names
        }
        self._chunk = CHUNK if variant.last_logits_only else max(1, min(CHUNK, LOGITS_LIMIT // self.vocab))
        self._all_logits = not variant.last_logits_only
        self._mask = np.ones((1, context), np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._logits = np.zeros((1, 1, self.vocab), np.float32)
        self._session: Any = session
        # Made once, not for each run; the entry is what the wrapper looks for, and saves it an exception.
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        self._prefill = self._binding()
        self._step = self._binding()
        self._step.bind_cpu_input("input_ids", self._token)
        for binding in (self._step, self._prefill):
            _bind_output(binding, "logits", self._logits)

    @property
    def version(self) -> str:
        return self._version

    def _run_prompt(self, ids: np.ndarray) -> np.ndarray:
        logits = self._logits
        for start in range(0, len(ids), self._chunk):
            chunk = ids[None, start : start + self._chunk]
            if self._all_logits:
                logits = np.empty((1, chunk.shape[1], self.vocab), np.float32)
                _bind_output(self._prefill, "logits", logits)
            self._prefill.bind_cpu_input("input_ids", chunk)
            self._run(self._prefill, chunk.shape[1])
        return logits[0, -1].copy()

    def _run_token(self, token: int) -> np.ndarray:
        self._token[0, 0] = token
        self._run(self._step, 1)
        return self._logits[0, 0].copy()

    def close(self) -> None:
        self._session = self._prefill = self._step = None
        self._cache.clear()

    def write_trace(self, path: Path) -> None:
        """Save what the session noted since it was made, as its profiler's JSON; it notes no more after that.

        About 1 kB for each operator that ran is held in memory until then, for at most a million of them.
        """
        shutil.move(self._session.end_profiling(), path)

    def _binding(self) -> Any:
        """A binding with the KV cache in place; only tokens, mask and logits are left to bind."""
        binding = self._session.io_binding()
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding

    @property
    def _closed(self) -> bool:
        return self._session is None

    def _run(self, binding: Any, count: int) -> None:
        total = self._position + count
        binding.bind_cpu_input("attention_mask", self._mask[:, :total])  # a view: nothing is copied
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed in variant {self._name} at token {total} ({_brief(error)}); "
                "export the bundle again"
            ) from None
        self._position = total
        self.runs += 1


load = OnnxRuntimeEngine  # what `open_engine` calls


def read_trace(path: Path) -> list[list[tuple[str, float]]]:
    """What a session's profile says of each run of the graph, in order: operators by type, with seconds.

    Each event is a line; a run's own comes after its operators'.
    """
    runs: list[list[tuple[str, float]]] = []
    operators: list[tuple[str, float]] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if len(text := line.strip().rstrip(",")) < 2:
                continue  # a bracket
            event = json.loads(text)
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                operators.append((event["args"]["op_name"], event["dur"] * 1e-6))
            elif event["name"] == "model_run":
                runs.append(operators)
                operators = []
    return runs


def _float_activations(path: Path) -> bytes:
    """The graph with MatMulNBits at accuracy level 1: the same integers, activations not rounded."""
    onnx = require("onnx", "onnx")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    return model.SerializeToString()


def _bind_output(binding: Any, name: str, array: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _check_graph(session: Any, variant: Variant, names: list[str]) -> None:
    """EngineError unless the graph has just the inputs and outputs that the manifest promises."""
    inputs = {node.name for node in session.get_inputs()}
    outputs = {node.name for node in session.get_outputs()}
    wanted_inputs = {"input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)}
    wanted_outputs = {"logits", *(f"present.{name}" for name in names)}
    if strange := sorted((inputs ^ wanted_inputs) | (outputs ^ wanted_outputs)):
        raise EngineError(
            f"the graph of variant {variant.name} is not the one in its manifest "
            f"({strange[0]} is in one of them alone); export the bundle again"
        )


def _brief(error: Exception) -> str:
    """What ONNX Runtime says, in one line: without its codes, source lines and advice."""
    text = " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ")
    text = text.split(" : ", 2)[-1]
    return text if len(text) <= 200 else text[:200] + "..."
