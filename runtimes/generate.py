"""Generate text with a bundle.

>>> model = load("out/")                                                    # doctest: +SKIP
>>> model.generate("What is 3 + 4?", max_tokens=16).text                    # doctest: +SKIP
'7'
>>> for piece in model.stream([{"role": "user", "content": "안녕"}]):         # doctest: +SKIP
...     print(piece, end="", flush=True)
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from runtimes import checksums
from runtimes.bundle import TOKENIZER, Bundle
from runtimes.chat import ChatTemplate, Message
from runtimes.engines import Engine, choose_variant, open_engine
from runtimes.errors import PromptError, TemplateError, UsageError
from runtimes.sampling import Sampler, Sampling
from runtimes.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    import numpy as np

GREEDY = Sampling()

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Generation:
    """What was generated. The end-of-turn token is neither in `text` nor in `tokens`.

    finish_reason: "stop" (the model ended its turn), "length" (max_tokens), "context" (no room left).
    timings: load_s, prefill_s, ttft_s (from the call to the first token), decode_s in seconds;
        prefill_tokens_per_s, and decode_tokens_per_s (left out where no token was decoded).
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    timings: dict[str, float]


class Model:
    """A bundle ready to generate."""

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer, *, load_s: float = 0.0) -> None:
        self.bundle = bundle
        self.engine = engine
        self.tokenizer = tokenizer
        self.load_s = load_s
        tokens = bundle.manifest.tokens
        source = bundle.manifest.chat_template
        self.eos = frozenset(tokens.eos)
        self.template: ChatTemplate | None = None
        if source is not None:
            bos, eos = tokenizer.token(tokens.bos), tokenizer.token(tokens.eos[0])
            self.template = ChatTemplate(source, bos_token=bos, eos_token=eos)
        self._cached: list[int] = []  # the tokens in the engine's KV cache
        self._running: Stream | None = None

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        raw: bool = False,
    ) -> Generation:
        """Answer a prompt, or continue a text.

        A string is the user's one message, put into the chat template; it is continued as it stands if `raw`
        or if the bundle has no template. Messages are a conversation (`role`, `content`). Raises PromptError,
        TemplateError, UsageError or EngineError.
        """
        return self.stream(prompt, max_tokens=max_tokens, sampling=sampling, raw=raw).finish()

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        raw: bool = False,
    ) -> "Stream":
        """As `generate`, but an iterator over pieces of text; `.generation` stands when it has ended."""
        start = perf_counter()
        tokens = self.encode(prompt, raw=raw)
        return Stream(self, tokens, max_tokens=max_tokens, sampling=sampling, start=start, reuse=False)

    def encode(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """The token ids that the engine is given for a prompt (see `generate`)."""
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty; write something to answer or to continue")
            if raw or self.template is None:
                return self.tokenizer.encode(prompt, add_special=True)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise UsageError("raw text is a string, but messages were given; give one or the other")
        if not prompt:
            raise PromptError("the conversation is empty; write at least one message")
        if not self.template:
            raise TemplateError(
                f"{self.bundle.path} has no chat template; give it raw text instead of messages"
            )
        return self.tokenizer.encode(self.template.render(prompt), add_special=False)

    def _prefill(self, prompt: list[int], reuse: bool) -> "tuple[np.ndarray, int]":
        """Logits after the prompt, and how many of its tokens had to be run."""
        known = 0
        if reuse:  # the last token is always run: its logits are wanted
            pairs = zip(self._cached, prompt[:-1], strict=False)
            known = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self.engine.reset(known)
        del self._cached[known:]
        logits = self.engine.prefill(prompt[known:])
        self._cached = list(prompt)
        return logits, len(prompt) - known

    def _decode(self, token: int) -> "np.ndarray":
        """Logits after one more token."""
        logits = self.engine.decode(token)
        self._cached.append(token)  # after the engine, so that it never lists what is not in the KV cache
        return logits

    def close(self) -> None:
        """Give the engine's memory back."""
        self._running = None
        self.engine.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    variant: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    on: str | None = None,
) -> Model:
    """Open a bundle and load the variant named, or the first that this machine can run.

    `on`: a simulator to run it in ("htp-simulator"). `context`: tokens to hold, prompt and answer together (default:
    all that the variant can). Raises ChecksumError if a file is not the one that was exported, else as `Bundle.open`
    and `open_engine`.
    """
    start = perf_counter()
    bundle = Bundle.open(path)
    chosen, _ = choose_variant(bundle, variant, on)
    with checksums.checked(bundle, chosen):
        tokenizer = Tokenizer(bundle.file(TOKENIZER))
        engine = open_engine(bundle, variant, context=context, threads=threads, on=on)
    return Model(bundle, engine, tokenizer, load_s=perf_counter() - start)


