"""Which ways to a device's compute a model can take, as asked, and why not the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.architecture import Architecture
from exporter.errors import GochuError, PlanRefused, RecipeError, UsageError
from exporter.formats import (
    DELEGATES,
    FORMATS,
    HEXAGON,
    XNNPACK,
    Delegate,
    Format,
    find_delegate,
    find_format,
)
from exporter.npu.hexagon_plan import Wishes
from exporter.quantization.recipe import Fit, Recipe, find_recipe
from exporter.quantization.scheme import Scheme, parse_scheme
from exporter.routes import Facts, Planned, Route, Rule, against, routes
from profiles import Device
from runtimes.bundle import Alternative

SMALL_MODEL = 100_000_000  # parameters
CPU = "cpu"  # asked for in a delegate's place: nothing but the CPU


@dataclass(frozen=True)
class Asked:
    """What the user asks for; the rest is planned. See `exporter.plan.make_plan`."""

    scheme: str | None = None
    algorithm: str = "rtn"
    context: int | None = None
    recipe: Recipe | None = None
    format: str | None = None
    delegate: str | None = None
    wishes: Wishes = field(default_factory=Wishes)
    calibration: Path | None = None
    prepare: tuple[str, ...] = ()
    qat_steps: int | None = None

    @property
    def prepared(self) -> tuple[str, ...]:
        """What is done to the weights before, by the recipe's word or the user's; UsageError if both say so."""
        return self.recipe.after(self.prepare).prepare if self.recipe else self.prepare

    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes asked for; () where they are planned."""
        rules = self.recipe.rules if self.recipe else Recipe.uniform(self.scheme).rules if self.scheme else ()
        return tuple(parse_scheme(rule.scheme) for rule in rules)


NOTHING = Asked()  # all is planned


@dataclass(frozen=True)
class Request:
    """A model that a plan is asked for. `arch`: as it is after its preparations, `original` before them; `device`: None
    for this computer; `facts`: what rules ask of them (`routes.describe`)."""

    original: Architecture
    arch: Architecture
    device: Device | None
    asked: Asked
    facts: Facts

    def instead(self, **asked: Any) -> "Request":
        """The same, but for something else that is asked for."""
        return replace(self, asked=replace(self.asked, **asked))


@dataclass(frozen=True)
class Way:
    """A route as it would be taken. `form`: its format as all its delegates take it; `delegates`: a variant for each,
    the preferred first; `recipes`: what to try, with the row that says why (None: as asked for); `warned`: the rules
    that it is taken against."""

    route: Route
    form: Format
    delegates: tuple[str, ...]
    recipes: Mapping[Recipe, Planned | None]
    warned: tuple[Rule, ...] = ()

    @property
    def on_cpu(self) -> bool:
        """Whether nothing but the CPU computes."""
        return _on_cpu(self.route)


@dataclass(frozen=True)
class Refused:
    """A route that is not taken. `fits`: whether it takes the schemes that were asked for."""

    route: Route
    error: GochuError
    reason: str
    rule: str
    fits: bool = True

    @classmethod
    def by(cls, rule: Rule, route: Route, facts: Facts) -> "Refused":
        """By a rule that stands against the route."""
        why = rule.reason(facts)
        return cls(route, PlanRefused(why, rule.id), why, rule.id)

    def alternative(self) -> Alternative:
        """The same for a plan."""
        return Alternative(value=self.route.title, reason=self.reason, rule=self.rule)


def ways(request: Request) -> tuple[tuple[Way, ...], tuple[Refused, ...]]:
    """The ways that can be taken, the one that is wanted most first, and the routes that cannot.

    A way that merely is slower is among them only where no other is left. Raises PlanRefused, RecipeError or UsageError
    if none is left: with the first rule that forbids one that takes what was asked for.
    """
    found: list[Way] = []
    refused: list[Refused] = []
    for route in _wanted(request.asked, request.facts):
        way = _way(route, request)
        if isinstance(way, Refused):
            refused.append(way)
        else:
            found.append(way)
    clear = [way for way in found if not way.warned]
    clear = clear or [way for way in found if all(rule.effect == "later" for rule in way.warned)]
    if not found:
        of_cpu = [one for one in refused if _on_cpu(one.route)]
        candidates = [one for one in refused if one.fits] or of_cpu or refused
        raise candidates[0].error
    if not clear:
        return tuple(found), tuple(refused)
    refused += [Refused.by(way.warned[0], way.route, request.facts) for way in found if way.warned]
    return tuple(clear), tuple(refused)


