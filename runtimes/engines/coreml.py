"""Run a Core ML variant: with Core ML itself on macOS, elsewhere with the evaluator in runtimes/mil.

A model is a chain of one or more packages, split by layers. Each has a function `prefill`, for as many tokens as its
input is long, and a function `decode`, for one; both share the package's states, which hold the KV cache. The entry
points are named `prefill` and `decode`, or `prefill.0`, `prefill.1`, ..., `decode.0`, ... in a chain of several:

    input_ids  int32 [1, T]         into the first package
    hidden     float16 [1, T, ...]  into the others: what the one before gives by that name
    position   int32 [1]            into each: tokens already in the KV cache
    last       int32 [1]            into the last: the row whose logits are wanted
    logits     float16 [1, 1, vocab]  from the last; or logits_0, logits_1, ... along the vocabulary
    token      int32 [1]            or this alone: the likeliest token, found in the graph

The last chunk of a prompt is filled up with token 0. The rows that these write into the KV cache come after all that
counts, so the causal mask hides them until later tokens overwrite them; where the chunk would reach past the context,
its tokens go through `decode`. Going back to an earlier position is forgetting a number.

The branch for macOS calls coremltools' documented API (MLModel with a function's name, make_state, predict with a
state) and has been tried with a stand-in for MLModel alone: it has not run on a Mac.
"""

import importlib
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtimes import apple
from runtimes.bundle import Bundle, Choice, EntryPoint, Variant
from runtimes.errors import BundleError, EngineError
from runtimes.extras import check, require
from runtimes.mil.library import EXTRA
from runtimes.mil.package import PACKAGE_MANIFEST, Package, open_package
from runtimes.quiet import quiet
from runtimes.session import Session

if TYPE_CHECKING:
    from runtimes.mil.evaluator import Evaluator

PREFILL, DECODE = "prefill", "decode"
_MACOS = 15  # the first whose Core ML has states
_FILLER = 0  # token in the rows of a chunk that no token of the prompt needs
_Arrays = dict[str, np.ndarray]


def load(
    bundle: Bundle,
    variant: Variant,
    choice: Choice,
    *,
    context: int,
    threads: int,
    exact: bool = False,
    compute_units: str | None = None,
) -> "CoreMLEngine":
    """Open a variant made for Core ML; BundleError or EngineError if its packages are damaged or not its manifest's.

    `exact`: always the evaluator, without rounding to float16. `compute_units`: what may compute on macOS, a key of
    `runtimes.apple.COMPUTE_UNITS` (default: what the variant was made for).
    """
    chain = links(variant)
    check("coremltools", EXTRA)
    native = sys.platform == "darwin" and not exact
    units = apple.compute_units(variant, compute_units)
    packages: list[_Package] = []
    for link in chain:
        package = open_package(package_folder(bundle, link))
        _check(package, PREFILL, link.prefill)
        _check(package, DECODE, link.decode)
        packages.append(
            _MacPackage(package.path, units) if native else _EvaluatedPackage(package, threads, exact)
        )
    how = "" if native else ", evaluated in torch"
    return CoreMLEngine(
        chain,
        packages,
        choice,
        context=context,
        capacity=variant.context,
        vocab=bundle.manifest.model.vocab,
        threads=threads,
        version=f"coremltools {importlib.metadata.version('coremltools')}{how}",
    )


@dataclass(frozen=True)
class Link:
    """A package of the chain: its two entry points."""

    prefill: EntryPoint
    decode: EntryPoint


class _Package(Protocol):
    """A loaded package, whose functions share its states."""

    def run(self, function: str, inputs: _Arrays) -> _Arrays: ...


