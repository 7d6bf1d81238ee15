"""Render a conversation with a model's own chat template.

Templates are programs from wherever the checkpoint came from. They run in jinja2's immutable sandbox, with
the names that Hugging Face templates use (https://huggingface.co/docs/transformers/chat_templating) and
nothing else; what they see is plain strings; what they may write is bounded.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from runtimes.errors import TemplateError, UsageError

MAX_OUTPUT = 8 << 20  # characters: more than any context holds
MAX_POWER = 1 << 16  # bits of a power that a template may compute

Message = Mapping[str, str]


class ChatTemplate:
    """A compiled chat template.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "안녕"}])
    '<user>안녕'
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """`bos_token`, `eos_token`: as the vocabulary spells them. TemplateError if it is malformed."""
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # malformed, or so deep that the parser gives up
            raise TemplateError(
                f"the chat template is malformed: {_brief(error)}; correct it and export again"
            ) from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text to give the model, the opening of the assistant's turn included if asked for.

        `messages`: dicts with `role` and `content`. The text holds whatever special tokens the model wants,
        BOS too: encode it with `add_special=False`. Raises TemplateError: the template refuses the messages
        (Gemma 2 refuses the role "system"), fails, or is stopped by the sandbox or a bound.
        """
        plain = _plain(messages)
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=plain, add_generation_prompt=add_generation_prompt, **self._tokens
            ):
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise SecurityError(f"it wrote more than {MAX_OUTPUT} characters")
                pieces.append(piece)
        except Exception as error:  # a template can raise whatever an expression can
            raise TemplateError(
                f"the chat template refuses these messages or fails on them: {_brief(error)}; "
                "change the messages or give raw text"
            ) from None
        return "".join(pieces)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Copies of the messages; UsageError unless they hold strings and nothing else."""
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UsageError("a message lacks its role or content; write {'role': 'user', 'content': '...'}")
        if wrong := next((k for k, v in message.items() if type(v) is not str), None):
            raise UsageError(
                f"a message's {wrong!r} is {type(message[wrong]).__name__}; only text can be used"
            )
    return [dict(message) for message in messages]


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, in which moreover no operator makes something huge."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Stop at once: jinja2 alone would write nothing where a template prints what it may not see."""
        raise SecurityError(f"it asks for {attribute!r} of {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > MAX_OUTPUT:
                    raise SecurityError(f"it repeats something {times} times")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_POWER:
            raise SecurityError(f"it raises a number to the power {right}")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """A namespace that takes no underscored names, the way to Python's own attributes."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        _refuse_underscored(values)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscored([name])
        super().__setitem__(name, value)


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; here it only shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 (so the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> _Sandbox:
    """Set up as transformers does (utils/chat_template_utils.py), so that templates mean the same."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise JinjaError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: jinja2's own filter would write < and > as escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse_underscored(names: Iterable[str]) -> None:
    for name in names:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")


def _brief(error: Exception) -> str:
    """The first line of what went wrong, or its kind where it says nothing."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
