"""What each algorithm loses, on pepper: KL divergence from the float model, answers, bytes, seconds.

On questions that pepper was never trained on, in torch with float activations, so that only weights differ. "layers"
are 4-bit weights of the layers with the embedding, which is the head too, at 8 bits; "all" has the embedding at 4 bits.
With --large also GPTQ's memory and time on the shape of Qwen2.5-0.5B, of which a few layers are made.

    python benchmarks/quantization.py --check --large
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Bound, finish, run_or_stop, table
from random_checkpoint import CONFIGS, write_checkpoint
from torch import Tensor

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.pepper.questions import Question, held_out
from exporter.pepper.score import score
from exporter.quantization.calibration import MOST, TEXTS, calibration_sequences
from exporter.quantization.recipe import Decision, Recipe, Rule, calibrated
from exporter.quantization.streaming import quantize_layers
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import FloatWeights, QuantizedWeights
from exporter.staging import Staging
from exporter.tokenizer import TOKENIZER, read_text_side
from exporter.torch_ops import TorchOps
from runtimes.chat import ChatTemplate
from runtimes.tokenizer import Tokenizer

ALGORITHMS = ("rtn-absmax", "rtn", "gptq", "gptq-act-order")
SCHEMES = {
    "int4": "int4",
    "int4-g128": "int4-g128",
    "int4-channel": "w4a16",
    "int8": "int8",
}  # name -> weights
CONTEXT, ANSWER = 512, 24  # tokens
SHAPE, LAYERS = "Qwen2.5-0.5B", 3
KL_SHARE, INT4_LOSS, INT8_LOSS = 1 / 3, 1.0, 0.2  # of rtn-absmax's, points, points
MEMORY = 1.5  # GB


class Kept(FloatWeights):
    """What other weights stand for, in float32, each asked for once."""

    def __init__(self, weights: QuantizedWeights, source: Checkpoint) -> None:
        super().__init__(weights, source.architecture)
        self._kept: dict[str, QuantizedTensor] = {}

    def matrix(self, name: str) -> QuantizedTensor:
        if name not in self._kept:
            self._kept[name] = super().matrix(name)
        return self._kept[name]


class Pepper:
    """The embedded model, the questions, and what it says to them in float."""

    def __init__(self, questions: int) -> None:
        self.source = open_checkpoint("pepper")
        self.questions = held_out(questions)
        self.sequences = calibration_sequences(self.source, CONTEXT)
        side = read_text_side(self.source)
        assert side.chat_template
        self.tokenizer = Tokenizer(side.folder / TOKENIZER)
        self.eos = set(side.tokens.eos)
        bos, eos = self.tokenizer.token(side.tokens.bos), self.tokenizer.token(side.tokens.eos[0])
        self.template = ChatTemplate(side.chat_template, bos_token=bos, eos_token=eos)
        self.reference = self.distributions(self.weights(Recipe.uniform("fp32"))[0])

    def weights(self, recipe: Recipe) -> tuple[Kept, int, float]:
        """The weights that a recipe gives, their bytes, and the seconds that finding them took."""
        decisions, start = recipe.resolve(self.source.architecture), time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            made = self._found(decisions, Path(work))
            kept = Kept(made, self.source)
            for name in decisions:
                kept.matrix(name)
        seconds = time.perf_counter() - start
        return kept, sum(report.bytes for report in made.reports), seconds

    def _found(self, decisions: dict[str, Decision], work: Path) -> QuantizedWeights:
        if not calibrated(decisions):
            return QuantizedWeights(self.source, decisions)
        found = quantize_layers(self.source, decisions, self.sequences, CONTEXT, Staging(work, ""))
        return QuantizedWeights(self.source, decisions, found=found)

    def tokens(self, asked: Question, answered: bool) -> list[int]:
        turns = [{"role": "user", "content": asked.prompt}]
        turns += [{"role": "assistant", "content": asked.answer}] if answered else []
        text = self.template.render(turns, add_generation_prompt=not answered)
        return self.tokenizer.encode(text, add_special=False)

    def distributions(self, weights: Kept) -> Tensor:
        """Log-probabilities after each token of all questions with their answers, [tokens, vocab]."""
        batches = by_length([self.tokens(asked, answered=True) for asked in self.questions])
        return torch.cat(
            [self._ops(weights).run(batch).log_softmax(-1).flatten(0, 1) for _, batch in batches]
        )

    def answers(self, weights: Kept) -> float:
        """Exact answers, in percent."""
        prompts, said = [self.tokens(asked, answered=False) for asked in self.questions], dict[str, str]()
        for places, batch in by_length(prompts):
            ops, made = self._ops(weights), list[Tensor]()
            given = batch
            for _ in range(ANSWER):
                made.append(given := ops.run(given)[:, -1:].argmax(-1))
            for place, ids in zip(places, torch.cat(made, 1).tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in self.eos), ANSWER)
                said[self.questions[place].prompt] = self.tokenizer.decode(ids[:end])
        return 100 * score(said.__getitem__, self.questions).overall.rate

    def _ops(self, weights: Kept) -> TorchOps:
        return TorchOps(self.source.architecture, weights, CONTEXT, rounded=0)


def by_length(sequences: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Sequences of one length together, and their places."""
    places = defaultdict[int, list[int]](list)
    for place, sequence in enumerate(sequences):
        places[len(sequence)].append(place)
    for some in places.values():
        yield some, torch.tensor([sequences[place] for place in some])


