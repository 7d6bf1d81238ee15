"""What an export will be, each decision with its reason, before anything is computed.

The rules are plain: the tables below, the profile's figures, and what `runtimes.predict` says a decoder needs.
No rule knows a device by its name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import profiles
from exporter.architecture import Architecture
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.formats import (
    APPLE_GPU,
    DELEGATES,
    FORMATS,
    HEXAGON,
    NEURAL_ENGINE,
    XNNPACK,
    Delegate,
    Format,
    find_delegate,
    find_format,
)
from exporter.npu import ane, hexagon
from exporter.npu.hexagon_plan import Compilation, Wishes, compilation
from exporter.quantization.algorithms import DEFAULT, TABLE_DEFAULT, find_algorithm
from exporter.quantization.calibration import text_digest, text_name
from exporter.quantization.recipe import Decision, Fit, Recipe, calibrated
from exporter.quantization.scheme import Scheme, parse_scheme
from exporter.quantization.training import Training, gb, plan_training
from profiles import Chip, Device
from runtimes.bundle import Choice
from runtimes.predict import Decoder, Prediction, Weight, predict

HEAD_MULTIPLE = 16  # onnxruntime 1.32, contrib_ops/cpu/bert/group_query_attention_helper.h
CONTEXTS = (4096, 2048, 1024, 512, 256)  # tokens; what is planned unless asked for
ROOMY = 1024  # tokens; a scheme that leaves room for fewer gives way to the next
TIGHT = 0.8  # of the memory budget; more is planned only if a context of up to ROOMY tokens needs it
SHORTEST = 16  # tokens; less holds no chat template
SMALL_MODEL = 100_000_000  # parameters
APP_BYTES = 300_000_000  # what the app itself needs: its screen, its code, the tokenizer

# Planned when no scheme is asked for: the first that leaves room for a context of ROOMY tokens.
_SCHEMES = {
    "small": {
        "int8": "the model is small: its weights cost little memory, and small models lose most at 4 bits",
    },
    "large": {
        "int4": "groups of 32 share a scale: under a third of float16's bytes, all of which each token reads",
        "int4-g128": "groups of 128 share a scale: int4, which has four times as many, leaves too little memory",
        "pal4-g8": "8 outputs share a lookup table of 16 values: a quarter of float16's bytes, which the Neural Engine "
        "unfolds as it multiplies",
    },
}
_FORMATS = {
    "onnx": "one file for Android, iOS, Linux, macOS and Windows; ONNX Runtime maps its weights from the file and "
    "multiplies by the integers as they are stored",
    "executorch": "one program for Android, iOS and Linux that ExecuTorch's own LLM runner opens; XNNPACK packs the "
    "integers anew when it loads them",
    "coreml": "a package for iOS 18 and macOS 15 that Xcode and Core ML open, for the Neural Engine or the GPU",
    "coreai": "an asset for iOS 27 and macOS 27 with the entry points that Apple's own runner of LLMs calls",
}
_CPU = {"onnx": "CPU (ONNX Runtime)", "executorch": "CPU (ExecuTorch, XNNPACK)"}
# Why the NPU stands idle, by its kind.
_BACKENDS = {
    "hexagon": "the {npu} NPU stands idle: this is made for the CPU; --delegate hexagon compiles for the NPU too",
    "ane": "this runs on the CPU; the {npu} is reached through Core ML, the better route on Apple's chips: --format "
    "coreml, or --delegate coreml within ExecuTorch",
    "exynos": "the {npu} stands idle: this is made for the CPU, and not for Samsung's compiler",
    "apu": "the {npu} stands idle: this is made for the CPU; --delegate mediatek reaches it, where MediaTek's SDK is "
    "installed",
    "tpu": "the {npu} stands idle: this is made for the CPU, and no format for Google's compiler is exported",
}
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
    qat_steps: int | None = None,
) -> Plan:
    """Decide what is not given, and refuse what cannot be.

    `device`: a name, model code or chip that `profiles.find` knows; None plans for this computer, without a
    memory budget. `context` in tokens. `delegate`: what computes instead of the CPU, which it falls back to;
    `wishes`: what is asked of its compiler, for delegate "hexagon". `calibration`: a text in place of the one that is
    shipped, for what is calibrated. `qat_steps`: how long algorithm "qat" trains.

    Raises:
        PlanRefused: the model does not fit the device's app memory as asked (the message says what would), or
            the context is not one that the model can have, or the engine cannot run its attention.
        RecipeError: no such scheme or algorithm, or a recipe that does not fit the model.
        UsageError: a recipe together with a scheme or an algorithm; no such format or delegate; a calibration text,
            or training steps, that nothing needs.
        UnknownDevice, AmbiguousDevice: see `profiles.find`.
    """
    target = profiles.find(device) if device is not None else None
    asked_rules = recipe.rules if recipe else Recipe.uniform(scheme).rules if scheme else ()
    schemes = [parse_scheme(rule.scheme) for rule in asked_rules]
    form, why_format = _format(arch, target, schemes, format, delegate)
    chosen_delegate = _delegate(form, delegate, target, schemes)
    if recipe and (scheme or algorithm != "rtn"):
        raise UsageError("a recipe says scheme and algorithm itself: give a recipe, or those two")
    if context is not None and not SHORTEST <= context <= arch.context:
        raise PlanRefused(
            f"a context of {context} tokens was asked for, but this model was trained for {arch.context}: "
            f"ask for {SHORTEST} to {arch.context}"
        )
    if recipe:
        offered = {recipe: "as the recipe says"}
    elif scheme:
        offered = {Recipe.uniform(scheme, algorithm): "as asked for"}
    else:
        size = "small" if arch.parameters < SMALL_MODEL else "large"
        usual = _default_schemes(size, chosen_delegate)
        offered = {Recipe.uniform(name, algorithm): why for name, why in usual.items()}
    delegates = _delegates(chosen_delegate, offered)
    offers = chosen_delegate.schemes if chosen_delegate else form.schemes
    by_quality = tuple(sorted(offers, key=lambda name: -parse_scheme(name).bits))
    engine = "qnn" if HEXAGON in delegates else form.engine
    form = replace(form, engine=engine, fit=_fit(form, delegates), schemes=by_quality)
    if wishes not in (None, Wishes()) and HEXAGON not in delegates:
        raise UsageError("--chips, --no-split and --allow-cpu-ops are for --delegate hexagon")
    if context is not None and context % form.block:
        raise PlanRefused(
            f"a context of {context} tokens was asked for, but {form.name} takes blocks of {form.block}: ask for "
            f"{-(-context // form.block) * form.block}"
        )
    contexts = (context,) if context else _contexts(arch, form.block)
    chosen = _choose(arch, target, form, offered, contexts)
    if chosen is None:
        assert target, "without a device everything fits"
        raise PlanRefused(_refusal(arch, target, form, next(iter(offered)), contexts, context))
    asked = context is not None
    plan = _plan(arch, target, form, delegates, chosen, why_format, offered[chosen.recipe], asked)
    static = HEXAGON in delegates and any(made.scheme.is_static for made in plan.decisions.values())
    if calibration is not None and not static and not calibrated(plan.decisions):
        raise UsageError(
            "--calibration is for what is found on a text, gptq's weights and Hexagon's ranges of w8a16 and w4a16, and "
            "nothing here is: drop it, or ask for --algorithm gptq"
        )
    training = plan_training(arch, plan.decisions, qat_steps)
    found_on_text = (*_calibration(plan.decisions, calibration), *(training.choices() if training else ()))
    plan = replace(plan, calibration=calibration, training=training, choices=(*plan.choices, *found_on_text))
    if HEXAGON not in delegates:
        return plan
    weights = {name: decision.scheme for name, decision in plan.decisions.items()}
    compiled = compilation(arch, weights, target, wishes or Wishes(), calibration)
    return replace(plan, compilation=compiled, choices=(*plan.choices, *compiled.choices(arch, weights)))


def _format(
    arch: Architecture,
    device: Device | None,
    schemes: Sequence[Scheme],
    asked: str | None,
    delegate: str | None,
) -> tuple[Format, str]:
    """The format and why: the one asked for, or that has the delegate; Core ML for Apple's devices, else ONNX unless
    it cannot hold the model."""
    fits = arch.head_dim % HEAD_MULTIPLE == 0
    hindrance = (
        f"the model's attention heads have {arch.head_dim} dimensions, and onnxruntime's GroupQueryAttention takes "
        f"multiples of {HEAD_MULTIPLE} on the CPU"
    )
    if asked is not None:
        form = find_format(asked)
        if form.name == "onnx" and not fits:
            raise PlanRefused(f"{hindrance}: export it with --format executorch")
        return form, _FORMATS[form.name]
    if delegate is not None:
        name = find_delegate(delegate).format
        return FORMATS[name], f"the one that has delegate {delegate}; {_FORMATS[name]}"
    if device is not None and device.os in ("ios", "macos") and _takes(find_delegate(APPLE_GPU), schemes):
        return FORMATS["coreml"], f"{device.name} has Core ML; {_FORMATS['coreml']}"
    if not fits:
        return FORMATS["executorch"], f"{hindrance}; {_FORMATS['executorch']}"
    return FORMATS["onnx"], _FORMATS["onnx"]


def _delegate(
    form: Format, asked: str | None, device: Device | None, schemes: Sequence[Scheme]
) -> Delegate | None:
    """What computes for the engine; None for a format that hands nothing on.

    For an iPhone the Neural Engine, unless it cannot have the schemes that were asked for.
    """
    usual = {"executorch": XNNPACK, "coreml": APPLE_GPU}
    if form.name == "coreml" and device and _has_neural_engine(device):
        routed = find_delegate(ane.route(device).value)
        usual["coreml"] = routed.name if _takes(routed, schemes) else APPLE_GPU
    if asked is not None and not any(delegate.format == form.name for delegate in DELEGATES.values()):
        raise UsageError(f"format {form.name} has no delegates: drop --delegate or give another format")
    if asked is None and form.name not in usual:
        return None
    found = find_delegate(asked or usual[form.name])
    if found.format != form.name:
        raise UsageError(
            f"delegate {found.name} is for --format {found.format}, and {form.name} was asked for: drop one of them"
        )
    if found.for_a_chip and device is None:
        raise PlanRefused(f"delegate {found.name} is compiled for a chip: say for which with --device")
    return found


def _has_neural_engine(device: Device) -> bool:
    return device.soc.npu is not None and device.soc.npu.kind == "ane"


def _takes(delegate: Delegate, schemes: Sequence[Scheme]) -> bool:
    """Whether the delegate can have weights of these schemes."""
    try:
        for scheme in schemes:
            delegate.fit(scheme)
    except RecipeError:
        return False
    return True


def _default_schemes(size: str, delegate: Delegate | None) -> dict[str, str]:
    """Schemes to plan with and why, of those that the delegate takes."""
    usual = _SCHEMES[size]
    if delegate is None:
        return {name: why for name, why in usual.items() if not parse_scheme(name).table}
    taken = {name: why for name, why in usual.items() if name in delegate.schemes}
    return taken or {delegate.schemes[0]: f"what {delegate.title} takes"}


def _delegates(delegate: Delegate | None, recipes: Iterable[Recipe]) -> tuple[str, ...]:
    """A variant for each: the delegate, and ExecuTorch's for the CPU to fall back to if it holds the same integers."""
    if delegate is None:
        return ()
    cpu = find_delegate(XNNPACK)  # within ExecuTorch
    if delegate is cpu or delegate.format != cpu.format:
        return (delegate.name,)
    schemes = [parse_scheme(rule.scheme) for recipe in recipes for rule in recipe.rules]
    return (delegate.name, XNNPACK) if _takes(cpu, schemes) else (delegate.name,)


