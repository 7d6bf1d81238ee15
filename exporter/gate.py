"""The gate: proof that an exported bundle says what its own integers mean.

The exported file generates text greedily, run by its engine. Then one pass of the reference decoder over
each whole sequence, on the integers read back from the file, layer by layer, must agree at every step. What
the file holds is tied to the checkpoint by digests that the quantizer wrote down. So the gate costs one
generation and one pass, needs no checkpoint, and its memory is one layer's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.architecture import Architecture, read_architecture
from exporter.checkpoint import read_json
from exporter.errors import GateFailed
from exporter.formats import NEURAL_ENGINE, find_format
from exporter.residency import heavy_elsewhere
from exporter.stored import is_quantized, stored_weights
from exporter.tokenizer import find_probes
from runtimes import extras
from runtimes.bundle import Bundle, Check, Gate, TensorReport, Variant
from runtimes.cpu import default_threads
from runtimes.engines import ENGINES, runs_here, simulator
from runtimes.hexagon import CORRELATION, correlations
from runtimes.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from exporter.quantization.weights import Weights

NEW_TOKENS = 64  # generated for each prompt
EXACT_TOKENS = 16  # of those, run again with float activations
TWIN_BYTES, TWIN_VOCAB = 1 << 30, 8192  # of float weights, where a program has to be written again for that
_PROMPTS = (
    "안녕하세요! 한국의 수도는 어디인가요?",
    "Once upon a time, in a small village by the sea,",
    "for i in range(10): print(i, i ** 2)",
)


@dataclass(frozen=True)
class Bounds:
    """How far the engine's logits may be from the reference's, as a share of their range at a step.

    `tie`: a token may differ where the reference's logits of the two are this near.
    """

    largest: float
    mean: float
    tie: float


# Parameters; a larger model is run for two tokens in a simulator, others for so many:
SIMULATED, SIMULATED_TOKENS = 100_000_000, 8


@dataclass(frozen=True)
class Effort:
    """How many prompts the gate runs, and how many tokens it generates for each."""

    prompts: int
    tokens: int


# Products rounded to float16. Of random models, whose weights amplify it most, single steps reach 2 %; the tokens that
# differ are nearer than 0.6 %.
HALF_BOUNDS = Bounds(largest=2e-2, mean=5e-3, tie=1e-2)
# All in float16, sums too: of tiny random models, single steps reach 1.4 %.
NPU_BOUNDS = Bounds(largest=2e-2, mean=1e-2, tie=2e-2)
FLOAT_BOUNDS = Bounds(largest=1e-3, mean=1e-4, tie=1e-3)  # float32 sums in another order


def rounding_bounds(noise: "np.ndarray", least: Bounds = FLOAT_BOUNDS) -> Bounds:
    """Bounds where activations are rounded to int8; `noise` [steps] is what that does to the reference itself.

    The reference rounds as the engine does, but a value beside a rounding boundary may fall to either side,
    which then moves others; and a processor with other kernels rounds in another way. Neither moves logits
    further than rounding moved them from float activations: two independent roundings differ by √2 of it.
    """
    return Bounds(
        largest=max(least.largest, 2 * float(noise.max())),
        mean=max(least.mean, 2 * float(noise.mean())),
        tie=max(least.tie, 2 * float(noise.max())),
    )


def verify(bundle: Bundle, progress: Callable[[str], None] = lambda check: None) -> Gate:
    """Run every check on every variant that can run here; returns the report, "unverified" if none can.

    Raises GateFailed with what failed, ChecksumError where a file is not the one that was exported.
    """
    for variant in bundle.manifest.variants:
        form = find_format(variant.format)
        for library in ("torch", *form.libraries):
            extras.check(library, form.extra)
    arch = read_architecture(read_json(bundle.file("config.json"), required=True))
    done = require_passed(_checks(bundle, arch, progress))
    ran = any(runs_here(variant) or _simulated(variant) for variant in bundle.manifest.variants)
    return Gate(status="passed" if ran else "unverified", checks=done)


def require_passed(checks: Iterable[Check]) -> tuple[Check, ...]:
    """All checks; GateFailed at the first that does not pass."""
    done: list[Check] = []
    for check in checks:
        done.append(check)
        if not check.passed:
            raise GateFailed(f"the gate failed at {check.name}: {check.detail}; the bundle must not be used")
    return tuple(done)


def _checks(bundle: Bundle, arch: Architecture, progress: Callable[[str], None]) -> Iterator[Check]:
    progress("checksums")
    yield _checksums(bundle)
    progress("tokenizer")
    tokenizer = Tokenizer(bundle.file("tokenizer.json"))
    yield _tokenizer(bundle, tokenizer)
    for variant in bundle.manifest.variants:
        if variant.residency:
            yield _residency(variant)
        if variant.format == "coreai":
            yield _asset(bundle, variant)
        if not runs_here(variant) and not _simulated(variant):
            yield _not_run(variant)
            continue
        if variant.delegate == NEURAL_ENGINE:
            yield _rules(bundle, variant)
        weights = stored_weights(bundle, variant)
        progress("integers")
        yield _integers(bundle, variant, arch, weights)
        progress("tokens")
        yield from _tokens(bundle, variant, arch, weights, tokenizer)


def _simulated(variant: Variant) -> bool:
    """Whether the chip that the variant is for can be simulated with what is installed here."""
    return simulator(variant) is not None and extras.installed(ENGINES[variant.engine].library)


def _residency(variant: Variant) -> Check:
    """No product of matrices runs outside of what the variant is for; nothing at all of what was compiled for an NPU.

    Unless whoever exported it accepted that.
    """
    found = variant.residency
    assert found is not None
    counts = dict(zip(found.elsewhere, found.elsewhere_ops, strict=True))
    heavy = counts if variant.compiled else heavy_elsewhere(found)
    why = "; ".join(dict.fromkeys(reason for reason in found.reasons if reason))
    outside = f"; outside are {', '.join(found.elsewhere)}" if found.elsewhere else ""
    macs, held = (
        _share(part, whole)
        for part, whole in ((found.macs_on, found.macs), (found.weight_bytes_on, found.weight_bytes))
    )
    detail = (
        f"{found.accelerator} computes {found.ops_on} of {found.ops} operations, {macs} of the multiply-adds, and "
        f"holds {held} of the weights{outside}"
    )
    if heavy and not variant.allows_cpu_ops:
        where = "the CPU (accept that with --allow-cpu-ops)" if variant.compiled else "portable kernels"
        detail = f"{found.accelerator} leaves {', '.join(heavy)} to {where}{f': {why}' if why else ''}"
    return Check(name="residency", passed=not heavy or variant.allows_cpu_ops, detail=detail)


def _asset(bundle: Bundle, variant: Variant) -> Check:
    """coreai's own reader finds the entry points, with their inputs and states."""
    extras.require("coreai_torch", "coreai")  # here, where nobody sees what it says
    from exporter.formats.coreai import check_asset

    asset = check_asset(bundle.file(variant.entry_points[0].file))
    wrong = [
        entry.name
        for entry in variant.entry_points
        if [spec.name for spec in entry.inputs] != list(asset.inputs.get(entry.name, ()))
    ]
    detail = f"coreai's reader finds {len(asset.inputs)} entry points with the inputs they were given"
    if wrong:
        detail = f"coreai's reader does not find entry point {wrong[0]} with its inputs"
    return Check(name="asset", passed=not wrong, detail=detail)


