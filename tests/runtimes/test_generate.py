"""Generation over an engine that says what the test tells it to."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import runtimes
from runtimes.errors import PromptError, TemplateError, UsageError
from runtimes.generate import Chat
from runtimes.sampling import Sampling

EOS, END_OF_TURN = 1, 2
HELLO = "안녕하세요! 🌶️ 맵다"


@pytest.mark.parametrize("end", [EOS, END_OF_TURN])
def test_stops_on_any_of_the_end_tokens(scripted_model: Callable, end: int) -> None:
    model = scripted_model("")
    words = model.tokenizer.encode(HELLO, add_special=False)
    model.engine.script = [*words, end, *words]
    result = model.generate("hi")
    assert (result.text, result.finish_reason) == (HELLO, "stop")
    assert result.tokens == tuple(words), "the end token is not part of the answer"
    assert model.engine.decoded == words


def test_stops_at_once(scripted_model: Callable) -> None:
    result = scripted_model([EOS]).generate("hi")
    assert (result.text, result.tokens, result.finish_reason) == ("", (), "stop")
    assert "decode_tokens_per_s" not in result.timings


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens(scripted_model: Callable, max_tokens: int) -> None:
    model = scripted_model("hot pepper ")
    result = model.generate("hi", max_tokens=max_tokens)
    assert len(result.tokens) == max_tokens
    assert result.finish_reason == "length"
    assert len(model.engine.decoded) == max_tokens - 1, "the last token is not run"


def test_max_tokens_in_the_middle_of_a_syllable(scripted_model: Callable) -> None:
    result = scripted_model("뷁").generate("hi", max_tokens=2)
    assert result.text == "\N{REPLACEMENT CHARACTER}"
    assert result.text == scripted_model("").tokenizer.decode(result.tokens)


def test_the_end_of_the_context(scripted_model: Callable) -> None:
    model = scripted_model("hot pepper ", context=10)
    result = model.generate("abcdef", raw=True, max_tokens=100)
    assert result.finish_reason == "context"
    assert model.engine.position == 10
    assert result.prompt_tokens + len(result.tokens) == 11, "the last token needs no room"


def test_a_prompt_that_just_fits(scripted_model: Callable) -> None:
    model = scripted_model("hot pepper ")
    length = len(model.encode("abcdef"))
    result = scripted_model("hot pepper ", context=length).generate("abcdef", max_tokens=2)
    assert (len(result.tokens), result.finish_reason) == (1, "context")
    with pytest.raises(PromptError, match=rf"has {length} tokens, but the context holds {length - 1}"):
        scripted_model("hot", context=length - 1).generate("abcdef")


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt(scripted_model: Callable, prompt: str | list) -> None:
    with pytest.raises(PromptError, match="is empty"):
        scripted_model("hot").generate(prompt)


def test_max_tokens_has_to_be_positive(scripted_model: Callable) -> None:
    with pytest.raises(UsageError, match="max_tokens is 0"):
        scripted_model("hot").generate("hi", max_tokens=0)


def test_errors_come_when_the_stream_is_made(scripted_model: Callable) -> None:
    with pytest.raises(PromptError):
        scripted_model("hot").stream("")


def test_streams_whole_characters_that_add_up(scripted_model: Callable) -> None:
    model = scripted_model(HELLO)
    length = len(model.engine.script)
    stream = model.stream("hi", max_tokens=length)
    assert stream.generation is None
    pieces = list(stream)
    assert "".join(pieces) == HELLO == stream.text == stream.generation.text
    assert len(pieces) > 5
    assert all(piece and "\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert list(stream) == [], "it has ended"


def test_what_the_model_is_given(scripted_model: Callable) -> None:
    """The template writes BOS and so does the tokenizer: only one of them may."""
    model = scripted_model([EOS])
    for prompt, raw, text in (
        ("hot", False, "<s><user>hot<end><assistant>"),
        ("hot", True, "<s>hot"),
        ([{"role": "user", "content": "hot"}], False, "<s><user>hot<end><assistant>"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], False, None),
    ):
        ids = model.encode(prompt, raw=raw)
        text = text or "<s><assistant>a<end><user>b<end><assistant>"
        assert model.tokenizer.decode(ids, skip_special=False) == text
        model.generate(prompt, raw=raw)
        assert model.engine.prefilled[-1] == ids
    with pytest.raises(UsageError, match="raw text is a string"):
        model.generate([{"role": "user", "content": "hot"}], raw=True)


def test_without_a_template_text_is_continued(scripted_model: Callable) -> None:
    model = scripted_model([EOS], template=None)
    assert model.encode("hot") == model.tokenizer.encode("hot", add_special=True)
    with pytest.raises(TemplateError, match="has no chat template"):
        model.generate([{"role": "user", "content": "hot"}])


def test_each_generation_starts_from_scratch(scripted_model: Callable) -> None:
    model = scripted_model("hot")
    first = model.generate("hi", max_tokens=3)
    second = model.generate("hi", max_tokens=3)
    assert first.tokens == second.tokens
    assert model.engine.prefilled[0] == model.engine.prefilled[1]


def test_an_older_stream_cannot_go_on(scripted_model: Callable) -> None:
    model = scripted_model("hot pepper ")
    first = model.stream("hi", max_tokens=9)
    next(first)
    second = model.stream("hi", max_tokens=9)
    with pytest.raises(UsageError, match="another generation has begun"):
        next(first)
    assert second.finish().finish_reason == "length"


def test_repetition_penalty_sees_prompt_and_answer(
    scripted_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model likes "a" best and "b" nearly as much; both lose half when they have occurred."""
    model = scripted_model("")
    a, b = model.tokenizer.encode("ab", add_special=False)
    logits = np.zeros(model.engine.vocab, np.float32)
    logits[[a, b]] = 1.0, 0.9
    monkeypatch.setattr(model.engine, "_logits", lambda: logits)
    assert model.generate("a", raw=True, max_tokens=2).text == "aa"
    sampling = Sampling(repetition_penalty=2.0)
    assert model.generate("a", raw=True, max_tokens=2, sampling=sampling).text == "ba"


