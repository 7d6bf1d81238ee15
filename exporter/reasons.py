"""What a plan says of itself: each decision with its reason and the rows of `rules.toml` that it rests on, and what the
user should know before it starts.

Nothing is decided here but what follows from the way, the recipe and the context that were chosen.
"""

from collections.abc import Iterator, Sequence

from exporter.backend import Refused, Request, Way, ways
from exporter.errors import GochuError
from exporter.formats import APPLE_GPU, HEXAGON, NEURAL_ENGINE, XNNPACK, find_delegate
from exporter.npu import ane, exynos, hexagon
from exporter.npu.hexagon_plan import Compilation
from exporter.quantization.algorithms import DEFAULT, find_algorithm
from exporter.quantization.calibration import text_kind, text_name
from exporter.quantization.preparation import PREPARATIONS, needs_text
from exporter.quantization.recipe import Decision
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.training import Training, gb
from exporter.routes import against, choice, entry, routes
from exporter.sizing import APP_BYTES, CONTEXTS, Candidate, fallback_bytes, is_tight, memory_budget
from profiles import Chip
from runtimes.bundle import Alternative, Choice

_ROUNDED = {
    "onnx": "a scale for each token and group",
    "executorch": "a scale and a zero point for each token",
}
_ACTIVATIONS = {
    "int8": "values that meet integers are rounded to 8 bits, {scale} found on the way, which the CPU's integer dot "
    "products need; all else is float32",
    "float32": "the CPU's kernels for these weights compute in float32",
}


def choices(
    request: Request,
    chosen: Candidate,
    refused: Sequence[Refused],
    compilation: Compilation | None,
    training: Training | None,
) -> Iterator[Choice]:
    """Every decision of a plan, in the order in which it is shown. `refused`: the routes that are not taken."""
    yield _format(request, chosen.way, refused)
    yield _backend(request, chosen.way, refused)
    yield from _npu(request, chosen)
    yield _fallback(request, chosen)
    yield _scheme(chosen)
    yield from _deviations(chosen)
    yield from _algorithms(chosen)
    yield _activations(chosen)
    yield _context(request, chosen)
    yield _entry_points(chosen.way)
    yield from _packages(chosen)
    yield from _positions(request, chosen.context)
    yield from _windows(request, chosen.context)
    yield _threads(request)
    yield from _memory(request, chosen)
    yield from _calibration(request, chosen)
    if compilation:
        yield from compilation.choices(request.arch, chosen.schemes())
    yield from _preparations(request, chosen)
    if training:
        yield choice("training", training.value, "training", reason=training.reason)


def _format(request: Request, way: Way, refused: Sequence[Refused]) -> Choice:
    """The format, and what stood against each of the others."""
    row = entry(f"format-{way.form.name}")
    others = {
        one.route.format: one for one in reversed(refused) if one.route.format not in ("", way.form.name)
    }
    ids, reasons = ["asked"] if request.asked.format else [], []
    if not ids and (first := others.get("onnx")):  # what is planned for all but Apple's devices
        ids, reasons = [first.rule], [first.reason]
    told = [Alternative(value=name, reason=one.reason, rule=one.rule) for name, one in others.items()]
    reason = "; ".join((*reasons, row.says))
    return choice("format", way.form.name, *ids, row.id, reason=reason, alternatives=tuple(told))


def _backend(request: Request, way: Way, refused: Sequence[Refused]) -> Choice:
    """What computes, and why nothing else does."""
    others = _alternatives(request, way, refused)
    reasons, ids = [way.route.says], [way.route.id]
    if request.asked.delegate is not None:
        reasons, ids = ["as asked for", *reasons], ["asked", *ids]
    npu = request.device.soc.npu if request.device else None
    if npu and way.on_cpu:
        own = {route.title for route in routes() if route.npu == npu.kind}
        first = next((one for one in others if one.value in own), None)
        rule, why = "asked", "as asked for"
        if first and first.rule != "in-order":
            rule, why = first.rule, first.reason
        ids.append(rule)
        reasons.append(f"the NPU ({npu.name}) stands idle: {why}")
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


