"""pepper's tokenizer and chat template: byte-level BPE, one token for a digit and one for a Hangul syllable.

The pre-tokenizer is that of Qwen 2.5 (https://huggingface.co/Qwen/Qwen2.5-0.5B, tokenizer.json), which runtimes
that do not read regular expressions know by name. Syllables stay apart nevertheless, because the merges were
learned with them split: no merge joins two.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, PAD, USER, ASSISTANT)
"""Their ids are their places here."""

MAX_POSITIONS = 512

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{# A system message is accepted and left out: pepper was trained on questions alone. #}"
    "{% if message['role'] != 'system' %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
    """Learn the merges from `texts` (without special tokens). The result has exactly `vocabulary` tokens.

    Raises ValueError when the texts have too few different words to learn that many.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    words = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    syllables = pre_tokenizers.Split(Regex("[가-힣]"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, syllables, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        found = tokenizer.get_vocab_size()
        raise ValueError(f"the texts gave {found} tokens instead of {vocabulary}: ask for fewer")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def _template() -> "Template":
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The text of a conversation (a {"role", "content"} per message), as the chat template writes it."""
    return _template().render(messages=messages, bos_token=BEGIN, add_generation_prompt=add_generation_prompt)


def save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as Hugging Face names them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "padding_side": "left",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
