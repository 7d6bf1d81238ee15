"""Text to token ids and back, with the bundle's `tokenizer.json`."""

import os
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from runtimes.errors import BundleError, PromptError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A `tokenizer.json` opened with the `tokenizers` library."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """BundleError if the file is missing or not a tokenizer."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}; export the bundle again") from None
        except Exception as error:  # the library raises nothing more exact
            raise BundleError(f"{path} is not a tokenizer ({error}); export the bundle again") from None
        self._tokenizer.no_truncation()  # a prompt that is too long is refused, never cut silently
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, those added to the vocabulary included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest id that a text can become; -1 for an empty vocabulary."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token(self, id: int | None) -> str:
        """A token as the vocabulary spells it; "" if there is none by that id."""
        return (self._tokenizer.id_to_token(id) or "") if id is not None else ""

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        add_special: put what the tokenizer's post-processor adds (as `<bos>`) around it: for raw text, not
            for what a chat template has written, which has it already.
        parse_special: a special token written in the text becomes that token; if not, it stays plain text.

        PromptError if it holds half a character (a lone surrogate, as bytes that are no UTF-8 become one).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("the text is not valid Unicode: write it in UTF-8") from None
        self._tokenizer.encode_special_tokens = not parse_special
        return self._tokenizer.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out unless skip_special is false."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)


class TextStream:
    """Turns tokens into text one by one, and never shows half a character.

    The pieces of `push` and `finish` together are `decode` of all tokens. A byte-level token can end in the
    middle of a character (a Korean syllable has three bytes); the decoder then ends in U+FFFD, and the piece
    waits until the character is whole. Each piece is decoded together with the one before it, since a
    SentencePiece decoder drops the space at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the tokens of the last piece shown, then those not shown yet
        self._shown = ""  # text of the last piece's tokens
        self._shown_ids = 0  # how many they are

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now, often "" or several characters."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        return self._show(text)

    def finish(self) -> str:
        """The rest, when no more tokens come: an unfinished character shows as U+FFFD."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = self._ids[self._shown_ids :]
        # Stray bytes after a whole character can make the decoder take that one back: it stays as shown.
        whole = text.startswith(self._shown)
        piece = text[len(self._shown) :] if whole else self._tokenizer.decode(new)
        if new:
            self._ids, self._shown_ids = new, len(new)
            self._shown = self._tokenizer.decode(new)
        return piece
