"""Reports: a table, Markdown, CSV, and a page with plots that needs nothing else; in English and Korean."""

import csv
import io
import re
import shutil
import socketserver
import string
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import invented_results as invented
import pytest
from rich.console import Console

from runtimes import measurement as results
from runtimes import report, report_plots, report_words, reports
from runtimes.errors import ResultsError, UsageError
from runtimes.measurement import Answer, Figure, Measurement, sampled
from runtimes.report_words import LANGUAGES, Words

PACKAGE = Path(reports.__file__).parent
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What stands in a page: tags with attributes, texts, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.styles = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.styles += data
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    def with_class(self, name: str) -> list[dict[str, str]]:
        return [values for _, values in self.tags if name in values.get("class", "").split()]

    def fetched(self) -> list[str]:
        """All that a browser would load from elsewhere, or run."""
        found = [
            tag
            for tag, _ in self.tags
            if tag in ("script", "link", "iframe", "object", "embed", "base", "image")
        ]
        found += re.findall(r"url\(|@import", self.styles)
        for _, values in self.tags:
            found += [name for name in values if name.startswith("on")]
            found += re.findall(r"url\([^)]*", values.get("style", ""))
            found += ["refresh"] if values.get("http-equiv", "").lower() == "refresh" else []
            for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href", "background"):
                if name in values and not values[name].startswith(("#", "data:")):
                    found.append(values[name])
        return found


def render(*files: list[Measurement], lang: str = "en") -> str:
    named = [reports.Results(f"{'ab'[i]}.jsonl", rows) for i, rows in enumerate(files)]
    return reports.render(named, "html", lang)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(invented.everything()))


