"""What targets for Qualcomm's NPU share: the variant to take there, and whether two processors say the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtimes.bundle import Bundle, EntryPoint, Variant
from runtimes.engines import named_variant, open_engine
from runtimes.errors import BundleError, TargetError
from runtimes.measurement import Figure, Kind, sampled
from runtimes.workload import prompt_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

CORRELATION = 0.999  # at the least, of a step's logits: the NPU's and the CPU's, by the same graph
_EXPORT = "export one with `gochu export --delegate hexagon --device ...`"


def variants(bundle: Bundle) -> list[Variant]:
    """Those that were compiled for Qualcomm's NPU; BundleError if there are none."""
    found = [variant for variant in bundle.manifest.variants if variant.compiled]
    if not found:
        others = ", ".join(variant.name for variant in bundle.manifest.variants)
        raise BundleError(f"{bundle.path} has no variant for Qualcomm's NPU, only {others}: {_EXPORT}")
    return found


def named(bundle: Bundle, name: str) -> Variant:
    """The variant by that name; UsageError if there is none, BundleError if it is not for Qualcomm's NPU."""
    variant = named_variant(bundle, name)
    if not variant.compiled:
        raise BundleError(
            f"variant {name} is made of graphs of any length, and Qualcomm's NPU takes graphs of fixed shapes that "
            f"were compiled for it: {_EXPORT}"
        )
    return variant


def length(entry: EntryPoint) -> int:
    """Tokens that a graph takes at once."""
    return int(next(spec for spec in entry.inputs if spec.name == "hidden").shape[1])


@dataclass(frozen=True)
class Run:
    """What a graph was given, and what it gave, by name."""

    inputs: "dict[str, NDArray[Any]]"
    outputs: "dict[str, NDArray[Any]]"


def runs_on_cpu(bundle: Bundle, variant: Variant) -> dict[str, Run]:
    """By entry point a run of each graph by the CPU's kernels: a full chunk of a prompt, and the token after it.

    MissingExtra if their library is not installed.
    """
    from runtimes.engines.qnn import QnnEngine

    engine = open_engine(bundle, variant.name, exact=True, on="htp-simulator")
    assert isinstance(engine, QnnEngine)
    found: dict[str, Run] = {}

    def watch(name: str, given: "dict[str, NDArray[Any]]", said: "dict[str, NDArray[Any]]") -> None:
        found[name] = Run(*({key: value.copy() for key, value in each.items()} for each in (given, said)))

    engine.watch = watch
    chunk = next(length(entry) for entry in variant.entry_points if entry.name.startswith("prefill"))
    engine.prefill(prompt_ids(chunk + 1, bundle.manifest.model.vocab))
    engine.close()
    return found


def correlations(ours: "Iterable[NDArray[Any]]", theirs: "Iterable[NDArray[Any]]") -> list[float]:
    """Of each step's logits, how they correlate: 1 where they are the same but for scale and offset."""
    import numpy as np

    return [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(ours, theirs, strict=True)]


def correlation_figure(found: list[float], where: str, kind: Kind) -> Figure:
    """The figure logits_correlation; TargetError if a step's is below CORRELATION, or no number."""
    least = min(found, key=lambda each: each if each == each else -2.0)
    if not least >= CORRELATION:
        raise TargetError(
            f"{where} does not compute what the same graph computes on the CPU: their logits correlate by {least:.4f} "
            f"where at least {CORRELATION} is expected; export the bundle again and run its gate"
        )
    return sampled("logits_correlation", "", found, kind)
