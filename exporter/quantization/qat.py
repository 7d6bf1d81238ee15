"""Quantization-aware training: the integers and scales by which the whole model predicts what the float model does.

The teacher is the float model: the loss is the KL divergence of the student's predictions from its own (Hinton et al.
2015, arxiv.org/abs/1503.02531, at temperature 1), so that no text has to be right, and nothing is learned that the
teacher does not know. It runs once; what its last layer gives is kept in a file, and only its head is computed again.

Training starts at the integers and scales of gptq-descent: a latent (see `quantization.latents`) is the float weight,
moved to the nearest point that rounds to its integer. So no step at all gives those weights, and a weight that was
rounded the other way is the quickest to change its mind. Norms and biases stay as they are, and activations are not
rounded: the integers are the same for every format and engine. An eighth of the sequences is kept aside, and if the
trained weights predict those no better, the ones that training started from are kept.

A latent, its gradient and Adam's two moments are in memory for every weight; of what the integers stand for, and of
values on their way, there is one layer at a time (`training.plan_training` tells how much). After each tenth of the
steps all is saved, and a run that was cut off goes on from there, to the same integers on the same machine with as many
threads.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from exporter import decoder
from exporter.checkpoint import Source
from exporter.errors import RecipeError
from exporter.quantization.latents import FromBeginning, Latent, Student
from exporter.quantization.recipe import Decision, calibrated, starting, trained
from exporter.quantization.streaming import FoundWeights, Progress, usable
from exporter.quantization.training import LOGITS, TOKENS
from exporter.quantization.weights import Found, QuantizedWeights, Remembered, SourceWeights, refuse_lost
from exporter.staging import Staging

RATE = 5e-4  # of Adam for the latents, in their scales: the peak, reached after _WARMUP steps
SCALE_RATE = 1.5e-3  # of Adam for the scales' logarithms
_BETAS, _EPSILON = (0.9, 0.999), 1e-12  # gradients are far below 1
_WARMUP = 10
_SEED = 0
_ASIDE = 8
_SAVES = 10
_TEACHER, _STATE, _BEFORE, _FOUND = "teacher.f32", "trained.{}.npz", "before", "trained.npz"


@torch.enable_grad()
def train(
    source: Source,
    decisions: Mapping[str, Decision],
    found: Found,
    sequences: Sequence[Sequence[int]],
    context: int,
    steps: int,
    work: Staging,
    progress: Progress = lambda what, done, total: None,
) -> Found:
    """Train the weights that `decisions` say, on token sequences, each cut to `context` tokens.

    `found`: what training starts from, as `quantize_layers` finds it for `recipe.starting(decisions)`. What is given
    back finds trained weights, and the others as `found` does. RecipeError for a loss that is no number, too few
    tokens, and weights that the training lost.
    """
    sequences, names = usable(sequences, context), trained(decisions)
    work = work.workspace()
    marks = sorted({steps * save // _SAVES for save in range(_SAVES + 1)})  # 0 is the first
    if not work.is_done("integers"):
        done = _taken_up(work, marks)
        _run_teacher(source, sequences, context, work, progress)
        run = _Run(source, decisions, found, sequences, context, steps, work.folder, progress)
        if done:
            run.load(done, work.folder)
        for before, mark in pairwise(marks):
            if mark > done:
                work.step(f"trained {mark}", partial(run.until, mark), _states(before))
    figures = work.step("integers", lambda folder: run.write(folder), [_TEACHER, *_states(steps)])
    new = FoundWeights(work.folder, decisions, figures)
    return lambda name: new(name) if name in names else found(name)


def _states(mark: int) -> list[str]:
    """The files that hold the state after `mark` steps."""
    return [_STATE.format(mark)] if mark else []


def _taken_up(work: Staging, marks: Sequence[int]) -> int:
    """The last step whose state an earlier run left; if it left none that is intact, all begins anew."""
    left = [mark for mark in marks if work.is_done(f"trained {mark}")]
    whole = [mark for mark in left if (work.folder / _STATE.format(mark)).is_file()]
    if left and not whole:
        work.clear()
    return max(whole, default=0)


def _run_teacher(
    source: Source,
    sequences: Sequence[Sequence[int]],
    context: int,
    work: Staging,
    progress: Progress,
) -> None:
    """Write what the float model's last layer gives, all tokens behind each other, float32 [tokens, hidden]."""
    arch = source.architecture

    @torch.no_grad()
    def make(folder: Path) -> None:
        ops, done = FromBeginning(arch, SourceWeights(source), context, rounded=0), 0
        starts = _starts(sequences)
        states = np.memmap(folder / _TEACHER, np.float32, "w+", shape=(starts[-1], arch.hidden))
        for batch in _batches(sequences, range(len(sequences))):
            tokens, _ = _padded([sequences[place] for place in batch])
            x = decoder.embedding(ops, arch, tokens)
            for i in range(arch.layers):
                x = decoder.layer(ops, arch, i, x)
            for place, state in zip(batch, x.numpy(), strict=True):
                length = len(sequences[place])
                states[starts[place] : starts[place] + length] = state[:length]
                done += length
            progress("run the float model", done, starts[-1])
        states.flush()

    work.step("teacher", make)


