"""onnxruntime-genai, which nobody here wrote, opens an exported folder as it is and says the same."""

import json
from typing import Any

import pytest

from runtimes.bundle import Bundle
from runtimes.engines import open_engine
from runtimes.generate import load

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

NEW = 40
KOREAN = "작은 고추가 맵다. 오늘 날씨가 어때요?"


def theirs(bundle: Bundle, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy tokens of onnxruntime-genai, with nothing set but the length."""
    model = og.Model(str(bundle.path))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def ours(bundle: Bundle, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy tokens of our engine, up to the end of the turn."""
    engine = open_engine(bundle, threads=1)
    tokens: list[int] = []
    token = int(engine.prefill(prompt).argmax())
    while len(tokens) < new and token not in bundle.manifest.tokens.eos:
        tokens.append(token)
        token = int(engine.decode(token).argmax())
    engine.close()
    return tokens


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4", "int4-g128"])
def test_the_same_greedy_tokens(family, scheme, bundles):
    bundle = bundles(family, scheme)
    prompts = [[(step * i + 3) % 512 for i in range(30)] for step in (7919, 101, 57)]
    found = [theirs(bundle, prompt) for prompt in prompts]
    assert found == [ours(bundle, prompt) for prompt in prompts]
    assert len({token for tokens in found for token in tokens}) > 10  # random weights, yet no stuck record


def test_the_same_ids_and_text(family, bundles):
    bundle = bundles(family, "int4")
    with load(bundle.path, threads=1) as model:
        ids = model.tokenizer.encode(KOREAN, add_special=False)
        tokenizer = og.Tokenizer(og.Model(str(bundle.path)))
        assert [int(token) for token in tokenizer.encode(KOREAN)] == ids
        assert tokenizer.decode(ids) == KOREAN


def test_config_says_what_the_manifest_says(bundles):
    bundle = bundles("gemma2", "int8")
    config = json.loads((bundle.path / "genai_config.json").read_text(encoding="utf-8"))
    manifest = bundle.manifest
    assert config["model"]["eos_token_id"] == list(manifest.tokens.eos)
    assert config["model"]["context_length"] == manifest.variants[0].context
    assert config["model"]["decoder"]["filename"] == manifest.variants[0].entry_points[0].file


QUESTIONS = (
    "23 더하기 45는?",
    "What is 23 + 45?",
    "화요일 다음 날은?",
    "삼백이십을 숫자로 쓰면?",
    "7 + 8 = ?",
)


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int8-channel", "int4"])
def test_pepper_gives_the_same_text(scheme, bundles):
    bundle = bundles("pepper", scheme)
    genai: Any = og.Model(str(bundle.path))
    tokenizer = og.Tokenizer(genai)
    with load(bundle.path, threads=1) as model:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(
                json.dumps(messages, ensure_ascii=False), add_generation_prompt=True
            )
            prompt = [int(token) for token in tokenizer.encode(text)]
            assert prompt == model.encode(question)
            answer = theirs(bundle, prompt, 24)
            generation = model.generate(question, max_tokens=24)
            assert list(generation.tokens) == answer
            assert tokenizer.decode(answer) == generation.text
            assert generation.text.strip()
