"""Calibration text that the model writes itself: what it was trained on, as far as it remembers, in no file at all.

As in Liu et al., LLM-QAT: Data-Free Quantization Aware Training for Large Language Models, 2023, arxiv.org/abs/
2305.17888, section 2.1: after its first token a text goes on with a few of the likeliest, so that it makes sense, and
then with tokens drawn from the model's own probabilities, so that it is varied. There the first token is drawn from the
whole vocabulary; here the texts begin with the likeliest ones, each with another. Where the model has a chat template
they begin in a user's turn, as in Xu et al., Magpie, 2024, arxiv.org/abs/2406.08464. An end is a token like others, and
the next turn or text comes behind it, but none comes at the beginning or right behind another: what a model was never
trained to go on from, it would go on ending.
"""

from collections.abc import Callable

import torch

from exporter.checkpoint import Checkpoint
from exporter.errors import RecipeError
from exporter.quantization.weights import OneLayer, Remembered, SourceWeights
from exporter.tokenizer import Encoder, read_text_side
from exporter.torch_ops import TorchOps

TOKENS = 4096  # of all texts together
LENGTH = 128  # tokens of a text
SURE = 4  # tokens at a text's beginning that are the likeliest ones
HELD = 400_000_000  # parameters that are held in float32; a larger model is read again for each token, layer by layer
_SEED = 0

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def write_texts(
    source: Checkpoint,
    context: int,
    most: int = TOKENS,
    progress: Progress = lambda what, done, total: None,
) -> list[list[int]]:
    """Token ids of texts that the float model writes, all of one length, of at most `context` tokens each and `most`
    in all; always the same ones. RecipeError if the model's probabilities are none."""
    arch, beginning, ends = source.architecture, *_beginning(source)
    length = min(context, LENGTH, most)
    count = min(max(1, min(most, TOKENS) // length), arch.vocab)
    exact = SourceWeights(source)
    held = Remembered(exact) if arch.parameters <= HELD else OneLayer(exact)
    ops, random = TorchOps(arch, held, length, rounded=0), torch.Generator().manual_seed(_SEED)
    texts = given = torch.tensor([beginning[: length - 1]] * count)
    sure = given.shape[1] + SURE
    while (done := texts.shape[1]) < length:
        scores = ops.run(given)[:, -1]
        if not torch.isfinite(scores).all():
            raise RecipeError(
                "the model's logits became NaN or infinite as it wrote its own calibration text: check the checkpoint, "
                "or give a text with --calibration FILE"
            )
        ended = torch.isin(texts[:, -1], ends) if done >= sure else torch.full((count,), True)
        scores[:, ends] = scores[:, ends].masked_fill(ended[:, None], -torch.inf)
        if texts is given:  # the first
            chosen = scores[0].argsort(descending=True, stable=True)[:count, None]
        elif done < sure:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=random)
        texts, given = torch.cat((texts, chosen), 1), chosen
        progress("write calibration text", texts.numel(), count * length)
    written: list[list[int]] = texts.tolist()
    return written


def _beginning(source: Checkpoint) -> tuple[list[int], torch.Tensor]:
    """Token ids that a text begins with, up to what a user would say, and those that end one."""
    side = read_text_side(source)
    ends = torch.tensor(side.tokens.eos)
    if opening := Encoder(side).opening():
        return opening, ends
    return [side.tokens.eos[0] if side.tokens.bos is None else side.tokens.bos], ends