def _rules(bundle: Bundle, variant: Variant) -> Check:
    """No package breaks a rule of the Neural Engine."""
    from exporter.npu import ane

    packages = dict.fromkeys(bundle.file(entry.file) for entry in variant.entry_points)
    reports = [ane.check(package) for package in packages]
    broken = [finding for report in reports for finding in (*report.broken, *report.unknown)]
    detail = (
        f"{len(reports)} package{'s keep' if len(reports) > 1 else ' keeps'} all {len(ane.rules())} rules"
    )
    if broken:
        detail = f"{broken[0].found} at {broken[0].where} ({len(broken)} findings)"
    return Check(name="rules", passed=not broken, detail=detail)


def _not_run(variant: Variant) -> Check:
    detail = f"variant {variant.name} cannot run on this machine: it was written, not run"
    return Check(name="not run", passed=True, detail=detail)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _checksums(bundle: Bundle) -> Check:
    bundle.verify_checksums()
    return Check(name="checksums", passed=True, detail=f"{len(bundle.manifest.files)} files are as written")


def _tokenizer(bundle: Bundle, tokenizer: Tokenizer) -> Check:
    manifest = bundle.manifest
    if not manifest.probes:
        return Check(name="tokenizer", passed=False, detail="the manifest has no probes to check it against")
    found = {(p.text, p.chat): p.ids for p in find_probes(tokenizer, manifest.chat_template, manifest.tokens)}
    wrong = [probe for probe in manifest.probes if found.get((probe.text, probe.chat)) != probe.ids]
    detail = f"{len(manifest.probes)} texts give the checkpoint's own ids"
    if wrong:
        detail = f"{wrong[0].text!r} does not give the ids that the checkpoint's tokenizer gives"
    return Check(name="tokenizer", passed=not wrong, detail=detail)


