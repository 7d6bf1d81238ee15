"""The texts on which ranges and Hessians are found, as token ids: a model's own kind of text, whole conversations, more
than a chunk long. And those that judge what came of it, which are others."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.errors import RecipeError
from exporter.tokenizer import Encoder, TextSide, read_text_side
from runtimes.chat import Message

TEXTS = Path(__file__).parent / "calibration.jsonl"  # Korean, English, code, numbers and chat
HELD_OUT = TEXTS.with_name("held_out.jsonl")  # of the same kinds, and none of them there
LONGEST = 512  # tokens of a sequence
SELF = Path("self")  # in place of a file: the model writes the text itself (see `quantization.self_text`)
FEWEST = 128  # tokens of a text that says anything
MOST = 16_384  # tokens in all: more than these move no range by much, and no Hessian
_PEPPER_TURNS = (*(1,) * 48, *(2, 3) * 6, 12)  # of each of pepper's conversations, which are short
_PEPPER_HELD_OUT = 1200  # questions: more tokens than are ever asked for


def text_digest(texts: Path | None) -> str | None:
    """SHA-256 of the user's text, None if there is none, "self" for the model's own; RecipeError if it cannot be
    read."""
    if texts == SELF:
        return str(SELF)
    try:
        return hashlib.sha256(texts.read_bytes()).hexdigest() if texts else None
    except OSError as error:
        raise _unreadable(texts, error) from None


def _unreadable(path: Path | None, error: OSError) -> RecipeError:
    return RecipeError(
        f"calibration text {path} cannot be read ({error.strerror}): give a .txt or .jsonl file, or self"
    )


def text_name(texts: Path | None) -> str:
    """What a plan calls it."""
    if texts == SELF:
        return "the model's own text"
    return texts.name if texts else "the text that is shipped"


def text_kind(texts: Path | None) -> str:
    """What it consists of, for a plan's reasons."""
    if texts == SELF:
        return "what the float model writes from its likeliest beginnings on (LLM-QAT, arXiv 2305.17888)"
    return (
        "the text that was given" if texts else "Korean, English, code, or for pepper what it was trained on"
    )


Conversation = Sequence[Message]
Progress = Callable[[str, int, int], None]


def calibration_sequences(
    checkpoint: Checkpoint,
    context: int,
    texts: Path | None = None,
    most: int = MOST,
    progress: Progress = lambda what, done, total: None,
    training: bool = False,
) -> list[list[int]]:
    """Token ids of at most `context` tokens each, `most` in all.

    `texts`: a .txt file, or a .jsonl file with a line {"text": ...} or {"messages": [...]} for each; without, pepper
    is given what it was trained on, and other models what is shipped. Short texts are joined, so that most sequences
    are long. `SELF` has the model write them, which takes as long as its answers do. `training`: pepper is given all
    that `most` allows, where Hessians are content with a tenth. RecipeError if a file is not as described.
    """
    if texts == SELF:
        from exporter.quantization.self_text import write_texts  # here: it needs torch

        return write_texts(checkpoint, context, most, progress)
    encode = Encoder(read_text_side(checkpoint)).document
    longest = min(context, LONGEST)
    sequences: Iterator[list[int]]
    if texts is None and checkpoint.source == "pepper":
        sequences = (encode(conversation)[:longest] for conversation in _pepper(endless=training))
    else:
        sequences = _joined(map(encode, read_texts(texts or TEXTS)), longest)
    return list(_cut(sequences, most))


def held_out_sequences(
    side: TextSide, source: str, context: int, texts: Path | None = None, most: int = MOST
) -> list[list[int]]:
    """As `calibration_sequences`, of texts that judge a model, none of which it is ever calibrated on.

    `texts`: a file as there; without, pepper is given questions that are held out of its training and of its
    calibration, with their answers, and other models what is shipped for that. `source`: the checkpoint's.
    """
    encode, longest = Encoder(side).document, min(context, LONGEST)
    if texts is None and source == "pepper":
        return list(_cut((encode(turns)[:longest] for turns in _held_out_pepper()), most))
    return list(_cut(_joined(map(encode, read_texts(texts or HELD_OUT)), longest), most))


def require_tokens(lengths: Iterable[int]) -> None:
    """RecipeError if sequences of these lengths are too few tokens to calibrate on."""
    if (tokens := sum(lengths)) < FEWEST:
        raise RecipeError(
            f"the calibration text has {tokens} tokens, and {FEWEST} are the fewest that say anything: give a longer "
            "one"
        )


def read_texts(path: Path) -> Iterator[str | Conversation]:
    """The documents of a .txt or .jsonl file; RecipeError tells the line that is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"calibration text {path} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): save it "
            "as UTF-8, or convert it (iconv -f CP949 -t UTF-8, or from UTF-16)"
        ) from None
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


def _held_out_pepper() -> Iterator[Conversation]:
    """Questions that pepper was never trained on, a conversation each, with the right answers."""
    from exporter.pepper.questions import held_out

    for question in held_out(_PEPPER_HELD_OUT):
        yield [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": question.answer},
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
