"""Mixed precision: most weights at few bits, and as many of the most sensitive at more as an average allows.

Raising a weight from one scheme to another costs bits and takes back what its error cost the model (see
`quantization.sensitivity`). Which ones to raise is a knapsack; weights are taken in the order of what is won for each
bit spent, those that no longer fit are passed over (Dantzig's greedy, Discrete-Variable Extremum Problems, 1957), and
if the one weight that wins the most is worth more than all that are so taken, it is taken instead.

Bits are those of the numbers alone. What scales add depends on the format: 16 or 32 bits for each group.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint
from exporter.errors import UsageError
from exporter.quantization.algorithms import DEFAULT
from exporter.quantization.calibration import LONGEST, calibration_sequences, require_tokens, text_digest
from exporter.quantization.recipe import Decision, Recipe, Rule
from exporter.quantization.scheme import parse_scheme
from exporter.staging import working_for, write_whole

ENOUGH = 8  # bits at which rounding to nearest loses so little that no other algorithm is worth its time

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Weight:
    """A weight matrix and what it costs: `bits` of all its numbers and nats of KL divergence a token, at the scheme
    that most have and at the one that it may be raised to."""

    name: str
    numbers: int
    schemes: tuple[str, str]
    bits: tuple[int, int]
    nats: tuple[float, float]

    @property
    def kind(self) -> str:
        """embedding, attention.q, ..., head: what it is in its layer."""
        return self.name.split(".", 2)[-1]

    @property
    def won(self) -> float:
        """Nats that raising it takes back."""
        return self.nats[0] - self.nats[1]

    @property
    def rate(self) -> float:
        """The same for each bit that this costs; 0 where it costs none."""
        spent = self.bits[1] - self.bits[0]
        return self.won / spent if spent > 0 else 0.0


@dataclass(frozen=True)
class Mixed:
    """A recipe of mixed precision and why it is so: all weights, which of them are `raised`, average `bits`."""

    recipe: Recipe
    weights: tuple[Weight, ...]
    raised: frozenset[str]
    bits: float
    measure: str

    def rows(self) -> list[dict[str, Any]]:
        """Each weight with its scheme and the reason, the most sensitive first."""
        order = _order(self.weights)
        lowest = min((weight.rate for weight in order if weight.name in self.raised), default=math.inf)
        rows = []
        for place, weight in enumerate(order, 1):
            raised, reason = weight.name in self.raised, f"place {place} of {len(order)} by nats a bit"
            if weight.bits[1] <= weight.bits[0]:
                reason = f"its shape takes {weight.schemes[0]}, which has as many bits"
            elif not raised and weight.rate > lowest:
                reason += ", and larger than what was left"
            rows.append(
                {
                    "tensor": weight.name,
                    "class": weight.kind,
                    "numbers": weight.numbers,
                    "scheme": weight.schemes[raised],
                    "nats": weight.nats[0],
                    "nats_raised": weight.nats[1],
                    "nats_per_bit": weight.rate,
                    "reason": reason,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "bits": self.bits,
            "measure": self.measure,
            "tensors": self.rows(),
        }


def quantize(
    source: Checkpoint,
    output: Path,
    *,
    target_bits: float,
    scheme: str = "int4",
    raise_to: str = "int8",
    measure: str = "hessian",
    algorithm: str = DEFAULT,
    calibration: Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Mixed:
    """Write a recipe of `target_bits` a weight on average to `output`, a TOML file that an export takes.

    Every weight has `scheme` by `algorithm`, or is raised to `raise_to`. `measure`: see `quantization.sensitivity`;
    on `calibration` (.txt or .jsonl, or
    `calibration.SELF`) or, without, the text that is shipped. A run that was cut off goes on where it
    was. UsageError for bits that the two schemes cannot give; otherwise raises as `measure_effects`.
    """
    from exporter.quantization.sensitivity import TOKENS, measure_effects  # which needs torch

    arch = source.architecture
    ways = (
        Recipe.uniform(scheme, algorithm).resolve(arch),
        Recipe.uniform(raise_to, _raised_by(algorithm, raise_to)).resolve(arch),
    )
    check_bits(arch, ways, target_bits, (scheme, raise_to))
    fingerprint = [source.fingerprint(), scheme, raise_to, measure, algorithm, text_digest(calibration)]
    with working_for(output, fingerprint, force) as work:

        def read(_: Path) -> list[list[int]]:
            found = calibration_sequences(source, min(arch.context, LONGEST), calibration, TOKENS, progress)
            require_tokens(map(len, found))
            return found

        sequences = work.step("calibration text", read)
        effects = measure_effects(source, ways, sequences, work, measure, progress)
        weights = _weights(arch, ways, effects)
        raised = choose(weights, target_bits)
        recipe = make_recipe(weights, raised, target_bits, (scheme, raise_to), algorithm)
        mixed = Mixed(recipe, weights, raised, average(weights, raised), measure)
        write_whole(output, to_toml(mixed, source.name))
    return mixed


def check_bits(
    arch: Architecture, ways: Sequence[Mapping[str, Decision]], target: float, names: tuple[str, str]
) -> None:
    """UsageError for an average that lies outside of what the two ways to quantize give."""
    total = sum(outputs * inputs for _, (outputs, inputs) in arch.matrices())
    low, high = (
        sum(way[name].scheme.bits * shape[0] * shape[1] for name, shape in arch.matrices()) / total
        for way in ways
    )
    if high <= low:
        raise UsageError(
            f"{names[1]} has {high:g} bits for each weight of this model, and {names[0]} has {low:g}: raise to a "
            "scheme of more bits"
        )
    if not low <= target <= high:
        floor = math.ceil(low * 1e3) / 1e3
        raise UsageError(
            f"{target:g} bits a weight were asked for, but for this model {names[0]} takes {low:.4g} and {names[1]} "
            f"{high:.4g}, scales not counted: ask for {floor:g} to {high:.4g}, or for another --scheme"
        )


def choose(weights: Sequence[Weight], target: float) -> frozenset[str]:
    """Which weights to raise within an average of `target` bits: the module's text says how."""
    left = target * sum(weight.numbers for weight in weights) - sum(weight.bits[0] for weight in weights)
    worth = [weight for weight in _order(weights) if weight.won > 0 and weight.bits[1] > weight.bits[0]]
    taken, spare = list[Weight](), left
    for weight in worth:
        cost = weight.bits[1] - weight.bits[0]
        if cost <= spare:
            taken.append(weight)
            spare -= cost
    fitting = [weight for weight in worth if weight.bits[1] - weight.bits[0] <= left]
    best = max(fitting, key=lambda weight: weight.won, default=None)
    if best is not None and best.won > sum(weight.won for weight in taken):
        taken = [best]
    return frozenset(weight.name for weight in taken)


