"""Which models fit on which devices, by which schemes: the planner asked for every pair, and its answers as a table."""

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import profiles
from exporter.architecture import Architecture
from exporter.backend import Asked
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.plan import Plan, choose
from exporter.sizing import is_tight, memory_budget
from profiles import Device, UnknownDevice

Verdict = Literal["fits", "tight", "no"]
PLANNED = "planned"  # in a scheme's place: the planner takes one
SCHEMES = (PLANNED, "int8", "int4")


@dataclass(frozen=True)
class Cell:
    """What the planner says of a model on a device by a scheme. `tight`: more than 80 % of the memory budget.

    `needed`: bytes of memory, where they are known; `reason` and `rule`: why this backend, or why not at all.
    """

    device: Device
    model: str
    parameters: int
    asked: str
    plan: Plan | None
    needed: float | None
    reason: str
    rule: str

    @property
    def budget(self) -> int:
        """Bytes that the model may use."""
        return memory_budget(self.device) or 0

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        if self.plan is None:
            return "no"
        return "tight" if is_tight(self.plan.prediction.memory.value, self.budget) else "fits"

    @property
    def share(self) -> float | None:
        """Of the memory budget, the share that is needed."""
        return self.needed / self.budget if self.needed and self.budget else None

    def backend(self) -> str:
        """What computes; "" if nothing can."""
        return next((c.value for c in self.plan.choices if c.topic == "backend"), "") if self.plan else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, in bytes and tokens/s; None for what is not known."""
        plan, decode = self.plan, self.plan.prediction.decode if self.plan else None
        return {
            "device": self.device.name,
            "device_id": self.device.id,
            "chip": self.device.soc.name,
            "ram_bytes": self.device.ram_bytes,
            "model": self.model,
            "parameters": self.parameters,
            "asked": self.asked,
            "verdict": self.verdict,
            "scheme": plan.scheme if plan else None,
            "backend": self.backend() or None,
            "format": plan.format if plan else None,
            "context": plan.context if plan else None,
            "file_bytes": plan.prediction.file.value if plan else None,
            "memory_bytes": self.needed,
            "budget_bytes": self.budget,
            "decode_tokens_per_s": decode.value if decode else None,
            "decode_low": decode.low if decode else None,
            "decode_high": decode.high if decode else None,
            "rule": self.rule,
            "reason": self.reason,
        }


def fit(
    models: Mapping[str, Architecture],
    devices: Sequence[Device],
    schemes: Sequence[str] = SCHEMES,
    context: int | None = None,
) -> tuple[Cell, ...]:
    """A cell for each device, model and scheme, in that order; every compiler counts as installed.

    `schemes`: names, or "planned"; one that is what is planned is left out beside it. `context` in tokens, planned if
    None. RecipeError for a scheme that there is not.
    """
    for scheme in schemes:
        Asked(None if scheme == PLANNED else scheme).schemes()
    found: list[Cell] = []
    for device in devices:
        for name, arch in models.items():
            cells = [_cell(device, name, arch, scheme, context) for scheme in schemes]
            planned = {(c.plan.scheme, c.backend()) for c in cells if c.plan and c.asked == PLANNED}
            found += [
                c
                for c in cells
                if c.asked == PLANNED or not c.plan or (c.plan.scheme, c.backend()) not in planned
            ]
    return tuple(found)


def _cell(device: Device, name: str, arch: Architecture, scheme: str, context: int | None) -> Cell:
    asked = Asked(scheme=None if scheme == PLANNED else scheme, context=context)
    try:
        plan = choose(device, arch, asked)
    except PlanRefused as refused:
        return Cell(device, name, arch.parameters, scheme, None, refused.needed, str(refused), refused.rule)
    except RecipeError as refused:
        return Cell(device, name, arch.parameters, scheme, None, None, str(refused), "weights-fit")
    (backend,) = (one for one in plan.choices if one.topic == "backend")
    needed = plan.prediction.memory.value
    return Cell(device, name, arch.parameters, scheme, plan, needed, backend.reason, ", ".join(backend.rules))


def find_devices(names: Sequence[str], listed: str = "") -> tuple[Device, ...]:
    """Devices by their names, and by a list with commas, in which a name may have one itself (iPhone17,1).

    Raises as `profiles.find`; UsageError if there is no name.
    """
    found = [profiles.find(name) for name in names]
    parts = [part.strip() for part in listed.split(",") if part.strip()]
    while parts:
        device, used = _first(parts)
        found.append(device)
        parts = parts[used:]
    if not found:
        raise UsageError("say for which devices: --device NAME, or --devices 'Galaxy S24 Ultra, Pixel 9'")
    return tuple({device.id: device for device in found}.values())


def _first(parts: Sequence[str]) -> tuple[Device, int]:
    """The device that the first two parts name with the comma between them, iPhone17,1; or else the first."""
    if len(parts) > 1:
        with contextlib.suppress(UnknownDevice):
            return profiles.find(",".join(parts[:2])), 2
    return profiles.find(parts[0]), 1


def with_ram(device: Device, gib: float) -> Device:
    """The device as if it had so much RAM; what an app was measured to get on the real one is left out then."""
    name = f"{device.name} with {gib:g} GiB"
    memory = device.memory.model_copy(update={"ram_gib": float(gib), "source": "asked for: no such device"})
    changed = {"id": f"{device.id}-{gib:g}gib", "name": name, "memory": memory, "app_memory": None}
    return device.model_copy(update=changed)


def to_csv(cells: Sequence[Cell]) -> str:
    """A row for each cell, under English names; plain numbers."""
    text = io.StringIO()
    rows = [cell.to_dict() for cell in cells]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """A number without more digits than it is worth, and no formula for a spreadsheet."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def rows(cells: Iterable[Cell]) -> Iterator[tuple[str, ...]]:
    """For a table: device, model, scheme, verdict, backend, context, size, memory, speed, why."""
    from runtimes.report import amount

    for cell in cells:
        plan = cell.plan
        memory = f"{amount(cell.needed, 'bytes')} of " if cell.needed else "of "
        decode = plan.prediction.decode.text if plan and plan.prediction.decode else ""
        yield (
            cell.device.name,
            cell.model,
            f"{plan.scheme}" if plan else cell.asked,
            cell.verdict,
            cell.backend(),
            str(plan.context) if plan else "",
            amount(plan.prediction.file.value, "bytes") if plan else "",
            memory + amount(cell.budget, "bytes"),
            decode.replace(" tokens/s", ""),
            f"[{cell.rule}]" if cell.needed else cell.reason,
        )
