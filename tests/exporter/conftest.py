"""An engine for static graphs of integers, for tests: chunks of a prompt, then token after token."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.quantization.tensor import QuantizedTensor
from runtimes import qnn
from runtimes.bundle import EntryPoint, TensorSpec

sys.path.insert(0, str(Path(__file__).parent))  # tests share linear_problems.py and plans.py

Run = Callable[[EntryPoint, dict[str, NDArray[Any]]], list[NDArray[Any]]]


class QdqEngine:
    """`entries` of `folder`; `run` runs one of them on named inputs (the CPU if not given).

    `calls`: the inputs of each run, by the entry point's name.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[EntryPoint],
        table: QuantizedTensor,
        embedding_scale: float = 1.0,
        run: Run | None = None,
    ) -> None:
        self.prefills = [entry for entry in entries if entry.name.startswith("prefill")]
        self.decodes = [entry for entry in entries if entry.name.startswith("decode")]
        specs = {spec.name: spec for entry in self.decodes for spec in entry.inputs}
        self.context = specs["past_key_values.0.value"].shape[2]
        (self.chunk,) = next(spec.shape for spec in self.prefills[0].inputs if spec.name == "positions")
        self.hidden = self.decodes[0].inputs[0]
        self._rows, self._scale = table, embedding_scale
        self.calls: list[tuple[str, dict[str, NDArray[Any]]]] = []
        if run is None:
            sessions = {entry.file: qnn.open_on_cpu(folder / entry.file) for entry in entries}

            def run(entry: EntryPoint, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
                return sessions[entry.file].run([spec.name for spec in entry.outputs], inputs)

        self._run = run
        self._caches = {name: spec for name, spec in specs.items() if name.startswith("past_key_values.")}
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.past = 0
        self.cache = {
            name: np.full(spec.shape, spec.zero_point, spec.dtype) for name, spec in self._caches.items()
        }

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after `tokens`: all but the last in chunks, that one alone."""
        before, last = list(tokens[:-1]), tokens[-1]
        for start in range(0, len(before), self.chunk):
            self._step(self.prefills, before[start : start + self.chunk], self.chunk)
        return self.decode(last)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Logits after one more token."""
        return self._step(self.decodes, [token], 1)

    def _step(self, entries: Sequence[EntryPoint], tokens: list[int], length: int) -> Any:
        here = np.zeros(length, np.int32)
        here[: len(tokens)] = np.arange(self.past, self.past + len(tokens))
        rows = np.zeros((1, length, self.hidden.shape[2]), np.float32)
        for i, token in enumerate(tokens):
            rows[0, i] = self._rows.dequantize(token, token + 1)[0] * self._scale
        x, result = integers(rows, self.hidden), None
        for entry in entries:
            given: dict[str, NDArray[Any]] = {}
            for spec in entry.inputs:
                if spec.name == "hidden":
                    given[spec.name] = x
                elif spec.name == "positions":
                    given[spec.name] = here
                elif spec.name.startswith("mask."):
                    given[spec.name] = self._mask(int(spec.name[5:]), len(tokens), length)
                else:
                    given[spec.name] = self.cache[spec.name]
            self.calls.append((entry.name, {name: value.copy() for name, value in given.items()}))
            for spec, value in zip(entry.outputs, self._run(entry, given), strict=True):
                if spec.name == "hidden_out":
                    x = value
                elif spec.name == "logits":
                    result = numbers(value, spec)[0, -1]
                else:
                    past = self.cache[spec.name.replace("present", "past_key_values")]
                    slots = slice(self.past, self.past + len(tokens))
                    if spec.name.endswith("key"):
                        past[..., slots] = value[..., : len(tokens)]
                    else:
                        past[..., slots, :] = value[..., : len(tokens), :]
        self.past += len(tokens)
        return result

    def _mask(self, window: int, count: int, length: int) -> NDArray[np.uint16]:
        queries = self.past + np.arange(length)[:, None]
        keys = np.concatenate((np.arange(self.context), self.past + np.arange(length)))
        held = np.concatenate((np.arange(self.context) < self.past, np.arange(length) < count))
        seen = held & (keys <= queries)
        if window:
            seen &= keys > queries - window
        return np.where(seen, 65535, 0).astype(np.uint16)[None, None]


def integers(values: NDArray[np.float32], spec: TensorSpec) -> NDArray[Any]:
    """Numbers as a tensor's integers."""
    largest = np.iinfo(spec.dtype).max
    return np.clip(np.rint(values / spec.scale) + spec.zero_point, 0, largest).astype(spec.dtype)


def numbers(values: NDArray[Any], spec: TensorSpec) -> NDArray[np.float32]:
    """And back."""
    return (values.astype(np.float32) - np.float32(spec.zero_point)) * np.float32(spec.scale)


@pytest.fixture(scope="session")
def qdq_engine() -> type[QdqEngine]:
    """The engine's class: test modules cannot import each other."""
    return QdqEngine
