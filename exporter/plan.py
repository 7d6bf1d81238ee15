"""What an export will be, each decision with its reason, before anything is computed.

`choose` is a function of data alone: the table of rules (`rules.toml`), the profile's figures, what was asked for, and
what `runtimes.predict` says a decoder needs. No rule knows a device by its name.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import profiles
from exporter.architecture import Architecture
from exporter.backend import NOTHING, Asked, Refused, Way, fit, ways
from exporter.errors import GochuError, PlanRefused, UsageError
from exporter.formats import APPLE_GPU, FORMATS, HEXAGON, NEURAL_ENGINE, XNNPACK, find_delegate
from exporter.npu import ane, hexagon
from exporter.npu.hexagon_plan import Compilation, Wishes, compilation
from exporter.quantization.algorithms import DEFAULT, find_algorithm
from exporter.quantization.calibration import text_digest, text_kind, text_name
from exporter.quantization.preparation import PREPARATIONS, finder, prepared_architecture, refuse_idle
from exporter.quantization.recipe import Decision, Recipe, calibrated
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.training import Training, gb, plan_training
from exporter.routes import (
    EVERY_COMPILER,
    Facts,
    Planned,
    against,
    choice,
    compilers,
    describe,
    entry,
    routes,
)
from profiles import Chip, Device
from runtimes.bundle import Alternative, Choice
from runtimes.predict import Decoder, Prediction, Weight, predict

CONTEXTS = (4096, 2048, 1024, 512, 256)  # tokens; what is planned unless asked for
ROOMY = 1024  # tokens; a scheme that leaves room for fewer gives way to the next
TIGHT = 0.8  # of the memory budget; more is planned only if a context of up to ROOMY tokens needs it
SHORTEST = 16  # tokens; less holds no chat template
APP_BYTES = 300_000_000  # what the app itself needs: its screen, its code, the tokenizer

_ROUNDED = {
    "onnx": "a scale for each token and group",
    "executorch": "a scale and a zero point for each token",
}
_ACTIVATIONS = {
    "int8": "values that meet integers are rounded to 8 bits, {scale} found on the way, which the CPU's integer dot "
    "products need; all else is float32",
    "float32": "the CPU's kernels for these weights compute in float32",
}


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
        return _calibrates(self.recipe, self.decisions)

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
    original, arch = arch, prepared_architecture(arch, asked.prepared)
    facts = describe(device, arch, compilers, _chips(device, asked))
    possible, refused = ways(arch, asked, facts)
    blocks = [way for way in possible if not (asked.context or 0) % way.form.block]
    if not blocks and asked.context:
        form = possible[0].form
        raise PlanRefused(
            f"a context of {asked.context} tokens was asked for, but {form.name} takes blocks of {form.block}: ask for "
            f"{-(-asked.context // form.block) * form.block}"
        )
    plan = _chosen(device, arch, asked, facts, blocks, list(refused))
    refuse_idle(asked.prepared, plan.decisions)
    training = plan_training(arch, plan.decisions, asked.qat_steps)
    choices = (*plan.choices, *_preparations(original, plan), *_training(training))
    return replace(plan, training=training, choices=choices)


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
    if asked.recipe and asked.recipe.prepare and asked.prepare:
        raise UsageError(
            f"recipe {asked.recipe.name} says itself what it prepares: drop --prepare or that line of it"
        )
    if asked.context is not None and not SHORTEST <= asked.context <= arch.context:
        raise PlanRefused(
            f"a context of {asked.context} tokens was asked for, but this model was trained for {arch.context}: "
            f"ask for {SHORTEST} to {arch.context}",
            "context-trained",
        )


def _chosen(
    device: Device | None,
    arch: Architecture,
    asked: Asked,
    facts: Facts,
    possible: Sequence[Way],
    refused: list[Refused],
) -> Plan:
    """The plan by the way that is wanted most of those that fit; where its compiler cannot have the model, the next."""
    found = _best(arch, device, possible, asked.context)
    if found is None:
        assert device, "without a device everything fits"
        raise _refusal(arch, device, possible, asked.context)
    way, best = found
    if HEXAGON not in way.delegates:
        if asked.wishes != Wishes():
            raise UsageError("--chips, --no-split and --allow-cpu-ops are for --delegate hexagon")
        return _plan(arch, device, asked, facts, way, best, refused, None)
    weights = {name: decision.scheme for name, decision in best.decisions.items()}
    try:
        compiled = compilation(arch, weights, device, asked.wishes, asked.calibration)
    except PlanRefused as error:
        others = [other for other in possible if other is not way]
        if not others or asked.delegate:
            raise
        refused.append(Refused(way.route, error, str(error), error.rule))
        return _chosen(device, arch, asked, facts, others, refused)
    return _plan(arch, device, asked, facts, way, best, refused, compiled)


@dataclass(frozen=True)
class _Candidate:
    recipe: Recipe
    planned: Planned | None
    decisions: Mapping[str, Decision]
    context: int
    prediction: Prediction


def _best(
    arch: Architecture, device: Device | None, possible: Sequence[Way], context: int | None
) -> tuple[Way, _Candidate] | None:
    """The way, recipe and context to plan with; None if nothing fits.

    The first recipe of the first way that fits easily with a roomy context, and the longest that does; else the first
    that fits at all with a roomy context, else with any.
    """
    budget = memory_budget(device)
    steps = {way.route.id: (context,) if context else _contexts(arch, way.form.block) for way in possible}
    for share, roomy, longer in ((TIGHT, True, True), (1, True, False), (1, False, False)):
        for way in possible:
            longest, shortest = steps[way.route.id][0], steps[way.route.id][-1]
            enough = max(shortest, min(ROOMY, longest))
            least, most = enough if roomy else shortest, longest if longer else enough
            for recipe, planned in way.recipes.items():
                for tokens in steps[way.route.id]:
                    if least <= tokens <= most:
                        step = _candidate(arch, way, recipe, tokens, None, planned)
                        if budget is None or step.prediction.memory.value <= share * budget:
                            return way, _candidate(arch, way, recipe, tokens, device, planned)
    return None


def _candidate(
    arch: Architecture,
    way: Way,
    recipe: Recipe,
    context: int,
    device: Device | None = None,
    planned: Planned | None = None,
) -> _Candidate:
    """What a recipe would need; its speed too if there is a device."""
    where: dict[str, Any] = {"engine": way.form.engine, "backend": way.form.backend}
    if device:
        where |= {"bandwidth": device.soc.bandwidth_bytes_per_s, "chip": device.soc.id}
    decisions, _ = _resolved(arch, recipe, way.form.name, way.delegates)
    prediction = _predicted(arch, recipe, way.form.name, way.delegates, context, **where)
    return _Candidate(recipe, planned, decisions, context, prediction)


@lru_cache(maxsize=512)
def _resolved(
    arch: Architecture, recipe: Recipe, form: str, delegates: tuple[str, ...]
) -> tuple[Mapping[str, Decision], Decoder]:
    """What each weight becomes, and the numbers for a prediction: alike for all devices."""
    decisions = recipe.resolve(arch, fit(FORMATS[form], delegates))
    return MappingProxyType(decisions), _decoder(arch, decisions)


@lru_cache(maxsize=16384)
def _predicted(
    arch: Architecture,
    recipe: Recipe,
    form: str,
    delegates: tuple[str, ...],
    context: int,
    **where: Any,
) -> Prediction:
    _, decoder = _resolved(arch, recipe, form, delegates)
    return predict(decoder, context, **where)


def _contexts(arch: Architecture, block: int) -> tuple[int, ...]:
    """The steps that the model can hold, longest first; its own length if that is shorter than all of them.

    A multiple of `block` tokens; PlanRefused if the model cannot hold one.
    """
    longest = min(arch.context, CONTEXTS[0]) // block * block
    if not longest:
        raise PlanRefused(
            f"this model was trained for {arch.context} tokens, and the format takes blocks of {block}: choose another"
        )
    return longest, *(step for step in CONTEXTS if step < longest)


def memory_budget(device: Device | None) -> int | None:
    """Bytes that the model may use in an app on `device`; None without a device: nothing is known then."""
    return max(device.app_memory_bytes - APP_BYTES, 0) if device else None


def _decoder(arch: Architecture, decisions: Mapping[str, Decision]) -> Decoder:
    """The numbers that a prediction needs. An embedding that is not the head too is only looked up."""
    weights = []
    for name, shape in arch.matrices():
        scheme = decisions[name].scheme
        looked_up = name == "embedding"
        multiplied = not looked_up or arch.tied
        weights.append(Weight(shape, scheme.bits, scheme.group, multiplied, looked_up, scheme.table))
    return Decoder(
        weights=tuple(weights),
        vectors=sum(length for _, length in arch.vectors()),
        layers=arch.layers,
        hidden=arch.hidden,
        ffn=arch.ffn,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        rotary=arch.rope.dim,
        softcap=arch.attention_softcap > 0,
    )


# refusing


def _refusal(arch: Architecture, device: Device, possible: Sequence[Way], context: int | None) -> PlanRefused:
    """Why nothing fits, and what would: less context, another scheme, another way, or else a smaller model."""
    budget = memory_budget(device) or 0
    powers = [1 << power for power in range(CONTEXTS[-1].bit_length() - 1, arch.context.bit_length())]
    every = tuple(sorted({arch.context, *powers}, reverse=True))
    wanted = context or min(ROOMY, arch.context)

    def fitting(way: Way, recipe: Recipe) -> _Candidate | None:
        steps = (_candidate(arch, way, recipe, tokens) for tokens in every if not tokens % way.form.block)
        return next((step for step in steps if step.prediction.memory.value <= budget), None)

    first = possible[0]
    needed = _needed(arch, first, next(iter(first.recipes)), context)
    for way in possible:
        recipe = next(iter(way.recipes))
        same = fitting(way, recipe)
        others = [step for name in way.form.schemes if (step := fitting(way, Recipe.uniform(name)))]
        offers = [same] if same else []
        offers += [step for step in others if step.context >= wanted][:1]
        if offers := offers or others[:1]:
            listed = " or ".join(f"{step.recipe.name} with up to {step.context} tokens" for step in offers)
            return _too_large(arch, device, needed, f"{listed} fits")
    way = possible[-1]
    least = _candidate(arch, way, Recipe.uniform(way.form.schemes[-1]), every[-1])
    size = int(arch.parameters * budget / least.prediction.memory.value)
    return _too_large(
        arch,
        device,
        needed,
        f"no scheme makes it fit ({least.recipe.name} with {least.context} tokens needs "
        f"{gb(least.prediction.memory.value)}), take a model of up to about {_count(size)} parameters",
    )


def _needed(arch: Architecture, way: Way, recipe: Recipe, context: int | None) -> _Candidate:
    """What does not fit: with the context that was asked for, or the shortest."""
    return _candidate(arch, way, recipe, context or _contexts(arch, way.form.block)[-1])


def _too_large(arch: Architecture, device: Device, needed: _Candidate, remedy: str) -> PlanRefused:
    """What does not fit, where, and what would."""
    memory = needed.prediction.memory.value
    return PlanRefused(
        f"the model ({_count(arch.parameters)} parameters) at {needed.recipe.name} with a context of {needed.context} "
        f"tokens needs {gb(memory)}, but on {device.name} it may use {gb(memory_budget(device) or 0)} "
        f"({_without_sources(device.app_memory_reason)}; {gb(APP_BYTES)} stay for the app): {remedy}",
        "ram-budget",
        memory,
    )


def _without_sources(reason: str) -> str:
    """A profile's reason without the sources in brackets, which the plan shows."""
    return re.sub(r" \([^()]*\)", "", reason)