def _fit(form: Format, delegates: tuple[str, ...]) -> Fit:
    """The nearest scheme that the format and all its delegates take: they hold the same integers."""
    fits = [find_delegate(name).fit for name in reversed(delegates)] or [form.fit]

    def fit(scheme: Scheme) -> tuple[Scheme, str]:
        notes = []
        for each in fits:
            scheme, note = each(scheme)
            notes.append(note)
        return scheme, "; ".join(filter(None, notes))

    return fit


@dataclass(frozen=True)
class _Candidate:
    recipe: Recipe
    decisions: dict[str, Decision]
    context: int
    prediction: Prediction


def _choose(
    arch: Architecture,
    device: Device | None,
    form: Format,
    recipes: Iterable[Recipe],
    contexts: tuple[int, ...],
) -> _Candidate | None:
    """The recipe and the context (of `contexts`, descending) to plan with; None if nothing fits.

    The first recipe that fits easily with a roomy context, and the longest that does; else the first that fits
    at all with a roomy context, else with any.
    """
    budget = memory_budget(device)
    longest, shortest = contexts[0], contexts[-1]
    roomy = max(shortest, min(ROOMY, longest))
    ladders = [_ladder(arch, device, form, recipe, contexts) for recipe in recipes]
    for share, least, most in ((TIGHT, roomy, longest), (1, roomy, roomy), (1, shortest, roomy)):
        for ladder in ladders:
            for step in ladder:
                if least <= step.context <= most and (
                    budget is None or step.prediction.memory.value <= share * budget
                ):
                    return step
    return None


