"""How the command line shows things to a person: always on standard error."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from exporter.fit import Cell
    from exporter.pepper.score import Score
    from exporter.pipeline import Progress as Report
    from exporter.plan import Plan
    from exporter.quantization.mixed import Mixed
    from profiles import Device
    from runtimes.bundle import Bundle, Choice, Gate, Variant
    from runtimes.targets import About

_FARMS = {
    "ai_hub": "Qualcomm AI Hub",
    "device_farm": "AWS Device Farm",
    "firebase": "Firebase Test Lab",
    "browserstack": "BrowserStack",
}

console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


def size(nbytes: float) -> str:
    """Bytes as a person reads them.

    >>> size(3_210_000), size(2_100_000_000)
    ('3.2 MB', '2.10 GB')
    """
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


@contextlib.contextmanager
def progress() -> Iterator["Report"]:
    """A bar with the time left, where standard error is a terminal; silent elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report


def show_choices(title: str, choices: Iterable["Choice"]) -> None:
    """Decisions, each with its reason."""
    table = _table(title, "topic", "choice", "why")
    for choice in choices:
        rules = f" [dim]\\[{', '.join(choice.rules)}][/dim]" if choice.rules else ""
        table.add_row(choice.topic, choice.value, escape(choice.reason) + rules)
    console.print(table)


def show_plan(name: str, plan: "Plan") -> None:
    """A plan: decisions, predictions, warnings."""
    target = plan.device.name if plan.device else "this computer"
    show_choices(f"Plan: {name} for {target}", plan.choices)
    table = _table("Not chosen", "topic", "instead", "why not")
    for choice in plan.choices:
        for other in choice.alternatives:
            table.add_row(choice.topic, other.value, f"{escape(other.reason)} [dim]\\[{other.rule}][/dim]")
    console.print(table)
    table = _table("Prediction", "predicted", "", "how")
    for figure in plan.prediction.rows():
        table.add_row(figure.name, figure.text, figure.explain)
    for name, why in plan.prediction.unknown:
        table.add_row(name, "unknown", why)
    console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]note:[/yellow] {warning}")


def show_fit(cells: "Sequence[Cell]") -> None:
    """What fits where, a line for each device, model and scheme."""
    from exporter.fit import rows

    columns = (
        "device",
        "model",
        "scheme",
        "fits?",
        "backend",
        "context",
        "size",
        "memory",
        "tokens/s",
        "why",
    )
    table = _table("", *columns)
    colours = {"fits": "green", "tight": "yellow", "no": "red"}
    for cell, row in zip(cells, rows(cells), strict=True):
        *shown, why = map(escape, row)
        shown[3] = f"[{colours[cell.verdict]}]{cell.verdict}[/]"
        table.add_row(*shown, why)
    console.print(table)


def show_gate(gate: "Gate") -> None:
    """The gate's report."""
    if not gate.checks:
        console.print("gate: [yellow]unverified[/yellow] (exported with --no-verify)")
        return
    table = _table("Gate", "check", "", "found")
    for check in gate.checks:
        verdict = "[green]passed[/green]" if check.passed else "[red]failed[/red]"
        table.add_row(check.name, "" if check.name == "not run" else verdict, check.detail)
    console.print(table)
    if gate.status == "unverified":
        console.print("gate: [yellow]unverified[/yellow]: no variant of this bundle can run on this machine")


def show_bundle(bundle: "Bundle", tensors: bool) -> None:
    """What a bundle is: model, variants, files, gate; its tensors too if asked for."""
    manifest = bundle.manifest
    model = manifest.model
    console.print(
        f"[bold]{model.name}[/bold] ({model.family}, {model.parameters / 1e6:.1f} M parameters, from {model.source}"
        f"{'@' + model.revision if model.revision else ''}), {size(bundle.size())}, planned for "
        f"{manifest.device or 'any computer'}"
    )
    for variant in manifest.variants:
        console.print(
            f"variant {variant.name}: {variant.format} for {variant.engine}, {variant.scheme}, context "
            f"{variant.context} tokens, for {', '.join(variant.chips) or _anywhere(variant)}"
        )
    console.print(f"stops on tokens {', '.join(map(str, manifest.tokens.eos))}")
    show_choices("Plan", manifest.plan)
    files = _table("Files", "file", "size", "SHA-256")
    for entry in manifest.files:
        files.add_row(entry.path, size(entry.size), entry.sha256[:16])
    console.print(files)
    show_gate(manifest.gate)
    if tensors:
        table = _table("Tensors", "tensor", "scheme", "algorithm", "shape", "error", "note")
        for t in manifest.tensors:
            shape = "×".join(map(str, t.shape))
            table.add_row(t.name, t.scheme, t.algorithm, shape, f"{t.error:.2e}", t.note)
        console.print(table)


def _anywhere(variant: "Variant") -> str:
    return "any CPU" if variant.delegate in ("", "xnnpack") else f"whatever has {variant.delegate}"