def measure(pepper: Pepper, what: str, scheme: str, algorithm: str) -> dict[str, Any]:
    """One row of the table."""
    embedding = "int8" if what == "layers" else SCHEMES[scheme]
    rules = (
        Rule(match="embedding", scheme=embedding, algorithm="rtn" if "gptq" in algorithm else algorithm),
        Rule(match="*", scheme=SCHEMES[scheme], algorithm=algorithm),
    )
    weights, nbytes, seconds = pepper.weights(Recipe(name="measured", rules=rules))
    found, reference = pepper.distributions(weights), pepper.reference
    return {
        "weights": what,
        "scheme": scheme,
        "algorithm": algorithm,
        "KL, 1e-3": 1e3 * float((reference.exp() * (reference - found)).sum(-1).mean()),
        "top-1, %": 100 * float((found.argmax(-1) == reference.argmax(-1)).float().mean()),
        "answers, %": pepper.answers(weights),
        "MB": nbytes / 1e6,
        "seconds": seconds,
    }


def large(work: Path) -> dict[str, Any]:
    """Memory and time of a whole export on a large shape, with GPTQ and without, on as many tokens as are used."""
    checkpoint = write_checkpoint(work / "checkpoint", CONFIGS[SHAPE] | {"num_hidden_layers": LAYERS})
    text = work / "text.jsonl"
    text.write_text(3 * TEXTS.read_text(encoding="utf-8"), encoding="utf-8")
    with open_checkpoint(checkpoint) as source:
        tokens = sum(map(len, calibration_sequences(source, CONTEXT, text)))
    assert tokens == MOST, f"{tokens} tokens are not the {MOST} that are used at most"
    command = [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), "--scheme", "int4-g128"]
    command += ["--context", str(CONTEXT), "--no-verify", "-o"]
    plain = run_or_stop([*command, str(work / "rtn")])
    gptq = run_or_stop([*command, str(work / "gptq"), "--algorithm", "gptq", "--calibration", str(text)])
    return {
        "shape": f"{SHAPE}, {LAYERS} layers",
        "tokens": tokens,
        "peak GB": gptq.peak_anon_bytes / 1e9,
        "peak GB with the file": gptq.peak_rss_bytes / 1e9,
        "s a layer": (gptq.wall_s - plain.wall_s) / LAYERS,
    }


def promises(row: Callable[[str, str, str], dict[str, Any]], float_rate: float) -> Iterator[Bound]:
    """What GPTQ keeps; `row` finds one of the table."""
    gptq, absmax = (row("layers", "int4", algorithm)["KL, 1e-3"] for algorithm in ("gptq", "rtn-absmax"))
    yield Bound("KL of gptq as a share of rtn-absmax's, the layers at int4", gptq / absmax, KL_SHARE)
    for scheme, most in (("int4", INT4_LOSS), ("int8", INT8_LOSS)):
        lost = float_rate - row("all", scheme, "gptq")["answers, %"]
        yield Bound(f"points of exact answers that {scheme} with gptq loses", lost, most)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--questions", type=int, default=600, help="how many held-out questions")
    parser.add_argument("--large", action="store_true", help="measure memory and time on a large shape too")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pepper is so small that several wait for each other
    with torch.no_grad():
        pepper = Pepper(arguments.questions)
        float_rate = pepper.answers(pepper.weights(Recipe.uniform("fp32"))[0])
        rows = [
            measure(pepper, what, scheme, algorithm)
            for what in ("all", "layers")
            for scheme in SCHEMES
            if what == "all" or scheme != "int8"
            for algorithm in ALGORITHMS
        ]
    table(f"pepper, {arguments.questions} held-out questions; float answers {float_rate:.1f} %", rows)
    found = {(row["weights"], row["scheme"], row["algorithm"]): row for row in rows}
    bounds = list(promises(lambda *key: found[key], float_rate))
    figures: dict[str, Any] = {"benchmark": "quantization", "float answers, %": float_rate, "rows": rows}
    if arguments.large:
        with tempfile.TemporaryDirectory() as work:
            figures["large"] = large(Path(work))
        figures["large"]["threads"] = threads
        table("GPTQ int4-g128, a whole export", [figures["large"]])
        bounds.append(Bound(f"peak memory in GB, {SHAPE}", figures["large"]["peak GB"], MEMORY))
    finish(figures, bounds, arguments.check)


if __name__ == "__main__":
    main()
