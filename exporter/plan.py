"""What an export will be, each decision with its reason, before anything is computed.

`choose` is a function of data alone: the table of rules (`rules.toml`), the profile's figures, what was asked for, and
what `runtimes.predict` says a decoder needs. No rule knows a device by its name. `exporter.backend` finds the ways that
a model can take, `exporter.sizing` what of it fits, and `exporter.reasons` tells both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import profiles
from exporter import reasons
from exporter.architecture import Architecture
from exporter.backend import NOTHING, Asked, Refused, Request, Way, ways
from exporter.errors import PlanRefused, UsageError
from exporter.formats import HEXAGON
from exporter.npu import hexagon
from exporter.npu.hexagon_plan import Compilation, Wishes, compilation
from exporter.quantization.calibration import text_digest
from exporter.quantization.preparation import needs_text, prepared_architecture, refuse_idle
from exporter.quantization.recipe import Decision, Recipe
from exporter.quantization.training import Training, plan_training
from exporter.routes import EVERY_COMPILER, compilers, describe
from exporter.sizing import Candidate, best, memory_budget, too_large
from profiles import Chip, Device
from runtimes.bundle import Choice
from runtimes.predict import Prediction

SHORTEST = 16  # tokens; less holds no chat template


@dataclass(frozen=True)
class Plan:
    """Everything that determines an export, why it is so, and what it will need.

    `device` is None for this computer. `decisions`: canonical tensor name -> scheme and algorithm.
    `delegates`: which compute an ExecuTorch program, a variant for each, the preferred first; `context`: tokens
    that the graph can hold. `warnings`: what the user should know before it starts. `compilation`: what an NPU's
    compiler is told, where one is used here; `calibration`: the user's text for what is calibrated; `training`: how
    long weights are trained, where they are.
    """

    device: Device | None
    format: str
    engine: str
    delegates: tuple[str, ...]
    scheme: str
    recipe: Recipe
    decisions: dict[str, Decision]
    context: int
    last_logits_only: bool
    choices: tuple[Choice, ...]
    prediction: Prediction
    warnings: tuple[str, ...]
    compilation: Compilation | None = None
    calibration: Path | None = None
    training: Training | None = None

    @property
    def calibrates(self) -> bool:
        """Whether weights, or scales folded into them, are found on a calibration text."""
        return needs_text(self.recipe, self.decisions)

    def fingerprint(self) -> dict[str, Any]:
        """All that determines the exported files, as JSON: equal plans of one model write equal files.

        RecipeError if the calibration text cannot be read.
        """
        return {
            "device": self.device.id if self.device else None,
            "format": self.format,
            "engine": self.engine,
            "delegates": list(self.delegates),
            "scheme": self.scheme,
            "recipe": self.recipe.model_dump(mode="json"),
            "context": self.context,
            "last_logits_only": self.last_logits_only,
            "calibration": text_digest(self.calibration),
            "training_steps": self.training.steps if self.training else None,
            "compilation": self.compilation.fingerprint() if self.compilation else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON, for scripts."""
        rows = [
            {"name": row.name, "unit": row.unit, "value": row.value, "low": row.low, "high": row.high}
            | {"explain": row.explain}
            for row in self.prediction.rows()
        ]
        return {
            **self.fingerprint(),
            "choices": [choice.model_dump(mode="json") for choice in self.choices],
            "prediction": rows,
            "not_predicted": dict(self.prediction.unknown),
            "memory_budget_bytes": memory_budget(self.device),
            "warnings": list(self.warnings),
        }


def make_plan(
    arch: Architecture,
    *,
    device: str | None = None,
    scheme: str | None = None,
    algorithm: str = "rtn",
    context: int | None = None,
    recipe: Recipe | None = None,
    format: str | None = None,
    delegate: str | None = None,
    wishes: Wishes | None = None,
    calibration: Path | None = None,
    prepare: tuple[str, ...] = (),
    qat_steps: int | None = None,
) -> Plan:
    """Decide what is not given, and refuse what cannot be.

    `device`: a name, model code or chip that `profiles.find` knows; None plans for this computer, without a
    memory budget. `context` in tokens. `delegate`: what computes instead of the CPU, which it falls back to, or
    "cpu" for that alone; `wishes`: what is asked of its compiler, for delegate "hexagon". `calibration`: a text in
    place of the one that is shipped, for what is calibrated. `prepare`: what is done to the weights before
    (`quantization.preparation`), where the recipe does not say. `qat_steps`: how long algorithm "qat" trains.

    Raises:
        PlanRefused: the model does not fit the device's app memory as asked (the message says what would), or
            the context is not one that the model can have, or the engine cannot run its attention.
        RecipeError: no such scheme, algorithm or preparation, or a recipe that does not fit the model.
        UsageError: a recipe together with what it says itself; no such format or delegate; a calibration text, or
            training steps, that nothing needs.
        UnknownDevice, AmbiguousDevice: see `profiles.find`.
    """
    how = (wishes or Wishes(), calibration, prepare, qat_steps)
    asked = Asked(scheme, algorithm, context, recipe, format, delegate, *how)
    target = profiles.find(device) if device is not None else None
    return choose(target, arch, asked, compilers())


