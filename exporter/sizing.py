"""What of a model fits a device: which schemes and contexts are tried, in what order, what each needs, and what would
fit where none of them does.

What is needed is predicted (`runtimes.predict`) from what each weight becomes; what there is, a profile says.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, product
from types import MappingProxyType
from typing import Any

from exporter.architecture import Architecture
from exporter.backend import Request, Way, fit
from exporter.errors import PlanRefused
from exporter.formats import FORMATS
from exporter.quantization.recipe import Decision, Recipe
from exporter.quantization.scheme import Scheme
from exporter.quantization.training import gb
from profiles import Device
from runtimes.predict import Decoder, Prediction, Weight, predict

CONTEXTS = (4096, 2048, 1024, 512, 256)  # tokens; what is planned unless asked for
ROOMY = 1024  # tokens; a scheme that leaves room for fewer gives way to the next
TIGHT = 0.8  # of the memory budget; more is planned only if a context of up to ROOMY tokens needs it
APP_BYTES = 300_000_000  # what the app itself needs: its screen, its code, the tokenizer


def memory_budget(device: Device | None) -> int | None:
    """Bytes that the model may use in an app on `device`; None without a device: nothing is known then."""
    return max(device.app_memory_bytes - APP_BYTES, 0) if device else None


def is_tight(needed: float, budget: int) -> bool:
    """Whether so many bytes are more of the memory budget than is planned without need."""
    return needed > TIGHT * budget


@dataclass(frozen=True)
class Candidate:
    """A recipe on a way, with a context in tokens: what each weight becomes, and what that will need."""

    way: Way
    recipe: Recipe
    context: int
    decisions: Mapping[str, Decision]
    prediction: Prediction

    @property
    def needed(self) -> float:
        """Bytes of memory."""
        return self.prediction.memory.value

    def schemes(self) -> dict[str, Scheme]:
        """By the canonical name of a weight."""
        return {name: decision.scheme for name, decision in self.decisions.items()}


def best(request: Request, possible: Sequence[Way]) -> Candidate | None:
    """What to plan with; None if nothing fits.

    The first recipe of the first way that fits easily with a roomy context, and the longest that does; else the first
    that fits at all with a roomy context, else with any.
    """
    budget = memory_budget(request.device)
    for share, roomy, longer in ((TIGHT, True, True), (1, True, False), (1, False, False)):
        for way in possible:
            steps = _contexts(request, way)
            longest, shortest = steps[0], steps[-1]
            enough = max(shortest, min(ROOMY, longest))
            least, most = enough if roomy else shortest, longest if longer else enough
            tried = [tokens for tokens in steps if least <= tokens <= most]
            for recipe, tokens in product(way.recipes, tried):
                needed = _candidate(request.arch, way, recipe, tokens).needed
                if budget is None or needed <= share * budget:
                    return _candidate(request.arch, way, recipe, tokens, request.device)
    return None


def _contexts(request: Request, way: Way) -> tuple[int, ...]:
    """Tokens: what is asked for, or the steps that the model can hold, longest first; its own length if that is shorter
    than all of them.

    A multiple of the format's block; PlanRefused if the model cannot hold one.
    """
    if request.asked.context:
        return (request.asked.context,)
    trained, block = request.arch.context, way.form.block
    longest = min(trained, CONTEXTS[0]) // block * block
    if not longest:
        raise PlanRefused(
            f"this model was trained for {trained} tokens, and the format takes blocks of {block}: choose another"
        )
    return longest, *(step for step in CONTEXTS if step < longest)


def _candidate(
    arch: Architecture, way: Way, recipe: Recipe, context: int, device: Device | None = None
) -> Candidate:
    """What a recipe would need; its speed too if there is a device."""
    where: dict[str, Any] = {"engine": way.form.engine, "backend": way.form.backend}
    if device:
        where |= {"bandwidth": device.soc.bandwidth_bytes_per_s, "chip": device.soc.id}
    made = arch, recipe, way.form.name, way.delegates
    decisions, _ = _resolved(*made)
    return Candidate(way, recipe, context, decisions, _predicted(*made, context, **where))


def fallback_bytes(arch: Architecture, chosen: Candidate) -> float:
    """Memory that the same recipe takes as ONNX on the CPU."""
    onnx = FORMATS["onnx"]
    return _predicted(arch, chosen.recipe, onnx.name, (), chosen.context, engine=onnx.engine).memory.value


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


def too_large(request: Request, device: Device, possible: Sequence[Way]) -> PlanRefused:
    """Why nothing fits the device, with what was asked for or else the shortest context; and what would."""
    way, budget = possible[0], memory_budget(device) or 0
    least = _candidate(request.arch, way, next(iter(way.recipes)), _contexts(request, way)[-1])
    return PlanRefused(
        f"the model ({_count(request.arch.parameters)} parameters) at {least.recipe.name} with a context of "
        f"{least.context} tokens needs {gb(least.needed)}, but on {device.name} it may use {gb(budget)} "
        f"({_without_sources(device.app_memory_reason)}; {gb(APP_BYTES)} stay for the app): "
        f"{_remedy(request, possible, budget)}",
        "ram-budget",
        least.needed,
    )


def _remedy(request: Request, possible: Sequence[Way], budget: int) -> str:
    """What would fit: less context, another scheme, another way, or else a smaller model."""
    arch = request.arch
    powers = [1 << power for power in range(CONTEXTS[-1].bit_length() - 1, arch.context.bit_length())]
    contexts = sorted({arch.context, *powers}, reverse=True)
    wanted = request.asked.context or min(ROOMY, arch.context)

    def fitting(way: Way, recipe: Recipe) -> list[Candidate]:
        """With the longest context that fits, if one does."""
        steps = (_candidate(arch, way, recipe, tokens) for tokens in contexts if not tokens % way.form.block)
        return list(islice((step for step in steps if step.needed <= budget), 1))

    for way in possible:
        offers = fitting(way, next(iter(way.recipes)))
        others = [step for name in way.form.schemes for step in fitting(way, Recipe.uniform(name))]
        offers += [step for step in others if step.context >= wanted][:1]
        if offers := offers or others[:1]:
            listed = " or ".join(f"{step.recipe.name} with up to {step.context} tokens" for step in offers)
            return f"{listed} fits"
    last = possible[-1]
    least = _candidate(arch, last, Recipe.uniform(last.form.schemes[-1]), contexts[-1])
    return (
        f"no scheme makes it fit ({least.recipe.name} with {least.context} tokens needs {gb(least.needed)}), take a "
        f"model of up to about {_count(int(arch.parameters * budget / least.needed))} parameters"
    )


def _without_sources(reason: str) -> str:
    """A profile's reason without the sources in brackets, which the plan shows."""
    return re.sub(r" \([^()]*\)", "", reason)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