class _Run:
    """The training itself, from step to step."""

    def __init__(
        self,
        source: Source,
        decisions: Mapping[str, Decision],
        found: Found,
        sequences: Sequence[Sequence[int]],
        context: int,
        steps: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        arch = source.architecture
        self._source, self._arch, self._progress = source, arch, progress
        self._sequences, self._starts, self._steps, self._done = sequences, _starts(sequences), steps, 0
        self._learned, self._aside = _parts(sequences)
        first = starting(decisions)
        start, exact = QuantizedWeights(source, first, found=found), SourceWeights(source)
        self.latents = {
            name: Latent(start.matrix(name), exact.matrix(name).data) for name in trained(decisions)
        }
        self._notes = {name: found(name)[1] for name in calibrated(first) if name in self.latents}
        self._student = Student(arch, Remembered(start), context, self.latents)
        self._teacher = FromBeginning(arch, Remembered(exact), context, rounded=0)  # only its head runs
        self._states = np.memmap(folder / _TEACHER, np.float32, "r").reshape(-1, arch.hidden)
        self._before = math.nan  # what `divergence` is before the first step
        groups = [
            {"params": [latent.latents for latent in self.latents.values()], "lr": RATE},
            {"params": [latent.logs for latent in self.latents.values()], "lr": SCALE_RATE},
        ]
        self._adam = torch.optim.Adam(groups, betas=_BETAS, eps=_EPSILON, fused=True)

    def until(self, mark: int, folder: Path) -> None:
        """Train until `mark` steps are done, and save the state."""
        if not self._done:
            self._before = self.divergence()
        order = torch.Generator().manual_seed(_SEED)
        for batch in islice(_shuffled(self._learned, order), self._done, mark):
            loss = self.step(batch)
            self._done += 1
            self._progress(f"train the weights (KL divergence {loss:.2g})", self._done, self._steps)
        arrays: dict[str, Any] = {_BEFORE: self._before}
        for name, tensor, state in self._tensors():
            arrays |= {name: tensor.detach().numpy(), f"{name}.mean": state["exp_avg"].numpy()}
            arrays[f"{name}.square"] = state["exp_avg_sq"].numpy()
        np.savez(folder / _STATE.format(mark), **arrays)

    def load(self, mark: int, folder: Path) -> None:
        """Go on where `until(mark)` ended."""
        with np.load(folder / _STATE.format(mark), allow_pickle=False) as arrays:
            for name, tensor, state in self._tensors():
                tensor.data = torch.from_numpy(arrays[name])
                state["step"] = torch.tensor(float(mark))
                state["exp_avg"] = torch.from_numpy(arrays[f"{name}.mean"])
                state["exp_avg_sq"] = torch.from_numpy(arrays[f"{name}.square"])
            self._before = float(arrays[_BEFORE])
        self._done = mark

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the trained integers and scales, or those that training started from if it made the model no better;
        their figures, as `streaming.FoundWeights` takes them."""
        after = self.divergence() if self._done else math.nan
        better = after < self._before
        what = f"from {self._before:.2g} to {after:.2g} on text kept aside"
        figures, arrays, exact = dict[str, Any](), dict[str, Any](), SourceWeights(self._source)
        for name, latent in self.latents.items():
            tensor, weights = latent.quantized() if better else latent.start, exact.matrix(name).data
            error = weights - tensor.dequantize()
            power, worst = float(np.square(weights).sum()), float(np.abs(error).max())
            lost = float(np.square(error).sum() / power) if power else float(worst > 0)
            refuse_lost(name, tensor.scheme, lost)
            notes = [self._notes.get(name, "")]
            if better:
                moved = float((tensor.integers() != latent.start.integers()).mean())
                notes.append(
                    f"training changed {moved:.1%} of the integers, and the model's KL divergence {what}"
                )
            elif self._done:
                notes.append(
                    f"training changed the model's KL divergence {what}: what it started from is kept"
                )
            arrays |= {f"{name}.data": tensor.data, f"{name}.scales": tensor.scales}
            figures[name] = {"file": _FOUND, "shape": tensor.shape, "error": lost, "worst": worst}
            figures[name]["note"] = "; ".join(filter(None, notes))
        np.savez(folder / _FOUND, **arrays)
        return figures

    @torch.no_grad()
    def divergence(self) -> float:
        """The mean KL divergence on the sequences kept aside, in nats per token."""
        total, tokens = 0.0, 0
        for batch in self._aside:
            states, goals = self._through_layers(batch)
            total += sum(float(loss) for loss in self._losses(states, goals))
            tokens += len(states)
        return total / tokens

    def step(self, batch: Sequence[int]) -> float:
        """Learn from the sequences at some places; their mean KL divergence before that."""
        rate = min(1.0, (self._done + 1) / _WARMUP) * (1 + math.cos(math.pi * self._done / self._steps)) / 2
        for group, peak in zip(self._adam.param_groups, (RATE, SCALE_RATE), strict=True):
            group["lr"] = peak * rate
        self._adam.zero_grad()
        x, goals = self._through_layers(batch)
        states, total = (
            x.detach().requires_grad_(),
            0.0,
        )  # the head's part first, so that few logits are in memory
        for loss in self._losses(states, goals):
            (loss / len(states)).backward()
            total += float(loss.detach()) / len(states)
        if not math.isfinite(total):
            raise RecipeError(
                f"the loss became NaN or infinite at training step {self._done + 1}: the float model's predictions on "
                "the calibration text are no numbers; repair the checkpoint, or give another text"
            )
        if x.requires_grad:
            x.backward(states.grad)
        self._adam.step()
        for latent in self.latents.values():
            latent.keep_within()
        return total

    def _tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """All that is trained by its name, with the optimizer's state of it."""
        for name, latent in self.latents.items():
            yield f"{name}.latents", latent.latents, self._adam.state[latent.latents]
            yield f"{name}.logs", latent.logs, self._adam.state[latent.logs]

    def _through_layers(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the student's last layer and the teacher's give, [tokens, hidden] each.

        Of what lies between, only layers' inputs are kept: the rest is computed again for the gradients (Chen et al.
        2016, arxiv.org/abs/1604.06174).
        """
        tokens, seen = _padded([self._sequences[place] for place in batch])
        x = decoder.embedding(self._student, self._arch, tokens)
        for i in range(self._arch.layers):
            x = checkpoint(
                decoder.layer, self._student, self._arch, i, x, use_reentrant=False, preserve_rng_state=False
            )
        goals = [self._states[self._starts[place] : self._starts[place + 1]] for place in batch]
        return x[seen], torch.from_numpy(np.concatenate(goals))

    def _losses(self, states: Tensor, goals: Tensor) -> Iterator[Tensor]:
        """The sum over some tokens of KL(teacher || student), and over the next, until all were in it."""
        at_once = max(1, LOGITS // self._arch.vocab)
        for some, goal in zip(states.split(at_once), goals.split(at_once), strict=True):
            with torch.no_grad():
                theirs = decoder.head(self._teacher, self._arch, goal).log_softmax(-1)
            ours = decoder.head(self._student, self._arch, some).log_softmax(-1)
            yield functional.kl_div(ours, theirs, reduction="sum", log_target=True)


def _starts(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Where each sequence begins if all lie behind each other, and the end."""
    return [0, *np.cumsum(list(map(len, sequences))).tolist()]


def _parts(sequences: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Batches to learn from, and of the sequences that are kept aside; all are in both if they are few."""
    places = range(len(sequences))
    aside = places[_ASIDE - 1 :: _ASIDE]
    if not aside:
        return _batches(sequences, places), _batches(sequences, places)
    learned = [place for place in places if place not in aside]
    return _batches(sequences, learned), _batches(sequences, aside)


def _batches(sequences: Sequence[Sequence[int]], places: Iterable[int]) -> list[list[int]]:
    """Places of sequences of like length, of up to TOKENS tokens together when padded."""
    batches: list[list[int]] = []
    for place in sorted(places, key=lambda place: len(sequences[place])):
        if not batches or len(sequences[place]) * (len(batches[-1]) + 1) > TOKENS:
            batches.append([])
        batches[-1].append(place)
    return batches


def _shuffled(batches: list[list[int]], order: torch.Generator) -> Iterator[list[int]]:
    """Each batch once, then each again in another order, without end."""
    while True:
        for i in torch.randperm(len(batches), generator=order).tolist():
            yield batches[i]


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids int64 [sequences, longest], padded on the right, where causal attention does not look, and where they
    are none of the padding, bool."""
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    seen = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        seen[row, : len(sequence)] = True
    return tokens, seen
