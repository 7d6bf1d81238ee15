"""Which tensor gets which scheme: ordered rules over canonical names, the first that matches wins."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.architecture import Architecture
from exporter.errors import RecipeError, UsageError
from exporter.quantization.algorithms import DEFAULT, find_algorithm, resolve_algorithm
from exporter.quantization.scheme import Scheme, fit_scheme, parse_scheme

Fit = Callable[[Scheme], tuple[Scheme, str]]


class Rule(BaseModel):
    """Tensors whose canonical name matches `match` (shell wildcards) get `scheme` by `algorithm`.

    The default algorithm is the scheme's own: round to nearest, or k-means for lookup tables.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str
    scheme: str
    algorithm: str = DEFAULT
    reason: str = ""


class Recipe(BaseModel):
    """Ordered rules, and what is done to the float weights before (`quantization.preparation`).

    As TOML: `name`, perhaps `prepare = ["hadamard"]`, then a `[[rules]]` table for each rule.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    prepare: tuple[str, ...] = ()
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @classmethod
    def uniform(cls, scheme: str, algorithm: str = DEFAULT, prepare: tuple[str, ...] = ()) -> "Recipe":
        """One scheme for every weight matrix."""
        rule = Rule(match="*", scheme=scheme, algorithm=algorithm)
        return cls(name=scheme, prepare=prepare, rules=(rule,))

    def after(self, prepare: tuple[str, ...]) -> "Recipe":
        """The same, with the weights prepared before as `prepare` says; UsageError if the recipe says so itself."""
        if self.prepare and prepare:
            raise UsageError(
                f"recipe {self.name} says itself what it prepares: drop --prepare or that line of it"
            )
        return self.model_copy(update={"prepare": self.prepare or prepare})

    def resolve(self, arch: Architecture, fit: Fit = lambda scheme: (scheme, "")) -> dict[str, "Decision"]:
        """What each weight matrix of `arch` becomes; RecipeError if a rule or a tensor is left over.

        `arch` is that of the prepared weights. `fit`: the nearest scheme that the format takes, and why it differs. A
        tied head is the embedding: rules for `head` are then not missed.
        """
        decisions: dict[str, Decision] = {}
        used = {rule for rule in self.rules if rule.match == "head"}
        for name, shape in arch.matrices():
            rule = next((rule for rule in self.rules if fnmatchcase(name, rule.match)), None)
            if rule is None:
                raise RecipeError(f"recipe {self.name}: no rule matches {name}; end with a rule for '*'")
            used.add(rule)
            scheme, note = fit_scheme(parse_scheme(rule.scheme), shape)
            scheme, why = fit(scheme)
            note = "; ".join(filter(None, (note, why)))
            algorithm = resolve_algorithm(rule.algorithm, scheme)
            if name == "embedding" and not arch.tied and find_algorithm(algorithm, scheme).from_hessian:
                default = resolve_algorithm(DEFAULT, scheme)
                why = f"it is only looked up, and {algorithm} weighs what is multiplied: {default} here"
                note, algorithm = "; ".join(filter(None, (note, why))), default
            decisions[name] = Decision(scheme, algorithm, note or rule.reason)
        if idle := [rule.match for rule in self.rules if rule not in used]:
            raise RecipeError(
                f"recipe {self.name}: the rule for {idle[0]!r} decides nothing; correct or drop it"
            )
        return decisions


@dataclass(frozen=True)
class Decision:
    """What one tensor becomes; `note` says why it is not what the rest is."""

    scheme: Scheme
    algorithm: str
    note: str = ""


def calibrated(decisions: Mapping[str, Decision]) -> list[str]:
    """The weights whose algorithm needs a calibration text."""
    return [
        name for name, made in decisions.items() if find_algorithm(made.algorithm, made.scheme).needs_text
    ]


def trained(decisions: Mapping[str, Decision]) -> list[str]:
    """The weights that are trained."""
    return [
        name for name, made in decisions.items() if find_algorithm(made.algorithm, made.scheme).trained_from
    ]


def starting(decisions: Mapping[str, Decision]) -> dict[str, Decision]:
    """Decisions by which trained weights become what their training starts from: a layer's by the algorithm that
    `trained_from` names, which needs its inputs, but an embedding that is only looked up by rounding to nearest."""
    start = dict(decisions)
    for name in trained(decisions):
        made = decisions[name]
        first = find_algorithm(made.algorithm, made.scheme).trained_from
        start[name] = replace(
            made, algorithm=DEFAULT if name == "embedding" and "head" in decisions else first
        )
    return start


SHIPPED = Path(__file__).parent / "recipes"


def find_recipe(name: str) -> Recipe:
    """A recipe by the name of one that is shipped, or by a file's path.

    >>> find_recipe("hexagon-w4a16").rules[-1].scheme
    'w4a16'
    """
    shipped = shipped_recipes()
    if name in shipped:
        return read_recipe(SHIPPED / f"{name}.toml")
    if not Path(name).suffix and not Path(name).exists():
        raise RecipeError(f"there is no recipe {name!r}: use one of {', '.join(shipped)}, or a TOML file")
    return read_recipe(Path(name))


def shipped_recipes() -> list[str]:
    """Names of the recipes that are shipped, in order."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def recipe_text(name: str) -> str:
    """The TOML file of a recipe that is shipped; RecipeError names those there are."""
    if name not in shipped_recipes():
        raise RecipeError(
            f"there is no recipe {name!r} among those that are shipped: use one of {', '.join(shipped_recipes())}"
        )
    return (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")


def purpose(text: str) -> str:
    """What a recipe's file says that it is for: the comment at its head."""
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in head)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file; RecipeError names the first thing that is wrong."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(data)
    except OSError as error:
        raise RecipeError(
            f"recipe {path} cannot be read ({error.strerror}): give a TOML file, or one of `gochu recipes`"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not TOML in UTF-8 ({error}): see `gochu recipes show portable-int4` for one that is"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        keys = ", ".join((Rule if len(first["loc"]) > 1 else Recipe).model_fields)
        if first["type"] == "extra_forbidden":
            wrong = f"there is no key {place}: use {keys}"
        elif first["type"] == "missing":
            wrong = f"{place} is missing: a recipe has name and rules, a rule at least match and scheme"
        else:
            wrong = f"{place}: {first['msg']}; see `gochu recipes show portable-int4` for one that is right"
        raise RecipeError(f"recipe {path}: {wrong}") from None
