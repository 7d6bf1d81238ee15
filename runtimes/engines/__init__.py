"""Engines execute a variant's files. Each has the same verbs: load, prefill, decode, reset.

An engine is a module here with a function, or a class by the name,

    load(bundle, variant, choice, *, context, threads, exact) -> Engine

and a line in `ENGINES`. No engine imports another.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from runtimes import cpu
from runtimes.bundle import Bundle, Choice, Variant
from runtimes.errors import BundleError, MissingExtra, UsageError
from runtimes.extras import require

if TYPE_CHECKING:
    import numpy as np


class Engine(Protocol):
    """A loaded model with its KV cache. Not for use from several threads at once."""

    choice: Choice  # the variant, and why this one
    context: int  # tokens that the KV cache holds
    vocab: int  # length of a row of logits
    threads: int

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        ...

    @property
    def version(self) -> str:
        """Name and version of the library that executes the model."""
        ...

    def prefill(self, tokens: Sequence[int]) -> "np.ndarray":
        """Append tokens to the KV cache; float32 logits [vocab] after the last of them.

        May be called again and again: a conversation goes on where it stood. Raises PromptError if there
        are none or more than fit, EngineError if the engine fails.
        """
        ...

    def decode(self, token: int) -> "np.ndarray":
        """Append one token; float32 logits [vocab] after it. PromptError if the context is full."""
        ...

    def reset(self, position: int = 0) -> None:
        """Forget everything after the first `position` tokens."""
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be used after that."""
        ...


@dataclass(frozen=True)
class _Entry:
    library: str  # what must be importable
    extra: str  # which extra brings it
    fragile: bool = False  # a damaged file may end the process, so its bytes are checked first
    prepare: str = ""  # the engine's function that imports what its library leaves for later


ENGINES = {
    "onnxruntime": _Entry(library="onnxruntime", extra="run"),
    "executorch": _Entry(library="executorch", extra="executorch", fragile=True, prepare="import_runtime"),
    "coreml": _Entry(library="coremltools", extra="coreml"),
    "qnn": _Entry(library="onnxruntime_qnn", extra="hexagon", fragile=True),
}
SIMULATORS = {"htp-simulator": "qnn"}  # simulated accelerators, and the engine that has each
_HERE = ("", "xnnpack", "ane", "gpu")  # delegates that compute here, or are evaluated


def choose_variant(bundle: Bundle, name: str | None = None, on: str | None = None) -> tuple[Variant, Choice]:
    """The variant to run on this machine, and why: the one named, else the first that can run here.

    `on`: a simulator (SIMULATORS) to run it on instead of this machine. Raises UsageError (no such variant or
    simulator), MissingExtra (its engine is not installed), BundleError (made for chips that this machine does not
    have, or not for the simulator).
    """
    if on is not None and on not in SIMULATORS:
        raise UsageError(f"there is no simulator {on!r} to run on; there is {', '.join(SIMULATORS)}")
    if name is not None:
        named = named_variant(bundle, name)
        if hindrance := _hindrance(named, on):
            raise hindrance
        return named, Choice(topic="variant", value=named.name, reason="it was asked for by name")
    hindrances: list[tuple[str, BundleError | MissingExtra]] = []
    for variant in bundle.manifest.variants:
        hindrance = _hindrance(variant, on)
        if hindrance is None:
            passed = "".join(f"; passed over {skipped}: {why}" for skipped, why in hindrances)
            where = f"in the {on}" if on else f"here ({variant.engine} on the CPU)"
            reason = f"the first that runs {where}{passed}"
            return variant, Choice(topic="variant", value=variant.name, reason=reason)
        hindrances.append((variant.name, hindrance))
    # What the user can mend comes first: an extra to install, before chips that are not there.
    raise next((h for _, h in hindrances if isinstance(h, MissingExtra)), hindrances[0][1])


def named_variant(bundle: Bundle, name: str) -> Variant:
    """The variant by that name, whether or not it can run here; UsageError if there is none."""
    for variant in bundle.manifest.variants:
        if variant.name == name:
            return variant
    known = ", ".join(variant.name for variant in bundle.manifest.variants)
    raise UsageError(f"{bundle.path} has no variant {name!r}; it has {known}")


def runs_here(variant: Variant) -> bool:
    """Whether this machine has an engine and the chips that the variant was made for, whatever is installed on it."""
    return variant.engine in ENGINES and not variant.chips and variant.delegate in _HERE


def simulator(variant: Variant) -> str | None:
    """What can stand in for the chips that the variant was made for, if anything can."""
    return next((name for name, engine in SIMULATORS.items() if engine == variant.engine), None)


def _hindrance(variant: Variant, on: str | None = None) -> BundleError | MissingExtra | None:
    """Why the variant cannot run on this machine, or in the simulator, or None if it can."""
    if on is not None and simulator(variant) != on:
        return BundleError(f"variant {variant.name} is not for the chips that the {on} simulates")
    if variant.chips and on is None:
        other = simulator(variant)
        advice = f"in the simulator (--on {other}), " if other else ""
        return BundleError(
            f"variant {variant.name} is for {', '.join(variant.chips)}, which this machine does not have; "
            f"run it on such a phone, {advice}or export one for the CPU"
        )
    entry = ENGINES.get(variant.engine)
    if entry is None:
        return BundleError(
            f"variant {variant.name} needs the engine {variant.engine}, which this machine does not have; "
            f"the engines here are {', '.join(ENGINES)}"
        )
    if on is None and variant.delegate not in _HERE:
        return BundleError(
            f"variant {variant.name} computes through {variant.delegate}, which this machine's {variant.engine} does "
            "not have; run it on a phone, or take a variant for the CPU"
        )
    if importlib.util.find_spec(entry.library) is None:
        return MissingExtra(
            f"{entry.library} is not installed, and variant {variant.name} runs on it; "
            f"install it with `pip install 'gochu[{entry.extra}]'`"
        )
    return None


def import_library(engine: str) -> None:
    """Import all that Python needs for an engine, whose time and memory are not a model's. Raises MissingExtra."""
    entry = ENGINES[engine]
    require(entry.library, entry.extra)
    if entry.prepare:
        getattr(importlib.import_module(f"runtimes.engines.{engine}"), entry.prepare)()


def settle(variant: Variant, context: int | None, threads: int | None) -> tuple[int, int]:
    """Context and threads as asked for or by default; UsageError if the variant cannot have them."""
    if context is not None and not 1 <= context <= variant.context:
        raise UsageError(
            f"a context of {context} tokens was asked for, but variant {variant.name} holds 1 to {variant.context}"
        )
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads were asked for, but at least 1 is needed")
    return context or variant.context, threads or cpu.default_threads()


def open_engine(
    bundle: Bundle,
    variant: str | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
    exact: bool = False,
    on: str | None = None,
) -> Engine:
    """Load the variant named, or the first that this machine can run; `engine.choice` says why that one.

    `on`: a simulator to run it in. `context`: tokens to hold in the KV cache (default: all that the variant can).
    `threads`: default one for each fast physical core. `exact`: do not round activations where the variant does, on
    the same weights: slower, and tells what is rounding from what is a mistake. Raises UsageError, MissingExtra,
    BundleError or EngineError.
    """
    chosen, choice = choose_variant(bundle, variant, on)
    context, threads = settle(chosen, context, threads)
    module = importlib.import_module(f"runtimes.engines.{chosen.engine}")
    engine: Engine = module.load(bundle, chosen, choice, context=context, threads=threads, exact=exact)
    return engine
