"""The models that quantization is measured on: what they say in float, to questions that they were never trained on.

In torch with float activations, so that only weights differ. `pepper` is embedded and was taught to be rounded;
`lessons` is trained by train_model.py and was not.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import train_model
from lessons import conversations as lesson_texts
from lessons import exam, stories
from torch import Tensor

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.pepper.questions import Question, held_out
from exporter.pepper.score import score
from exporter.pepper.train import conversations as pepper_texts
from exporter.quantization.preparation import prepared_architecture
from exporter.quantization.recipe import Recipe
from exporter.quantization.stage import quantize
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import FloatWeights, QuantizedWeights
from exporter.staging import Staging
from exporter.tokenizer import TOKENIZER, read_text_side
from exporter.torch_ops import TorchOps
from runtimes.chat import ChatTemplate
from runtimes.tokenizer import Tokenizer

CONTEXT, ANSWER = 512, 48  # tokens
SEQUENCES, LENGTH = 256, 64  # that calibrate: beginnings of conversations that are that long


class Kept(FloatWeights):
    """What other weights stand for, in float32, each asked for once."""

    def __init__(self, weights: QuantizedWeights, arch: Architecture) -> None:
        super().__init__(weights, arch)
        self.arch = arch  # a preparation may have untied the head
        self._kept: dict[str, QuantizedTensor] = {}

    def matrix(self, name: str) -> QuantizedTensor:
        if name not in self._kept:
            self._kept[name] = super().matrix(name)
        return self._kept[name]


@dataclass(frozen=True)
class Figures:
    """What weights cost: KL divergence from the float model in nats a token, how often the likeliest token is the float
    model's, and exact answers (both in percent)."""

    divergence: float
    agreement: float
    answers: float


class Subject:
    """A model, its questions, the text that calibrates it, and what it says in float.

    `asked` have one right answer each, `told` have none; both are read, with their answers, for the divergence.
    `texts`: of its training, whole conversations.
    """

    def __init__(
        self,
        name: str,
        source: Checkpoint,
        asked: Sequence[Question],
        told: Sequence[Question],
        texts: Iterator[str],
    ) -> None:
        self.name, self.source, self.asked, self.told = name, source, asked, told
        side = read_text_side(source)
        assert side.chat_template
        self.folder = side.folder
        self.tokenizer = Tokenizer(side.folder / TOKENIZER)
        self.eos = set(side.tokens.eos)
        bos, eos = self.tokenizer.token(side.tokens.bos), self.tokenizer.token(side.tokens.eos[0])
        self.template = ChatTemplate(side.chat_template, bos_token=bos, eos_token=eos)
        encoded = (self.tokenizer.encode(text, add_special=False) for text in texts)
        self.sequences = list(islice((ids[:LENGTH] for ids in encoded if len(ids) >= LENGTH), SEQUENCES))
        plain = self.weights(Recipe.uniform("fp32"))[0]
        self.reference = [logits.log_softmax(-1) for logits in self._logits(plain)]
        self.float_answers = self.answers(plain)

    def weights(self, recipe: Recipe, source: Checkpoint | None = None) -> tuple[Kept, int, float]:
        """The weights that a recipe gives, their bytes, and the seconds that finding them took.

        `source`: another checkpoint of the same model, whose weights another library found.
        """
        start = time.perf_counter()
        given = source or self.source
        decisions = recipe.resolve(prepared_architecture(given.architecture, recipe.prepare))
        with tempfile.TemporaryDirectory() as work:
            staging = Staging(Path(work), "")
            given, found = quantize(
                given, recipe, decisions, lambda training: self.sequences, CONTEXT, staging
            )
            made = QuantizedWeights(given, decisions, found=found)
            kept = Kept(made, given.architecture)
            for name in decisions:
                kept.matrix(name)
        seconds = time.perf_counter() - start
        return kept, sum(report.bytes for report in made.reports), seconds

    def figures(self, weights: Kept) -> Figures:
        """What weights cost."""
        total, same, tokens = 0.0, 0, 0
        for reference, logits in zip(self.reference, self._logits(weights), strict=True):
            found = logits.log_softmax(-1)
            total += float((reference.exp() * (reference - found)).sum())
            same += int((found.argmax(-1) == reference.argmax(-1)).sum())
            tokens += reference[..., 0].numel()
        return Figures(total / tokens, 100 * same / tokens, self.answers(weights))

    def answers(self, weights: Kept) -> float:
        """Exact answers, in percent."""
        prompts, said = [self._tokens(asked, answered=False) for asked in self.asked], dict[str, str]()
        for places, batch in by_length(prompts):
            ops, made = TorchOps(weights.arch, weights, CONTEXT, rounded=0), list[Tensor]()
            given, ended = batch, torch.zeros(len(batch), dtype=torch.bool)
            while len(made) < ANSWER and not ended.all():
                made.append(given := ops.run(given)[:, -1:].argmax(-1))
                ended |= torch.isin(given[:, 0], torch.tensor(sorted(self.eos)))
            for place, ids in zip(places, torch.cat(made, 1).tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in self.eos), len(ids))
                said[self.asked[place].prompt] = self.tokenizer.decode(ids[:end])
        return 100 * score(said.__getitem__, self.asked).overall.rate

    def _tokens(self, asked: Question, answered: bool) -> list[int]:
        turns = [{"role": "user", "content": asked.prompt}]
        turns += [{"role": "assistant", "content": asked.answer}] if answered else []
        text = self.template.render(turns, add_generation_prompt=not answered)
        return self.tokenizer.encode(text, add_special=False)

    def _logits(self, weights: Kept) -> Iterable[Tensor]:
        """After each token of all questions with their answers, batch by batch, [sequences, length, vocab]."""
        read = [self._tokens(asked, answered=True) for asked in (*self.asked, *self.told)]
        for _, batch in by_length(read):
            yield TorchOps(weights.arch, weights, CONTEXT, rounded=0).run(batch)


def by_length(sequences: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Sequences of one length together, and their places."""
    places = defaultdict[int, list[int]](list)
    for place, sequence in enumerate(sequences):
        places[len(sequence)].append(place)
    for some in places.values():
        yield some, torch.tensor([sequences[place] for place in some])


def pepper(questions: int) -> Subject:
    """The embedded model."""
    return Subject("pepper", open_checkpoint("pepper"), held_out(questions), [], pepper_texts(seed=1))


def lessons(questions: int) -> Subject:
    """The model of train_model.py, which is trained first if it is not there."""
    folder = train_model.default_folder()
    if not folder.exists():
        train_model.make(folder)
    told = stories(questions // 8)
    return Subject("lessons", open_checkpoint(folder), exam(questions), told, lesson_texts(seed=1))


SUBJECTS = {"pepper": pepper, "lessons": lessons}
