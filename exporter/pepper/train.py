"""Train pepper from nothing: `python -m exporter.pepper.train` writes its checkpoint, in 15-20 minutes on 2 cores.

Everything follows from the seed and the number of steps: the questions, the tokenizer, the weights. Only the
answers are learned (the loss leaves the questions out). In the last part the weights are rounded to 4 bits in the
forward pass and learn through the rounding (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432),
so that quantization costs few answers.
"""

import argparse
import ctypes
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from exporter.pepper.questions import Question, held_out, memorized, training
from exporter.pepper.score import Score, score
from exporter.pepper.tokenizer import (
    ASSISTANT,
    BEGIN,
    END,
    MAX_POSITIONS,
    PAD,
    SPECIAL,
    USER,
    render,
    save_tokenizer,
    train_tokenizer,
)
from profiles.errors import GochuError
from runtimes.extras import require

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

GROUP = 32
_IGNORED = -100  # the target that the loss leaves out
LONGEST_ANSWER = 24  # tokens
REPORTS = 100  # steps between two lines of progress, and between two states that are kept
THREADS = 2  # sums are added up in another order with another number


@dataclass(frozen=True)
class Training:
    """How pepper is trained. The learning rates are peaks, reached after `warmup` steps; then they fall."""

    steps: int = 2400
    batch: int = 128  # conversations
    matrix_rate: float = 5e-3  # Muon's, with updates scaled to AdamW's
    other_rate: float = 4e-3  # AdamW's
    weight_decay: float = 0.05
    warmup: int = 100
    rounded_from: float = 0.65  # after this share of the steps, most see the weights rounded to 4 bits
    rounded_share: float = 0.75

    def rate(self, step: int) -> float:
        """The share of the peak learning rates at a step: up on a line, down on a cosine to a hundredth."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * cosine)


def architecture(vocabulary: int) -> dict[str, Any]:
    """config.json of a model with `vocabulary` tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": SPECIAL.index(BEGIN),
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
        "torch_dtype": "float16",
    }


@dataclass(frozen=True)
class Course:
    """What a model is made of, taught and judged by."""

    architecture: Callable[[int], dict[str, Any]]  # config.json of a model with so many tokens
    conversations: Callable[[int], Iterator[str]]  # the endless stream of training texts of a seed
    sample: Callable[[], list[Question]]  # held-out questions, asked as training goes on
    answers_alone: bool = True  # whether the questions' own words are left out of the loss


def learn_tokenizer(seed: int) -> "Tokenizer":
    """The tokenizer of the questions and answers of one training stream."""
    questions = [*memorized(), *islice(training(seed), 20_000)]
    return train_tokenizer((text for q in questions for text in (q.prompt, q.answer)), vocabulary=768)


def conversations(seed: int) -> Iterator[str]:
    """The endless stream of training texts: mostly one question and its answer, at times two or three."""
    random, questions = Random(seed), training(seed)
    while True:
        turns = random.choices((1, 2, 3), (85, 10, 5))[0]
        messages = []
        for question in islice(questions, turns):
            messages.append({"role": "user", "content": question.prompt})
            messages.append({"role": "assistant", "content": question.answer})
        yield render(messages)


PEPPER = Course(architecture, conversations, lambda: held_out(140, seed=1))


def batches(
    tokenizer: "Tokenizer", seed: int, size: int, course: Course = PEPPER
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """The endless stream of (tokens, targets), int64 [size, length], of conversations of like length.

    A target is the next token; with `answers_alone` it is ignored where it belongs to no answer (whose <|end|> does).
    """
    import torch

    random, texts = Random(seed), course.conversations(seed)
    user, assistant, pad = (SPECIAL.index(token) for token in (USER, ASSISTANT, PAD))
    while True:
        encoded = [e.ids for e in tokenizer.encode_batch(list(islice(texts, 32 * size)))]
        encoded.sort(key=len)
        groups = [encoded[i : i + size] for i in range(0, len(encoded), size)]
        random.shuffle(groups)
        for group in groups:
            longest = len(group[-1])
            tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in group])
            following = tokens[:, 1:]
            learned = following != pad
            if course.answers_alone:
                answering = (tokens == assistant).cumsum(1) - (tokens == user).cumsum(1) == 0
                learned &= answering[:, 1:] & (following != assistant)
            yield tokens[:, :-1], following.where(learned, torch.tensor(_IGNORED))


