"""Published measurements as rows to fit: what a token of each run reads and multiplies, from its model's shapes.

Observations name a model and a scheme; `observed.toml` says what those are. A run is left out only by a rule: its
chip's bandwidth is not known, or its model or scheme is not in that file (the user's own observations).
"""

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from profiles import Observation
from runtimes.fitted import CONTEXT, Quantity, Setting, workspace

TOKENS = 512  # in the cache, where the source does not say
PROMPT = 128  # tokens, likewise


@dataclass(frozen=True)
class Row:
    """One figure to fit. `value`: s/token, or bytes of memory; `size` and `units` as in `runtimes.fitted`;
    `rounding`: half of the last digit that was printed, as a share of the value."""

    quantity: Quantity
    at: Setting
    value: float
    size: float
    units: float
    rounding: float
    label: str
    printed: str
    source: str


@dataclass(frozen=True)
class Counted:
    """A model at a scheme. `multiplied`: weights of the layers; in bytes: `read`, what a token reads of the weights;
    `file`, all that is stored; `cached` of a token, which has `cache_values` numbers."""

    layers: int
    multiplied: float
    read: float
    file: float
    cached: float
    cache_values: int


def rows(observations: Iterable[Observation], quantity: Quantity) -> list[Row]:
    """A row for each run that says something of the quantity. A prompt's speed is taken from the time to the first
    token where the source gives no other, and the prompt's length."""
    seen = tuple(observations)
    told = {_run(each) for each in seen if each.figure == "prefill_speed"}
    return [row for each in seen if (row := _row(each, quantity, _run(each) in told))]


def _row(seen: Observation, quantity: Quantity, has_speed: bool) -> Row | None:
    figures = {"decode": ("decode_speed",), "memory": ("peak_memory",), "prefill": ("prefill_speed", "ttft")}
    bandwidth = seen.soc.bandwidth_bytes_per_s
    model, scheme = _model(seen), _scheme(seen)
    if seen.figure not in figures[quantity] or not (bandwidth and model and scheme):
        return None
    counted = count(model, scheme)
    cache = _tables()["caches"][seen.engine]
    value, units = seen.value, float(counted.layers)
    if quantity == "decode":
        tokens = seen.prompt + (seen.generated or 0) / 2 if seen.prompt else TOKENS
        tokens = (seen.context or CONTEXT) if cache["whole"] else tokens
        value, size = 1 / seen.value, (counted.read + tokens * counted.cached) / bandwidth
    elif quantity == "memory":
        units = workspace(counted.cache_values, model["hidden"], model["ffn"], seen.prompt or PROMPT)
        size = counted.file
    else:
        if seen.figure == "ttft" and (has_speed or not seen.prompt):
            return None
        value = seen.value / seen.prompt if seen.figure == "ttft" and seen.prompt else 1 / seen.value
        size = 2 * counted.multiplied / bandwidth
    digits = seen.printed.split()[0]
    return Row(
        quantity,
        Setting(seen.engine, seen.backend, scheme["kernel"], seen.soc.id),
        value,
        size,
        units,
        0.5 * 10.0 ** -len(digits.partition(".")[2]) / float(digits),
        f"{seen.model.rpartition('/')[2]} {seen.scheme}",
        seen.printed,
        seen.source,
    )


def count(model: dict[str, Any], scheme: dict[str, Any]) -> Counted:
    """Bytes of a model of `observed.toml` at one of its schemes."""
    layers, hidden = model["layers"], model["hidden"]
    body = model.get("multiplied") or sum(outputs * inputs for outputs, inputs in _matrices(model))
    values = model.get("cache_values") or 2 * layers * model["kv_heads"] * model["head_dim"]
    head = model["vocab"] * hidden
    stored = body * scheme["bits"] / 8
    if "undivided" in scheme and "multiplied" not in model:
        stored = sum(
            outputs * inputs * scheme["bits" if inputs % scheme["group"] == 0 else "undivided"] / 8
            for outputs, inputs in _matrices(model)
        )
    read = stored + head * scheme["head"] / 8
    apart = scheme.get("head_copy", False) or not model["tied"]
    tables = model.get("looked_up", 0) + (head if apart else 0)
    return Counted(
        layers,
        body,
        read,
        read + tables * scheme["embedding"] / 8,
        values * scheme.get("cache_bits", _tables()["caches"][scheme["engine"]]["bits"]) / 8,
        values,
    )


def _matrices(model: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of all layers' matrices."""
    hidden, ffn, head = model["hidden"], model["ffn"], model["head_dim"]
    queries, keys = model["heads"] * head, model["kv_heads"] * head
    layer = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    layer += [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    yield from layer * model["layers"]


def _run(seen: Observation) -> tuple[object, ...]:
    place = seen.device.id if seen.device else seen.soc.id
    return seen.source, seen.model, seen.scheme, seen.engine, seen.backend, place, seen.prompt, seen.note


def _model(seen: Observation) -> dict[str, Any] | None:
    return next((entry for entry in _tables()["models"] if seen.model in entry["names"]), None)


def _scheme(seen: Observation) -> dict[str, Any] | None:
    """The first entry of the engine with that name, and with that model if it is for some only."""
    return next(
        (
            entry
            for entry in _tables()["schemes"]
            if entry["engine"] == seen.engine
            and seen.scheme in entry["names"]
            and seen.model in entry.get("models", [seen.model])
        ),
        None,
    )


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    return tomllib.loads((files("runtimes") / "observed.toml").read_text(encoding="utf-8"))
