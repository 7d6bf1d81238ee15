"""What fits where: the table, its files and page, and what a phone of each size can run."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

import profiles
from exporter import fit as fitting
from exporter import known
from exporter.errors import RecipeError, UsageError
from exporter.fit_html import page
from profiles import UnknownDevice, UnknownModel
from runtimes.report_words import Words

MODELS = known.catalogue()


def verdicts(device: str, gib: float) -> dict[str, str]:
    """What a phone like that, with so much RAM, could run as planned."""
    phone = fitting.with_ram(profiles.find(device), gib)
    return {cell.model: cell.verdict for cell in fitting.fit(MODELS, [phone], [fitting.PLANNED])}


@pytest.mark.parametrize("device", ["Pixel 9", "Galaxy S24 Ultra"])
def test_what_phones_of_each_size_can_run(device: str) -> None:
    """8 GB: Llama 3.2 1B and Phi-3 mini; 16 GB: Llama 3.2 3B and Qwen 2.5 7B; 32 GB: the class of 13 B. Quantized."""
    small, middle, large = (verdicts(device, gib) for gib in (8, 16, 32))
    assert {small["Llama 3.2 1B"], small["Phi-3 mini"]} == {"fits"}
    assert {small["Llama 2 13B"], small["Phi-3 medium"], small["Gemma 2 9B"]} == {"no"}
    assert {middle["Llama 3.2 3B"], middle["Qwen 2.5 7B"]} == {"fits"}
    assert set(large.values()) == {"fits"}
    assert verdicts(device, 2)["Phi-3 mini"] == "no"


def test_floats_are_for_small_models() -> None:
    cells = fitting.fit(MODELS, [profiles.find("Pixel 9")], ["fp16", "int4"])
    found = {(cell.model, cell.asked): cell for cell in cells}
    assert found["Qwen 2.5 0.5B", "fp16"].verdict == "fits"
    assert found["Llama 3.2 3B", "fp16"].verdict == "no"
    assert found["Llama 3.2 3B", "int4"].verdict == "fits"
    refused = found["Llama 3.2 3B", "fp16"]
    assert refused.rule == "ram-budget"
    assert refused.share
    assert refused.share > 1
    assert all(cell.share is not None and cell.share <= 1 for cell in cells if cell.plan)


def test_a_scheme_that_is_planned_anyway_is_told_once() -> None:
    cells = fitting.fit({"Llama 3.2 1B": MODELS["Llama 3.2 1B"]}, [profiles.find("Pixel 9")])
    assert [(cell.asked, cell.plan.scheme if cell.plan else "") for cell in cells] == [
        ("planned", "int4"),
        ("int8", "int8"),
    ]


def test_tight_is_more_than_80_percent() -> None:
    cells = fitting.fit(MODELS, [profiles.find("iPhone 13"), profiles.find("Pixel 8")])
    assert {cell.verdict for cell in cells} == {"fits", "tight", "no"}
    for cell in cells:
        if cell.plan and cell.share:
            assert (cell.verdict == "tight") == (cell.share > 0.8)


def test_what_the_backend_cannot_have_says_its_rule() -> None:
    (cell,) = fitting.fit({"Llama 3.2 1B": MODELS["Llama 3.2 1B"]}, [profiles.find("Pixel 9")], ["pal4"])
    assert (cell.verdict, cell.rule, cell.needed) == ("no", "weights-fit", None)
    assert "lookup tables" in cell.reason
    with pytest.raises(RecipeError, match="no scheme 'int5'"):
        fitting.fit(MODELS, [profiles.find("Pixel 9")], ["int5"])


def test_devices_by_a_list_with_commas() -> None:
    found = fitting.find_devices(["갤럭시 S24 울트라"], "iPhone17,1, Pixel 9,iPhone 17, 갤럭시 S24 울트라")
    assert [device.id for device in found] == ["galaxy-s24-ultra", "iphone-16-pro", "pixel-9", "iphone-17"]
    with pytest.raises(UnknownDevice, match="Pixel 99"):
        fitting.find_devices([], "Pixel 9, Pixel 99")
    with pytest.raises(UsageError, match="--devices"):
        fitting.find_devices([], " , ")


def test_the_catalogue_holds_what_its_names_say() -> None:
    """The parameters that each model is sold by."""
    for name, arch in MODELS.items():
        stated = re.search(r"([\d.]+)B$", name)
        size = float(stated[1]) if stated else {"Phi-3 mini": 3.8, "Phi-3 medium": 14.0}[name]
        assert arch.parameters / 1e9 == pytest.approx(size, rel=0.31 if name == "Gemma 2 2B" else 0.24), name
    assert next(iter(MODELS)) == "Qwen 2.5 0.5B"
    assert {model.config["model_type"] for model in profiles.models()} == {"llama", "qwen2", "gemma2", "phi3"}


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama 3.2 1b", "Llama 3.2 1B"),
        ("라마 3.2 1B", "Llama 3.2 1B"),
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 1B"),
        ("Phi-3-mini-4k-instruct", "Phi-3 mini"),
        ("qwen2.5-7b", "Qwen 2.5 7B"),
    ],
)
def test_models_by_their_names(name: str, model: str) -> None:
    assert known.describe_model(name) == (model, MODELS[model])


def test_unknown_models_are_said() -> None:
    with pytest.raises(UnknownModel, match=r"Llama 3\.2 1B.*or give a checkpoint"):
        known.describe_model("Llama 3.2 11B")
    names = [
        label for model in profiles.models() for label in {profiles.lookup.normalized(n) for n in model.names}
    ]
    assert len(names) == len(set(names))


def test_csv_and_json(gochu: Any, tmp_path: Path) -> None:
    arguments = ["fit", "Llama 3.2 1B", "--devices", "SM-S928N,iPhone17,1", "--scheme", "int4,pal4"]
    code, out, _ = gochu(*arguments, "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert [(row["device_id"], row["verdict"]) for row in rows] == [
        ("galaxy-s24-ultra", "fits"),
        ("galaxy-s24-ultra", "no"),
        ("iphone-16-pro", "fits"),
        ("iphone-16-pro", "fits"),
    ]
    code, out, _ = gochu(*arguments, "--json")
    told = json.loads(out)
    assert [row["rule"] for row in told][:2] == ["hexagon-portable", "weights-fit"]
    assert float(rows[0]["memory_bytes"]) == pytest.approx(told[0]["memory_bytes"], rel=1e-5)
    assert told[0]["decode_low"] < told[0]["decode_tokens_per_s"] < told[0]["decode_high"]


def test_the_page(gochu: Any, tmp_path: Path) -> None:
    file = tmp_path / "어디에.html"
    code, _, err = gochu("fit", "--device", "Pixel 9", "--ram", "8GB", "--html", file, "--lang", "ko")
    text = file.read_text(encoding="utf-8")
    assert code == 0
    assert "어디에.html" in err
    assert '<html lang="ko">' in text
    assert "default-src 'none'" in text
    assert not re.findall(r"<script|<link|<img|\bsrc=|\bhref=|url\(|@import", text)
    assert "어떤 모델이 어디에 들어가나" in text
    assert text.count('<svg class="track"') == len(MODELS) + 1  # a row for each, and the ruler
    assert text.count("<tbody>") == len(MODELS)
    assert "안 됨" in text
    assert "[ram-budget]" in text


def test_names_are_text_in_the_page() -> None:
    device = profiles.find("Pixel 9").model_copy(update={"name": "<b>9</b>"})
    text = page(fitting.fit({"<i>": MODELS["Llama 3.2 1B"]}, [device]), Words("en"))
    assert "<b>9</b>" not in text
    assert "&lt;b&gt;9&lt;/b&gt;" in text
    assert "<i>" not in text.replace("<i></i>", "")  # the legend's dots are such


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--device"),
        (["--device", "Galaxy S24"], 3, "more than one chip"),
        (["--device", "Pixel 9", "--ram", "much"], 2, "no size of RAM"),
        (["--device", "Pixel 9", "--scheme", "int5"], 3, "no scheme 'int5'"),
        (["--device", "Pixel 9", "--lang", "fr"], 2, "'fr'"),
        (["no such model", "--device", "Pixel 9"], 3, "no model of the catalogue"),
    ],
)
def test_what_cannot_be(gochu: Any, arguments: list[str], code: int, words: str) -> None:
    done, out, err = gochu("fit", *arguments)
    assert (done, out) == (code, "")
    assert words in err.replace("\n", " ")