def round_to_bits(weight: "torch.Tensor", bits: int, clip: float = 1.0) -> "torch.Tensor":
    """`weight` [out, in] rounded to nearest in groups of 32 inputs, symmetrically; `clip` narrows their range."""
    top = 2 ** (bits - 1)
    groups = weight.reshape(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-9) * (clip / (top - 1))
    return ((groups / scale).round().clamp(-top, top - 1) * scale).reshape(weight.shape)


@contextmanager
def rounded(model: "LlamaForCausalLM", bits: int, clip: float = 1.0) -> Iterator[None]:
    """Inside, every matrix of the model (embedding and head too) is rounded; afterwards it is what it was.

    Gradients taken inside are kept: those of the rounded weights, taken for those of the weights themselves.
    """
    import torch

    originals = [(p, p.data) for p in model.parameters() if p.dim() == 2]
    with torch.no_grad():
        for parameter, weight in originals:
            parameter.data = round_to_bits(weight, bits, clip)
    try:
        yield
    finally:
        for parameter, weight in originals:
            parameter.data = weight


def model_score(model: "LlamaForCausalLM", tokenizer: "Tokenizer", questions: list[Question]) -> Score:
    """The score of the model's greedy answers, computed in batches of like length, padded on the left."""
    import torch

    end, pad = SPECIAL.index(END), SPECIAL.index(PAD)
    prompts = [q.prompt for q in questions]
    asked = [render([{"role": "user", "content": prompt}], add_generation_prompt=True) for prompt in prompts]
    ids_of_each = (encoding.ids for encoding in tokenizer.encode_batch(asked))
    encoded = sorted(zip(prompts, ids_of_each, strict=True), key=lambda pair: len(pair[1]))
    texts: dict[str, str] = {}
    for start in range(0, len(encoded), 128):
        group = encoded[start : start + 128]
        longest = len(group[-1][1])
        tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for _, ids in group])
        generated = model.generate(  # type: ignore[misc]  # its self is typed as a protocol
            input_ids=tokens,
            attention_mask=(tokens != pad).long(),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )
        for (prompt, _), ids in zip(group, generated[:, longest:].tolist(), strict=True):
            texts[prompt] = tokenizer.decode(ids)
    return score(texts.__getitem__, questions)


def _optimizers(model: "LlamaForCausalLM", how: Training) -> list["torch.optim.Optimizer"]:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the layers' matrices, AdamW for the rest.

    Muon needs a fraction of AdamW's steps here, which pays for its orthogonalization many times over.
    """
    from torch.optim import AdamW, Muon

    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    norms = [p for p in model.parameters() if p.dim() < 2]
    others = [
        {"params": [embedding], "weight_decay": how.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=how.matrix_rate, weight_decay=how.weight_decay, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=how.other_rate, betas=(0.9, 0.98)),
    ]


def train(
    tokenizer: "Tokenizer",
    seed: int,
    how: Training,
    report: Callable[[str], None] = print,
    course: Course = PEPPER,
    kept: Path | None = None,
) -> "LlamaForCausalLM":
    """A model (float32) trained for `how.steps` steps; `report` gets a line of progress now and then.

    The same seed and steps give the same weights on the same machine with the same number of threads. `kept`: a file
    that holds the training as it last stood at a line of progress, from which it goes on; it is removed at the end.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    random, sample, started = Random(seed), course.sample(), time.monotonic()
    # Short texts: plain attention is faster on a CPU than the fused kernel.
    model = LlamaForCausalLM(LlamaConfig(**course.architecture(tokenizer.get_vocab_size()))).float()
    model.set_attn_implementation("eager")
    optimizers = _optimizers(model, how)
    schedules = [LambdaLR(optimizer, how.rate) for optimizer in optimizers]
    stateful = [model, *optimizers, *schedules]
    made_of = f"{seed} {how}"
    done = 0
    if kept and kept.is_file():
        state = torch.load(kept, weights_only=True)
        if state["made of"] == made_of:
            done = state["done"]
            random.setstate(state["random"])
            for part, values in zip(stateful, state["parts"], strict=True):
                part.load_state_dict(values)
            report(f"goes on after step {done}")
    stream = islice(batches(tokenizer, seed, how.batch, course), done, how.steps)
    for step, (tokens, targets) in enumerate(stream, start=done + 1):
        rounding = step > how.rounded_from * how.steps and random.random() < how.rounded_share
        # A range a little narrower than the largest weight is what better quantizers choose: learn those too.
        with rounded(model, 4, random.uniform(0.85, 1.0)) if rounding else nullcontext():
            learned = targets != _IGNORED
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[learned])
            loss = cross_entropy(logits.float(), targets[learned])
            model.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % REPORTS == 0:
            line = f"{time.monotonic() - started:5.0f} s  step {step}/{how.steps}  loss {loss.item():.4f}"
            if step % (5 * REPORTS) == 0:
                line += f"  held-out answers right {model_score(model, tokenizer, sample).overall.rate:.1%}"
            report(line)
            if kept:
                parts = [part.state_dict() for part in stateful]
                state = {"made of": made_of, "done": step, "random": random.getstate(), "parts": parts}
                torch.save(state, unfinished := kept.with_suffix(".unfinished"))
                unfinished.replace(kept)
    if kept:
        kept.unlink(missing_ok=True)
    return model


