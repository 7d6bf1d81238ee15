"""What each algorithm loses: KL divergence from the float model, answers, bytes, seconds; beside other projects' own.

On two models (`subjects`), on questions that they were never trained on, in torch with float activations, so that only
weights differ. "layers" leaves the embedding, which is the head too, in float, as the other projects do; "all" gives
it the same scheme. Every algorithm and preparation of the registries is tried where it has
something for a scheme.

With --peers llm-compressor's GPTQ and auto-round quantize the same checkpoints on the same tokens, in environments of
their own, which are made first. With --large also GPTQ's memory, and its time for a layer, on the shape of
Qwen2.5-0.5B. Speed is only to be judged on a quiet machine.

    python benchmarks/quantization.py --check
    python benchmarks/quantization.py --check --peers --large
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from common import Bound, finish, table
from large_layers import MEMORY, SHAPE, layer_times, whole_export
from subjects import SUBJECTS, Subject

from exporter.checkpoint import open_checkpoint
from exporter.errors import RecipeError
from exporter.quantization.algorithms import ALGORITHMS, DEFAULT, TABLE_ALGORITHMS, find_algorithm
from exporter.quantization.preparation import PREPARATIONS
from exporter.quantization.recipe import Recipe, Rule
from exporter.quantization.scheme import Scheme, parse_scheme
from exporter.quantization.training import STEPS

SCHEMES = ("int4", "int4-g128", "w4a16", "int3", "int3-g128", "int3-channel", "int8", "int8-channel", "pal4")
PEER_SCHEMES = ("int4", "int4-g128", "w4a16", "int3-g128", "int8")
WHOLE = ("int4", "int8")  # for all weights too
PREPARED = ("int4", "int4-g128", "w4a16", "int3-g128")
GPTQ, BEST, TRAINED, ABSMAX = "gptq", "gptq-descent", "qat", "rtn-absmax"
KL_SHARE, INT4_LOSS, INT8_LOSS = 1 / 3, 1.0, 0.2  # of rtn-absmax's, points, points
ROUNDING = 1e-5  # nats: below it, one run's KL is another's


@dataclass(frozen=True)
class Row:
    """What was done to a model's weights, by whom, and what it cost."""

    model: str
    weights: str  # "layers" or "all"
    scheme: str
    algorithm: str
    ours: bool
    divergence: float  # nats a token
    agreement: float  # percent
    answers: float  # percent
    nbytes: int | None
    seconds: float

    def shown(self) -> dict[str, Any]:
        """For the table."""
        return {
            "weights": self.weights,
            "scheme": self.scheme,
            "algorithm": self.algorithm,
            "KL, 1e-3": f"{1e3 * self.divergence:.3f}",
            "top-1, %": self.agreement,
            "answers, %": self.answers,
            "MB": self.nbytes and self.nbytes / 1e6,
            "seconds": self.seconds,
        }


def known(names: Sequence[str]) -> Iterator[tuple[str, Scheme]]:
    """The schemes that there are, of those named."""
    for name in names:
        try:
            yield name, parse_scheme(name)
        except RecipeError:
            continue


def algorithms(scheme: Scheme) -> Iterator[str]:
    """All that find what a scheme asks for."""
    for name in TABLE_ALGORITHMS if scheme.table else ALGORITHMS:
        try:
            find_algorithm(name, scheme)
        except RecipeError:
            continue
        yield name


def recipe(weights: str, scheme: str, algorithm: str, prepare: str = "") -> Recipe:
    """Of all weights, or of the layers' alone."""
    kept = ("embedding", "head") if weights == "layers" else ()
    rules = [Rule(match=name, scheme="fp32") for name in kept]
    rules.append(Rule(match="*", scheme=scheme, algorithm=algorithm))
    return Recipe(name="measured", rules=tuple(rules), prepare=(prepare,) if prepare else ())


def ours(subject: Subject, schemes: Sequence[str]) -> Iterator[Row]:
    """Every algorithm at every scheme; every preparation before the plainest and the best of those that do not train,
    and what served the best before training."""
    for weights, names in (("layers", SCHEMES), ("all", WHOLE)):
        for name, scheme in known([name for name in names if name in schemes]):
            for algorithm in algorithms(scheme):
                yield from measured(subject, weights, name, algorithm)
    for name, scheme in known([name for name in PREPARED if name in schemes]):
        served = dict[str, float]()
        for prepare in (prepare for prepare, made in PREPARATIONS.items() if made.of(scheme)):
            yield from measured(subject, "layers", name, DEFAULT, prepare)
            for row in measured(subject, "layers", name, BEST, prepare):
                served[prepare] = row.divergence
                yield row
        if served:
            yield from measured(subject, "layers", name, TRAINED, min(served, key=lambda name: served[name]))


def measured(subject: Subject, weights: str, scheme: str, algorithm: str, prepare: str = "") -> Iterator[Row]:
    """One algorithm at one scheme, perhaps after a preparation; nothing where it refuses, which is said."""
    name = f"{prepare} + {algorithm}" if prepare else algorithm
    try:
        found, nbytes, seconds = subject.weights(recipe(weights, scheme, algorithm, prepare))
    except RecipeError as error:
        print(f"{subject.name}, {weights}, {scheme}, {name} is refused: {error}", file=sys.stderr)
        return
    figures = vars(subject.figures(found)).values()
    yield Row(subject.name, weights, scheme, name, True, *figures, nbytes=nbytes, seconds=seconds)