def choose(
    device: Device | None,
    arch: Architecture,
    asked: Asked = NOTHING,
    compilers: frozenset[str] = EVERY_COMPILER,
) -> Plan:
    """Decide what is not asked for, and refuse what cannot be; a pure function, and total but for its refusals.

    `compilers`: those that are there, by delegate (see `exporter.routes`). Raises as `make_plan`, but for what is not
    known by its name there.
    """
    _require_sense(arch, asked)
    prepared = prepared_architecture(arch, asked.prepared)
    facts = describe(device, prepared, compilers, _chips(device, asked))
    request = Request(arch, prepared, device, asked, facts)
    possible, refused = ways(request)
    return _first_that_compiles(request, _in_blocks(possible, asked.context), refused)


def _chips(device: Device | None, asked: Asked) -> tuple[Chip, ...]:
    """The chips that are compiled for in place of a device's own, where that is asked of a Hexagon NPU."""
    own = device.soc.npu.kind if device and device.soc.npu else ""
    if HEXAGON not in (asked.delegate, own):
        return ()
    return tuple(chip for chip in profiles.chips() if chip.id in map(str.lower, asked.wishes.chips))


def _require_sense(arch: Architecture, asked: Asked) -> None:
    """UsageError or PlanRefused for what no device could have."""
    if asked.recipe and (asked.scheme or asked.algorithm != "rtn"):
        raise UsageError("a recipe says scheme and algorithm itself: give a recipe, or those two")
    if asked.context is not None and not SHORTEST <= asked.context <= arch.context:
        raise PlanRefused(
            f"a context of {asked.context} tokens was asked for, but this model was trained for {arch.context}: "
            f"ask for {SHORTEST} to {arch.context}",
            "context-trained",
        )


def _in_blocks(possible: Sequence[Way], context: int | None) -> list[Way]:
    """The ways whose format takes the context that is asked for; PlanRefused if none does."""
    found = [way for way in possible if not (context or 0) % way.form.block]
    if context and not found:
        form = possible[0].form
        raise PlanRefused(
            f"a context of {context} tokens was asked for, but {form.name} takes blocks of {form.block}: ask for "
            f"{-(-context // form.block) * form.block}"
        )
    return found


def _first_that_compiles(request: Request, possible: Sequence[Way], refused: tuple[Refused, ...]) -> Plan:
    """The plan by the way that is wanted most of those that fit; where its compiler cannot have the model, the next."""
    asked, chosen = request.asked, best(request, possible)
    if chosen is None:
        assert request.device, "without a device everything fits"
        raise too_large(request, request.device, possible)
    if HEXAGON not in chosen.way.delegates:
        if asked.wishes != Wishes():
            raise UsageError("--chips, --no-split and --allow-cpu-ops are for --delegate hexagon")
        return _plan(request, chosen, refused, None)
    try:
        compiled = compilation(
            request.arch, chosen.schemes(), request.device, asked.wishes, asked.calibration
        )
    except PlanRefused as error:
        others = [way for way in possible if way is not chosen.way]
        if not others or asked.delegate:
            raise
        against = Refused(chosen.way.route, error, str(error), error.rule)
        return _first_that_compiles(request, others, (*refused, against))
    return _plan(request, chosen, refused, compiled)


def _plan(
    request: Request, chosen: Candidate, refused: Sequence[Refused], compiled: Compilation | None
) -> Plan:
    """All of it told; UsageError or RecipeError for a text, a preparation or training steps that nothing needs."""
    asked = request.asked
    static = compiled is not None and compiled.route == hexagon.QUANTIZED
    if asked.calibration is not None and not static and not needs_text(chosen.recipe, chosen.decisions):
        raise UsageError(
            "--calibration is for what is found on a text, gptq's weights, the scales of awq and smoothquant, and "
            "Hexagon's ranges of w8a16 and w4a16, and nothing here is: drop it, or ask for --algorithm gptq"
        )
    refuse_idle(asked.prepared, chosen.decisions)
    training = plan_training(request.arch, chosen.decisions, asked.qat_steps)
    return Plan(
        device=request.device,
        format=chosen.way.form.name,
        engine=chosen.way.form.engine,
        delegates=chosen.way.delegates,
        scheme=chosen.recipe.name,
        recipe=chosen.recipe,
        decisions=dict(chosen.decisions),
        context=chosen.context,
        last_logits_only=True,
        choices=tuple(reasons.choices(request, chosen, refused, compiled, training)),
        prediction=chosen.prediction,
        warnings=tuple(reasons.warnings(request, chosen)),
        compilation=compiled,
        calibration=asked.calibration,
        training=training,
    )