def _ladder(
    arch: Architecture, device: Device | None, form: Format, recipe: Recipe, contexts: Iterable[int]
) -> list[_Candidate]:
    """One candidate for each context."""
    decisions = recipe.resolve(arch, form.fit)
    decoder = _decoder(arch, decisions)
    bandwidth = device.soc.bandwidth_bytes_per_s if device else None
    return [
        _Candidate(
            recipe, decisions, context, predict(decoder, context, engine=form.engine, bandwidth=bandwidth)
        )
        for context in contexts
    ]


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


def _refusal(
    arch: Architecture,
    device: Device,
    form: Format,
    recipe: Recipe,
    contexts: tuple[int, ...],
    context: int | None,
) -> str:
    """Why nothing fits, and what would: less context, another scheme, or else a smaller model."""
    budget = memory_budget(device) or 0
    needed = _ladder(arch, device, form, recipe, contexts[-1:])[0]
    found = (
        f"the model ({_count(arch.parameters)} parameters) at {recipe.name} with a context of {needed.context} tokens "
        f"needs {gb(needed.prediction.memory.value)}, but on {device.name} it may use {gb(budget)} "
        f"({_without_sources(device.app_memory_reason)}; {gb(APP_BYTES)} stay for the app)"
    )
    powers = [1 << power for power in range(CONTEXTS[-1].bit_length() - 1, arch.context.bit_length())]
    every = tuple(sorted({arch.context, *powers}, reverse=True))
    wanted = context or min(ROOMY, arch.context)

    def fitting(other: Recipe) -> list[_Candidate]:
        return [
            step
            for step in _ladder(arch, device, form, other, every)
            if step.prediction.memory.value <= budget
        ]

    same = fitting(recipe)
    others = [steps[0] for name in form.schemes if (steps := fitting(Recipe.uniform(name)))]
    offers = same[:1] + [step for step in others if step.context >= wanted][:1]
    if not offers:
        offers = others[:1]
    if offers:
        listed = " or ".join(f"{step.recipe.name} with up to {step.context} tokens" for step in offers)
        return f"{found}: {listed} fits"
    least = _ladder(arch, device, form, Recipe.uniform(form.schemes[-1]), every[-1:])[0]
    size = int(arch.parameters * budget / least.prediction.memory.value)
    return (
        f"{found}: no scheme makes it fit ({least.recipe.name} with {least.context} tokens needs "
        f"{gb(least.prediction.memory.value)}), take a model of up to about {_count(size)} parameters"
    )


