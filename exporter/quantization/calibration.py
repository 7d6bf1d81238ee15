"""The texts on which ranges and Hessians are found, as token ids: a model's own kind of text, whole conversations, more
than a chunk long."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.errors import RecipeError
from exporter.tokenizer import TOKENIZER, read_text_side
from runtimes.chat import ChatTemplate, Message
from runtimes.tokenizer import Tokenizer

TEXTS = Path(__file__).parent / "calibration.jsonl"  # Korean, English, code, numbers and chat
LONGEST = 512  # tokens of a sequence
MOST = 16_384  # tokens in all: more than these move no range by much, and no Hessian
_PEPPER_TURNS = (*(1,) * 48, *(2, 3) * 6, 12)  # of each of pepper's conversations, which are short


def text_digest(texts: Path | None) -> str | None:
    """SHA-256 of the user's text, None if there is none; RecipeError if it cannot be read."""
    try:
        return hashlib.sha256(texts.read_bytes()).hexdigest() if texts else None
    except OSError as error:
        raise RecipeError(f"calibration text {texts} cannot be read: {error.strerror}") from None


def text_name(texts: Path | None) -> str:
    """What a plan calls it."""
    return texts.name if texts else "the text that is shipped"


Conversation = Sequence[Message]


def calibration_sequences(
    checkpoint: Checkpoint, context: int, texts: Path | None = None, most: int = MOST, training: bool = False
) -> list[list[int]]:
    """Token ids of at most `context` tokens each, `most` in all.

    `texts`: a .txt file, or a .jsonl file with a line {"text": ...} or {"messages": [...]} for each; without, pepper
    is given what it was trained on, and other models what is shipped. Short texts are joined, so that most sequences
    are long. `training`: pepper is given all that `most` allows, where Hessians are content with a tenth. RecipeError
    if a file is not as described.
    """
    side = read_text_side(checkpoint)
    tokenizer = Tokenizer(side.folder / TOKENIZER)
    template = None
    if side.chat_template is not None:
        bos, eos = tokenizer.token(side.tokens.bos), tokenizer.token(side.tokens.eos[0])
        template = ChatTemplate(side.chat_template, bos_token=bos, eos_token=eos)

    def encode(document: str | Conversation) -> list[int]:
        if isinstance(document, str):
            return tokenizer.encode(document, add_special=True)
        if template is None:
            return tokenizer.encode("\n".join(turn["content"] for turn in document), add_special=True)
        return tokenizer.encode(template.render(document, add_generation_prompt=False), add_special=False)

    longest = min(context, LONGEST)
    sequences: Iterator[list[int]]
    if texts is None and checkpoint.source == "pepper":
        sequences = (encode(conversation)[:longest] for conversation in _pepper(endless=training))
    else:
        sequences = _joined(map(encode, read_texts(texts or TEXTS)), longest)
    return list(_cut(sequences, most))


def read_texts(path: Path) -> Iterator[str | Conversation]:
    """The documents of a .txt or .jsonl file; RecipeError tells the line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"calibration text {path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        yield from filter(None, (paragraph.strip() for paragraph in text.split("\n\n")))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield _document(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RecipeError(
                f'{path}, line {number}: write {{"text": "..."}}, or {{"messages": [...]}} with the role and content '
                "of each turn"
            ) from None


def _document(line: Any) -> str | Conversation:
    if "text" in line:
        if not isinstance(line["text"], str):
            raise TypeError
        return str(line["text"])
    return [{key: turn[key] + "" for key in ("role", "content")} for turn in line["messages"]]


def _pepper(endless: bool) -> Iterator[Conversation]:
    """Questions of pepper's training with their answers, never held-out ones; those of Hessians are the first."""
    from exporter.pepper.questions import training

    questions = training(seed=1)
    for turns in cycle(_PEPPER_TURNS) if endless else _PEPPER_TURNS:
        yield [
            {"role": role, "content": content}
            for question in islice(questions, turns)
            for role, content in (("user", question.prompt), ("assistant", question.answer))
        ]


def _joined(documents: Iterator[list[int]], longest: int) -> Iterator[list[int]]:
    """Documents behind each other, cut into sequences of `longest` tokens."""
    held: list[int] = []
    for document in documents:
        held += document
        while len(held) >= longest:
            yield held[:longest]
            held = held[longest:]
    if held:
        yield held


def _cut(sequences: Iterator[list[int]], most: int) -> Iterator[list[int]]:
    for sequence in sequences:
        if sequence[:most]:
            yield sequence[:most]
        most -= len(sequence)
        if most <= 0:
            return
