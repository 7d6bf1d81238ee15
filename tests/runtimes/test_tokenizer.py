"""Tokenizer and the stream of text: no half characters, nothing lost, nothing added."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.errors import BundleError
from runtimes.tokenizer import TextStream, Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.text(st.sampled_from(" abc안녕하세요고추 맵다é🌶️\n.")) | st.text()


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(i) for i in ids), text.finish()]


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@given(text=TEXTS)
def test_the_pieces_are_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special=False)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=TEXTS, data=st.data())
def test_the_pieces_are_the_whole_text_in_any_tokenization(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    """A model may spell a text in tokens that the tokenizer would not choose, special ones in between."""
    special = [tokenizer.id("<s>"), tokenizer.id("</s>")]
    ids: list[int] = []
    while text:
        cut = data.draw(st.integers(1, len(text)))
        ids += tokenizer.encode(text[:cut], add_special=False)
        ids += data.draw(st.lists(st.sampled_from(special), max_size=2))
        text = text[cut:]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_byte_level_tokens_of_any_kind_lose_nothing(byte_level: Path, ids: list[int]) -> None:
    """Even bytes that are no text: what cannot be read shows as the decoder shows it."""
    tokenizer = Tokenizer(byte_level)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 290), max_size=30))
def test_byte_fallback_tokens_of_any_kind_do_not_fail(byte_fallback: Path, ids: list[int]) -> None:
    tokenizer = Tokenizer(byte_fallback)
    readable = "".join(stream(tokenizer, ids)).replace(REPLACEMENT, "")
    assert len(readable) >= len(tokenizer.decode(ids).replace(REPLACEMENT, ""))


def test_no_half_syllable_is_ever_shown(tokenizer: Tokenizer) -> None:
    text = "작은 고추가 맵다 🌶️ 힣뷁"
    ids = tokenizer.encode(text, add_special=False)
    assert len(ids) > len(text), "the syllables have to fall apart for this to say anything"
    pieces = stream(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces).strip() == text
    assert pieces[-1] == "", "nothing was held back to the end"


def test_a_syllable_shows_as_soon_as_it_is_whole(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.encode("뷁", add_special=False)
    assert len(ids) == 3
    assert stream(tokenizer, ids) == ["", "", "뷁", ""]


def test_an_unfinished_syllable_shows_at_the_end(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.encode("a뷁", add_special=False)[:-1]
    assert stream(tokenizer, ids) == ["a", "", "", REPLACEMENT]


def test_spaces_between_words_are_kept(byte_fallback: Path) -> None:
    tokenizer = Tokenizer(byte_fallback)
    ids = tokenizer.encode("the cat sat", add_special=False)
    assert "".join(stream(tokenizer, ids)) == "the cat sat"


def test_special_tokens_are_added_parsed_and_left_out(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    plain = tokenizer.encode("hot", add_special=False)
    assert tokenizer.encode("hot", add_special=True) == [tokenizer.id("<s>"), *plain]
    assert tokenizer.encode("<end>", add_special=False) == [tokenizer.id("<end>")]
    spelled = tokenizer.encode("<end>", add_special=False, parse_special=False)
    assert tokenizer.id("<end>") not in spelled
    assert tokenizer.decode(spelled) == "<end>"
    assert tokenizer.encode("<end>", add_special=False) == [tokenizer.id("<end>")], (
        "the setting does not stay"
    )
    assert tokenizer.decode([tokenizer.id("<end>"), *plain]) == "hot"
    assert tokenizer.decode([tokenizer.id("<end>"), *plain], skip_special=False) == "<end>hot"


def test_tokens_by_id_and_back(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    assert (tokenizer.token(0), tokenizer.token(None), tokenizer.token(10**6)) == ("<s>", "", "")
    assert tokenizer.id("no such token") is None
    assert tokenizer.vocab_size == 300


def test_truncation_in_the_file_does_not_cut_prompts(byte_level: Path, tmp_path: Path) -> None:
    import tokenizers

    short = tokenizers.Tokenizer.from_file(str(byte_level))
    short.enable_truncation(4)
    short.enable_padding(length=64)
    short.save(str(tmp_path / "short.json"))
    ids = Tokenizer(tmp_path / "short.json").encode("a long text, longer than four tokens", add_special=False)
    assert ids == Tokenizer(byte_level).encode("a long text, longer than four tokens", add_special=False)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xff", b'{"model": {"type": "BPE", "vocab": 3}}']
)
def test_a_broken_tokenizer_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer(tmp_path / "tokenizer.json")
