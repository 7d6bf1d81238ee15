"""A trained model that is larger than pepper and was not taught to be rounded, for what quantization costs there.

Llama-shaped, 5.1 M parameters, trained from nothing on text that `lessons` and pepper's own questions generate: every
token of it is learned. In about 10 minutes on 2 quiet cores; the same seed and steps give the same weights on the same
machine. What is cut off goes on at the last hundredth step.

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 python benchmarks/train_model.py
"""

import argparse
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lessons import conversations, exam

from exporter.pepper import train as pepper
from exporter.pepper.tokenizer import train_tokenizer

VOCABULARY = 1536
HOW = pepper.Training(steps=1200, batch=64, matrix_rate=4e-3, other_rate=3e-3, rounded_from=1.0)


def default_folder() -> Path:
    """Where the checkpoint is kept, outside the repository."""
    return Path.home() / ".cache" / "gochu" / "models" / "lessons-5m"


def architecture(vocabulary: int) -> dict[str, Any]:
    """config.json of a model with `vocabulary` tokens."""
    return pepper.architecture(vocabulary) | {"intermediate_size": 768, "num_hidden_layers": 6}


COURSE = pepper.Course(architecture, conversations, lambda: exam(140, seed=1), answers_alone=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=HOW.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=pepper.THREADS)
    parser.add_argument("-o", "--output", type=Path, default=default_folder(), help="default: %(default)s")
    arguments = parser.parse_args()
    make(arguments.output, arguments.seed, arguments.steps, arguments.threads)


def make(folder: Path, seed: int = 0, steps: int = HOW.steps, threads: int = pepper.THREADS) -> None:
    """Train the model and write it into `folder`, with a table of what it answers."""
    import torch

    torch.set_num_threads(threads)
    pepper.keep_memory()
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(islice(conversations(seed), 20_000), VOCABULARY)
    say = partial(print, flush=True)
    kept = folder.parent / f".{folder.name}.training"
    model = pepper.train(tokenizer, seed, replace(HOW, steps=steps), say, COURSE, kept)
    pepper.save_checkpoint(model, tokenizer, folder, COURSE)
    model.half().float()  # what was saved
    pepper.print_rates(model, tokenizer, exam(800), "held out")


if __name__ == "__main__":
    main()
