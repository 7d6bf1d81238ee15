"""The models that quantization is measured on: what they say in float, to questions that they were never trained on.

In torch with float activations, so that only weights differ. `pepper` is embedded and was taught to be rounded;
`lessons` is trained by train_model.py and was not.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import train_model
from lessons import conversations as lesson_texts
from lessons import exam, stories
from torch import Tensor

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.pepper.questions import Question, held_out
from exporter.pepper.score import score
from exporter.pepper.train import conversations as pepper_texts
from exporter.quality_answers import by_length, greedy
from exporter.quantization.preparation import prepared_architecture
from exporter.quantization.recipe import Recipe
from exporter.quantization.stage import quantize
from exporter.quantization.training import STEPS
from exporter.quantization.weights import FloatWeights, QuantizedWeights, Remembered
from exporter.staging import Staging
from exporter.tokenizer import Encoder, read_text_side
from exporter.torch_ops import TorchOps
from runtimes.chat import Message

CONTEXT, ANSWER = 512, 48  # tokens
SEQUENCES, LENGTH = 256, 64  # that calibrate: beginnings of conversations that are that long


class Kept(Remembered):
    """What other weights stand for, in float32, each asked for once."""

    def __init__(self, weights: QuantizedWeights, arch: Architecture) -> None:
        super().__init__(FloatWeights(weights, arch))
        self.arch = arch  # a preparation may have untied the head


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
    `texts`: of its training, whole conversations. `steps`: how long weights are trained, where they are.
    """

    steps = STEPS

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
        self.folder, self.encoder, self.eos = side.folder, Encoder(side), set(side.tokens.eos)
        encoded = (self.encoder.tokenizer.encode(text, add_special=False) for text in texts)
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
                given, recipe, decisions, lambda training: self.sequences, CONTEXT, staging, steps=self.steps
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
        prompts, said = [self.encoder.prompt(asked.prompt) for asked in self.asked], dict[str, str]()

        def ops() -> TorchOps:
            return TorchOps(weights.arch, weights, CONTEXT, rounded=0)

        for place, ids in greedy(ops, prompts, self.eos, ANSWER):
            said[self.asked[place].prompt] = self.encoder.tokenizer.decode(ids)
        return 100 * score(said.__getitem__, self.asked).overall.rate

    def _logits(self, weights: Kept) -> Iterable[Tensor]:
        """After each token of all questions with their answers, batch by batch, [sequences, length, vocab]."""
        read = [self.encoder.document(_conversation(asked)) for asked in (*self.asked, *self.told)]
        for _, batch in by_length(read):
            yield TorchOps(weights.arch, weights, CONTEXT, rounded=0).run(batch)


def _conversation(asked: Question) -> list[Message]:
    return [{"role": "user", "content": asked.prompt}, {"role": "assistant", "content": asked.answer}]


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