# explaining


def _plan(
    arch: Architecture,
    device: Device | None,
    asked: Asked,
    facts: Facts,
    way: Way,
    chosen: _Candidate,
    refused: Sequence[Refused],
    compiled: Compilation | None,
) -> Plan:
    """All of it told; UsageError for a calibration text that nothing needs."""
    static = compiled is not None and compiled.route == hexagon.QUANTIZED
    calibrates = _calibrates(chosen.recipe, chosen.decisions)
    if asked.calibration is not None and not static and not calibrates:
        raise UsageError(
            "--calibration is for what is found on a text, gptq's weights, the scales of awq and smoothquant, and "
            "Hexagon's ranges of w8a16 and w4a16, and nothing here is: drop it, or ask for --algorithm gptq"
        )
    weights = {name: decision.scheme for name, decision in chosen.decisions.items()}
    choices = [
        _format(way, asked, refused),
        _backend(device, asked, facts, way, refused),
        *_npu(arch, device, way, chosen.context),
        _fallback(arch, way, chosen),
        _scheme(way, chosen),
        *_deviations(chosen.recipe, chosen.decisions),
        *_algorithms(chosen.decisions),
        _activations(way, chosen.decisions),
        _context(arch, device, chosen, asked),
        _entry_points(way),
        *_packages(way, chosen),
        *_positions(arch, chosen.context),
        *_windows(arch, chosen.context),
        _threads(device),
        *_memory(device, chosen),
        *(_calibration(asked.calibration) if calibrates else ()),
        *(compiled.choices(arch, weights) if compiled else ()),
    ]
    return Plan(
        device=device,
        format=way.form.name,
        engine=way.form.engine,
        delegates=way.delegates,
        scheme=chosen.recipe.name,
        recipe=chosen.recipe,
        decisions=dict(chosen.decisions),
        context=chosen.context,
        last_logits_only=True,
        choices=tuple(choices),
        prediction=chosen.prediction,
        warnings=tuple(_warnings(arch, device, asked, facts, way, chosen)),
        compilation=compiled,
        calibration=asked.calibration,
    )