def test_the_page_is_whole_and_loads_nothing(page: Page) -> None:
    assert page.fetched() == []
    policy = next(v["content"] for _, v in page.tags if v.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "@media (prefers-color-scheme: dark)" in page.styles


@pytest.mark.parametrize(
    "planted",
    [
        "<img src='http://a/b.png'>",
        "<style>@import 'x'</style>",
        "<style>p { background: url(x) }</style>",
        "<p style='background: url(x)'></p>",
        "<a href='https://a'></a>",
        "<p onclick='x'></p>",
        "<script></script>",
        "<link href='x'>",
    ],
)
def test_what_would_be_loaded_is_found(planted: str) -> None:
    assert Page(planted).fetched()


def test_names_are_text_whatever_they_hold() -> None:
    rows = [
        invented.case(
            "갤럭시 S23",
            length,
            model=EVIL,
            device=f'"{EVIL}',
            variant=EVIL,
            engine=EVIL,
            command=EVIL,
            notes=(EVIL,),
            os=EVIL,
            scheme=f"int4 & {length}",
        )
        for length in (64, 256)
    ]
    rows += [
        row.model_copy(update={"figures": (sampled("decode_speed", "tokens/s", [9.0] * 3),)}) for row in rows
    ]
    found = Page(render(rows, rows))
    assert found.fetched() == []
    assert found.texts.count(EVIL) >= len(rows), "it is shown as it is"


def test_each_row_shows_the_command_that_repeats_it(page: Page) -> None:
    rows = invented.everything()
    shown = [text for text in page.texts if text.startswith(("gochu bench", "gochu plan"))]
    assert shown == [row.command for row in rows]


def test_what_is_not_measured_says_so(page: Page) -> None:
    shown = [text for text in page.texts if text in ("predicted", "emulated")]
    not_measured = [f for m in invented.everything() for f in m.figures if f.kind != "measured"]
    assert len(shown) == len(not_measured) + 2, "in each cell, and in the explanation of the words"
    assert len(page.with_class("hollow")) == len(invented.SPEEDS)


def test_marks_notes_and_conditions_are_seen(page: Page) -> None:
    marks = [values for values in page.with_class("tag") if "mark" in values["class"].split()]
    rows = [m for m in invented.everything() for _ in m.marks]
    assert len(marks) >= len(rows) + 3
    for text in ("CPU fallback", "interrupted", "throttled", "prompt cut to fit the context of 1152"):
        assert text in page.texts
    for text in ("thermal moderate, 44 °C, battery 79 %", "sm8650", "23 더하기 45는? → 68입니다."):
        assert text in page.texts
    assert any("decode's on CPU (3), NPU (341)" in text for text in page.texts)


def test_plots_for_all_that_can_be_drawn(page: Page) -> None:
    for heading in (
        "Decode speed and peak memory",
        "Prefill speed by prompt length",
        "Sustained decode speed",
        "Predicted and measured",
    ):
        assert heading in page.texts
    assert "Before and after" not in page.texts, "there is but one file"
    alone = Page(render([invented.emulated()])).texts
    assert "All measurements" in alone
    assert not {"Decode speed and peak memory", "Predicted and measured", "Sustained decode speed"} & {*alone}


def test_a_card_shows_the_middle_run_and_not_the_luckiest() -> None:
    runs = [
        invented.measurement(sampled("decode_speed", "tokens/s", [speed])) for speed in (20.0, 90.0, 30.0)
    ]
    runs.append(invented.measurement(sampled("decode_speed", "tokens/s", [200.0]), marks=("throttled",)))
    runs.append(invented.predicted("Galaxy S24 Ultra"))
    texts = Page(render(runs)).texts
    assert texts[texts.index("At a glance") :][4] == "30.0 tokens/s"


def test_up_is_faster_and_right_is_more_memory() -> None:
    small, large = (
        invented.measurement(
            sampled("decode_speed", "tokens/s", [speed]), sampled("peak_memory", "bytes", [size]), device=name
        )
        for name, speed, size in (("a", 40.0, 4e8), ("b", 10.0, 9e8))
    )
    first, second = Page(render([small, large])).with_class("dot")
    assert float(first["cx"]) < float(second["cx"])
    assert float(first["cy"]) < float(second["cy"]), "SVG counts from the top"
    assert {"s0" in first["class"], "s1" in second["class"]} == {True}


def test_the_curve_of_a_throttling_phone_falls() -> None:
    for throttles in (True, False):
        found = Page(render([invented.sustained("갤럭시 S23", throttles=throttles)]))
        (line,) = found.with_class("line")
        heights = [float(place.split(",")[1]) for place in line["points"].split()]
        fall = heights[-1] - heights[0]
        assert (fall > 40) == throttles
        assert len(found.with_class("speck")) == 80


def test_thousands_of_samples_become_a_band() -> None:
    times = [0.1 * i for i in range(6000)]
    figure = sampled("decode_speed", "tokens/s", [30.0 + i % 7 for i in range(6000)], times=times)
    text = render([invented.measurement(figure, sustained_minutes=10)])
    found = Page(text)
    assert (len(found.with_class("band")), len(found.with_class("speck"))) == (1, 0)
    assert len(text) < 60_000


def test_two_files_are_before_and_after() -> None:
    rows = [invented.case(device, 64) for device in invented.SPEEDS]
    found = Page(render(rows, [invented.case(device, 64, 1.5) for device in invented.SPEEDS]))
    assert "Before and after" in found.texts
    assert found.texts.count("slower by 50%") == len(rows), "TTFT"
    assert found.texts.count("slower by 33%") == 2 * len(rows), "the speeds"
    assert {"good"} not in [{*v["class"].split()} for v in found.with_class("mid")]
    apart = Page(render(rows[:1], rows[1:2]))
    assert "The two files have no figure in common: nothing was measured in both." in apart.texts


def test_ticks_are_round() -> None:
    assert report_plots._round_ticks(0, 43) == [0, 10, 20, 30, 40]
    assert report_plots._round_ticks(-0.6, 0.6) == [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]
    axis = report_plots.Axis("", str, 0, 100).fit([1, 1000])
    assert (axis.log, axis.ticks) == (True, [1, 10, 100, 1000])
    assert axis.at(10) - axis.at(1) == pytest.approx(axis.at(100) - axis.at(10), abs=0.2)
    flat = report_plots.Axis("", str, 0, 100).fit([5, 5], zero=False)
    assert 0 < flat.at(5) < 100


@pytest.mark.parametrize("files", [1, 2])
def test_a_korean_page_is_korean(files: int) -> None:
    rows = [invented.everything(1 + 0.5 * i) for i in range(files)]
    found = Page(render(*rows, lang="ko"))
    assert ("html", {"lang": "ko"}) in found.tags
    english = {en for en, ko in report_words._WORDS.values() if en != ko} - {"cpu"}
    data = {answer for m in rows[0] for answer in (m.where.target, m.what.variant, m.how.workload)}
    assert not (english - data) & {*found.texts}
    assert {"측정 결과", "디코딩 속도와 최대 메모리", "스로틀링", "예측"} <= {*found.texts}
    labels = [values["aria-label"] for _, values in found.tags if "aria-label" in values]
    assert all(re.search("[가-힣]", label) for label in labels)


def test_both_languages_say_the_same() -> None:
    for key, (en, ko) in report_words._WORDS.items():
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in (en, ko)]
        assert fields[0] == fields[1], key
        hangul = re.search("[가-힣]", ko)
        assert hangul or key in ("ttft", "column ttft", "lede", "days", "interval", "function's"), key