def _alternatives(request: Request, way: Way, refused: Sequence[Refused]) -> list[Alternative]:
    """Of the routes that concern the device, those that were not taken: the first rule against each."""
    why = {one.route.id: one.alternative() for one in refused}
    found: dict[str, Alternative] = {}
    for route in routes():
        if route.title in (way.route.title, *found) or not route.concerns(request.facts):
            continue
        rules = against(route, request.facts)
        if route.id in why:
            found[route.title] = why[route.id]
        elif rules:
            found[route.title] = Refused.by(rules[0], route, request.facts).alternative()
        else:
            reason = f"{entry('in-order').says}: {route.says}"
            found[route.title] = Alternative(value=route.title, reason=reason, rule="in-order")
    return list(found.values())


def _npu(request: Request, chosen: Candidate) -> Iterator[Choice]:
    """What Samsung's compiler would take of the model, where the phone has an Exynos chip."""
    device = request.device
    if device and device.soc.npu and device.soc.npu.kind == "exynos" and chosen.way.form.name == "executorch":
        told = exynos.route(device, request.arch, context=chosen.context)
        yield choice(told.topic, told.value, "exynos", reason=told.reason)


def _fallback(request: Request, chosen: Candidate) -> Choice:
    """The variant for whatever cannot run the first one."""
    way = chosen.way
    if HEXAGON in way.delegates:
        why = f"{entry('fallback-cpu').says}; there it takes {gb(fallback_bytes(request.arch, chosen))} of memory"
        return choice("fallback", "CPU (ONNX Runtime)", "fallback-cpu", reason=why)
    if XNNPACK in way.delegates[1:]:
        return choice("fallback", find_delegate(XNNPACK).title, "fallback-cpu")
    if way.form.name in ("coreml", "coreai"):
        return choice("fallback", "none", "fallback-coreml")
    return choice("fallback", "none", "fallback-absent" if way.route.asked else "fallback-none")


def _scheme(chosen: Candidate) -> Choice:
    """The scheme, and those before and after it in the route's order."""
    row = chosen.way.recipes[chosen.recipe]
    if row is None:
        return choice("scheme", chosen.recipe.name, "asked")
    order = [planned for planned in chosen.way.recipes.values() if planned]
    place = order.index(row)
    others = [
        Alternative(value=one.scheme, reason="it leaves too little memory", rule="ram-budget")
        if index < place
        else Alternative(value=one.scheme, reason=entry("in-order").says, rule="in-order")
        for index, one in enumerate(order)
        if index != place
    ]
    return choice("scheme", chosen.recipe.name, row.id, alternatives=tuple(others))


def _deviations(chosen: Candidate) -> Iterator[Choice]:
    """One choice for each group of tensors that got another scheme than the recipe's last rule, which is for all."""
    usual = parse_scheme(chosen.recipe.rules[-1].scheme)
    groups: dict[Decision, list[str]] = {}
    for name, decision in chosen.decisions.items():
        if decision.scheme.name != usual.name:
            groups.setdefault(decision, []).append(name)
    for decision, names in groups.items():
        kinds = sorted({name.split(".", 2)[-1] for name in names})
        why = f"{', '.join(kinds)}: {decision.note or 'as the recipe says'}"
        yield choice("tensors", f"{_tensors(names)} at {decision.scheme.name}", "group-divides", reason=why)


