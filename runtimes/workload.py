"""What to measure: lengths of prompts and answers, and how often."""

import random
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
    """Cases, each run `warmup` times unmeasured and then `repeats` times measured."""

    name: str
    cases: Annotated[tuple[Case, ...], Field(min_length=1)]
    warmup: Annotated[int, Field(ge=1)] = 1
    repeats: Count = 5

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
)


def preset(name: str) -> Workload:
    """A workload by its name: `smoke` (seconds) or `standard` (64, 256 and 1024 tokens in, 128 out)."""
    for workload in _PRESETS:
        if workload.name == name:
            return workload
    raise UsageError(f"there is no workload {name!r}; there are {', '.join(w.name for w in _PRESETS)}")


def prompt_ids(length: int, vocab: int, seed: int = 0) -> list[int]:
    """`length` token ids drawn evenly from the vocabulary: the same for every engine that is compared."""
    return random.Random(seed).choices(range(vocab), k=length)