def _without_sources(reason: str) -> str:
    """A profile's reason without the sources in brackets, which the plan shows."""
    return re.sub(r" \([^()]*\)", "", reason)


# explaining


def _plan(
    arch: Architecture,
    device: Device | None,
    form: Format,
    delegates: tuple[str, ...],
    chosen: _Candidate,
    why_format: str,
    why: str,
    asked: bool,
) -> Plan:
    prediction, budget = chosen.prediction, memory_budget(device)
    choices = [
        Choice(topic="format", value=form.name, reason=why_format),
        _backend(device, form, delegates),
        *_npu(arch, device, form, chosen.context),
        Choice(topic="scheme", value=chosen.recipe.name, reason=why),
        *_deviations(chosen.recipe, chosen.decisions),
        *_algorithms(chosen.decisions),
        _activations(form, delegates, chosen.decisions),
        _context(arch, device, chosen, asked),
        _entry_points(form, delegates),
        *_positions(arch, chosen.context),
        *_windows(arch, chosen.context),
        _threads(device),
    ]
    warnings = []
    if device and not prediction.decode:
        warnings.append(
            f"the profile of {device.name} does not say its memory bandwidth: its speed is not predicted"
        )
    if device and budget:
        needed = prediction.memory.value
        share = needed / budget
        choices.append(
            Choice(
                topic="memory",
                value=f"{gb(needed)} of {gb(budget)}",
                reason=f"{device.app_memory_reason}; {gb(APP_BYTES)} stay for the app",
            )
        )
        if share > TIGHT:
            warnings.append(
                f"tight: {gb(needed)} is {share:.0%} of the {gb(budget)} that the model may use on {device.name}; "
                "a shorter context leaves more"
            )
    return Plan(
        device=device,
        format=form.name,
        engine=form.engine,
        delegates=delegates,
        scheme=chosen.recipe.name,
        recipe=chosen.recipe,
        decisions=chosen.decisions,
        context=chosen.context,
        last_logits_only=True,
        choices=tuple(choices),
        prediction=prediction,
        warnings=tuple(warnings),
    )


