"""What a bundle takes over from a checkpoint's tokenizer: its files, special tokens and chat template."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint, read_json
from exporter.errors import CheckpointError
from runtimes.bundle import Bundle, Probe, Tokens, file_sha256
from runtimes.chat import ChatTemplate, Message
from runtimes.errors import BundleError
from runtimes.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
_SAID = "USER'S-TURN"  # in place of a user's words
_FILES = (  # what runtimes and their tokenizer libraries look for beside the model
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PROBES = (
    "안녕하세요, 오늘 날씨가 어때요?",
    "작은 고추가 맵다. 삼백이십을 숫자로 쓰면?",
    "The quick brown fox jumps over 13 lazy dogs.",
    "  def f(x):\n\treturn x**2  # 제곱\n",
    "한국어와 English를 섞어 쓴 문장 🌶️ 1,234.5 ₩",
)


@dataclass(frozen=True)
class TextSide:
    """All of a model that is not its weights."""

    folder: Path
    tokens: Tokens
    chat_template: str | None
    probes: tuple[Probe, ...]

    def copy(self, to: Path) -> None:
        """Copy the tokenizer's files into a bundle's folder."""
        for name in self._names():
            shutil.copyfile(self.folder / name, to / name)

    def fingerprint(self) -> list[Any]:
        """Changes when any of it does, as JSON."""
        files = [[name, file_sha256(self.folder / name)] for name in self._names()]
        return [files, self.tokens.model_dump(), self.chat_template]

    def _names(self) -> list[str]:
        return [name for name in _FILES if (self.folder / name).is_file()]


def read_text_side(checkpoint: Checkpoint) -> TextSide:
    """Read and check it; CheckpointError if it is missing or does not fit the weights."""
    folder, arch = checkpoint.path, checkpoint.architecture
    if not (folder / TOKENIZER).is_file():
        hint = ""
        if (folder / "tokenizer.model").is_file():
            hint = " (tokenizer.model alone is not enough: save it once with transformers' fast tokenizer)"
        raise CheckpointError(
            f"{folder / TOKENIZER} is missing: download it from where the weights came from{hint}"
        )
    try:
        tokenizer = Tokenizer(folder / TOKENIZER)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.largest_id >= arch.vocab:
        raise CheckpointError(
            f"{folder / TOKENIZER} has token ids up to {tokenizer.largest_id} where the embedding has {arch.vocab} "
            "rows: tokenizer and weights do not belong together"
        )
    config = read_json(folder / "tokenizer_config.json")
    template = _chat_template(folder, config)
    tokens = _tokens(checkpoint, config, tokenizer, template)
    return TextSide(folder, tokens, template, tuple(find_probes(tokenizer, template, tokens)))


def bundled_text_side(bundle: Bundle) -> TextSide:
    """The text side that a bundle took over."""
    manifest = bundle.manifest
    return TextSide(bundle.path, manifest.tokens, manifest.chat_template, manifest.probes)


class Encoder:
    """Token ids of texts and of conversations, as a model is given them."""

    def __init__(self, side: TextSide) -> None:
        self.tokenizer = Tokenizer(side.folder / TOKENIZER)
        self._template = (
            None if side.chat_template is None else _compile(side.chat_template, side.tokens, self.tokenizer)
        )

    def document(self, document: str | Sequence[Message]) -> list[int]:
        """A text as it is, or a whole conversation; its texts alone where the model has no template."""
        if isinstance(document, str):
            return self.tokenizer.encode(document, add_special=True)
        if self._template is None:
            return self.document("\n".join(turn["content"] for turn in document))
        return self.tokenizer.encode(
            self._template.render(document, add_generation_prompt=False), add_special=False
        )

    def prompt(self, text: str) -> list[int]:
        """A user's message that waits for an answer; the text itself where the model has no template."""
        if self._template is None:
            return self.document(text)
        return self.tokenizer.encode(
            self._template.render([{"role": "user", "content": text}]), add_special=False
        )

    def opening(self) -> list[int]:
        """What stands before a user's words in a conversation's first turn; [] where the model has no template."""
        if self._template is None:
            return []
        before, said, _ = self._template.render([{"role": "user", "content": _SAID}]).partition(_SAID)
        return self.tokenizer.encode(before, add_special=False) if said else []


def find_probes(tokenizer: Tokenizer, template: str | None, tokens: Tokens) -> Iterable[Probe]:
    """`PROBES` with their ids: as raw text, and as a user's message unless the template tells the date."""
    for text in PROBES:
        yield Probe(text=text, chat=False, ids=tuple(tokenizer.encode(text, add_special=True)))
    if template is not None and "strftime_now" not in template:
        chat = _compile(template, tokens, tokenizer)
        for text in PROBES:
            rendered = chat.render([{"role": "user", "content": text}])
            yield Probe(text=text, chat=True, ids=tuple(tokenizer.encode(rendered, add_special=False)))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """From chat_template.jinja, tokenizer_config.json (a text, or named ones), or chat_template.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is not a text: download it again"
        )
    return template


def _tokens(
    checkpoint: Checkpoint, config: dict[str, Any], tokenizer: Tokenizer, template: str | None
) -> Tokens:
    """Special tokens by id. EOS are all that config.json, generation_config.json and the tokenizer name,
    and the one that the chat template ends a turn with: a missing one means text without end."""
    places = (checkpoint.generation_config, checkpoint.config)

    def first(role: str) -> int | None:
        for place in places:
            value = place.get(f"{role}_token_id")
            if isinstance(value, int):
                return value
        return tokenizer.id(_spelled(config.get(f"{role}_token")))

    named = tokenizer.id(_spelled(config.get("eos_token")))
    eos: list[int] = [] if named is None else [named]  # first: it is what templates call eos_token
    for place in places:
        value = place.get("eos_token_id")
        eos += value if isinstance(value, list) else [] if value is None else [value]
    vocab = checkpoint.architecture.vocab
    if any(not isinstance(id, int) or not 0 <= id < vocab for id in eos):
        raise CheckpointError(f"{checkpoint.path}: an eos_token_id is no token id of this model: {eos}")
    found = Tokens(bos=first("bos"), eos=tuple(dict.fromkeys(eos)) or (0,), pad=first("pad"))
    if template is not None:
        end = _turn_end(_compile(template, found, tokenizer), tokenizer)
        eos += [] if end is None else [end]
    if not eos:
        raise CheckpointError(
            f"{checkpoint.path} names no eos_token_id: generation would never stop; add it to generation_config.json"
        )
    return Tokens(bos=found.bos, eos=tuple(dict.fromkeys(eos)), pad=found.pad)


def _spelled(token: Any) -> str:
    """tokenizer_config.json writes a token as a text or as a table with its content."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _compile(template: str, tokens: Tokens, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(
        template, bos_token=tokenizer.token(tokens.bos), eos_token=tokenizer.token(tokens.eos[0])
    )


def _turn_end(chat: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that the template puts behind an assistant's answer, if it does."""
    answer = "gochu"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    after = chat.render(messages, add_generation_prompt=False).rpartition(answer)[2]
    ids = tokenizer.encode(after, add_special=False)
    return ids[0] if ids and not tokenizer.decode(ids[:1]) else None