def _algorithms(chosen: Candidate) -> Iterator[Choice]:
    """How integers and tables are found, where it is not the schemes' own way; floats are only converted."""
    found = {made.algorithm: made.scheme for made in chosen.decisions.values() if not made.scheme.is_float}
    if found.keys() <= {DEFAULT}:
        return
    for algorithm, scheme in found.items():
        some = [name for name, made in chosen.decisions.items() if made.algorithm == algorithm]
        where = "" if len(found) == 1 else f" for {_tensors(some)}"
        why = find_algorithm(algorithm, scheme).reason
        yield choice("algorithm", algorithm + where, "algorithm", reason=why)


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _activations(chosen: Candidate) -> Choice:
    """What values are between products."""
    delegates, form = chosen.way.delegates, chosen.way.form
    schemes = chosen.schemes().values()
    if HEXAGON in delegates:
        route = hexagon.common_route(schemes)
        value = "uint16" if route == hexagon.QUANTIZED else "float16"
        return choice("activations", value, "activations-hexagon", reason=hexagon.reason("routes", route))
    if form.name == "coreai" or (delegates and delegates[0] != XNNPACK):
        title = find_delegate(delegates[0]).title if delegates else "Core AI"
        why = f"{title} unfolds the weights where it multiplies by them"
        value = "float" if form.name == "executorch" else "float16"
        return choice("activations", value, "activations-unfolded", reason=why)
    kinds = sorted({scheme.activations for scheme in schemes}, reverse=True)
    reasons = [
        _ACTIVATIONS["int8" if kind == "int8" else "float32"].format(scale=_ROUNDED[form.name])
        for kind in kinds
    ]
    why = "; ".join(dict.fromkeys(reasons))
    return choice("activations", " and ".join(kinds), "activations-cpu", reason=why)


def _context(request: Request, chosen: Candidate) -> Choice:
    """How many tokens the graph can hold, and what each costs."""
    per_token = chosen.prediction.cache.value / chosen.context
    cost = f"each token takes {per_token / 1e3:.1f} kB of KV cache"
    if request.asked.context is not None:
        id, why = "asked", f"as asked for; {cost}"
    elif chosen.context == request.arch.context:
        id, why = "context-trained", f"all that the model was trained for; {cost}"
    elif chosen.context == CONTEXTS[0]:
        id = "context-chat"
        why = f"enough for a chat; {cost}, the model could hold {request.arch.context} tokens"
    else:
        id, where = "context-memory", request.device.name if request.device else "this computer"
        why = f"more does not fit well in the memory of {where}; {cost}"
    return choice("context", f"{chosen.context} tokens", id, reason=why)


def _entry_points(way: Way) -> Choice:
    """Which graphs there are, and of what shapes."""
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


