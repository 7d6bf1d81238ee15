"""Run an ExecuTorch variant (.pte) with ExecuTorch's own runtime on this machine's CPU.

The program holds the KV cache: each run appends its tokens behind `start_pos`, so going back to an earlier
position is forgetting a number. Threads are the process's: ExecuTorch has one pool for all programs
(pytorch/executorch: extension/threadpool).
"""

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, Choice, Variant
from runtimes.errors import BundleError, EngineError, MissingExtra, UsageError
from runtimes.extras import require
from runtimes.pte import read_header
from runtimes.quiet import quiet
from runtimes.session import Session

EXTRA = "executorch"
METHOD = "forward"
DELEGATE = "delegates beside their nodes"
SCALARS = "scalars (positions)"  # operators on numbers, whose kernels have no name of their own
CLOCK = (
    "XNNPACK's profiler drops fractions of a microsecond: nodes shorter than that seem to take no time, and what they "
    f"take stands under {DELEGATE}, with new shapes and memory"
)
_TICK = 1e-9  # seconds
_NUMBER = re.compile(r" #\d+$")  # which of a delegate's nodes of that kind
_CHATTER = ("cpuinfo", "threadpool")  # what it says whenever it loads a program
# Modules that register the kernels that our programs call, when they are imported.
_KERNELS = ("executorch.extension.llm.custom_ops.custom_ops", "executorch.kernels.quantized")


def load(
    bundle: Bundle,
    variant: Variant,
    choice: Choice,
    *,
    context: int,
    threads: int,
    exact: bool = False,
    trace: bool = False,
) -> "ExecuTorchEngine":
    """Open a variant made for ExecuTorch; BundleError or EngineError if its program is damaged."""
    if exact:
        raise UsageError(
            "ExecuTorch has no kernels for these weights that leave activations as they are: "
            "the gate writes a program with float weights for that"
        )
    path = bundle.file(variant.entry_points[0].file)
    vocab = bundle.manifest.model.vocab
    return ExecuTorchEngine(path, choice, context=context, vocab=vocab, threads=threads, trace=trace)