def _warnings(
    arch: Architecture, device: Device | None, asked: Asked, facts: Facts, way: Way, chosen: _Candidate
) -> Iterator[str]:
    """What the user should know before it starts: what is slower than it could be, or tight."""
    if not device:
        return
    yield from (f"{rule.reason(facts)} [{rule.id}]" for rule in way.warned if rule.effect != "later")
    if asked.format or asked.delegate:
        try:
            first = ways(arch, replace(asked, format=None, delegate=None), facts)[0][0]
        except GochuError:
            first = way  # what was asked for can be made by this way alone
        order = [route.id for route in routes()]
        if order.index(first.route.id) < order.index(way.route.id):
            says = f"{first.route.title}: {first.route.says} [{first.route.id}]"
            yield f"unless asked otherwise it is planned for the {says}"
    if asked.scheme and not way.warned:
        usual = ways(arch, replace(asked, scheme=None), facts)[0][0]
        first_scheme = parse_scheme(next(iter(usual.recipes)).rules[-1].scheme)
        if (bits := parse_scheme(asked.scheme).bits) > first_scheme.bits:
            yield (
                f"{asked.scheme} has {bits / first_scheme.bits:g} times the bits of {first_scheme.name}, which would "
                f"be planned: {entry('bytes-per-token').says} [bytes-per-token]"
            )
    if not chosen.prediction.decode:
        yield f"the profile of {device.name} does not say its memory bandwidth: its speed is not predicted"
    needed, budget = chosen.prediction.memory.value, memory_budget(device)
    if HEXAGON in way.delegates and (most := _on_cpu(arch, chosen)) > (budget or 0):
        yield (
            f"the variant for the CPU takes {gb(most)}, more than {device.name} has for it: there this runs on the "
            "NPU or not at all [ram-budget]"
        )
    if budget and needed > TIGHT * budget:
        yield (
            f"tight: {gb(needed)} is {needed / budget:.0%} of the {gb(budget)} that the model may use on "
            f"{device.name}; a shorter context leaves more [ram-tight]"
        )