def _packages(chosen: Candidate) -> Iterator[Choice]:
    """How many packages the Neural Engine's limit makes of a model, by its predicted size."""
    if NEURAL_ENGINE in chosen.way.delegates:
        count = -(-int(chosen.prediction.file.value) // ane.limits().package_bytes)
        yield choice("packages", str(count) if count == 1 else f"about {count}", "ane-package-bytes")


def _positions(request: Request, context: int) -> Iterator[Choice]:
    """LongRoPE has two sets of frequencies; a graph has one of them for all its positions."""
    rope = request.arch.rope
    if rope.long_inv_freq is None:
        return
    original = rope.original_context
    if rope.is_long(context):
        value, why = "long factors", f"the context is longer than the {original} tokens before the extension"
    else:
        value = "short factors"
        why = f"the context is within the {original} tokens before the extension, where these are exact"
    yield choice("rope", value, "longrope", reason=why)


def _windows(request: Request, context: int) -> Iterator[Choice]:
    """Layers that see only the last tokens; of no effect where the context is no longer than the window."""
    windows = [window for window in request.arch.windows if 0 < window < context]
    if windows:
        value = f"{max(windows)} tokens in {len(windows)} of {request.arch.layers} layers"
        yield choice("sliding window", value, "sliding-window")


def _threads(request: Request) -> Choice:
    """One for each fast core, where a profile says how many there are."""
    chip = request.device.soc if request.device else None
    if chip is None or chip.performance_cores is None:
        return choice("threads", "found when it runs", "fast-cores", reason="one for each fast core")
    return choice("threads", str(chip.performance_cores), "fast-cores", reason=_cores(chip))


def _cores(chip: Chip) -> str:
    slow = [] if chip.cpu is None else [c for c in chip.cpu.clusters if not c.performance]
    if not slow:
        return f"one for each core of the {chip.name}"
    listed = " and ".join(f"{cluster.count} {cluster.core} cores" for cluster in slow)
    return f"one for each fast core of the {chip.name}; {listed} would hold them up"


def _memory(request: Request, chosen: Candidate) -> Iterator[Choice]:
    """The share of the budget that is used."""
    if request.device and (budget := memory_budget(request.device)):
        ids = ("ram-budget", "ram-tight") if is_tight(chosen.needed, budget) else ("ram-budget",)
        why = f"{request.device.app_memory_reason}; {gb(APP_BYTES)} stay for the app"
        yield choice("memory", f"{gb(chosen.needed)} of {gb(budget)}", *ids, reason=why)


def _calibration(request: Request, chosen: Candidate) -> Iterator[Choice]:
    """The text that weights are calibrated on."""
    if needs_text(chosen.recipe, chosen.decisions):
        text = request.asked.calibration
        why = f"the layers' activations on it say which weights matter: {text_kind(text)}; the model runs on it here, "
        why += "layer by layer"
        yield choice("calibration", text_name(text), "calibration", reason=why)


def _preparations(request: Request, chosen: Candidate) -> Iterator[Choice]:
    """What is done to the weights before they are quantized."""
    for name in chosen.recipe.prepare:
        made = PREPARATIONS[name]
        reason = "; ".join(filter(None, (made.reason, made.note(request.original, chosen.decisions))))
        yield choice("preparation", name, "preparation", reason=reason)


def warnings(request: Request, chosen: Candidate) -> Iterator[str]:
    """What the user should know before it starts: what is slower than it could be, or tight; of a device alone."""
    device, way = request.device, chosen.way
    if not device:
        return
    yield from (f"{rule.reason(request.facts)} [{rule.id}]" for rule in way.warned if rule.effect != "later")
    yield from _slower(request, way)
    if not chosen.prediction.decode:
        yield f"the profile of {device.name} does not say its memory bandwidth: its speed is not predicted"
    budget = memory_budget(device) or 0
    if HEXAGON in way.delegates and (most := fallback_bytes(request.arch, chosen)) > budget:
        yield (
            f"the variant for the CPU takes {gb(most)}, more than {device.name} has for it: there this runs on the "
            "NPU or not at all [ram-budget]"
        )
    if is_tight(chosen.needed, budget):
        yield (
            f"tight: {gb(chosen.needed)} is {chosen.needed / budget:.0%} of the {gb(budget)} that the model may use "
            f"on {device.name}; a shorter context leaves more [ram-tight]"
        )


def _slower(request: Request, way: Way) -> Iterator[str]:
    """What would be planned in place of the format, delegate or scheme that was asked for, if it is faster."""
    asked = request.asked
    if asked.format or asked.delegate:
        try:
            first = ways(request.instead(format=None, delegate=None))[0][0]
        except GochuError:
            first = way  # what was asked for can be made by this way alone
        order = [route.id for route in routes()]
        if order.index(first.route.id) < order.index(way.route.id):
            says = f"{first.route.title}: {first.route.says} [{first.route.id}]"
            yield f"unless asked otherwise it is planned for the {says}"
    if asked.scheme and not way.warned:
        usual = ways(request.instead(scheme=None))[0][0]
        first_scheme = parse_scheme(next(iter(usual.recipes)).rules[-1].scheme)
        if (bits := parse_scheme(asked.scheme).bits) > first_scheme.bits:
            yield (
                f"{asked.scheme} has {bits / first_scheme.bits:g} times the bits of {first_scheme.name}, which would "
                f"be planned: {entry('bytes-per-token').says} [bytes-per-token]"
            )
