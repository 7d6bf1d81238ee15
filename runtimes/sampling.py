"""Choose the next token from logits.

The steps and their order are those of transformers' `generate` (generation/utils.py,
`_get_logits_processor`): repetition penalty, temperature, top-k, top-p, min-p; each works on what the one
before has left. (llama.cpp's default chain has the same steps, but with the temperature last, so its top-p
and min-p see other probabilities.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.errors import EngineError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The default is greedy: always the likeliest.

    temperature: 0 = greedy; below 1 sharper, above 1 flatter than the model's own probabilities.
    top_k: keep the k likeliest tokens; 0 = all.
    top_p: keep the fewest likeliest tokens whose probabilities reach top_p; 1 = all
        (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
    min_p: keep tokens at least min_p times as likely as the likeliest; 0 = all
        (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082).
    repetition_penalty: divide the positive and multiply the negative logits of tokens that have occurred,
        in the prompt or since; 1 = none (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).
    seed: the same seed gives the same choices; None = another each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("temperature", "a number from 0 up", 0 <= self.temperature < float("inf")),
            (
                "top_k",
                "a whole number from 0 (all tokens) up",
                self.top_k >= 0 and self.top_k == int(self.top_k),
            ),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "a number above 0", 0 < self.repetition_penalty < float("inf")),
            ("seed", "a whole number from 0 up", self.seed is None or self.seed >= 0),
        ):
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}, but it has to be {allowed}")


class Sampler:
    """Picks tokens by one `Sampling`; holds the state of its random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray, history: Sequence[int] = ()) -> int:
        """The next token's id. `logits` float [vocab]; `history` the ids so far, prompt included.

        EngineError if a logit is not a number.
        """
        if self.sampling.temperature == 0:
            scores = self._penalized(logits, history)
            best = int(scores.argmax())
            _check(scores[best])
            return best
        tokens, probabilities = self.distribution(logits, history)
        if len(tokens) == 1:
            return int(tokens[0])
        edges = probabilities.cumsum()
        return int(
            tokens[min(int(edges.searchsorted(self._random.random() * edges[-1], "right")), len(tokens) - 1)]
        )

    def distribution(self, logits: np.ndarray, history: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be chosen (ids, likeliest first) and their probabilities (float64, sum 1).

        For a temperature above 0.
        """
        s = self.sampling
        scores = self._penalized(logits, history).astype(np.float64)
        _check(scores[scores.argmax()])
        scores /= s.temperature
        tokens = np.flatnonzero(scores > -np.inf)
        if 0 < s.top_k < len(tokens):
            least = np.partition(scores[tokens], -s.top_k)[-s.top_k]
            tokens = tokens[scores[tokens] >= least]  # ties with the k-th stay, as in transformers
        tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
        probabilities = np.exp(scores[tokens] - scores[tokens[0]])
        probabilities /= probabilities.sum()
        if s.top_p < 1:
            likelier = probabilities.cumsum() - probabilities  # what the tokens before this one reach
            tokens, probabilities = tokens[likelier < s.top_p], probabilities[likelier < s.top_p]
        if s.min_p > 0:
            likely = probabilities >= s.min_p * probabilities[0]
            tokens, probabilities = tokens[likely], probabilities[likely]
        return tokens, probabilities / probabilities.sum()

    def _penalized(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        penalty = self.sampling.repetition_penalty
        if penalty == 1 or len(history) == 0:
            return logits
        seen = np.unique(np.asarray(history, np.int64))
        scores = logits.copy()
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        return scores


def _check(largest: np.floating) -> None:
    """argmax stops at the first NaN, so the largest logit tells of any; EngineError if it is not finite."""
    if not np.isfinite(largest):
        raise EngineError(
            f"the model computed {largest} as a logit; its files are damaged, export the bundle again"
        )
