"""What to measure: lengths of prompts and answers, and how often or for how long."""

import random
import re
from typing import Annotated

from pydantic import Field

from runtimes.bundle import Strict
from runtimes.errors import UsageError

Count = Annotated[int, Field(ge=1)]


class Case(Strict):
    """One prompt length with one answer length, both in tokens."""

    prompt_tokens: Count
    new_tokens: Count


class Workload(Strict):
    """Cases, each run `warmup` times unmeasured and then measured: `repeats` times, or again and again for `minutes`
    if those are given. `cool_down`: seconds of rest before each case. `prompts` are answered greedily after the last
    case, `answer_tokens` at most each: so one sees that two targets say the same."""

    name: str
    cases: Annotated[tuple[Case, ...], Field(min_length=1)]
    warmup: Annotated[int, Field(ge=1)] = 1
    repeats: Count = 5
    minutes: Annotated[float, Field(ge=0)] = 0.0
    cool_down: Annotated[float, Field(ge=0)] = 0.0
    prompts: tuple[str, ...] = ()
    answer_tokens: Count = 32

    def clipped(self, context: int) -> "tuple[tuple[Case, str], ...]":
        """The cases as a context of so many tokens can hold them, each with a note of what was cut.

        The answer stays and the prompt is cut; a case that would become another's double is left out.
        UsageError if the context cannot hold even one prompt token with the shortest answer.
        """
        fitting: dict[Case, str] = {}
        for case in self.cases:
            room = context - case.new_tokens
            if room >= case.prompt_tokens:
                fitting.setdefault(case, "")
            elif room >= 1:
                cut = Case(prompt_tokens=room, new_tokens=case.new_tokens)
                fitting.setdefault(
                    cut, f"prompt cut from {case.prompt_tokens} tokens to fit the context of {context}"
                )
        if not fitting:
            raise UsageError(
                f"workload {self.name} needs a context of {1 + min(c.new_tokens for c in self.cases)} tokens, "
                f"but this one has {context}; take a smaller workload or a larger context"
            )
        return tuple(fitting.items())


_PRESETS = (
    Workload(name="smoke", cases=(Case(prompt_tokens=16, new_tokens=16),), repeats=2),
    Workload(
        name="standard",
        cases=tuple(Case(prompt_tokens=length, new_tokens=128) for length in (64, 256, 1024)),
    ),
    Workload(name="sustained", cases=(Case(prompt_tokens=256, new_tokens=128),), minutes=10),
)
_TEST = re.compile(r"(?:pp(?P<prompt>[1-9]\d{0,6}))?\+?(?:tg(?P<new>[1-9]\d{0,6}))?")


def preset(name: str) -> Workload:
    """A workload by its name.

    `smoke` (seconds), `standard` (64, 256 and 1024 tokens in, 128 out) or `sustained` (10 minutes of 256 in, 128 out);
    or tests by llama-bench's names, comma-separated: pp512 (a prompt of 512 tokens), tg128 (128 tokens, from a prompt
    of one), pp512+tg128 (https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench). UsageError if it is
    neither.

    >>> [(case.prompt_tokens, case.new_tokens) for case in preset("pp512,tg128").cases]
    [(512, 1), (1, 128)]
    """
    for workload in _PRESETS:
        if workload.name == name:
            return workload
    tests = [_TEST.fullmatch(part) if part else None for part in name.split(",")]
    if not all(tests):
        raise UsageError(
            f"there is no workload {name!r}; there are {', '.join(w.name for w in _PRESETS)}, and llama-bench's tests, "
            "for example pp512,tg128"
        )
    found = [(match["prompt"], match["new"]) for match in tests if match]
    cases = [Case(prompt_tokens=int(prompt or 1), new_tokens=int(new or 1)) for prompt, new in found]
    return Workload(name=name, cases=tuple(dict.fromkeys(cases)))


def prompt_ids(length: int, vocab: int, seed: int = 0) -> list[int]:
    """`length` token ids drawn evenly from the vocabulary: the same for every engine that is compared."""
    return random.Random(seed).choices(range(vocab), k=length)