def _wanted(asked: Asked, facts: Facts) -> list[Route]:
    """The routes that are as asked for, and concern the device; UsageError or PlanRefused if there is none such."""
    exported = [route for route in routes() if route.format]
    if asked.format is not None:
        find_format(asked.format)
        exported = [route for route in exported if route.format == asked.format]
    if asked.delegate == CPU:
        found = [route for route in exported if _on_cpu(route)]
        if not found:
            raise UsageError(
                f"format {asked.format} is made for more than the CPU: drop --delegate cpu, or ask for --format onnx"
            )
        return found
    if asked.delegate is not None:
        return _delegated(asked.delegate, exported, asked, facts)
    unasked = [route for route in exported if not route.asked]
    if asked.format is None:
        return [route for route in unasked if route.concerns(facts)]
    unasked = unasked or exported  # the format has no other
    return [route for route in unasked if route.concerns(facts)] or unasked


def _on_cpu(route: Route) -> bool:
    return route.delegate in ("", XNNPACK) and not route.asked


def _delegated(name: str, exported: Sequence[Route], asked: Asked, facts: Facts) -> list[Route]:
    """The routes of a delegate."""
    if asked.format is not None and not any(d.format == asked.format for d in DELEGATES.values()):
        raise UsageError(f"format {asked.format} has no delegates: drop --delegate or give another format")
    delegate = find_delegate(name)
    if asked.format not in (None, delegate.format):
        raise UsageError(
            f"delegate {name} is for --format {delegate.format}, and {asked.format} was asked for: drop one of them"
        )
    if delegate.for_a_chip and "chip" not in facts:
        raise PlanRefused(f"delegate {name} is compiled for a chip: say for which with --device")
    return [route for route in exported if route.delegate == name]


def _way(route: Route, request: Request) -> Way | Refused:
    """A route with what would be made of the model on it, or what forbids it."""
    form, delegate = FORMATS[route.format], find_delegate(route.delegate) if route.delegate else None
    asked, standing = request.asked, against(route, request.facts)
    try:
        recipes = _offered(route, request.arch, asked)
        delegates = _delegates(delegate, recipes)
        fitted = fit(form, delegates)
        for scheme in asked.schemes():
            fitted(scheme)
        _require_kind(route, asked.schemes())
    except RecipeError as error:
        return Refused(route, RecipeError(f"{error} [weights-fit]"), str(error), "weights-fit", fits=False)
    for rule in standing:
        if rule.effect == "forbids":
            return Refused.by(rule, route, request.facts)
    offers = route.takes or (delegate.schemes if delegate else form.schemes)
    by_quality = tuple(sorted(offers, key=lambda name: -parse_scheme(name).bits))
    engine = "qnn" if HEXAGON in delegates else form.engine
    backend = delegate.backend if delegate else None
    form = replace(form, engine=engine, fit=fitted, schemes=by_quality, backend=backend)
    return Way(route, form, delegates, recipes, standing)


def _offered(route: Route, arch: Architecture, asked: Asked) -> dict[Recipe, Planned | None]:
    """What was asked for, or what the table plans by the model's size."""
    if asked.recipe:
        return {asked.recipe.after(asked.prepare): None}
    if asked.scheme:
        return {Recipe.uniform(asked.scheme, asked.algorithm, asked.prepare): None}
    planned = route.small if arch.parameters < SMALL_MODEL else route.large
    return {_recipe(each, asked): each for each in planned}


def _recipe(planned: Planned, asked: Asked) -> Recipe:
    if not planned.recipe:
        return Recipe.uniform(planned.scheme, asked.algorithm, asked.prepare)
    shipped = find_recipe(planned.scheme)
    rules = tuple(rule.model_copy(update={"algorithm": asked.algorithm}) for rule in shipped.rules)
    return shipped.model_copy(update={"rules": rules, "prepare": asked.prepare or shipped.prepare})


def _require_kind(route: Route, schemes: Sequence[Scheme]) -> None:
    """RecipeError if values between products are to be integers on a route where they are floats, or the reverse."""
    static = any(scheme.is_static for scheme in schemes)
    if schemes and route.static not in (None, static):
        use = "w8a16 or w4a16" if route.static else "int8 or int4"
        raise RecipeError(f"{schemes[-1].name} is not for {route.title} by this route: use {use}")


def _delegates(delegate: Delegate | None, recipes: Mapping[Recipe, object]) -> tuple[str, ...]:
    """A variant for each: the delegate, and ExecuTorch's for the CPU to fall back to if it holds the same integers."""
    if delegate is None:
        return ()
    cpu = find_delegate(XNNPACK)  # within ExecuTorch
    if delegate is cpu or delegate.format != cpu.format:
        return (delegate.name,)
    try:
        for recipe in recipes:
            for rule in recipe.rules:
                cpu.fit(parse_scheme(rule.scheme))
    except RecipeError:
        return (delegate.name,)
    return (delegate.name, XNNPACK)


def fit(form: Format, delegates: tuple[str, ...]) -> Fit:
    """The nearest scheme that the format and all its delegates take: they hold the same integers."""
    fits = [find_delegate(name).fit for name in reversed(delegates)] or [form.fit]

    def nearest(scheme: Scheme) -> tuple[Scheme, str]:
        notes = []
        for each in fits:
            scheme, note = each(scheme)
            notes.append(note)
        return scheme, "; ".join(filter(None, notes))

    return nearest
