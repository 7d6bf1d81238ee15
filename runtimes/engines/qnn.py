"""Run a variant for Qualcomm's NPU: static graphs for a chunk of a prompt and for one token, chained if it is split.

On Linux x86-64 the NPU is simulated, and what runs are the graphs that were compiled (`Compiled.sources`): the
simulator ends the process when it loads a binary with several graphs. On a phone or a Snapdragon laptop the same
code loads the binaries, and the NPU is real; there it was never run.

The caller holds the KV cache. A graph gives back either the whole of it, which takes the old one's place, or the new
rows alone, which are put where they belong.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import qnn
from runtimes.bundle import Bundle, Choice, EntryPoint, TensorSpec, Variant
from runtimes.errors import BundleError, EngineError
from runtimes.session import Session

_HIDDEN = -1e3  # added to a score in float16 that must not count: exp makes 0 of it


class QnnEngine(Session):
    """The verbs of `runtimes.engines.Engine` over sessions on the NPU, real or simulated.

    `exact`: the same graphs by the CPU's kernels, which tells what is the NPU's rounding from what is the graph's.
    `watch`: told each run of a graph: its entry point's name, inputs and outputs by name. It copies what it keeps.
    """

    watch: Callable[[str, dict[str, NDArray[Any]], dict[str, NDArray[Any]]], None] | None = None

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        choice: Choice,
        *,
        context: int,
        threads: int,
        exact: bool = False,
    ) -> None:
        compiled = variant.compiled
        if compiled is None:
            raise BundleError(f"variant {variant.name} was not compiled for a chip; export it again")
        self.choice, self.context, self.threads = choice, context, threads
        self.vocab = bundle.manifest.model.vocab
        chip = qnn.Chip(compiled.chip, compiled.arch)
        simulated = exact or qnn.simulated()
        entries = compiled.sources if simulated else variant.entry_points
        place = "on the CPU" if exact else "simulated" if simulated else "NPU"
        self._version = f"{qnn.version()}, {', '.join(variant.chips)} ({compiled.arch}, {place})"
        self._room = variant.context
        self._embed: Any = qnn.open_on_cpu(bundle.file(_only(entries, "embed").file))
        self._prefill, self._decode = (
            [
                _Part(bundle, entry, None if exact else chip, _content(bundle, entry) if simulated else "")
                for entry in entries
                if entry.name.partition(".")[0] == name
            ]
            for name in ("prefill", "decode")
        )
        if not self._prefill or not self._decode:
            raise BundleError(
                f"variant {variant.name} has no entry points prefill and decode; export it again"
            )
        self._cache = {spec.name: zeros(spec) for part in self._decode for spec in part.past}

    @property
    def version(self) -> str:
        return self._version

    def placed(self) -> dict[str, dict[str, int]]:
        """Of prefill and of decode: how many operations the NPU computes, and the CPU. Not for `exact` engines."""
        counts = {"prefill": Counter[str](), "decode": Counter[str]()}
        for name, parts in (("prefill", self._prefill), ("decode", self._decode)):
            for part in parts:
                counts[name].update(part.placed())
        return {name: dict(count) for name, count in counts.items()}

    def close(self) -> None:
        self._embed = None
        self._prefill, self._decode = [], []
        self._cache.clear()

    @property
    def _closed(self) -> bool:
        return self._embed is None

    def _run_prompt(self, ids: np.ndarray) -> np.ndarray:
        """All but the last token in chunks, the last one by itself: only `decode` has a head."""
        length, rest = self._prefill[0].length, ids[:-1]
        while len(rest) > 1 and self._position + length <= self._room:
            chunk, rest = rest[:length], rest[length:]
            self._run(self._prefill, chunk)
        for token in rest:  # one is left, or the padding of another chunk would not fit in the cache
            self._run(self._decode, token[None])
        return self._run_token(int(ids[-1]))

    def _run_token(self, token: int) -> np.ndarray:
        logits = self._run(self._decode, np.array([token]))
        assert logits is not None
        return logits

    def _run(self, parts: "list[_Part]", ids: np.ndarray) -> NDArray[np.float32] | None:
        """Run tokens through all parts, padded to their length; logits [vocab] of the last one, where there are."""
        length, count = parts[0].length, len(ids)
        padded = np.zeros((1, length), np.int64)
        padded[0, :count] = ids
        logits = None
        (hidden,) = self._embed.run(["hidden"], {"input_ids": padded})
        for part in parts:
            given = {"hidden": hidden} | {
                spec.name: position_input(spec, self._position, length, self._room) for spec in part.places
            }
            given |= {spec.name: self._cache[spec.name] for spec in part.past}
            found = part.run(given)
            if self.watch:
                self.watch(part.name, given, found)
            for present in part.present:  # more than `past`: a prompt's last layer is not attended to
                past = present.replace("present", "past_key_values")
                self._cache[past] = remembered(self._cache[past], found[present], self._position, count)
            hidden = found.get("hidden_out")
            if (last := part.outputs.get("logits")) is not None:
                logits = real(found["logits"][0, count - 1], last)
        self._position += count
        return logits


load = QnnEngine  # what `open_engine` calls


class _Part:
    """A graph: some layers, for a number of tokens; on a chip's NPU, or on the CPU without one. `kept`: what tells
    its bytes from others', where it is compiled here, to be simulated."""

    def __init__(self, bundle: Bundle, entry: EntryPoint, chip: qnn.Chip | None, kept: str = "") -> None:
        self.name = entry.name
        self.inputs = {spec.name: spec for spec in entry.inputs}
        self.outputs = {spec.name: spec for spec in entry.outputs}
        self.past = [spec for spec in entry.inputs if spec.name.startswith("past_key_values")]
        self.present = [name for name in self.outputs if name.startswith("present")]
        self.places = [spec for spec in entry.inputs if spec not in self.past and spec.name != "hidden"]
        self.length = int(self.inputs["hidden"].shape[1])
        self._path, self._chip, self._kept = bundle.file(entry.file), chip, kept
        self._opened: Any = None
        self._nodes: list[qnn.Node] = []

    @property
    def _session(self) -> Any:
        """Opened when it is first needed: to simulate a graph is to compile it, the first time."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        if self._chip is None:
            session = qnn.open_on_cpu(self._path)
        elif self._kept:
            session, self._nodes = qnn.open_kept(self._path, self._chip, self._kept)
        else:
            session = qnn.open_session(self._path, self._chip)
            self._nodes = qnn.nodes(session)
        found = {node.name for node in (*session.get_inputs(), *session.get_outputs())}
        if strange := sorted(found ^ {*self.inputs, *self.outputs}):
            raise EngineError(
                f"the graph {self._path.name} is not the one in its manifest ({strange[0]} is in one of them alone); "
                "export the bundle again"
            )
        return session

    def placed(self) -> Counter[str]:
        """Operations on the NPU and on the CPU."""
        assert self._session
        return Counter("NPU" if node.provider == qnn.PROVIDER else "CPU" for node in self._nodes)

    def run(self, given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(self.outputs, self._session.run(list(self.outputs), given), strict=True))
        except Exception as error:
            raise EngineError(
                f"QNN failed in {self._path.name} ({' '.join(str(error).split())[:300]}); export the bundle again"
            ) from None


def zeros(spec: TensorSpec) -> NDArray[Any]:
    """What stands for zero, in the shape of an input."""
    return np.full([int(size) for size in spec.shape], spec.zero_point or 0, spec.dtype)


def real(values: NDArray[Any], spec: TensorSpec) -> NDArray[np.float32]:
    """The numbers that an output's integers stand for, float32."""
    if spec.scale is None:
        return np.array(values, np.float32)
    return (values.astype(np.float32) - np.float32(spec.zero_point or 0)) * np.float32(spec.scale)


