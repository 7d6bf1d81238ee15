"""transformers on the original checkpoint, which shares no code with Gochu, against the exported bundle."""

import pytest
import torch

from runtimes.engines import open_engine
from runtimes.generate import load

TEXTS = (
    "안녕하세요, 오늘 날씨가 어때요?",
    "The quick brown fox jumps over 13 lazy dogs.",
    "  def f(x):\n\treturn x**2  # 제곱\n\n",
    "한국어와 English를 섞어 쓴 문장 🌶️ 1,234.5 ₩",
    "<s> 특수 토큰 <end> 사이 </s>",
    "",
)
CONVERSATION = (
    {"role": "system", "content": "짧게 답하세요."},
    {"role": "user", "content": "화요일 다음 날은?"},
    {"role": "assistant", "content": "수요일"},
    {"role": "user", "content": "What comes after Friday? 🌶️"},
)
CONTEXT = 64


def greedy(bundle, prompt: list[int], new: int) -> list[int]:
    engine = open_engine(bundle, threads=1)
    tokens = [int(engine.prefill(prompt).argmax())]
    while len(tokens) < new:
        tokens.append(int(engine.decode(tokens[-1]).argmax()))
    engine.close()
    return tokens


def test_greedy_tokens_of_the_checkpoint(family, checkpoints, bundles):
    """48 new tokens: past every sliding window."""
    bundle = bundles(family, "fp32", CONTEXT)
    prompt = [(7919 * i + 3) % 512 for i in range(CONTEXT - 48)]
    with torch.no_grad():
        found = checkpoints.model(family).generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=48,
            min_new_tokens=48,
            eos_token_id=-1,
        )
    expected = found[0, len(prompt) :].tolist()
    assert len(set(expected)) > 3
    assert greedy(bundle, prompt, 48) == expected


@pytest.mark.parametrize("name", ["llama-llama3-rope", "pepper"])
def test_tokenizer_and_template(name, bundles):
    from transformers import AutoTokenizer

    bundle = bundles(name, "int8")
    library = AutoTokenizer.from_pretrained(bundle.path)
    with load(bundle.path, threads=1) as model:
        for text in TEXTS:
            assert model.tokenizer.encode(text, add_special=True) == library(text)["input_ids"]
            assert model.tokenizer.encode(text, add_special=False) == library.encode(
                text, add_special_tokens=False
            )
        for messages in (CONVERSATION[1:2], CONVERSATION[1:], CONVERSATION):
            for prompt in (True, False):
                rendered = library.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=prompt
                )
                assert model.template.render(messages, add_generation_prompt=prompt) == rendered
        rendered = library.apply_chat_template(
            list(CONVERSATION), add_generation_prompt=True, return_dict=True
        )
        assert model.encode(CONVERSATION) == rendered["input_ids"]


def test_pepper_says_what_its_checkpoint_says(bundles):
    from transformers import AutoModelForCausalLM

    from exporter.pepper import checkpoint_path

    bundle = bundles("pepper", "fp32")
    original = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)
    with load(bundle.path, threads=1) as model:
        for question in (
            "23 더하기 45는?",
            "What is 23 + 45?",
            "화요일 다음 날은?",
            "삼백이십을 숫자로 쓰면?",
        ):
            prompt = model.encode(question)
            with torch.no_grad():
                found = original.generate(
                    torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=list(model.eos)
                )
            expected = [t for t in found[0, len(prompt) :].tolist() if t not in model.eos]
            assert list(model.generate(question, max_tokens=24).tokens) == expected