def _format(way: Way, asked: Asked, refused: Sequence[Refused]) -> Choice:
    """The format, and what stood against each of the others."""
    row = entry(f"format-{way.form.name}")
    against = {
        one.route.format: one for one in reversed(refused) if one.route.format not in ("", way.form.name)
    }
    ids, reasons = ["asked"] if asked.format else [], []
    if not asked.format and (first := against.get("onnx")):  # what is planned for all but Apple's devices
        ids, reasons = [first.rule], [first.reason]
    others = [Alternative(value=name, reason=one.reason, rule=one.rule) for name, one in against.items()]
    reason = "; ".join((*reasons, row.says))
    return choice("format", way.form.name, *ids, row.id, reason=reason, alternatives=tuple(others))


def _backend(
    device: Device | None, asked: Asked, facts: Facts, way: Way, refused: Sequence[Refused]
) -> Choice:
    """What computes, and why nothing else does."""
    others = _alternatives(facts, way, refused)
    reasons, ids = [way.route.says], [way.route.id]
    if asked.delegate is not None:
        reasons, ids = ["as asked for", *reasons], ["asked", *ids]
    npu = device.soc.npu if device else None
    if npu and way.on_cpu:
        own = {route.title for route in routes() if route.npu == npu.kind}
        first = next((one for one in others if one.value in own), None)
        by_rule = first is not None and first.rule != "in-order"
        ids.append(first.rule if first and by_rule else "asked")
        reasons.append(
            f"the NPU ({npu.name}) stands idle: {first.reason if first and by_rule else 'as asked for'}"
        )
    elif way.form.name == "coreml":
        other = APPLE_GPU if way.route.delegate == NEURAL_ENGINE else NEURAL_ENGINE
        reasons.append(f"--delegate {other} is the other layout")
        reasons.append("written here, and evaluated operation by operation, never run on Apple's hardware")
    elif HEXAGON in way.delegates:
        reasons.append("compiled here and run in Qualcomm's simulator, never on a phone")
    elif way.form.name == "executorch" and not way.on_cpu:
        reasons.append("it is written here and was never run on a phone")
    why, rules = "; ".join(reasons), tuple(dict.fromkeys(ids))
    return choice("backend", way.route.title, *rules, reason=why, alternatives=tuple(others))


