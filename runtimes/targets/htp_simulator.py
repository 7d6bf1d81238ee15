"""See in Qualcomm's simulator of its NPU whether a Hexagon variant is right and whole on the NPU; never how fast.

The simulator is inside the package onnxruntime-qnn for Linux x86-64. What runs are the graphs that were compiled
(`Compiled.sources`): compiled again for the same chip, by the same compiler. A token takes it up to minutes, which says
nothing of a phone, so no time is a figure here.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from runtimes import checksums, extras, hexagon, measuring, qnn
from runtimes.bundle import Bundle, Strict, Variant
from runtimes.engines import open_engine
from runtimes.errors import TargetError
from runtimes.measurement import Answer, Backend, Figure, Mark, Measurement, Method, sampled
from runtimes.workload import Workload, preset, prompt_ids

if TYPE_CHECKING:
    import numpy as np

    from runtimes.engines import Engine

TARGET = "htp-simulator"
_PROMPT_TOKENS, _NEW_TOKENS = 16, 8  # at most, where nothing was asked
_LARGE = 100_000_000  # parameters, above which it is two new tokens


class Job(Strict):
    """What the simulating process is told: prompts to answer, or else the ids of one."""

    bundle: str
    variant: str
    ids: tuple[int, ...]
    new_tokens: int
    prompts: tuple[str, ...]


class Seen(Strict):
    """What it says. `placed`: of each function, operations by processor; `correlations`: of each step's logits, the
    simulated and the CPU's, which may be no number."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    engine: str
    placed: dict[str, dict[str, int]]
    correlations: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    answers: tuple[Answer, ...]


def check() -> None:
    """TargetError if this machine cannot have the simulator, MissingExtra if it has not."""
    if not qnn.simulated():
        raise TargetError(
            "the simulator of Qualcomm's NPU is for x86-64 alone, and this machine is another: take one that is"
        )
    extras.check(qnn.LIBRARY, qnn.EXTRA)


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "smoke",
    *,
    variant: str | None = None,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Simulate a bundle's Hexagon variant (default: the first): one measurement, whatever the workload's cases.

    The workload's prompts are answered greedily, else a prompt of its first case, clipped short. Figures, all
    simulated: npu_operations, npu_share (percent), logits_correlation of each step with the same graphs on the CPU;
    `where.backend` has the operations of each function. `allow_fallback`: operations on the CPU are a mark, not an
    error. Raises TargetError (no simulator here, an operation on the CPU, other logits), UsageError, MissingExtra,
    BundleError, ChecksumError, EngineError.
    """
    bundle = Bundle.open(bundle_path)
    chosen = hexagon.named(bundle, variant) if variant else hexagon.variants(bundle)[0]
    check()
    workload = preset(workload) if isinstance(workload, str) else workload
    checksums.check(bundle, chosen)
    progress(f"simulating {chosen.name}")
    seen = Seen.model_validate_json(
        measuring.run_apart("runtimes.targets.htp_simulator", _job(bundle, chosen, workload))
    )
    where = f"the simulated {chosen.chips[0]}"
    return [
        measuring.measurement(
            measuring.subject(bundle, chosen),
            measuring.place(
                TARGET, seen.engine, None, Backend(requested="NPU", effective=seen.placed), chosen.chips[0]
            ),
            _method(workload, chosen, seen),
            [
                *_residency(seen),
                hexagon.correlation_figure(list(seen.correlations), where, "simulated"),
            ],
            bundle,
            marks=_marks(seen, where, allow_fallback),
            answers=seen.answers,
            on=TARGET,
            variant=variant,
            allow_fallback=allow_fallback,
        )
    ]


def _job(bundle: Bundle, variant: Variant, workload: Workload) -> Job:
    """The workload's prompts, or a prompt of its first case, cut as short as a simulator wants it."""
    case, _ = workload.clipped(variant.context)[0]
    most = 2 if bundle.manifest.model.parameters > _LARGE else _NEW_TOKENS
    length = min(case.prompt_tokens, _PROMPT_TOKENS)
    return Job(
        bundle=str(bundle.path.resolve()),
        variant=variant.name,
        ids=tuple(prompt_ids(length, bundle.manifest.model.vocab)),
        new_tokens=workload.answer_tokens if workload.prompts else min(case.new_tokens, most),
        prompts=workload.prompts,
    )


