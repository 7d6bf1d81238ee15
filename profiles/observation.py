"""What others measured on phones and computers and published: the figures that constants are fitted from.

A file holds the tables of one source. What all runs of a table have in common is said once, in the table; a run
says the rest, and its figures as the source prints them.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from profiles.model import Amount, Chip, Count, Device, Frozen, Identifier, Source, Text

Engine = Literal["coreai", "coreml", "executorch", "genie", "litert-lm", "llama.cpp", "mlx", "mnn"]
FigureName = Literal["prefill_speed", "decode_speed", "ttft", "peak_memory", "file_size"]
Unit = Literal["tokens/s", "s", "bytes"]

_UNITS: dict[str, tuple[float, Unit]] = {
    "tokens/s": (1, "tokens/s"),
    "ms": (1e-3, "s"),
    "s": (1, "s"),
    "MB": (1e6, "bytes"),
    "MiB": (1 << 20, "bytes"),
    "GB": (1e9, "bytes"),
    "GiB": (1 << 30, "bytes"),
}
_NUMBER = r"^\d+(\.\d+)? "
Speed = Annotated[str, StringConstraints(pattern=_NUMBER + "tokens/s$")]
Duration = Annotated[str, StringConstraints(pattern=_NUMBER + "m?s$")]
Size = Annotated[str, StringConstraints(pattern=_NUMBER + "[MG]i?B$")]
Date = Annotated[str, StringConstraints(pattern=r"^20\d\d-\d\d(-\d\d)?$")]


class Conditions(Frozen):
    """Under which a figure was measured. None: the source does not tell.

    `model` is the id of its Hugging Face repository where there is one; `scheme` and `bits` (of a weight, without
    its scales) are as the source or the engine calls them; `prompt` and `generated` are in tokens, as is
    `context`, what the cache holds.
    """

    model: Text
    parameters: Count | None = None
    scheme: Text
    bits: Amount | None = None
    engine: Engine
    delegate: Text | None = None
    backend: Literal["cpu", "gpu", "npu"]
    threads: Count | None = None
    prompt: Count | None = None
    generated: Count | None = None
    context: Count | None = None
    note: Text | None = None
    source: Source
    date: Date | None = None


class Run(Conditions):
    """What a file says of one run: on a device, or only on a chip, where the source names a reference board."""

    device: Identifier | None = None
    chip: Identifier | None = None
    prefill_speed: Speed | None = None
    decode_speed: Speed | None = None
    ttft: Duration | None = None
    peak_memory: Size | None = None
    file_size: Size | None = None

    @model_validator(mode="after")
    def _is_somewhere_and_says_something(self) -> "Run":
        if (self.device is None) == (self.chip is None):
            raise ValueError("a run names either its device or its chip")
        if not any(self.figures()):
            raise ValueError("a run has at least one figure")
        return self

    def figures(self) -> Iterator[tuple[FigureName, str]]:
        for name in FigureName.__args__:  # type: ignore[attr-defined]
            if printed := getattr(self, name):
                yield name, printed


class Observation(Conditions):
    """One figure: `value` in `unit`, and `printed` as in the source. `device` is None where only the chip is known."""

    device: Device | None
    soc: Chip
    figure: FigureName
    value: Amount
    unit: Unit
    printed: Text


class Publication(Frozen):
    runs: Annotated[tuple[Run, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, values: Any) -> Any:
        """Each run with what its table says of all its runs; what is no table is left for the fields to refuse."""
        if not isinstance(values, dict) or set(values) != {"tables"}:
            return values
        try:
            return {
                "runs": [
                    {**{key: value for key, value in table.items() if key != "runs"}, **run}
                    for table in values["tables"]
                    for run in table["runs"]
                ]
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                "an observation file is a list of [[tables]], each with a list of runs"
            ) from error

    def observations(self, devices: Mapping[str, Device], chips: Mapping[str, Chip]) -> Iterator[Observation]:
        """A figure each. Raises KeyError for a device or chip without a profile."""
        for run in self.runs:
            device = devices[run.device] if run.device else None
            soc = device.soc if device else chips[run.chip or ""]
            conditions = {name: getattr(run, name) for name in Conditions.model_fields}
            for figure, printed in run.figures():
                number, name = printed.split()
                scale, unit = _UNITS[name]
                yield Observation(
                    **conditions,
                    device=device,
                    soc=soc,
                    figure=figure,
                    value=float(number) * scale,
                    unit=unit,
                    printed=printed,
                )