def _backend(device: Device | None, form: Format, delegates: tuple[str, ...]) -> Choice:
    if form.name == "coreml":
        return Choice(
            topic="backend", value=find_delegate(delegates[0]).title, reason=_layout(device, delegates[0])
        )
    if form.name == "coreai":
        why = "Core AI compiles the asset on the device for what it has; written here, never run on Apple's hardware"
        return Choice(topic="backend", value="CPU, GPU or Neural Engine (Core AI)", reason=why)
    cpu = _CPU[form.name]
    if HEXAGON in delegates:
        why = f"as asked for, with a variant for the {cpu} to fall back to; compiled here and run in Qualcomm's "
        why += "simulator, never on a phone"
        return Choice(topic="backend", value=find_delegate(HEXAGON).title, reason=why)
    if delegates and delegates[0] != XNNPACK:
        fallback = (
            f"with a variant for the {cpu} to fall back to"
            if XNNPACK in delegates
            else "without a variant for the CPU, which has no products by these weights"
        )
        why = f"as asked for, {fallback}; it is written here and was never run on a phone"
        return Choice(topic="backend", value=find_delegate(delegates[0]).title, reason=why)
    npu = device.soc.npu if device else None
    why = _BACKENDS[npu.kind].format(npu=npu.name) if npu else "runs on every phone and computer"
    return Choice(topic="backend", value=cpu, reason=why)


def _layout(device: Device | None, delegate: str) -> str:
    """Why a Core ML package is laid out as it is."""
    never = "written here, and evaluated operation by operation, never run on Apple's hardware"
    other = APPLE_GPU if delegate == NEURAL_ENGINE else NEURAL_ENGINE
    if device is not None and _has_neural_engine(device) and (route := ane.route(device)).value == delegate:
        return f"{route.reason} (--delegate {other}); {never}"
    what = {
        NEURAL_ENGINE: "1x1 convolutions, lookup tables or one scale for each output, two states",
        APPLE_GPU: "linear layers with integers in groups, which the Neural Engine does not take",
    }[delegate]
    return f"{what}; --delegate {other} is the other layout; {never}"


def _npu(arch: Architecture, device: Device | None, form: Format, context: int) -> Iterator[Choice]:
    """What Samsung's compiler would take of the model, where the phone has an Exynos chip."""
    if device and device.soc.npu and device.soc.npu.kind == "exynos" and form.name == "executorch":
        from exporter.npu import exynos

        yield exynos.route(device, arch, context=context)


def _deviations(recipe: Recipe, decisions: Mapping[str, Decision]) -> Iterator[Choice]:
    """One choice for each group of tensors that got another scheme than the recipe's last rule, which is for all."""
    usual = parse_scheme(recipe.rules[-1].scheme)
    groups: dict[Decision, list[str]] = {}
    for name, decision in decisions.items():
        if decision.scheme.name != usual.name:
            groups.setdefault(decision, []).append(name)
    for decision, names in groups.items():
        kinds = sorted({name.split(".", 2)[-1] for name in names})
        yield Choice(
            topic="tensors",
            value=f"{len(names)} tensor{'s' if len(names) > 1 else ''} at {decision.scheme.name}",
            reason=f"{', '.join(kinds)}: {decision.note or 'as the recipe says'}",
        )


def _activations(form: Format, delegates: tuple[str, ...], decisions: Mapping[str, Decision]) -> Choice:
    if HEXAGON in delegates:
        route = hexagon.common_route(decision.scheme for decision in decisions.values())
        value = "uint16" if route == hexagon.QUANTIZED else "float16"
        return Choice(topic="activations", value=value, reason=hexagon.reason("routes", route))
    if delegates and delegates[0] != XNNPACK:
        why = f"{find_delegate(delegates[0]).title} unfolds the weights where it multiplies by them"
        return Choice(topic="activations", value="float16" if form.name == "coreml" else "float", reason=why)
    if form.name == "coreai":
        why = "Core AI unfolds the weights where it multiplies by them"
        return Choice(topic="activations", value="float16", reason=why)
    kinds = sorted({decision.scheme.activations for decision in decisions.values()}, reverse=True)
    reasons = [_ACTIVATIONS[kind].format(scale=_ROUNDED[form.name]) for kind in kinds]
    return Choice(topic="activations", value=" and ".join(kinds), reason="; ".join(reasons))