def _integers(bundle: Bundle, variant: Variant, arch: Architecture, weights: "Weights") -> Check:
    """Every matrix, and where a format keeps them in float32 every norm and bias, is what the quantizer found."""
    from exporter.quantization.tensor import vector_digest

    def digest(report: TensorReport) -> str:
        if len(report.shape) == 1:
            return vector_digest(weights.vector(report.name))
        return weights.matrix(report.name).digest()

    reports = bundle.manifest.tensors
    if variant.format == "coreml" or is_quantized(variant):  # vectors are rounded to 16 bits
        reports = tuple(report for report in reports if len(report.shape) == 2)
    lost = {name for name, _ in (*arch.matrices(), *arch.vectors())} - {
        r.name for r in bundle.manifest.tensors
    }
    wrong = sorted(lost) + [report.name for report in reports if digest(report) != report.digest]
    detail = f"{len(reports)} weights hold the quantizer's own integers and scales"
    if wrong:
        detail = f"{wrong[0]} does not hold what the quantizer found ({len(wrong)} of {len(reports)} differ)"
    return Check(name="integers", passed=not wrong, detail=detail)


def _tokens(
    bundle: Bundle, variant: Variant, arch: Architecture, weights: "Weights", tokenizer: Tokenizer
) -> Iterator[Check]:
    """Greedy tokens of the engine, and one teacher-forced pass of the reference over them.

    Where the variant rounds activations, its graph runs once more without, over the same tokens: that must
    agree with the reference to float rounding, and shows every mistake that rounding could hide.
    """
    import numpy as np

    effort = _effort(bundle, variant, arch)
    prompts = list(_prompts(tokenizer, arch, variant.context - effort.tokens))[-effort.prompts :]
    sequences, logits = _generate(bundle, variant, prompts, effort.tokens)
    ours = np.concatenate(logits)
    rounded, exact = _reference(arch, weights, variant, sequences, [len(prompt) for prompt in prompts])
    spread = np.maximum(exact.max(-1) - exact.min(-1), 1e-6)
    if variant.compiled:
        on_cpu = np.concatenate(_teacher_forced(bundle, variant, prompts, sequences, effort.tokens))
        if is_quantized(variant):
            # Every value is rounded: the same graph, computed by somebody else, is the reference.
            rounded = on_cpu
            yield _correlation(ours, on_cpu)
        else:
            error = np.abs(on_cpu - exact).max(-1) / spread
            yield _logits_check("graph", error, FLOAT_BOUNDS, "by the CPU's kernels")
    noise = np.abs(exact - rounded).max(-1) / spread
    bounds = {"coreml": HALF_BOUNDS, "qnn": NPU_BOUNDS}.get(variant.engine, FLOAT_BOUNDS)
    if noise.any() and variant.compiled:
        bounds = rounding_bounds(noise, NPU_BOUNDS)
    elif noise.any():
        bounds = rounding_bounds(noise)
        if variant.format == "executorch":
            yield _float_twin(variant, arch, weights)
        else:
            forced = _teacher_forced(bundle, variant, prompts, sequences, EXACT_TOKENS)
            starts = np.cumsum([0, *map(len, logits)])
            at = np.concatenate(
                [start + np.arange(len(rows)) for start, rows in zip(starts, forced, strict=False)]
            )
            error = np.abs(np.concatenate(forced) - exact[at]).max(-1) / spread[at]
            yield _logits_check("graph", error, FLOAT_BOUNDS, "with float activations")
    gaps = (rounded.max(-1) - rounded[np.arange(len(ours)), ours.argmax(-1)]) / spread
    same, near = int((gaps == 0).sum()), int(((gaps > 0) & (gaps <= bounds.tie)).sum())
    wrong = len(ours) - same - near  # a NaN is neither
    yield Check(
        name="tokens",
        passed=wrong == 0,
        detail=f"{same} of {len(ours)} greedy tokens on {len(prompts)} prompts are the reference's, "
        f"{near} are near-ties (within {bounds.tie:.2g} of the logits' range), {wrong} are wrong",
        figures={
            "steps": len(ours),
            "same": same,
            "near_ties": near,
            "wrong": wrong,
            "tie_bound": bounds.tie,
        },
    )
    how = f"; rounding the activations alone moves them by {noise.mean():.2g}" if noise.any() else ""
    yield _logits_check("logits", np.abs(ours - rounded).max(-1) / spread, bounds, f"as it runs{how}")


