"""What all engines do alike: know how many tokens the KV cache holds, and refuse what cannot be run."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from runtimes.errors import PromptError, UsageError


class Session(ABC):
    """The verbs prefill, decode and reset of `runtimes.engines.Engine`, around what an engine does for them.

    `position`: tokens in the KV cache; whoever runs some adds them to `_position`.
    """

    context: int
    vocab: int
    _position = 0

    @property
    def position(self) -> int:
        return self._position

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self._check_room(len(tokens))
        if len(tokens) == 0:
            raise PromptError("there are no tokens to run; give a prompt that is not empty")
        ids = np.asarray(tokens, np.int64)
        if ids.view(np.uint64).max() >= self.vocab:  # negative ones are huge as unsigned numbers: one look
            strange = ids[(ids < 0) | (ids >= self.vocab)][0]
            raise PromptError(f"token {strange} is not in the vocabulary of {self.vocab}")
        return self._run_prompt(ids)

    def decode(self, token: int) -> np.ndarray:
        self._check_room(1)
        if not 0 <= token < self.vocab:
            raise PromptError(f"token {token} is not in the vocabulary of {self.vocab}")
        return self._run_token(token)

    def reset(self, position: int = 0) -> None:
        if not 0 <= position <= self._position:
            raise UsageError(
                f"cannot go back to position {position}: the KV cache holds {self._position} tokens"
            )
        self._position = position

    @property
    @abstractmethod
    def _closed(self) -> bool:
        """Whether the engine has given its memory back."""

    @abstractmethod
    def _run_prompt(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 [n]; float32 logits [vocab] after the last of them."""

    @abstractmethod
    def _run_token(self, token: int) -> np.ndarray:
        """Append one token; float32 logits [vocab] after it."""

    def _check_room(self, count: int) -> None:
        if self._closed:
            raise UsageError("the engine is closed; load the bundle again")
        if self._position + count > self.context:
            raise PromptError(
                f"{self._position + count} tokens do not fit in the context of {self.context}; "
                "shorten the prompt or open the model with a larger context"
            )
