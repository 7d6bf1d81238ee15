import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from exporter.pepper import checkpoint_path
from exporter.pepper.language import korean_numeral
from exporter.pepper.questions import Question, held_out, memorized
from exporter.pepper.score import Score, score
from exporter.pepper.tokenizer import SPECIAL, render

FOLDER = checkpoint_path()
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CONVERSATION = [
    {"role": "system", "content": "간단히 답해."},
    {"role": "user", "content": "안녕?"},
    {"role": "assistant", "content": "안녕하세요! 저는 고추예요."},
    {"role": "user", "content": "37 더하기 45는?"},
]
TEXTS = [
    "",
    " ",
    "안녕하세요? 작은 고추가 맵다 🌶️",
    "What is 37 + 45?\n\n\t끝",
    "뷁쀍 ㅋㅋ 漢字 naïve \u200d\u0301",
    "'s 'LL 1234",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: nothing to compare with"
    )


@pytest.fixture(scope="module")
def auto_tokenizer(transformers):
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model(transformers):
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval()


def test_the_checkpoint_is_whole_and_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6


def test_the_configuration_is_a_llama_that_every_format_takes() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == 10000.0
    assert config["max_position_embeddings"] >= 512
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert all(
        config[key] % 32 == 0 for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
    )
    assert config["vocab_size"] <= 2048
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [config["eos_token_id"]]


def test_the_weights_are_float16_between_2_and_6_million() -> None:
    with (FOLDER / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"F16"}
    end = max(tensor["data_offsets"][1] for tensor in header.values())
    assert 2e6 <= end / 2 <= 6e6
    assert "lm_head.weight" not in header


def test_special_tokens_are_special_and_the_vocabulary_is_the_configured_one(tokenizer: Tokenizer) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    added = tokenizer.get_added_tokens_decoder()
    assert [added[i].content for i in range(len(SPECIAL))] == list(SPECIAL)
    assert all(token.special for token in added.values())
    assert len({config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]}) == 3


@pytest.mark.parametrize("text", TEXTS)
def test_both_tokenizers_give_the_same_ids_and_the_text_back(
    tokenizer: Tokenizer, auto_tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text).ids
    assert auto_tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert auto_tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("number", [7, 320, 1234, 9876])
def test_a_digit_and_a_numeral_syllable_are_one_token_wherever_they_stand(
    tokenizer: Tokenizer, number: int
) -> None:
    for word in (f"{number}", korean_numeral(number)):
        tokens = tokenizer.encode(f"값은 {word}원").ids
        alone = [tokenizer.encode(sign).ids for sign in word]
        assert all(len(ids) == 1 for ids in alone)
        start = tokens.index(alone[0][0])
        assert tokens[start : start + len(word)] == [ids[0] for ids in alone]


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("prompted", [True, False])
def test_the_training_text_is_what_the_chat_template_renders(
    tokenizer: Tokenizer, auto_tokenizer, turns: int, prompted: bool
) -> None:
    messages = CONVERSATION[-turns:]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
    assert text == render(messages, add_generation_prompt=prompted)
    assert text.startswith("<|begin|>")
    assert text.endswith("<|assistant|>" if prompted else "<|end|>")
    assert auto_tokenizer(text)["input_ids"] == tokenizer.encode(text).ids
    assert tokenizer.encode(text).ids.count(SPECIAL.index("<|begin|>")) == 1


def ask(model, tokenizer, questions: list[Question]) -> Score:
    """The score of greedy answers by transformers alone, in left-padded batches with a KV cache."""
    said: dict[str, str] = {}
    ordered = sorted(questions, key=lambda question: len(question.prompt))
    for start in range(0, len(ordered), 100):
        batch = ordered[start : start + 100]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question.prompt}] for question in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        generated = model.generate(**inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
        for question, ids in zip(batch, generated, strict=True):
            said[question.prompt] = tokenizer.decode(ids, skip_special_tokens=True)
    return score(said.__getitem__, questions)


def test_the_weights_answer_held_out_questions(model, auto_tokenizer) -> None:
    result = ask(model, auto_tokenizer, held_out(300))
    assert result.overall.rate >= 0.98, result.misses


def test_rounding_to_4_bits_costs_few_answers(model, auto_tokenizer) -> None:
    from exporter.pepper.train import rounded

    with rounded(model, 4):
        result = ask(model, auto_tokenizer, held_out(300))
    assert result.overall.rate >= 0.96, result.misses


def test_the_weights_know_what_they_learned_by_heart(model, auto_tokenizer) -> None:
    questions = memorized()
    result = ask(model, auto_tokenizer, [*questions[::4], *questions[-14:]])
    assert result.overall.rate >= 0.99, result.misses


@pytest.mark.parametrize(("said", "name"), [("안녕?", "고추"), ("Who are you?", "pepper")])
def test_pepper_gives_its_name(model, auto_tokenizer, said: str, name: str) -> None:
    question = Question(said, name, "small talk", "ko")
    miss = ask(model, auto_tokenizer, [question]).misses[0]
    assert name in miss.got


def test_a_long_conversation_runs(model, auto_tokenizer) -> None:
    messages = CONVERSATION[1:3] * 20 + CONVERSATION[3:]
    inputs = auto_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape[1] > 300
    generated = model.generate(**inputs, max_new_tokens=8)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_the_path_is_a_folder() -> None:
    assert isinstance(FOLDER, Path)
    assert FOLDER.is_dir()
