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
        edges = probabilities.cumsum()
        place = int(edges.searchsorted(self._random.random() * edges[-1], "right"))
        return int(tokens[min(place, len(tokens) - 1)])

    def distribution(self, logits: np.ndarray, history: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be chosen (ids) and their probabilities (float64, above 0, sum 1).

        For a temperature above 0.
        """
        s = self.sampling
        scores = self._penalized(logits, history)
        largest = scores[scores.argmax()]
        _check(largest)
        if 0 < s.top_k < len(scores):
            least = np.partition(scores, -s.top_k)[-s.top_k]
            tokens = np.flatnonzero(scores >= least)  # ties with the k-th stay, as in transformers
        else:
            tokens = np.arange(len(scores))
        weights = np.exp((scores[tokens].astype(np.float64) - largest) / s.temperature)
        keep = weights > 0
        if s.top_p < 1:
            keep = _likeliest(weights, s.top_p)
        if s.min_p > 0:
            keep &= weights >= s.min_p
        return tokens[keep], weights[keep] / weights[keep].sum()

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


def _likeliest(weights: np.ndarray, share: float) -> np.ndarray:
    """A mask of the fewest largest weights that together reach `share` of the sum.

    They are few as a rule, so a growing number of candidates is sorted instead of the whole vocabulary.
    """
    goal, candidates = share * weights.sum(), 256
    while candidates < len(weights):
        order = np.argpartition(weights, -candidates)[-candidates:]
        if weights[order].sum() >= goal:
            break
        candidates *= 8
    else:
        order = np.arange(len(weights))
    order = order[np.argsort(-weights[order], kind="stable")]
    before = weights[order].cumsum() - weights[order]
    mask = np.zeros(len(weights), bool)
    mask[order[before < goal]] = True
    return mask