class CoreMLEngine(Session):
    """The verbs of `runtimes.engines.Engine` over a chain of packages.

    `capacity`: rows of the KV cache in the packages' states. Of a variant that gives `token` instead of logits, the
    "logits" are 1 for that token and 0 for all others: enough to take the likeliest, not to sample or compare.
    """

    def __init__(
        self,
        chain: Sequence[Link],
        packages: Sequence[_Package],
        choice: Choice,
        *,
        context: int,
        capacity: int,
        vocab: int,
        threads: int,
        version: str,
    ) -> None:
        self.choice, self.context, self.vocab, self.threads = choice, context, vocab, threads
        self.version = version
        self.runs = 0  # of the chain, since it was loaded
        self._chain, self._packages, self._capacity = chain, list(packages), capacity
        self._chunk = chunk_length(chain[0].prefill)

    def _run_prompt(self, ids: np.ndarray) -> np.ndarray:
        for chunk in np.split(ids, range(self._chunk, len(ids), self._chunk)):
            if len(chunk) > 1 and self._position + self._chunk <= self._capacity:
                logits = self._run(PREFILL, chunk, self._chunk)
            else:
                for token in chunk:
                    logits = self._run(DECODE, token[None], 1)
        return logits

    def _run_token(self, token: int) -> np.ndarray:
        return self._run(DECODE, np.array([token]), 1)

    def close(self) -> None:
        self._packages.clear()

    @property
    def _closed(self) -> bool:
        return not self._packages

    def _run(self, function: str, tokens: np.ndarray, length: int) -> np.ndarray:
        """Float32 logits [vocab] after the last of up to `length` tokens, which are then in the KV cache."""
        ids = np.full((1, length), _FILLER, np.int32)
        ids[0, : len(tokens)] = tokens
        values: _Arrays = {
            "input_ids": ids,
            "position": np.array([self._position], np.int32),
            "last": np.array([len(tokens) - 1], np.int32),
        }
        for link, package in zip(self._chain, self._packages, strict=True):
            entry = link.prefill if function == PREFILL else link.decode
            values |= package.run(function, {spec.name: values[spec.name] for spec in entry.inputs})
        logits = self._logits(values)
        self._position += len(tokens)
        self.runs += 1
        return logits

    def _logits(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        outputs = [spec.name for spec in self._chain[-1].decode.outputs]
        if outputs == ["token"]:
            logits = np.zeros(self.vocab, np.float32)
            logits[int(values["token"].item())] = 1
            return logits
        return np.concatenate([values[name].reshape(-1) for name in outputs]).astype(np.float32)


class _EvaluatedPackage:
    """A package run operation by operation in torch."""

    def __init__(self, package: Package, threads: int, exact: bool) -> None:
        require("torch", EXTRA)
        evaluator = importlib.import_module("runtimes.mil.evaluator")
        self._evaluator: Evaluator = evaluator.Evaluator(package, threads=threads, exact=exact)

    def run(self, function: str, inputs: _Arrays) -> _Arrays:
        return self._evaluator.run(function, inputs)


class _MacPackage:
    """A package run by Core ML. A state made for one function serves the other: both have the same states."""

    def __init__(self, path: Path, units: str) -> None:
        self._name = path.name
        if int(platform.mac_ver()[0].partition(".")[0] or 0) < _MACOS:
            raise EngineError(
                f"Core ML keeps a KV cache from macOS {_MACOS} on; this is {platform.mac_ver()[0]}"
            )
        with quiet():
            library = require("coremltools", EXTRA)
        allowed = library.ComputeUnit[apple.COMPUTE_UNITS[units][0]]
        self._models = {
            function: self._load(library, path, function, allowed) for function in (PREFILL, DECODE)
        }
        self._state = self._models[PREFILL].make_state()

    def run(self, function: str, inputs: _Arrays) -> _Arrays:
        try:
            found: _Arrays = self._models[function].predict(inputs, self._state)
        except RuntimeError as error:
            raise EngineError(
                f"Core ML failed in {function} of {self._name} ({apple.words(error)}); export the bundle again"
            ) from None
        return found

    def _load(self, library: Any, path: Path, function: str, allowed: Any) -> Any:
        """Core ML compiles the function now. What it has against that, coremltools only warns of."""
        with quiet():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                model = library.models.MLModel(str(path), compute_units=allowed, function_name=function)
            except (RuntimeError, RuntimeWarning, ValueError) as error:
                raise EngineError(
                    f"Core ML cannot load {function} of {path} ({apple.words(error)}); export the bundle again"
                ) from None
        if model.__proxy__ is None:  # of a version that this macOS does not know, it does not even warn
            raise EngineError(
                f"{path} needs a newer macOS than this one; update it or export for an older one"
            )
        return model


def _check(package: Package, function: str, entry: EntryPoint) -> None:
    """BundleError unless a package has a function with the inputs and outputs that the manifest promises."""
    found = package.functions.get(function)
    if found is None:
        raise BundleError(f"{package.path} has no function {function}; export the bundle again")
    promised = {spec.name for spec in entry.inputs}, {spec.name for spec in entry.outputs}
    for names, there in zip(promised, (set(found.inputs), set(found.outputs)), strict=True):
        if strange := sorted(names ^ there):
            raise BundleError(
                f"the function {function} of {package.path} is not the one in the manifest "
                f"({strange[0]} is in one of them alone); export the bundle again"
            )


def package_folder(bundle: Bundle, link: Link) -> Path:
    """The package's folder, which a manifest may name by the file that stands for it."""
    path = bundle.file(link.prefill.file)
    return path.parent if path.name == PACKAGE_MANIFEST else path


def links(variant: Variant) -> list[Link]:
    """The packages in order; BundleError if the entry points are not those of a chain."""
    entries = {entry.name: entry for entry in variant.entry_points}
    count = len(entries) // 2
    parts = [""] if count == 1 else [f".{i}" for i in range(count)]
    names = [f"{function}{part}" for function in (PREFILL, DECODE) for part in parts]
    if count == 0 or sorted(names) != sorted(entry.name for entry in variant.entry_points):
        raise BundleError(
            f"variant {variant.name} has the entry points {', '.join(entries)}, where Core ML's are prefill and decode "
            "of each package; export it again"
        )
    chain = [Link(entries[f"{PREFILL}{part}"], entries[f"{DECODE}{part}"]) for part in parts]
    available = {"input_ids", "position", "last"}
    for link in chain:
        for entry in (link.prefill, link.decode):
            if missing := sorted({spec.name for spec in entry.inputs} - available):
                raise BundleError(
                    f"the entry point {entry.name} of variant {variant.name} takes {missing[0]}, which nothing before "
                    "it gives; export it again"
                )
        if link.prefill.file != link.decode.file:
            raise BundleError(
                f"the entry points {link.prefill.name} and {link.decode.name} of variant {variant.name} are in two "
                "packages, which cannot share a KV cache; export it again"
            )
        available |= {spec.name for spec in link.decode.outputs}
    chunk_length(chain[0].prefill)
    outputs = [spec.name for spec in chain[-1].decode.outputs]
    if not outputs or outputs not in (["token"], ["logits"], [f"logits_{i}" for i in range(len(outputs))]):
        raise BundleError(
            f"variant {variant.name} gives {', '.join(outputs)}, where logits or token is wanted; export it again"
        )
    return chain


def chunk_length(entry: EntryPoint) -> int:
    """Tokens that an entry point takes at once; BundleError if its manifest does not say."""
    for spec in entry.inputs:
        if (
            spec.name == "input_ids"
            and len(spec.shape) == 2
            and isinstance(spec.shape[1], int)
            and spec.shape[1] > 0
        ):
            return spec.shape[1]
    raise BundleError(
        f"the entry point {entry.name} does not say how many input_ids it takes; export it again"
    )