def _alternatives(facts: Facts, way: Way, refused: Sequence[Refused]) -> list[Alternative]:
    """Of the routes that concern the device, those that were not taken: the first rule against each."""
    why = {one.route.id: one.alternative() for one in refused}
    found: dict[str, Alternative] = {}
    for route in routes():
        if route.title in (way.route.title, *found) or not route.concerns(facts):
            continue
        rules = against(route, facts)
        if route.id in why:
            found[route.title] = why[route.id]
        elif rules:
            found[route.title] = Alternative(
                value=route.title, reason=rules[0].reason(facts), rule=rules[0].id
            )
        else:
            reason = f"{entry('in-order').says}: {route.says}"
            found[route.title] = Alternative(value=route.title, reason=reason, rule="in-order")
    return list(found.values())


def _npu(arch: Architecture, device: Device | None, way: Way, context: int) -> Iterator[Choice]:
    """What Samsung's compiler would take of the model, where the phone has an Exynos chip."""
    if device and device.soc.npu and device.soc.npu.kind == "exynos" and way.form.name == "executorch":
        from exporter.npu import exynos

        told = exynos.route(device, arch, context=context)
        yield choice(told.topic, told.value, "exynos", reason=told.reason)


def _fallback(arch: Architecture, way: Way, chosen: _Candidate) -> Choice:
    """The variant for whatever cannot run the first one."""
    if HEXAGON in way.delegates:
        why = f"{entry('fallback-cpu').says}; there it takes {gb(_on_cpu(arch, chosen))} of memory"
        return choice("fallback", "CPU (ONNX Runtime)", "fallback-cpu", reason=why)
    if XNNPACK in way.delegates[1:]:
        return choice("fallback", find_delegate(XNNPACK).title, "fallback-cpu")
    if way.form.name in ("coreml", "coreai"):
        return choice("fallback", "none", "fallback-coreml")
    return choice("fallback", "none", "fallback-absent" if way.route.asked else "fallback-none")


def _on_cpu(arch: Architecture, chosen: _Candidate) -> float:
    """Bytes of memory that the ONNX variant for the CPU takes."""
    engine = FORMATS["onnx"].engine
    return _predicted(arch, chosen.recipe, "onnx", (), chosen.context, engine=engine).memory.value


def _scheme(way: Way, chosen: _Candidate) -> Choice:
    """The scheme, and those before and after it in the route's order."""
    if chosen.planned is None:
        return choice("scheme", chosen.recipe.name, "asked")
    order = [planned for planned in way.recipes.values() if planned]
    place = order.index(chosen.planned)
    others = [
        Alternative(value=one.scheme, reason="it leaves too little memory", rule="ram-budget")
        if index < place
        else Alternative(value=one.scheme, reason=entry("in-order").says, rule="in-order")
        for index, one in enumerate(order)
        if index != place
    ]
    return choice("scheme", chosen.recipe.name, chosen.planned.id, alternatives=tuple(others))