def position_input(spec: TensorSpec, position: int, length: int, context: int) -> NDArray[Any]:
    """An input that says where the tokens are, of which `length` come after `position` others.

    `positions` [length]: their numbers. `attention_mask` [1, context]: 1 for the tokens so far. `mask.W`
    [1, 1, length, context + length]: zero where a token sees a slot of the cache, or one of its own run, and the
    lowest number else; W is the window, 0 for none.
    """
    if spec.name == "positions":
        return np.arange(position, position + length).astype(spec.dtype)
    if spec.name == "attention_mask":
        return (np.arange(context) < position + length).astype(spec.dtype)[None]
    name, _, window = spec.name.partition(".")
    if name != "mask":
        raise EngineError(f"no one knows what the input {spec.name} is; export the bundle again")
    queries = position + np.arange(length)[:, None]
    slots = np.arange(context)
    keys = np.concatenate((np.where(slots < position, slots, np.iinfo(np.int64).max), queries[:, 0]))
    seen = keys <= queries
    if int(window):
        seen &= keys > queries - int(window)
    lowest = np.iinfo(spec.dtype).min if np.issubdtype(spec.dtype, np.integer) else _HIDDEN
    return np.where(seen, spec.zero_point or 0, lowest).astype(spec.dtype)[None, None]


def remembered(cache: NDArray[Any], new: NDArray[Any], position: int, count: int) -> NDArray[Any]:
    """The cache after `count` tokens at `position`: what a graph gave if that is all of it, else with its rows in."""
    if new.shape == cache.shape:
        return new
    (axis,) = (i for i, (a, b) in enumerate(zip(cache.shape, new.shape, strict=True)) if a != b)
    into, rows = [slice(None)] * cache.ndim, [slice(None)] * cache.ndim
    into[axis], rows[axis] = slice(position, position + count), slice(0, count)
    cache[tuple(into)] = new[tuple(rows)]
    return cache


def _content(bundle: Bundle, entry: EntryPoint) -> str:
    """Checksums of a graph and of all weights."""
    files = bundle.manifest.files
    return " ".join(each.sha256 for each in files if each.path == entry.file or each.path.endswith(".data"))


def _only(entries: Iterable[EntryPoint], name: str) -> EntryPoint:
    found = next((entry for entry in entries if entry.name == name), None)
    if found is None:
        raise BundleError(f"there is no entry point {name}; export the bundle again")
    return found