def theirs(subject: Subject, peer: str, names: Sequence[str], work: Path, repeats: int) -> Iterator[Row]:
    """What another project makes of the layers' matrices, at each scheme."""
    schemes = dict(known([name for name in PEER_SCHEMES if name in names]))
    tasks = [peers.Task(scheme.bits, scheme.group, repeats) for scheme in schemes.values()]
    found = peers.quantize(peer, subject.folder, subject.sequences, tasks, work, threads=1)
    for name, made in zip(schemes, found, strict=True):
        package, number = next(iter(made.versions.items()))
        with open_checkpoint(made.checkpoint) as source:
            figures = subject.figures(subject.weights(Recipe.uniform("fp32"), source)[0])
        who = f"{package} {number}"
        yield Row(
            subject.name,
            "layers",
            name,
            who,
            False,
            *vars(figures).values(),
            nbytes=None,
            seconds=made.seconds,
        )


def promises(rows: Sequence[Row], float_answers: dict[str, float]) -> Iterator[Bound]:
    """What is kept against plain rounding: by GPTQ on pepper, by our best on a model that learned no rounding."""
    found = {(row.model, row.weights, row.scheme, row.algorithm): row for row in rows if row.ours}
    for model, exact in float_answers.items():
        if (model, "layers", "int4", ABSMAX) not in found:
            continue
        absmax = found[model, "layers", "int4", ABSMAX]
        kept = found[model, "layers", "int4", GPTQ] if model == "pepper" else best(rows, absmax)
        what = f"{model}, int4: KL of {kept.algorithm} as a share of {ABSMAX}'s"
        yield Bound(what, kept.divergence / absmax.divergence, KL_SHARE)
        if model == "pepper":
            for scheme, most in (("int4", INT4_LOSS), ("int8", INT8_LOSS)):
                if row := found.get((model, "all", scheme, GPTQ)):
                    what = f"{model}, {scheme} with {GPTQ}: points of exact answers lost"
                    yield Bound(what, exact - row.answers, most)


def best(rows: Sequence[Row], beside: Row) -> Row:
    """Our row of least divergence on the same model, weights and scheme."""
    key = beside.model, beside.weights, beside.scheme
    same = (row for row in rows if row.ours and (row.model, row.weights, row.scheme) == key)
    return min(same, key=lambda row: row.divergence)


def against_peers(rows: Sequence[Row]) -> Iterator[Bound]:
    """Our best against theirs at each scheme, and the time of our GPTQ against theirs."""
    gptq = {(row.model, row.weights, row.scheme): row for row in rows if row.ours and row.algorithm == GPTQ}
    for peer in (row for row in rows if not row.ours):
        mine, at = best(rows, peer), f"{peer.model}, {peer.scheme}"
        what = f"{at}: KL of {mine.algorithm} as a share of {peer.algorithm}'s"
        yield Bound(what, mine.divergence / max(peer.divergence, ROUNDING), 1.0)
        what = f"{at}: seconds of {GPTQ} as a share of {peer.algorithm}'s"
        yield Bound(what, gptq[peer.model, peer.weights, peer.scheme].seconds / peer.seconds, 1.0)


def told(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each told on standard error when it is there."""
    for row in rows:
        kl = f"KL {1e3 * row.divergence:.3f} thousandths"
        print(
            f"{row.model}, {row.weights}, {row.scheme}, {row.algorithm}: {kl}, {row.seconds:.1f} s",
            file=sys.stderr,
        )
        yield row


def large(with_peers: bool, threads: int) -> tuple[dict[str, Any], list[Bound]]:
    """GPTQ on a large shape."""
    with tempfile.TemporaryDirectory() as work:
        figures: dict[str, Any] = {"export": whole_export(Path(work)) | {"threads": threads}}
        figures["layer"] = layer_times(Path(work), with_peers, threads)
    table("GPTQ int4-g128, a whole export", [figures["export"]])
    table("seconds for a layer, the same tokens", figures["layer"])
    bounds = [Bound(f"{SHAPE}: peak memory in GB", figures["export"]["peak GB"], MEMORY)]
    mine = figures["layer"][0]["s a layer"]
    for row in figures["layer"][1:]:
        bounds.append(
            Bound(
                f"{SHAPE}: seconds a layer as a share of {row['quantizer']}'s", mine / row["s a layer"], 1.0
            )
        )
    return figures, bounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--questions", type=int, default=600, help="how many held-out questions")
    parser.add_argument(
        "--qat-steps", type=int, default=STEPS, help="how long qat trains; default: %(default)s"
    )
    parser.add_argument("--peers", action="store_true", help="measure other projects' quantizers too")
    parser.add_argument("--repeats", type=int, default=1, help="of which a peer's quickest counts")
    parser.add_argument("--large", action="store_true", help="measure memory and time on a large shape too")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that several wait for each other
    rows, float_answers = list[Row](), dict[str, float]()
    with torch.no_grad(), tempfile.TemporaryDirectory() as work:
        for name in arguments.models:
            subject = SUBJECTS[name](arguments.questions)
            subject.steps = arguments.qat_steps
            float_answers[name] = subject.float_answers
            made = list(told(ours(subject, arguments.schemes)))
            for peer in peers.PEERS if arguments.peers else ():
                print(f"{name}: {peer} quantizes", file=sys.stderr)
                made += told(
                    theirs(subject, peer, arguments.schemes, Path(work) / name / peer, arguments.repeats)
                )
            rows += made
            title = f"{name}, {len(subject.asked)} held-out questions"
            table(f"{title}; float answers {subject.float_answers:.1f} %", [row.shown() for row in made])
    bounds = [*promises(rows, float_answers), *against_peers(rows)]
    figures: dict[str, Any] = {"benchmark": "quantization", "float answers, %": float_answers}
    figures["rows"] = [vars(row) for row in rows]
    if arguments.large:
        torch.set_num_threads(threads)
        figures["large"], more = large(arguments.peers, threads)
        bounds += more
    finish(figures, bounds, arguments.check)


if __name__ == "__main__":
    main()