def test_timings(scripted_model: Callable) -> None:
    timings = scripted_model("hot pepper ").generate("hi", max_tokens=8).timings
    assert set(timings) == {
        "load_s",
        "prefill_s",
        "ttft_s",
        "decode_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    }
    assert 0 < timings["prefill_s"] < timings["ttft_s"]
    assert timings["decode_tokens_per_s"] == pytest.approx(7 / timings["decode_s"])


def test_the_readers_time_is_not_the_models(
    scripted_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("runtimes.generate.perf_counter", lambda: next(clock))
    stream = scripted_model("abcdefgh").stream("hi", max_tokens=5)
    for _ in stream:
        for _ in range(1000):
            next(clock)
    assert stream.generation.timings["decode_s"] < 100


def test_chat_keeps_the_conversation(scripted_model: Callable) -> None:
    model = scripted_model([])
    chat = Chat(model, system="be brief")
    answer = model.tokenizer.encode("네 hot", add_special=False)
    model.engine.script = [*answer, END_OF_TURN]
    assert chat.send("안녕").finish().text == "네 hot"
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.send("more").finish()
    whole = model.encode([*chat.messages[:-1]])
    assert model.engine.position == len(whole) + len(answer)
    assert len(model.engine.prefilled[1]) < len(whole) - len(answer), (
        "what is in the KV cache is not run again"
    )
    reused = len(whole) - len(model.engine.prefilled[1])
    assert model.engine.prefilled[1] == whole[reused:]
    assert model.engine.prefilled[0] + answer == whole[:reused], "all of the first turn was in the KV cache"


def test_chat_that_does_not_fit_stays_as_it_was(scripted_model: Callable) -> None:
    chat = Chat(scripted_model([EOS], context=40))
    chat.send("hi").finish()
    before = chat.messages
    with pytest.raises(PromptError, match="context holds 40"):
        chat.send("a very long message " * 10)
    with pytest.raises(PromptError, match="is empty"):
        chat.send("")
    assert chat.messages == before
    chat.reset()
    assert chat.messages == []


def test_chat_keeps_an_answer_that_was_broken_off(scripted_model: Callable) -> None:
    chat = Chat(scripted_model("abcdefgh"))
    stream = chat.send("hi", max_tokens=8)
    first = next(stream)
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    assert chat.send("again", max_tokens=2).finish().finish_reason == "length"


def test_chat_without_a_template_goes_on_with_one_text(scripted_model: Callable) -> None:
    model = scripted_model("bcd", template=None)
    chat = Chat(model)
    chat.send("a", max_tokens=3).finish()
    chat.send("e", max_tokens=3).finish()
    assert "".join(m["content"] for m in chat.messages) == "abcdebcd"


def test_load_and_close(toy: Path) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    with runtimes.load(toy, threads=1, context=32) as model:
        result = model.generate("고추", max_tokens=5)
        assert result.timings["load_s"] == model.load_s > 0
        assert model.engine.context == 32
        assert (
            result == model.generate("고추", max_tokens=5)
            or result.tokens == model.generate("고추", max_tokens=5).tokens
        )
    with pytest.raises(UsageError, match="is closed"):
        model.generate("고추")