def test_every_word_that_is_used_is_known() -> None:
    """A word without an entry is shown by its key: right for another package's figure, wrong for a label."""
    sources = [*PACKAGE.glob("report*.py"), *PACKAGE.glob("*.jinja"), PACKAGE.parent / "exporter/fit_html.py"]
    used = {
        key
        for path in sources
        for key in re.findall(r'words[\[(]\s*"([^"{}]+)"', path.read_text(encoding="utf-8"))
    }
    assert len(used) > 30
    assert used <= set(report_words._WORDS)
    for kind in results.Kind.__args__ + results.Mark.__args__:
        assert {kind, f"{kind}, means"} <= set(report_words._WORDS)
    with pytest.raises(UsageError, match="'fr'; there are en and ko"):
        Words("fr")


def test_csv_has_a_row_for_each_figure() -> None:
    rows = invented.everything()
    rows[0] = rows[0].model_copy(
        update={"how": rows[0].how.model_copy(update={"notes": ('a "note", with\nlines',)})}
    )
    text = reports.render([reports.Results("a.jsonl", rows)], "csv", "ko")
    found = list(csv.DictReader(io.StringIO(text)))
    figures = [(m, figure) for m in rows for figure in m.figures]
    assert len(found) == len(figures)
    for line, (m, figure) in zip(found, figures, strict=True):
        assert (line["file"], line["device"], line["figure"]) == ("a.jsonl", m.where.device, figure.name)
        assert (float(line["value"]), line["kind"], line["unit"]) == (figure.value, figure.kind, figure.unit)
        assert line["p5"] == ("" if figure.p5 is None else str(figure.p5))
        assert (line["marks"], line["command"]) == (" ".join(m.marks), m.command)
        assert line["samples"] == str(max(1, len(figure.samples)))
    assert found[0]["notes"] == 'a "note", with\nlines'
    assert {line["backend"] for line in found} == {"", "NPU and CPU"}


def test_markdown_keeps_its_table_whatever_names_hold() -> None:
    row = invented.case(
        "갤럭시 S23", 64, device="a|b\n*c*", model=f"a|{EVIL}", command="echo `a` | tee", notes=("a|b",)
    )
    text = reports.render([reports.Results("a", [row, invented.emulated()])], "markdown")
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    bars = {re.sub(r"\\\|", "", line).count("|") for line in table[:3]}
    assert len(bars) == 1
    assert r"\<script\>" in text
    assert "<script>" not in text
    assert "`` echo `a` | tee ``" in text
    assert "598 MB emulated" in text
    assert "- **emulated**: another machine's instructions" in text
    korean = reports.render([reports.Results("a", [row])], "markdown", "ko")
    assert korean.startswith("# 측정 결과")
    assert "디코딩 속도" in korean


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_terminals_table_shows_kinds_and_marks(lang: str) -> None:
    words = Words(lang)
    text = io.StringIO()
    report.show(invented.everything(), Console(file=text, width=220), words)
    shown = text.getvalue()
    for key in ("predicted", "emulated", "interrupted", "throttled", "cpu_fallback", "marks"):
        assert words[key] in shown
    assert words["column decode_speed"] in shown
    assert "812 M" in shown


def test_the_table_has_no_column_of_marks_where_there_are_none() -> None:
    grid = report.table([invented.case("갤럭시 S23", 64)])
    assert "marks" not in [column.header for column in grid.columns]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "결과.jsonl"
    results.append(path, invented.everything())
    return path


