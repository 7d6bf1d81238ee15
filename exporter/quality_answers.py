"""Questions put to either side of a quality report, many at once, for exact answers."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporter.quality_sides import Progress, Side
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights
from exporter.tokenizer import Encoder
from exporter.torch_ops import TorchOps

ANSWER = 32  # tokens at most, as `gochu score` has it


def answer_all(
    side: Side, prompts: Sequence[str], progress: Progress = lambda what, done, total: None
) -> dict[str, str]:
    """The greedy answer to each user's message: by the bundle's engine, or by the reference decoder.

    The latter holds the whole model in float32: it is meant for pepper.
    """
    encoder, eos = Encoder(side.text), set(side.text.tokens.eos)
    given = [encoder.prompt(prompt) for prompt in prompts]
    answers, said = _by_engine(side, given, eos) if side.engine else _by_reference(side, given, eos), {}
    for place, ids in answers:
        said[prompts[place]] = encoder.tokenizer.decode(ids)
        progress("answers", len(said), len(prompts))
    return said


def _by_engine(side: Side, prompts: Sequence[list[int]], eos: set[int]) -> Iterator[tuple[int, list[int]]]:
    assert side.engine
    engine = side.engine(min(side.context, max(map(len, prompts)) + ANSWER))
    for place, prompt in enumerate(prompts):
        engine.reset()
        token, ids = int(engine.prefill(prompt).argmax()), list[int]()
        while token not in eos and len(ids) < ANSWER and engine.position < engine.context:
            ids.append(token)
            token = int(engine.decode(token).argmax())
        yield place, ids
    engine.close()


def _by_reference(side: Side, prompts: Sequence[list[int]], eos: set[int]) -> Iterator[tuple[int, list[int]]]:
    kept = replace(side, weights=_Kept(side.weights))
    return greedy(lambda: kept.ops(kept.context), prompts, eos, ANSWER)


@torch.no_grad()
def greedy(
    ops: Callable[[], TorchOps], prompts: Sequence[list[int]], eos: set[int], most: int
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's place and the likeliest tokens after it, up to `most` or one of `eos`, which is left out.

    Prompts of one length go together through what `ops` makes for each length, until all have ended.
    """
    stops = torch.tensor(sorted(eos))
    for places, given in by_length(prompts):
        model, made, ended = ops(), list[Tensor](), torch.zeros(len(places), dtype=torch.bool)
        while len(made) < most and not ended.all():
            made.append(given := model.run(given)[:, -1:].argmax(-1))
            ended |= torch.isin(given[:, 0], stops)
        for place, ids in zip(places, torch.cat(made, 1).tolist(), strict=True):
            yield place, ids[: next((i for i, token in enumerate(ids) if token in eos), most)]


def by_length(sequences: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Places of sequences of one length, and their token ids [sequences, length]."""
    places = defaultdict[int, list[int]](list)
    for place, sequence in enumerate(sequences):
        places[len(sequence)].append(place)
    for some in places.values():
        yield some, torch.tensor([sequences[place] for place in some])


class _Kept:
    """What other weights stand for, in float32, each asked for once; activations are rounded as theirs are."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._matrices: dict[str, QuantizedTensor] = {}

    def scheme(self, name: str) -> Scheme:
        return self.matrix(name).scheme

    def matrix(self, name: str) -> QuantizedTensor:
        if name not in self._matrices:
            matrix = self._weights.matrix(name)
            scheme = Scheme(32, matrix.scheme.group, matrix.scheme.activations)
            self._matrices[name] = QuantizedTensor(name, scheme, matrix.shape, matrix.dequantize())
        return self._matrices[name]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._weights.vector(name)