class ExecuTorchEngine(Session):
    """The verbs of `runtimes.engines.Engine` over an ExecuTorch program.

    `trace`: have the runtime note when each operator begins and ends; `write_trace` then saves it.
    """

    def __init__(
        self, path: Path, choice: Choice, *, context: int, vocab: int, threads: int, trace: bool = False
    ) -> None:
        read_header(path)  # ExecuTorch ends the process on some damaged files
        runtime = import_runtime()
        self.choice, self.context, self.vocab, self.threads = choice, context, vocab, threads
        self.runs = 0  # of the program, since it was loaded
        self._name = path.name
        try:
            with quiet() as said:
                runtime._unsafe_reset_threadpool(threads)
                self._program: Any = runtime._load_program(
                    str(path),
                    enable_etdump=trace,
                    program_verification=runtime.Verification.InternalConsistency,
                )
                self._chunk = int(self._program.load_method("get_max_seq_len").call()[0])
                self._method: Any = self._program.load_method(METHOD)  # packs weights
        except RuntimeError as error:
            raise EngineError(
                f"ExecuTorch cannot load {path.name} ({_reason(error, said)}); export the bundle again"
            ) from None
        torch: Any = importlib.import_module("torch")
        self._tensor = torch.from_numpy
        self._start = np.zeros(1, np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._step = [self._tensor(self._token), self._tensor(self._start)]

    @property
    def version(self) -> str:
        return f"executorch {importlib.metadata.version('executorch')}"

    def _run_prompt(self, ids: np.ndarray) -> np.ndarray:
        for chunk in np.split(ids, range(self._chunk, len(ids), self._chunk)):
            logits = self._run([self._tensor(chunk[None]), self._step[1]], len(chunk))
        return logits

    def _run_token(self, token: int) -> np.ndarray:
        self._token[0, 0] = token
        return self._run(self._step, 1)

    def close(self) -> None:
        self._method = self._program = None

    def write_trace(self, path: Path) -> None:
        """Save what the runtime noted since the program was loaded, as an ETDump; MissingExtra if it cannot note.

        About 70 bytes for each operator that ran are held in memory until then.
        """
        with quiet():  # a runtime without hooks says so there, and writes nothing
            self._program.write_etdump_result_to_file(str(path))
        if not path.exists():
            raise MissingExtra(
                f"{self.version} was built without event tracing, which its packages have from 1.5 on: "
                f"install one with `pip install -U 'gochu[{EXTRA}]' 'executorch>=1.5'`"
            )

    @property
    def _closed(self) -> bool:
        return self._method is None

    def _run(self, inputs: list[Any], count: int) -> np.ndarray:
        self._start[0] = self._position
        try:
            logits = self._method.call(inputs, clone_outputs=False)[0]
        except RuntimeError as error:
            raise EngineError(
                f"ExecuTorch failed in {self._name} at token {self._position + count} ({_reason(error)}); "
                "export the bundle again"
            ) from None
        self._position += count
        self.runs += 1
        return logits.numpy()[0, -1].copy()


def read_trace(path: Path) -> list[list[tuple[str, float]]]:
    """What an ETDump says of each run of the program, in order: operators by name, with seconds.

    A node of an XNNPACK delegate has the name that XNNPACK's profiler gives it; what else a delegate takes is
    `DELEGATE`. Layout: devtools/etdump/etdump_schema_flatcc.fbs in pytorch/executorch.
    """
    with quiet():
        serialize = importlib.import_module("executorch.devtools.etdump.serialize")
    dump = serialize.deserialize_from_etdump_flatcc(path.read_bytes())
    runs = [_operators([e.profile_event for e in run.events if e.profile_event]) for run in dump.run_data]
    return [run for run in runs if run]  # loading and constant methods call no operator


def _operators(events: Sequence[Any]) -> list[tuple[str, float]]:
    """The events of one run: a call's parts come before the call itself."""
    found: list[tuple[str, float]] = []
    parts: list[tuple[str, float]] = []
    for event in events:
        seconds = (event.end_time - event.start_time) * _TICK
        if event.name == "DELEGATE_CALL":
            found += parts
            found.append((DELEGATE, max(0.0, seconds - sum(part for _, part in parts))))
            parts = []
        elif event.name == "OPERATOR_CALL":
            found.append((parts[-1][0] if parts else SCALARS, seconds))
            parts = []
        elif event.delegate_debug_id_str:
            parts.append((_NUMBER.sub("", event.delegate_debug_id_str), seconds))
        elif event.instruction_id >= 0 and event.chain_index >= 0:
            parts.append((event.name.removeprefix("native_call_").partition(".")[0], seconds))
    return found


def import_runtime() -> Any:
    """ExecuTorch's Python binding with all kernels that our programs need; MissingExtra if it is absent.

    Importing it says much that is no news to a user; that is kept off the screen. Attention's products go to torch's
    MKL, which would start a team of threads inside each of ExecuTorch's own, and spin: one each is enough.
    """
    if "torch" not in sys.modules:  # it is read when torch is loaded
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    require("executorch", EXTRA)
    with quiet():
        for name in _KERNELS:
            importlib.import_module(name)
        runtime = importlib.import_module("executorch.extension.pybindings.portable_lib")
    if "XnnpackBackend" not in runtime._get_registered_backend_names():
        raise BundleError("this build of ExecuTorch has no XNNPACK backend; install the one from PyPI")
    return runtime


def _reason(error: Exception, said: Sequence[str] = ()) -> str:
    """What ExecuTorch says, in one line."""
    lines = [line.partition("] ")[2] or line for line in said if not any(word in line for word in _CHATTER)]
    text = " ".join((lines[0] if lines else str(error)).split())
    return text if len(text) <= 200 else text[:200] + "..."