def average(weights: Iterable[Weight], raised: Iterable[str]) -> float:
    """Bits a weight, those of `raised` raised."""
    weights, raised = list(weights), set(raised)
    bits = sum(weight.bits[weight.name in raised] for weight in weights)
    return bits / sum(weight.numbers for weight in weights)


def make_recipe(
    weights: Sequence[Weight],
    raised: frozenset[str],
    target: float,
    schemes: tuple[str, str],
    algorithm: str = DEFAULT,
) -> Recipe:
    """Rules with their reasons: one for each kind of weight or layer that is raised as a whole, one for each other
    weight that is, and one for the rest."""
    order, rules = _order(weights), list[Rule]()
    left = [weight for weight in order if weight.name in raised]
    inner = [weight for weight in left if "." in weight.name]
    patterns = [f"*.{kind}" for kind in dict.fromkeys(weight.kind for weight in inner)]
    patterns += sorted({f"layers.{weight.name.split('.')[1]}.*" for weight in inner})
    patterns += [weight.name for weight in left]
    for pattern in patterns:
        meant = [weight for weight in weights if fnmatchcase(weight.name, pattern)]
        covered = [weight for weight in left if weight in meant]
        if not covered or not raised.issuperset(weight.name for weight in meant):
            continue
        if len(covered) == 1 and pattern != covered[0].name:
            continue  # it gets a rule of its own
        nats = sorted(weight.nats[0] for weight in covered)
        places = sorted(place for place, weight in enumerate(order, 1) if weight in covered)
        reason = (
            f"{covered[0].schemes[0]} costs {_span(nats, '.2g')} nats of KL, place {_span(places, 'd')} of "
            f"{len(order)} by nats a bit"
        )
        by = _raised_by(algorithm, schemes[1])
        rules.append(Rule(match=pattern, scheme=schemes[1], algorithm=by, reason=reason))
        left = [weight for weight in left if weight not in covered]
    if len(raised) < len(weights):
        rules.append(Rule(match="*", scheme=schemes[0], algorithm=algorithm))
    return Recipe(name=f"{schemes[0]}-mixed-{target:g}", rules=tuple(rules))


def to_toml(mixed: Mixed, checkpoint: str) -> str:
    """The recipe as a TOML file whose head says what it was made for."""
    lines = [
        f"# For {_one_line(checkpoint)}: {mixed.bits:.4g} bits a weight on average, scales not counted.",
        f"# Made by gochu quantize, which measured what each weight costs alone (--measure {mixed.measure}).",
        f"name = {_quoted(mixed.recipe.name)}",
    ]
    for rule in mixed.recipe.rules:
        lines += ["", "[[rules]]", f"match = {_quoted(rule.match)}", f"scheme = {_quoted(rule.scheme)}"]
        lines += [f"algorithm = {_quoted(rule.algorithm)}"] if rule.algorithm != DEFAULT else []
        lines += [f"reason = {_quoted(rule.reason)}"] if rule.reason else []
    return "\n".join(lines) + "\n"


def _raised_by(algorithm: str, scheme: str) -> str:
    return DEFAULT if parse_scheme(scheme).bits >= ENOUGH else algorithm


def _weights(
    arch: Architecture, ways: Sequence[Mapping[str, Decision]], effects: Mapping[str, tuple[float, ...]]
) -> tuple[Weight, ...]:
    found = []
    for name, (outputs, inputs) in arch.matrices():
        low, high = (way[name].scheme for way in ways)
        numbers = outputs * inputs
        bits, nats = (low.bits * numbers, high.bits * numbers), (effects[name][0], effects[name][1])
        found.append(Weight(name, numbers, (low.name, high.name), bits, nats))
    return tuple(found)


def _order(weights: Iterable[Weight]) -> list[Weight]:
    return sorted(weights, key=lambda weight: -weight.rate)


def _span(numbers: Sequence[float], form: str) -> str:
    """The first and the last of ascending numbers, or the one that both are."""
    first, last = (format(number, form) for number in (numbers[0], numbers[-1]))
    return first if first == last else f"{first} to {last}"


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _one_line(text: str) -> str:
    """For a comment, which holds no control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)