def show_mixed(mixed: "Mixed") -> None:
    """What each weight of a recipe of mixed precision becomes and why, the most sensitive first."""
    table = _table("Weights, by nats of KL divergence a bit", "tensor", "class", "scheme", "nats", "why")
    for row in mixed.rows():
        table.add_row(row["tensor"], row["class"], row["scheme"], f"{row['nats']:.2e}", row["reason"])
    console.print(table)


def show_recipes(found: Iterable[dict[str, Any]]) -> None:
    """The recipes that are shipped: what each is for, the schemes in it, and how they are found."""
    table = _table("Recipes", "recipe", "schemes", "by", "what it is for")
    for recipe in found:
        columns = (", ".join(recipe[key]) for key in ("schemes", "algorithms"))
        table.add_row(recipe["name"], *columns, escape(recipe["purpose"]))
    console.print(table)


def show_devices(devices: Iterable["Device"]) -> None:
    """Profiles, a line each."""
    table = _table("", "device", "chip", "NPU", "memory", "an app may use", "model codes")
    for device in devices:
        table.add_row(
            device.name,
            device.soc.name,
            device.soc.npu.family if device.soc.npu else "",
            f"{device.ram_bytes / 2**30:.0f} GiB",
            f"{device.app_memory_bytes / 2**30:.1f} GiB",
            ", ".join(device.model_codes),
        )
    console.print(table)


def show_device(device: "Device") -> None:
    """One profile: each figure beside its source; what is not known is not in it."""
    console.print(f"{device.name} ({device.id}): {', '.join(device.aliases)}", style="bold", markup=False)
    table = _table("", "what", "figure", "source")
    table.columns[-1].overflow = "fold"  # an address cut short leads nowhere
    for row in _facts(device):
        table.add_row(*map(escape, row))
    console.print(table)
    for note in filter(None, (device.note, device.soc.note)):
        console.print(f"note: {note}", markup=False)


def _facts(device: "Device") -> Iterator[tuple[str, str, str]]:
    chip, npu, types = device.soc, device.soc.npu, device.soc.number_types
    versions, farms = device.versions, device.farms
    if device.models:
        market = f" ({device.market})" if device.market else ""
        yield "model codes", ", ".join(device.model_codes) + market, device.models.source
    yield "memory", f"{device.memory.ram_gib:g} GiB", device.memory.source
    yield "an app may use", f"{device.app_memory_bytes / 2**30:.1f} GiB", device.app_memory_reason
    if versions:
        yield "system", f"{device.os} {versions.first or '?'} to {versions.last or '?'}", versions.source
    for farm, title in _FARMS.items():
        if farms and (names := getattr(farms, farm)):
            yield title, ", ".join(names), farms.source
    yield "chip", f"{chip.vendor} {chip.name} ({chip.id})", ""
    if chip.ro_soc_model:
        yield "ro.soc.model", ", ".join(chip.ro_soc_model.names), chip.ro_soc_model.source
    if chip.cpu:
        cores = ", ".join(
            f"{c.count} x {c.core}" + (f" {c.ghz:g} GHz" if c.ghz else "") for c in chip.cpu.clusters
        )
        yield "CPU", cores, chip.cpu.source
    if chip.dram:
        yield "DRAM", f"{chip.dram.gb_per_s:g} GB/s", chip.dram.source
    if npu:
        known = npu.model_dump(exclude={"kind", "name", "source"}, exclude_none=True)
        yield "NPU", ", ".join([npu.name, *(f"{key} {value}" for key, value in known.items())]), npu.source
    if types:
        weights, activations = " ".join(types.weights), " ".join(types.activations)
        source = f"{types.source}. {types.note}" if types.note else types.source
        yield "number types", f"weights {weights}; activations {activations}", source
    if chip.gpu:
        tops = f", {chip.gpu.tops:g} tops" if chip.gpu.tops else ""
        yield "GPU", f"{chip.gpu.name}{tops}", chip.gpu.source


def show_score(score: "Score") -> None:
    """Exact answers by kind and language."""
    table = _table("Exact answers", "", "right", "asked", "rate")
    rows = {"all": score.overall, **score.by_language, **score.by_kind}
    for name, tally in rows.items():
        table.add_row(name, str(tally.right), str(tally.asked), f"{tally.rate:.1%}")
    console.print(table)
    for miss in score.misses[:5]:
        console.print(
            f"missed: {miss.question.prompt} → {miss.got!r}, right is {miss.question.answer!r}", markup=False
        )


def show_targets(found: Iterable["About"]) -> None:
    """Where bundles are measured, whether that works here, and what can be said there."""
    table = _table("Targets", "target", "what it does", "ready", "options")
    for each in found:
        ready = {True: "yes", None: "not known before it measures"}.get(each.ready) or f"no: {each.hindrance}"
        table.add_row(each.name, escape(each.what), escape(ready), escape("\n".join(each.options)))
    console.print(table)