def _method(workload: Workload, variant: Variant, seen: Seen) -> Method:
    said = "the simulator tells what the NPU computes, not how fast"
    return Method(
        workload=workload.name,
        prompt_tokens=seen.prompt_tokens,
        new_tokens=seen.new_tokens,
        context=variant.context,
        warmup=0,
        repeats=1,
        notes=(said,) if workload.prompts else (said, "of the workload, a short prompt of its first case"),
    )


def _residency(seen: Seen) -> list[Figure]:
    on = sum(each.get("NPU", 0) for each in seen.placed.values())
    of = sum(sum(each.values()) for each in seen.placed.values())
    return [
        sampled("npu_operations", "operations", [on], "simulated"),
        sampled("npu_share", "%", [100 * on / of], "simulated"),
    ]


def _marks(seen: Seen, where: str, allow_fallback: bool) -> list[Mark]:
    """TargetError if an operation is left to the CPU and that is not allowed."""
    elsewhere = {name: each["CPU"] for name, each in seen.placed.items() if each.get("CPU")}
    if elsewhere and not allow_fallback:
        listed = ", ".join(f"{count} of {name}" for name, count in elsewhere.items())
        raise TargetError(
            f"{where} leaves operations to the CPU ({listed}): choose another scheme, or accept that with "
            "--allow-fallback"
        )
    return ["cpu_fallback"] if elsewhere else []


class Witness:
    """An engine that remembers what it was asked and what it said, so that another can be asked the same."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.choice, self.context, self.vocab = engine.choice, engine.context, engine.vocab
        self.threads = engine.threads
        self._asked: list[tuple[str, Any]] = []
        self.said: list[np.ndarray] = []  # logits

    @property
    def position(self) -> int:
        return self._engine.position

    @property
    def version(self) -> str:
        return self._engine.version

    def prefill(self, tokens: Sequence[int]) -> "np.ndarray":
        return self._ask("prefill", list(tokens))

    def decode(self, token: int) -> "np.ndarray":
        return self._ask("decode", token)

    def _ask(self, verb: str, given: Any) -> "np.ndarray":
        self._asked.append((verb, given))
        logits: np.ndarray = getattr(self._engine, verb)(given)
        self.said.append(logits)
        return logits

    def reset(self, position: int = 0) -> None:
        self._asked.append(("reset", position))
        self._engine.reset(position)

    def close(self) -> None:
        self._engine.close()

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the longest prompt, and of the longest answer."""
        prompts, answers = [0], [0]
        for verb, given in self._asked:
            if verb == "prefill":
                prompts.append(len(given))
                answers.append(1)
            elif verb == "decode":
                answers[-1] += 1
        return max(prompts), max(answers)

    def ask_again(self, other: "Engine") -> "list[np.ndarray]":
        """What another engine says to the same."""
        found = (getattr(other, verb)(given) for verb, given in self._asked)
        return [logits for logits in found if logits is not None]


def run(job: Job) -> Seen:
    """Do the simulating, in this process."""
    from runtimes.engines.qnn import QnnEngine

    bundle = Bundle.open(job.bundle)
    simulated = open_engine(bundle, job.variant, on=TARGET)
    assert isinstance(simulated, QnnEngine)
    witness = Witness(simulated)
    answers = measuring.ask(bundle, witness, job.prompts, job.new_tokens)
    if not answers:
        logits = witness.prefill(job.ids)
        for _ in range(job.new_tokens - 1):
            logits = witness.decode(int(logits.argmax()))
    exact = open_engine(bundle, job.variant, exact=True, on=TARGET)
    prompt_tokens, new_tokens = witness.lengths
    return Seen(
        engine=simulated.version,
        placed=simulated.placed(),
        correlations=tuple(hexagon.correlations(witness.said, witness.ask_again(exact))),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        answers=answers,
    )


if __name__ == "__main__":
    sys.exit(measuring.answer(Job, run))