def _memory(device: Device | None, chosen: _Candidate) -> Iterator[Choice]:
    """The share of the budget that is used."""
    if device and (budget := memory_budget(device)):
        needed = chosen.prediction.memory.value
        ids = ("ram-budget", "ram-tight") if needed > TIGHT * budget else ("ram-budget",)
        why = f"{device.app_memory_reason}; {gb(APP_BYTES)} stay for the app"
        yield choice("memory", f"{gb(needed)} of {gb(budget)}", *ids, reason=why)


def _packages(way: Way, chosen: _Candidate) -> Iterator[Choice]:
    """How many packages the Neural Engine's limit makes of a model, by its predicted size."""
    if NEURAL_ENGINE in way.delegates:
        count = -(-int(chosen.prediction.file.value) // ane.limits().package_bytes)
        yield choice("packages", str(count) if count == 1 else f"about {count}", "ane-package-bytes")


def _deviations(recipe: Recipe, decisions: Mapping[str, Decision]) -> Iterator[Choice]:
    """One choice for each group of tensors that got another scheme than the recipe's last rule, which is for all."""
    usual = parse_scheme(recipe.rules[-1].scheme)
    groups: dict[Decision, list[str]] = {}
    for name, decision in decisions.items():
        if decision.scheme.name != usual.name:
            groups.setdefault(decision, []).append(name)
    for decision, names in groups.items():
        kinds = sorted({name.split(".", 2)[-1] for name in names})
        yield choice(
            "tensors",
            f"{len(names)} tensor{'s' if len(names) > 1 else ''} at {decision.scheme.name}",
            "group-divides",
            reason=f"{', '.join(kinds)}: {decision.note or 'as the recipe says'}",
        )


def _activations(way: Way, decisions: Mapping[str, Decision]) -> Choice:
    delegates, form = way.delegates, way.form
    if HEXAGON in delegates:
        route = hexagon.common_route(decision.scheme for decision in decisions.values())
        value = "uint16" if route == hexagon.QUANTIZED else "float16"
        return choice("activations", value, "activations-hexagon", reason=hexagon.reason("routes", route))
    if way.form.name == "coreai" or (delegates and delegates[0] != XNNPACK):
        title = find_delegate(delegates[0]).title if delegates else "Core AI"
        why = f"{title} unfolds the weights where it multiplies by them"
        value = "float" if form.name == "executorch" else "float16"
        return choice("activations", value, "activations-unfolded", reason=why)
    kinds = sorted({decision.scheme.activations for decision in decisions.values()}, reverse=True)
    reasons = [
        _ACTIVATIONS["int8" if kind == "int8" else "float32"].format(scale=_ROUNDED[form.name])
        for kind in kinds
    ]
    return choice(
        "activations", " and ".join(kinds), "activations-cpu", reason="; ".join(dict.fromkeys(reasons))
    )


def _algorithms(decisions: Mapping[str, Decision]) -> Iterator[Choice]:
    """How integers and tables are found, where it is not the schemes' own way; floats are only converted."""
    found = {made.algorithm: made.scheme for made in decisions.values() if not made.scheme.is_float}
    if found.keys() <= {DEFAULT}:
        return
    for name, scheme in found.items():
        some = [tensor for tensor, made in decisions.items() if made.algorithm == name]
        where = "" if len(found) == 1 else f" for {len(some)} tensor{'s' if len(some) > 1 else ''}"
        yield choice("algorithm", name + where, "algorithm", reason=find_algorithm(name, scheme).reason)


def _preparations(arch: Architecture, plan: Plan) -> Iterator[Choice]:
    """What is done to the weights of `arch` before they are quantized."""
    for name in plan.recipe.prepare:
        made = PREPARATIONS[name]
        reason = "; ".join(filter(None, (made.reason, made.note(arch, plan.decisions))))
        yield choice("preparation", name, "preparation", reason=reason)


def _training(training: Training | None) -> Iterator[Choice]:
    if training:
        yield choice("training", training.value, "training", reason=training.reason)


def _calibrates(recipe: Recipe, decisions: Mapping[str, Decision]) -> bool:
    """Whether weights, or scales folded into them, are found on a calibration text."""
    return bool(calibrated(decisions)) or finder(recipe.prepare) is not None


def _calibration(texts: Path | None) -> Iterator[Choice]:
    """The text that weights are calibrated on."""
    why = f"the layers' activations on it say which weights matter: {text_kind(texts)}; the model runs on it here, "
    why += "layer by layer"
    yield choice("calibration", text_name(texts), "calibration", reason=why)


def _context(arch: Architecture, device: Device | None, chosen: _Candidate, asked: Asked) -> Choice:
    per_token = chosen.prediction.cache.value / chosen.context
    cost = f"each token takes {per_token / 1e3:.1f} kB of KV cache"
    if asked.context is not None:
        id, why = "asked", f"as asked for; {cost}"
    elif chosen.context == arch.context:
        id, why = "context-trained", f"all that the model was trained for; {cost}"
    elif chosen.context == CONTEXTS[0]:
        id = "context-chat"
        why = f"enough for a chat; {cost}, the model could hold {arch.context} tokens"
    else:
        id = "context-memory"
        why = f"more does not fit well in the memory of {device.name if device else 'this computer'}; {cost}"
    return choice("context", f"{chosen.context} tokens", id, reason=why)


def _entry_points(way: Way) -> Choice:
    if way.form.name == "coreml":
        why = "shapes are fixed: a prompt goes in chunks of 64 tokens, the last one padded, and then token by token"
        return choice("entry points", "prefill and decode", "fixed-shapes", reason=why)
    if way.form.name == "coreai":
        why = (
            "shapes are fixed: blocks of 64 tokens fill the cache with a prompt, blocks of 8 give the logits"
        )
        return choice("entry points", "load, gather, prompt and extend", "fixed-shapes", reason=why)
    if HEXAGON in way.delegates:
        why = (
            "shapes are fixed: all but the last token of a prompt go in chunks of 128, the last one padded, without a "
            "head; the embedding is looked up on the CPU, since the NPU takes no quantized table"
        )
        return choice("entry points", "embed, prefill and decode", "fixed-shapes", reason=why)
    if way.delegates and not find_delegate(way.delegates[0]).any_length:
        return choice("entry points", "decode", "no-any-length")
    why = "one graph takes any number of tokens, a prompt or the one just chosen, and gives the logits of the last: "
    why += "those before it are never read"
    return choice("entry points", "decode", "any-length", reason=why)


def _positions(arch: Architecture, context: int) -> Iterator[Choice]:
    """LongRoPE has two sets of frequencies; a graph has one of them for all its positions."""
    if arch.rope.long_inv_freq is None:
        return
    original = arch.rope.original_context
    if arch.rope.is_long(context):
        value, why = "long factors", f"the context is longer than the {original} tokens before the extension"
    else:
        value = "short factors"
        why = f"the context is within the {original} tokens before the extension, where these are exact"
    yield choice("rope", value, "longrope", reason=why)


def _windows(arch: Architecture, context: int) -> Iterator[Choice]:
    """Layers that see only the last tokens; of no effect where the context is no longer than the window."""
    windows = [window for window in arch.windows if 0 < window < context]
    if windows:
        value = f"{max(windows)} tokens in {len(windows)} of {arch.layers} layers"
        yield choice("sliding window", value, "sliding-window")


def _threads(device: Device | None) -> Choice:
    cores = device.soc.performance_cores if device else None
    if device is None or cores is None:
        return choice("threads", "found when it runs", "fast-cores", reason="one for each fast core")
    return choice("threads", str(cores), "fast-cores", reason=_cores(device.soc))


def _cores(chip: Chip) -> str:
    slow = [] if chip.cpu is None else [c for c in chip.cpu.clusters if not c.performance]
    if not slow:
        return f"one for each core of the {chip.name}"
    listed = " and ".join(f"{cluster.count} {cluster.core} cores" for cluster in slow)
    return f"one for each fast core of the {chip.name}; {listed} would hold them up"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
