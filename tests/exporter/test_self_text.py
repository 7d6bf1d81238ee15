"""Calibration text that the model writes itself: by its own probabilities, always the same, for every family."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.errors import RecipeError
from exporter.plan import make_plan
from exporter.quantization import self_text
from exporter.quantization.calibration import SELF, calibration_sequences
from exporter.tokenizer import TOKENIZER, read_text_side
from runtimes.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write(folder: Path | str, context: int = 64, most: int = 320, **more: Any) -> list[list[int]]:
    with open_checkpoint(folder) as source:
        return calibration_sequences(source, context, SELF, most, **more)


def test_every_family_writes_by_its_own_probabilities(family, checkpoints):
    """The beginning is the chat template's, and the first tokens are those that transformers finds the likeliest."""
    folder, model = checkpoints.folder(family), checkpoints.model(family)
    texts = write(folder)
    assert [len(text) for text in texts] == [64] * 5
    with open_checkpoint(folder) as source:
        side = read_text_side(source)
    beginning = Tokenizer(side.folder / TOKENIZER).encode("<s><user>", add_special=False)
    ends, start = set(side.tokens.eos), len(beginning)
    assert all(text[:start] == beginning for text in texts)
    assert len({text[start] for text in texts}) == 5
    likely = torch.tensor(sorted(ends))
    with torch.no_grad():
        logits = model(torch.tensor(texts)).logits
    logits[..., likely] = -torch.inf
    assert logits[0, start - 1].topk(5).indices.tolist() == [text[start] for text in texts]
    for row, text in zip(logits, texts, strict=True):
        assert row[start : start + 3].argmax(-1).tolist() == text[start + 1 : start + 4]
    assert not any({one, other} <= ends for text in texts for one, other in pairwise(text))
    drawn = torch.stack(
        [row[at, text[at + 1]] for row, text in zip(logits, texts, strict=True) for at in range(40, 63)]
    )
    assert not torch.equal(drawn, logits[:, 40:63].amax(-1).flatten())  # from there on not the likeliest


def test_a_text_does_not_go_on_ending():
    """As pepper would, which learned answers alone, and never what comes behind one."""
    texts = write("pepper", 40, 400)
    with open_checkpoint("pepper") as source:
        (end,) = read_text_side(source).tokens.eos
    assert sum(text.count(end) for text in texts) > 10
    assert not any(one == other == end for text in texts for one, other in pairwise(text))
    assert not any(end in text[:6] for text in texts)


def test_it_is_always_the_same_however_weights_are_held(checkpoints, monkeypatch):
    folder = checkpoints.folder("qwen2")
    told: list[tuple[str, int, int]] = []
    texts = write(folder, progress=lambda *what: told.append(what))
    assert {what for what, _, _ in told} == {"write calibration text"}
    assert told[-1][1:] == (320, 320)
    monkeypatch.setattr(self_text, "HELD", 0)
    assert write(folder) == texts
    monkeypatch.setattr(self_text, "_SEED", 1)
    assert write(folder) != texts


def test_its_size_is_bounded(checkpoints):
    folder = checkpoints.folder("qwen2")
    assert [len(text) for text in write(folder, context=2048, most=100)] == [100]
    assert [len(text) for text in write(folder, context=16, most=40)] == [16, 16]


def test_logits_that_are_nan_are_refused(checkpoints, tmp_path):
    model = checkpoints.write(tmp_path / "checkpoint", "qwen2")
    model.model.layers[1].post_attention_layernorm.weight.data *= 1e30
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(RecipeError, match="NaN or infinite as it wrote its own calibration text"):
        write(tmp_path / "checkpoint")


def test_an_export_on_it_writes_it_once(checkpoints, gochu, monkeypatch, tmp_path):
    """A run that is cut off behind it keeps it; the plan and the manifest say what it was."""
    from exporter.quantization import streaming
    from runtimes.bundle import Bundle

    monkeypatch.setattr(self_text, "TOKENS", 256)
    written: list[Any] = []
    original = self_text.write_texts
    monkeypatch.setattr(self_text, "write_texts", lambda *given: written.append(given) or original(*given))
    arguments = [
        "export",
        checkpoints.folder("qwen2"),
        "--scheme",
        "int4",
        "--algorithm",
        "gptq",
        "--context",
        64,
    ]
    arguments += ["--calibration", "self", "-o", tmp_path / "out"]

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_quantize", stop)
        assert gochu(*arguments)[0] != 0
    assert not (tmp_path / "out").exists()
    code, _, err = gochu(*arguments)
    assert code == 0, err
    assert len(written) == 1
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.gate.status == "passed"
    said = next(choice for choice in manifest.plan if choice.topic == "calibration")
    assert said.value == "the model's own text"
    assert "2305.17888" in said.reason


def test_a_recipe_of_mixed_precision_on_it(checkpoints, gochu, monkeypatch, tmp_path):
    monkeypatch.setattr(self_text, "TOKENS", 256)
    options = ("--target-bits", 6.5, "--calibration", "self", "-o", tmp_path / "r.toml")
    code, _, err = gochu("quantize", checkpoints.folder("qwen2"), *options)
    assert code == 0, err


def test_hexagons_ranges_may_be_found_on_it():
    with open_checkpoint("pepper") as source:
        plan = make_plan(
            source.architecture, scheme="w8a16", delegate="hexagon", device="Galaxy S23", calibration=SELF
        )
    assert ("calibration", "the model's own text") in [(each.topic, each.value) for each in plan.choices]
    assert plan.fingerprint()["calibration"] == "self"