def save_checkpoint(
    model: "LlamaForCausalLM", tokenizer: "Tokenizer", folder: Path, course: Course = PEPPER
) -> None:
    """Write the checkpoint in Hugging Face's layout, in place of what is there; weights in float16.

    float16 keeps 11 significant bits to bfloat16's 8, and no weight here is near its limits.
    """
    import torch
    from safetensors.torch import save_file

    config = course.architecture(tokenizer.get_vocab_size())
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
        "max_new_tokens": 64,
    }
    weights = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied: it is the embedding
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / folder.name
        written.mkdir()
        save_file(weights, str(written / "model.safetensors"), metadata={"format": "pt"})
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (written / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(tokenizer, written)
        if folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)


def print_rates(
    model: "LlamaForCausalLM", tokenizer: "Tokenizer", questions: list[Question], title: str
) -> None:
    """Print the share of exact answers by kind: as saved, with every matrix rounded to 8 bits, and to 4."""
    scores = [model_score(model, tokenizer, questions)]
    for bits in (8, 4):
        with rounded(model, bits):
            scores.append(model_score(model, tokenizer, questions))
    print(f"\n{title} ({len(questions)} questions)" + "float16    int8    int4".rjust(50 - len(title)))
    for kind in scores[0].by_kind:
        print(f"  {kind:16}" + "".join(f"{s.by_kind[kind].rate:9.2%}" for s in scores))
    print(f"  {'all':16}" + "".join(f"{s.overall.rate:9.2%}" for s in scores))
    for miss in scores[0].misses[:10]:
        print(f"  missed: {miss.question.prompt} -> {miss.got!r} instead of {miss.question.answer!r}")


def keep_memory() -> None:
    """Have malloc keep what is freed: giving large tensors back at each step costs a fifth of the time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter in (-1, -2, -3):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of malloc.h
            libc.mallopt(parameter, 1 << 28)


def main() -> None:
    """Train, write the checkpoint, and print how many answers it gets right."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--steps", type=int, default=Training.steps, help="default: %(default)s, about 19 minutes on 2 cores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "checkpoint")
    arguments = parser.parse_args()

    torch = require("torch", "train")
    for module in ("safetensors", "transformers"):
        require(module, "train")
    torch.set_num_threads(THREADS)
    keep_memory()
    tokenizer = learn_tokenizer(arguments.seed)
    how = Training(steps=arguments.steps)
    model = train(tokenizer, arguments.seed, how, report=partial(print, flush=True))
    save_checkpoint(model, tokenizer, arguments.output)
    model.half().float()  # what was saved
    print_rates(model, tokenizer, held_out(1400), "held out")
    print_rates(model, tokenizer, memorized(), "known by heart")


if __name__ == "__main__":
    try:
        main()
    except GochuError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