def _algorithms(decisions: Mapping[str, Decision]) -> Iterator[Choice]:
    """How integers and tables are found, where it is not the schemes' own way; floats are only converted."""
    found = {made.algorithm: made.scheme for made in decisions.values() if not made.scheme.is_float}
    if found.keys() <= {DEFAULT, TABLE_DEFAULT}:
        return
    for name, scheme in found.items():
        some = [tensor for tensor, made in decisions.items() if made.algorithm == name]
        where = "" if len(found) == 1 else f" for {len(some)} tensor{'s' if len(some) > 1 else ''}"
        yield Choice(topic="algorithm", value=name + where, reason=find_algorithm(name, scheme).reason)


def _calibration(decisions: Mapping[str, Decision], texts: Path | None) -> Iterator[Choice]:
    """The text that weights are calibrated on, where they are."""
    if calibrated(decisions):
        why = "the layers' activations on it say which weights matter: Korean, English, code and numbers, or for "
        why += "pepper what it was trained on; the model runs on it here, layer by layer"
        yield Choice(topic="calibration", value=text_name(texts), reason=why)


def _context(arch: Architecture, device: Device | None, chosen: _Candidate, asked: bool) -> Choice:
    per_token = chosen.prediction.cache.value / chosen.context
    cost = f"each token takes {per_token / 1e3:.1f} kB of KV cache"
    if asked:
        why = f"as asked for; {cost}"
    elif chosen.context == arch.context:
        why = f"all that the model was trained for; {cost}"
    elif chosen.context == CONTEXTS[0]:
        why = f"enough for a chat; {cost}, the model could hold {arch.context} tokens"
    else:
        why = f"more does not fit well in the memory of {device.name if device else 'this computer'}; {cost}"
    return Choice(topic="context", value=f"{chosen.context} tokens", reason=why)


def _entry_points(form: Format, delegates: tuple[str, ...]) -> Choice:
    if form.name == "coreml":
        why = "shapes are fixed: a prompt goes in chunks of 64 tokens, the last one padded, and then token by token"
        return Choice(topic="entry points", value="prefill and decode", reason=why)
    if form.name == "coreai":
        why = (
            "shapes are fixed: blocks of 64 tokens fill the cache with a prompt, blocks of 8 give the logits"
        )
        return Choice(topic="entry points", value="load, gather, prompt and extend", reason=why)
    if HEXAGON in delegates:
        why = "shapes are fixed: all but the last token of a prompt go in chunks, the last one padded, without a head; "
        why += "the embedding is looked up on the CPU, since the NPU takes no quantized table"
        return Choice(topic="entry points", value="embed, prefill and decode", reason=why)
    if delegates and not find_delegate(delegates[0]).any_length:
        why = "its compiler wants fixed shapes, and two graphs would have a KV cache each: a prompt goes token by token"
        return Choice(topic="entry points", value="decode", reason=why)
    return Choice(
        topic="entry points",
        value="decode",
        reason="one graph takes any number of tokens, a prompt or the one just chosen, and gives the logits of "
        "the last: those before it are never read",
    )


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
    yield Choice(topic="rope", value=value, reason=why)


def _windows(arch: Architecture, context: int) -> Iterator[Choice]:
    """Layers that see only the last tokens; of no effect where the context is no longer than the window."""
    windows = [window for window in arch.windows if 0 < window < context]
    if windows:
        yield Choice(
            topic="sliding window",
            value=f"{max(windows)} tokens in {len(windows)} of {arch.layers} layers",
            reason="as it was trained: older tokens are masked, the KV cache holds them all the same",
        )


def _threads(device: Device | None) -> Choice:
    cores = device.soc.performance_cores if device else None
    if device is None or cores is None:
        return Choice(topic="threads", value="found when it runs", reason="one for each fast core")
    return Choice(topic="threads", value=str(cores), reason=_cores(device.soc))


def _cores(chip: Chip) -> str:
    slow = [] if chip.cpu is None else [c for c in chip.cpu.clusters if not c.performance]
    if not slow:
        return f"one for each core of the {chip.name}"
    listed = " and ".join(f"{cluster.count} {cluster.core} cores" for cluster in slow)
    return f"one for each fast core of the {chip.name}; {listed} would hold them up"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
