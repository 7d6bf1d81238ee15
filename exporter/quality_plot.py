"""Draw a quality report: error by layer and kind of tensor."""

from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.quality import KINDS, Quality
from runtimes.plot import COLOURS, canvas, check, drawable


def plot(quality: Quality, path: Path) -> None:
    """Draw SQNR over the layers into a .png or .svg file: a line for each kind of tensor, one for the layers' outputs.

    UsageError (another suffix, no folder, nothing by layers in the report), MissingExtra (matplotlib).
    """
    check(path)
    if not quality.layers:
        raise UsageError(f"there is nothing to draw by layer: {'; '.join(quality.notes)}")
    layers = len(quality.layers)
    with canvas(path, 9.5, 5.2) as (figure, fonts):
        axes = figure.add_subplot()
        colours = dict(zip(KINDS, COLOURS, strict=False))
        for kind, colour in colours.items():
            _draw(axes, quality, kind, colour)
        outputs = [layer.output_db for layer in quality.layers]
        if any(db is not None for db in outputs):
            label = "the layer's output, with all errors before it"
            axes.plot(range(layers), _drawn(outputs), color="black", linewidth=2.5, marker="o", label=label)
        axes.set_xlim(-1.5, layers + 0.5)
        ticks = {-1: "embedding", **{i: str(i) for i in range(0, layers, -(-layers // 16))}, layers: "head"}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlabel("layer")
        axes.set_ylabel("signal to noise in dB: 20 is an error of a tenth")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(drawable(_title(quality), fonts), loc="left", fontsize=10)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)


def _draw(axes: Any, quality: Quality, kind: str, colour: str) -> None:
    """What the products by one kind of tensor lose, which is a line; of embedding and head it is a point."""
    tensors = [tensor for tensor in quality.tensors if tensor.kind == kind]
    if all(tensor.output_db is None for tensor in tensors):
        return
    ends = {"embedding": -1, "head": len(quality.layers)}
    places = [ends[kind] if tensor.layer is None else tensor.layer for tensor in tensors]
    values = _drawn([tensor.output_db for tensor in tensors])
    axes.plot(places, values, color=colour, marker="D" if kind in ends else ".", linewidth=1.2, label=kind)


def _drawn(values: list[float | None]) -> list[float]:
    """What has no error is left out of a line."""
    return [float("nan") if db is None else db for db in values]


def _title(quality: Quality) -> str:
    first, second = quality.first, quality.second
    return (
        f"{second.name} ({second.what}) against {first.name} ({first.what})\n"
        f"KL {quality.kl.mean:.2g} nats a token, the same likeliest token after {quality.agreement:.1f} %"
    )
