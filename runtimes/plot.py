"""Draw traces: a bar for each phase, cut into its operators. And what every drawing here starts from."""

import contextlib
import importlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes import extras
from runtimes.errors import UsageError

if TYPE_CHECKING:
    from runtimes.trace import Phase, Trace

EXTRA = "plot"
SUFFIXES = (".png", ".svg")
OTHERS = "others"
_KOREAN = (
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "NanumGothic",
    "Apple SD Gothic Neo",
    "Malgun Gothic",
    "UnDotum",
)
# Told apart by eyes that see few colours, too (Okabe and Ito, https://jfly.uni-koeln.de/color), and two more.
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#7B61A8",
    "#8C6D46",
    "#1B3A57",
)
_GREY = ("#8A8A8A", "#CFCFCF")  # framework, others
_LABELLED = 0.05  # a part this long has room for its share


def plot(traces: "Sequence[Trace]", path: Path) -> None:
    """Draw the phases of one or more traces as bars of 100 %, into a .png or .svg file.

    The longest operators have a colour each, the same in all bars; the rest are drawn together. Raises UsageError
    (another suffix, no folder, no trace), MissingExtra (matplotlib is not installed).
    """
    check(path)
    if not traces:
        raise UsageError("there is no trace to draw; trace at least one case")
    bars = [(trace, phase) for trace in traces for phase in trace.phases]
    with canvas(path, 11, 1.9 + 0.62 * len(bars)) as (figure, fonts):
        axes = figure.add_subplot()
        _draw(axes, bars)
        _label(axes, bars, fonts)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float) -> "Iterator[tuple[Any, Sequence[_Font] | None]]":
    """A matplotlib figure of so many inches, which is written when the block ends, and the fonts that `drawable` asks
    for."""
    matplotlib: Any = importlib.import_module("matplotlib")
    figure_module: Any = importlib.import_module("matplotlib.figure")
    fonts = _fonts()
    kept = None if path.suffix.lower() == ".svg" else fonts  # an .svg has letters, which its viewer draws
    settings = {"font.family": [font.family for font in fonts], "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a box is drawn for it
        figure = figure_module.Figure(figsize=(width, height), layout="constrained")
        yield figure, kept
        figure.savefig(path, dpi=150)


def check(path: Path) -> None:
    """UsageError or MissingExtra if nothing can be drawn into that file: to know it before anything is traced."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path} is neither {' nor '.join(SUFFIXES)}: give the plot's file one of these suffixes"
        )
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder; make it, or draw into one that is there")
    extras.check("matplotlib", EXTRA)


def _draw(axes: Any, bars: "Sequence[tuple[Trace, Phase]]") -> None:
    from runtimes.trace import FRAMEWORK

    named = _longest(phase for _, phase in bars)
    starts = [0.0] * len(bars)
    colours = {**dict(zip(named, COLOURS, strict=False)), FRAMEWORK: _GREY[0], OTHERS: _GREY[1]}
    for name, colour in colours.items():
        widths = [max(0.0, _share(phase, name, colours)) for _, phase in bars]
        if not any(widths):
            continue
        drawn = axes.barh(
            range(len(bars)), widths, left=starts, height=0.66, color=colour, edgecolor="white", label=name
        )
        texts = [f"{width:.0%}" if width >= _LABELLED else "" for width in widths]
        axes.bar_label(drawn, texts, label_type="center", fontsize=9, color=_ink(colour))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]


def _label(axes: Any, bars: "Sequence[tuple[Trace, Phase]]", fonts: "Sequence[_Font] | None") -> None:
    from runtimes.report import amount, where

    names = []
    for place, (trace, phase) in enumerate(bars):
        what = f"{trace.what.model} {trace.what.variant}"
        length = f"{phase.tokens} tokens" if phase.name == "prefill" else "each token"
        names.append(drawable(f"{what}\n{phase.name}, {length}", fonts))
        axes.text(1.01, place, amount(phase.traced, "s"), va="center", fontsize=10, fontweight="bold")
    axes.set_yticks(range(len(bars)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    title = "\n".join(
        ["Time by operator, as traced", *dict.fromkeys(where(trace.where) for trace, _ in bars)]
    )
    axes.set_title(drawable(title, fonts), loc="left", fontsize=10)


def _longest(phases: "Iterable[Phase]") -> list[str]:
    """Operators with the largest share in any bar: as many as there are colours."""
    from runtimes.trace import FRAMEWORK

    largest: dict[str, float] = {}
    for phase in phases:
        for each in phase.operators:
            if each.name != FRAMEWORK:
                largest[each.name] = max(largest.get(each.name, 0.0), each.share)
    ordered = sorted(largest, key=lambda name: -largest[name])
    return [name for name in ordered if largest[name] >= 0.01][: len(COLOURS)]


def _share(phase: "Phase", name: str, drawn: Iterable[str]) -> float:
    if name == OTHERS:
        return sum(each.share for each in phase.operators if each.name not in set(drawn))
    found = phase.operator(name)
    return found.share if found else 0.0


def _ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour like #0072B2."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


class _Font:
    """A font that is installed, and which characters it has."""

    def __init__(self, family: str, path: str) -> None:
        self.family = family
        font: Any = importlib.import_module("matplotlib.ft2font").FT2Font(path)
        self.characters = set(font.get_charmap())


def _fonts() -> list[_Font]:
    """matplotlib's own font, and the first font with Korean letters that this machine has, if any."""
    manager: Any = importlib.import_module("matplotlib.font_manager").fontManager
    installed = {entry.name: entry.fname for entry in manager.ttflist}
    families = ["DejaVu Sans", *[family for family in _KOREAN if family in installed][:1]]
    return [_Font(family, installed[family]) for family in families]


def drawable(text: str, fonts: Sequence[_Font] | None) -> str:
    """The text with a box for each character that none of the fonts has; the text itself if there are none given."""
    if fonts is None:
        return text
    known = {"\n"}.union(*({chr(code) for code in font.characters} for font in fonts))
    return "".join(character if character in known else "□" for character in text)