def _correlation(ours: "np.ndarray", theirs: "np.ndarray") -> Check:
    """Of the logits of each step, the NPU's and the CPU's."""
    least = min(correlations(ours, theirs))
    return Check(
        name="graph",
        passed=least >= CORRELATION,  # so a NaN fails
        detail=f"the logits correlate with the same graph's on the CPU by at least {least:.5f} (bound {CORRELATION})",
        figures={"correlation": least, "bound": CORRELATION},
    )


def _logits_check(name: str, error: "np.ndarray", bounds: Bounds, how: str) -> Check:
    largest, mean = float(error.max()), float(error.mean())
    return Check(
        name=name,
        passed=largest <= bounds.largest and mean <= bounds.mean,  # so a NaN fails
        detail=f"error as a share of the logits' range: largest {largest:.2g} (bound {bounds.largest:.2g}), "
        f"mean {mean:.2g} (bound {bounds.mean:.2g}), {how}",
        figures={
            "largest": largest,
            "mean": mean,
            "largest_bound": bounds.largest,
            "mean_bound": bounds.mean,
        },
    )


def _effort(bundle: Bundle, variant: Variant, arch: Architecture) -> Effort:
    """As much as the gate always does; less in a simulator, where a token takes up to minutes, and least of all for
    the second chip and further ones, which run the same graphs."""
    if variant.compiled is None:
        return Effort(prompts=len(_PROMPTS) + 1, tokens=NEW_TOKENS)
    first = next(other for other in bundle.manifest.variants if other.compiled)
    if arch.parameters > SIMULATED or variant != first:
        return Effort(prompts=1, tokens=2)
    return Effort(prompts=len(_PROMPTS) + 1, tokens=SIMULATED_TOKENS)


def _prompts(tokenizer: Tokenizer, arch: Architecture, room: int) -> Iterable[list[int]]:
    """Texts, and ids from all over the vocabulary, none longer than `room`."""
    room = max(1, room)
    for text in _PROMPTS:
        if ids := tokenizer.encode(text, add_special=True)[:room]:
            yield ids
    yield [(i * 7919 + 3) % arch.vocab for i in range(min(48, room))]


def _generate(
    bundle: Bundle, variant: Variant, prompts: Sequence[list[int]], tokens: int
) -> "tuple[list[list[int]], list[np.ndarray]]":
    """Greedy continuations: whole sequences, and float32 logits [steps, vocab] of each."""
    import numpy as np

    from runtimes.engines import open_engine

    longest = max(map(len, prompts)) + tokens
    on = simulator(variant) if variant.compiled else None
    engine = open_engine(bundle, variant.name, context=min(variant.context, longest), on=on)
    sequences, logits = [], []
    for prompt in prompts:
        engine.reset()
        rows = [engine.prefill(prompt)]
        new = [int(rows[0].argmax())]
        while len(new) < min(tokens, engine.context - len(prompt)):
            rows.append(engine.decode(new[-1]))
            new.append(int(rows[-1].argmax()))
        sequences.append(prompt + new)
        logits.append(np.stack(rows))
    engine.close()
    return sequences, logits


def _teacher_forced(
    bundle: Bundle,
    variant: Variant,
    prompts: Sequence[list[int]],
    sequences: Sequence[list[int]],
    tokens: int,
) -> "list[np.ndarray]":
    """Logits [steps, vocab] of the engine without rounding, fed the first tokens that each prompt gave."""
    import numpy as np

    from runtimes.engines import open_engine

    on = simulator(variant) if variant.compiled else None
    engine = open_engine(bundle, variant.name, context=max(map(len, sequences)), exact=True, on=on)
    logits = []
    for prompt, sequence in zip(prompts, sequences, strict=True):
        engine.reset()
        fed = sequence[len(prompt) : -1][: tokens - 1]
        logits.append(np.stack([engine.prefill(prompt), *(engine.decode(token) for token in fed)]))
    engine.close()
    return logits