def test_the_command(gochu: Any, file: Path, tmp_path: Path) -> None:
    code, out, err = gochu("report", file)
    assert (code, out) == (0, "")
    assert "갤럭시 S23" in err
    for name, start in (
        ("a/보고서.html", "<!DOCTYPE html>"),
        ("a.md", "# 측정 결과"),
        ("a.csv", "file,time,"),
    ):
        assert gochu("report", file, "-o", tmp_path / name, "--lang", "ko")[:2] == (0, "")
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)
    code, out, err = gochu("report", file, file, "--format", "html")
    assert (code, err) == (0, "")
    assert "no difference" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--format", "pdf"], 2, "no format 'pdf'; there are table, markdown, csv, html"),
        (["-o", "a.pdf"], 2, "no format for a.pdf"),
        (["-o", "a.txt", "--format", "table"], 2, "for the terminal"),
        (["--lang", "fr"], 2, "no reports in 'fr'"),
        (["-o", "/dev/null/a.csv"], 3, "cannot be written to /dev/null/a.csv"),
    ],
)
def test_what_cannot_be(gochu: Any, file: Path, arguments: list[str], code: int, words: str) -> None:
    found = gochu("report", file, *arguments)
    assert found[:2] == (code, "")
    assert words in found[2]
    assert found[2].count("\n") == 1


def test_files_without_measurements(gochu: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ResultsError, match=r"no measurement in empty\.jsonl"):
        reports.load([empty])
    assert gochu("report", tmp_path / "none.jsonl")[0] == 3


def test_amounts_of_instructions() -> None:
    figure = Figure(name="decode_instructions", unit="instructions", kind="emulated", value=1.234e9)
    assert report.cell(figure) == "1.23 G emulated"
    assert report.cell(figure.model_copy(update={"value": 0.0, "samples": (0.0, 0.0), "p5": 0.0, "p95": 0.0}))


class Recorder(socketserver.StreamRequestHandler):
    """A proxy that answers nothing and remembers what it was asked for."""

    def handle(self) -> None:
        line = self.rfile.readline().decode("latin-1").strip()
        self.server.asked.append(line)  # type: ignore[attr-defined]
        self.wfile.write(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture
def proxy() -> Iterator[socketserver.ThreadingTCPServer]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


BROWSERS_OWN = re.compile(
    r"\b(google|googleapis|gstatic|gvt1)\.com\b"
)  # it looks for updates, page or no page
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="opens the page in a browser; chromium is not installed")
def test_a_browser_that_opens_the_page_asks_for_nothing(proxy: Any, tmp_path: Path) -> None:
    """Its proxy is ours, so that a request would be seen, as that of another page is."""

    def opened(name: str, text: str) -> tuple[str, list[str]]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        proxy.asked.clear()
        done = subprocess.run(
            [
                BROWSER,
                *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync".split(),
                *"--disable-background-networking --disable-component-update --dump-dom".split(),
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--proxy-server=http://127.0.0.1:{proxy.server_address[1]}",
                f"file://{tmp_path / name}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout, [line for line in proxy.asked if not BROWSERS_OWN.search(line)]

    _, asked = opened("other.html", "<img src='http://pepper.test/x.png'>")
    assert any("pepper.test/x.png" in line for line in asked)
    shown, asked = opened("report.html", render([invented.case("갤럭시 S23", 64)]))
    assert "갤럭시 S23" in shown
    assert asked == []


def test_what_a_simulator_and_a_model_say_is_in_the_table() -> None:
    """No empty columns of times, and the answers that were asked for."""
    figures = (
        sampled("npu_share", "%", [62.5], "simulated"),
        sampled("logits_correlation", "", [0.9999791], "simulated"),
    )
    found = invented.measurement(*figures).model_copy(
        update={"answers": (Answer(prompt="안녕 [x]", text="네.", tokens=(1,)),)}
    )
    text = io.StringIO()
    report.show([found], Console(file=text, width=160))
    said = text.getvalue()
    assert "62.5 % simulated" in said
    assert "0.99998 simulated" in said
    assert "TTFT" not in said
    assert f"{found.where.target}: 안녕 [x] → 네." in said
    text = io.StringIO()
    report.show([invented.measurement(sampled("ttft", "s", [1.0])), found], Console(file=text, width=200))
    assert "TTFT" in text.getvalue()