class Stream(Iterator[str]):
    """A generation under way: an iterator over pieces of text, each whole characters and never empty."""

    generation: Generation | None  # what came out, once there is no more to come

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        start: float,
        reuse: bool,
    ) -> None:
        """`start`: when the call came in (perf_counter). `reuse`: keep the KV cache of the tokens that the
        prompt has in common with what ran before."""
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}, but at least 1 token has to be generated")
        if not prompt:
            raise PromptError("the prompt has no tokens; write something to answer or to continue")
        if len(prompt) > model.engine.context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, but the context holds {model.engine.context}; "
                "shorten it or open the model with a larger context"
            )
        self.text = ""  # so far
        self.generation = None
        self._model = model
        self._pieces = self._run(prompt, max_tokens, Sampler(sampling), start, reuse)
        model._running = self

    def __next__(self) -> str:
        if self._model._running is not self and self.generation is None:
            raise UsageError("another generation has begun on this model; finish one before the next")
        piece = next(self._pieces)
        self.text += piece
        return piece

    def finish(self) -> Generation:
        """Run to the end and return what came out."""
        for _ in self:
            pass
        assert self.generation is not None
        return self.generation

    def _run(
        self, prompt: list[int], max_tokens: int, sampler: Sampler, start: float, reuse: bool
    ) -> Iterator[str]:
        model, engine = self._model, self._model.engine
        began = perf_counter()
        logits, fed = model._prefill(prompt, reuse)
        prefill_s = perf_counter() - began
        text, tokens, history = TextStream(model.tokenizer), [], list(prompt)
        ttft_s = decode_s = 0.0
        reason: FinishReason | None = None
        while True:
            token = sampler.pick(logits, history)
            piece = ""
            if token in model.eos:
                reason = "stop"
            else:
                tokens.append(token)
                history.append(token)
                piece = text.push(token)
                if len(tokens) == max_tokens:
                    reason = "length"
                elif engine.position == engine.context:
                    reason = "context"
            if reason is not None:
                piece += text.finish()
            now = perf_counter()
            if ttft_s == 0:
                ttft_s = now - start
            else:
                decode_s += now - began
            if piece:
                yield piece
            if reason is not None:
                break
            began = perf_counter()
            logits = model._decode(token)
        steps = len(tokens) - (reason != "stop")
        timings = {
            "load_s": model.load_s,
            "prefill_s": prefill_s,
            "ttft_s": ttft_s,
            "decode_s": decode_s,
            "prefill_tokens_per_s": fed / prefill_s,
        }
        if steps:
            timings["decode_tokens_per_s"] = steps / decode_s
        self.generation = Generation(self.text, tuple(tokens), len(prompt), reason, timings)


class Chat:
    """A conversation that goes on: each answer stays in the history and, as far as it can, in the KV cache.

    >>> chat = Chat(load("out/"))                        # doctest: +SKIP
    >>> for piece in chat.send("안녕"):                   # doctest: +SKIP
    ...     print(piece, end="", flush=True)
    """

    def __init__(self, model: Model, *, system: str | None = None, sampling: Sampling = GREEDY) -> None:
        self._model = model
        self._sampling = sampling
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._said: list[Message] = list(self._system)
        self._answer: Stream | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation so far; an answer that was broken off stands as far as it came."""
        answer: list[Message] = [{"role": "assistant", "content": self._answer.text}] if self._answer else []
        return [*self._said, *answer]

    def send(self, text: str, *, max_tokens: int = 256) -> Stream:
        """Say something and stream the answer; only what is new is run through the model.

        If it raises (PromptError: the conversation has outgrown the context), the history is as before. A
        bundle without a chat template continues one growing text instead.
        """
        start = perf_counter()
        if not text:
            raise PromptError("the message is empty; write something")
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        if self._model.template:
            tokens = self._model.encode(messages)
        else:
            tokens = self._model.encode("".join(message["content"] for message in messages), raw=True)
        answer = Stream(
            self._model, tokens, max_tokens=max_tokens, sampling=self._sampling, start=start, reuse=True
        )
        self._said, self._answer = messages, answer
        return answer

    def reset(self) -> None:
        """Begin anew, with the same system message."""
        self._said, self._answer = list(self._system), None