def _float_twin(variant: Variant, arch: Architecture, weights: "Weights") -> Check:
    """The same program with float weights, so that activations are not rounded, against the reference.

    ExecuTorch has no kernels that multiply floats by grouped integers. So the program is written once more, with
    what the integers stand for, cut to as many layers and as much of the vocabulary as bounds its size: every kind
    of layer is in it, and what the cut leaves out is in the checks of the whole.
    """
    import tempfile

    import numpy as np
    import torch

    from exporter.formats.executorch import PROGRAM, write_executorch
    from exporter.formats.executorch_runner import runner_methods
    from exporter.quantization.weights import FloatWeights
    from exporter.torch_ops import TorchOps
    from runtimes.bundle import Choice, Tokens
    from runtimes.engines.executorch import ExecuTorchEngine

    arch = _cut(arch)
    floats = FloatWeights(weights, arch)
    context = min(variant.context, max(64, 2 * max((w for w in arch.windows if w < 256), default=0)))
    tokens = [(i * 7919 + 3) % arch.vocab for i in range(min(48, context))]
    with tempfile.TemporaryDirectory() as folder:
        methods = runner_methods(arch, Tokens(eos=(0,)), context, context)
        write_executorch(arch, floats, context, Path(folder), methods)
        choice = Choice(topic="variant", value=variant.name, reason="its twin")
        engine = ExecuTorchEngine(
            Path(folder) / PROGRAM, choice, context=context, vocab=arch.vocab, threads=default_threads()
        )
        half = len(tokens) // 2
        ours = np.stack([engine.prefill(tokens[:half]), *(engine.decode(token) for token in tokens[half:])])
        engine.close()
    reference = TorchOps(arch, floats, context, rounded=0)
    theirs = reference.run(torch.tensor([tokens]))[0, half - 1 :].numpy()
    spread = np.maximum(theirs.max(-1) - theirs.min(-1), 1e-6)
    how = f"with float activations, over {arch.layers} layers and {arch.vocab} rows of the vocabulary"
    return _logits_check("graph", np.abs(ours - theirs).max(-1) / spread, FLOAT_BOUNDS, how)


def _cut(arch: Architecture) -> Architecture:
    """`arch` with few enough layers and words that its float weights stay below TWIN_BYTES, two layers at least."""
    vocab = min(arch.vocab, TWIN_VOCAB)
    one = replace(arch, layers=1, vocab=vocab)
    two = replace(arch, layers=2, vocab=vocab)
    room = TWIN_BYTES // 4 - one.parameters
    layers = min(arch.layers, max(2, 1 + room // max(1, two.parameters - one.parameters)))
    return replace(arch, layers=layers, vocab=vocab, windows=arch.windows[:layers])


def _reference(
    arch: Architecture,
    weights: "Weights",
    variant: Variant,
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
) -> "tuple[np.ndarray, np.ndarray]":
    """The reference's logits [steps, vocab] where tokens were generated: with the activations that the
    weights' schemes have, and with float activations.

    All sequences go through a layer together, in both ways, padded on the right, where causal attention
    does not look.
    """
    import torch

    from exporter import decoder
    from exporter.torch_ops import TorchOps

    count = len(sequences)
    tokens = torch.zeros(2 * count, max(map(len, sequences)), dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = tokens[count + i, : len(sequence)] = torch.tensor(sequence)
    torch.set_num_threads(default_threads())  # an engine may have left torch but one
    ops = TorchOps(arch, weights, variant.context, rounded=count, engine=variant.engine)
    with torch.no_grad():
        hidden = decoder.embedding(ops, arch, tokens)
        for i in range(arch.layers):
            hidden = decoder.layer(ops, arch, i, hidden)
            ops.forget(i)
        steps = [slice(n - 1, len(s) - 1) for n, s in zip(prompt_lengths, sequences, strict=True)]
        halves = [
            torch.cat([states[step] for states, step in zip(half, steps, strict=True)])
            for half in hidden.split(count)
        ]
        ops.rounded = 1
        rounded, exact = decoder.head(ops, arch, torch.stack(halves)).numpy()
    return rounded, exact
