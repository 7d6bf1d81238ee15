"""The story of an export: from a checkpoint to a verified bundle."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, Source, open_checkpoint
from exporter.errors import UsageError
from exporter.formats import DELEGATES, FORMATS, HEXAGON, NEURAL_ENGINE, XNNPACK, find_delegate
from exporter.gate import require_passed
from exporter.gate import verify as run_gate
from exporter.npu.hexagon_plan import Wishes
from exporter.plan import Plan, make_plan
from exporter.quality_gate import QualityBounds, hold
from exporter.quantization.calibration import calibration_sequences
from exporter.quantization.folding import folded
from exporter.quantization.preparation import prepared_architecture
from exporter.quantization.recipe import Recipe
from exporter.quantization.stage import quantize
from exporter.quantization.weights import Found, QuantizedWeights
from exporter.staging import Staging, discard, files_in, staging, write_whole
from exporter.tokenizer import TextSide, read_text_side
from runtimes import extras
from runtimes.bundle import (
    MANIFEST,
    Bundle,
    Compiled,
    EntryPoint,
    Gate,
    KVCache,
    Manifest,
    ModelInfo,
    Residency,
    TensorReport,
    Variant,
)
from runtimes.engines import ENGINES
from runtimes.errors import GochuError

CONFIG = "config.json"
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    scheme: str | None = None,
    algorithm: str = "rtn",
    recipe: Recipe | None = None,
    context: int | None = None,
    revision: str | None = None,
    format: str | None = None,
    delegate: str | None = None,
    wishes: Wishes | None = None,
    calibration: Path | None = None,
    prepare: tuple[str, ...] = (),
    qat_steps: int | None = None,
    verify: bool = True,
    bounds: QualityBounds | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Export a checkpoint (folder, repository id, or "pepper") to a bundle at `output`, for a device.

    What is not given (scheme, format, context in tokens) is planned for the device. `delegate`, `wishes`: what computes
    beside the CPU; `calibration`: a .txt or .jsonl file of the model's kind of text, for what is found on one, and
    `qat_steps`, how long algorithm "qat" trains on it; `prepare`: what is done to the weights before (see
    `exporter.plan.make_plan`). Without `verify` the bundle says of itself that it is unverified; `bounds`: how far from
    the float checkpoint it may be, to which the gate holds it.
    Every error is a GochuError; after one there is no bundle at `output`, or the one that was there before.
    """
    if bounds and not verify:
        raise UsageError("the gate is what holds an export to bounds: give them without --no-verify")
    with open_checkpoint(checkpoint, revision) as source:
        plan = make_plan(
            source.architecture,
            device=device,
            scheme=scheme,
            algorithm=algorithm,
            recipe=recipe,
            context=context,
            format=format,
            delegate=delegate,
            wishes=wishes,
            calibration=calibration,
            prepare=prepare,
            qat_steps=qat_steps,
        )
        _require_libraries(plan, verify)
        text = read_text_side(source)
        fingerprint = [source.fingerprint(), plan.fingerprint(), text.fingerprint(), _version()]
        with staging(Path(output), fingerprint, force) as stage:
            arch = prepared_architecture(source.architecture, plan.recipe.prepare)
            stage.step("text", lambda folder: _write_text_side(source, arch, text, folder))
            weights, found = _quantize(source, plan, stage, progress)
            made = []
            for part in _cpu_first(plan):

                def write(folder: Path, part: str = part) -> Any:
                    return _write_variant(weights, plan, part, text, found, folder, progress)

                made.append(stage.step(part, write))
            if plan.compilation:
                made = _for_hexagon(source, arch, plan, stage, made, progress)
            manifest = _manifest(source, plan, text, stage, made)
            write_whole(stage.folder / MANIFEST, manifest.to_json())
            if verify:
                gate = _pass_gate(stage, source, weights, plan, found, bounds, progress)
                write_whole(stage.folder / MANIFEST, manifest.model_copy(update={"gate": gate}).to_json())
    return Bundle.open(output)


def _cpu_first(plan: Plan) -> tuple[str, ...]:
    """The steps that write variants from the checkpoint; the NPU's graphs are made over the CPU's weights."""
    return (plan.format,) if HEXAGON in plan.delegates else plan.delegates or (plan.format,)


def _write_text_side(source: Checkpoint, arch: Architecture, text: TextSide, folder: Path) -> None:
    """The tokenizer's files, and the config: of the weights in the bundle, whose head may no longer be tied."""
    text.copy(folder)
    if arch.tied == source.architecture.tied:
        shutil.copyfile(source.path / CONFIG, folder / CONFIG)
        return
    config = source.config | {"tie_word_embeddings": arch.tied}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_libraries(plan: Plan, verify: bool) -> None:
    """MissingExtra before any work is done, not after."""
    form = FORMATS[plan.format]
    for library in form.libraries:
        extras.check(library, form.extra)
    if plan.calibrates:
        extras.check("torch", form.extra)
    if verify:
        engine = ENGINES.get(plan.engine)  # there is none for what cannot run here
        for library in ("torch", *([engine.library] if engine and plan.engine == form.engine else ())):
            extras.check(library, form.extra)
    if plan.engine != form.engine:  # the compiler for an NPU
        extras.check(ENGINES[plan.engine].library, ENGINES[plan.engine].extra)


def _quantize(source: Checkpoint, plan: Plan, stage: Staging, progress: Progress) -> tuple[Source, Found]:
    """The stage before all formats: weights as they are quantized, and what is found of them on a calibration text."""
    if plan.training:
        plan.training.refuse_if_too_large()

    def texts(training: bool) -> Any:
        def write(_: Path) -> list[list[int]]:
            return calibration_sequences(
                source, plan.context, plan.calibration, progress=progress, training=training
            )

        # A step, since the model may write the text itself, token by token
        return stage.step("training text" if training else "calibration text", write)

    steps = plan.training.steps if plan.training else 0
    work = stage.workspace()
    return quantize(source, plan.recipe, plan.decisions, texts, plan.context, work, progress, steps)


def _write_variant(
    source: Source,
    plan: Plan,
    part: str,
    text: TextSide,
    found: Found,
    folder: Path,
    progress: Progress,
) -> Any:
    """Quantize and write the variant for a delegate (or of the format); its manifest entries as JSON."""
    arch, done = source.architecture, 0
    delegate = part if part in DELEGATES and part != plan.format else ""
    before = files_in(folder)

    def advance(name: str, count: int) -> None:
        nonlocal done
        done += count
        progress(f"quantize {name}", done, arch.parameters)

    weights = QuantizedWeights(source, plan.decisions, advance, found)
    write = _WRITERS[plan.format]
    entries, cache, residency, tools = write(arch, weights, plan, delegate, text, folder)
    one_chip = delegate and plan.device and find_delegate(delegate).for_a_chip
    chips = (plan.device.soc.id,) if one_chip and plan.device else ()
    variant = Variant(
        name="-".join(filter(None, (plan.format, delegate, plan.scheme))),
        format=plan.format,
        engine=FORMATS[plan.format].engine,
        delegate=delegate,
        chips=chips,
        scheme=plan.scheme,
        context=plan.context,
        last_logits_only=plan.last_logits_only,
        entry_points=entries,
        kv_cache=cache,
        files=tuple(sorted(files_in(folder) - before)),
        residency=residency,
        toolchain=_toolchain("numpy", "tokenizers", *tools),
    )
    return {
        "variant": variant.model_dump(mode="json"),
        "tensors": [report.model_dump(mode="json") for report in weights.reports],
    }


Written = tuple[tuple[EntryPoint, ...], KVCache, Residency | None, tuple[str, ...]]


def _write_onnx(
    arch: Architecture, weights: QuantizedWeights, plan: Plan, _: str, text: TextSide, folder: Path
) -> Written:
    from exporter.formats.genai import write_genai_config
    from exporter.formats.onnx import write_onnx

    entry = write_onnx(arch, weights, plan.context, folder, plan.last_logits_only)
    write_genai_config(arch, text.tokens, entry, plan.context, folder)
    return (entry,), arch.kv_cache("float32", held_by="caller"), None, ("onnx",)


def _write_executorch(
    arch: Architecture, weights: QuantizedWeights, plan: Plan, delegate: str, text: TextSide, folder: Path
) -> Written:
    extras.require("executorch.exir", "executorch")  # here, where nobody sees what it says
    from exporter.formats.executorch import CHUNK, write_executorch
    from exporter.formats.executorch_runner import runner_methods

    methods = runner_methods(arch, text.tokens, plan.context, min(CHUNK, plan.context))
    tools = ("executorch", "torch")
    if delegate == XNNPACK:
        entry, residency = write_executorch(arch, weights, plan.context, folder, methods)
        return (entry,), arch.kv_cache("float32"), residency, tools
    from exporter.formats.executorch_traced import write_traced

    chip = plan.device.soc.id if plan.device else ""
    entry, residency = write_traced(arch, weights, plan.context, folder, delegate, methods, chip)
    return (entry,), arch.kv_cache("float32" if delegate == "vulkan" else "float16"), residency, tools


def _write_coreml(
    arch: Architecture, weights: QuantizedWeights, plan: Plan, delegate: str, text: TextSide, folder: Path
) -> Written:
    from exporter.formats.coreml import write_coreml
    from exporter.formats.coreml_ane import write_coreml_ane
    from exporter.npu import ane

    write = write_coreml_ane if delegate == NEURAL_ENGINE else write_coreml
    entries = write(arch, weights, plan.context, folder)
    residency = None
    if delegate == NEURAL_ENGINE:
        packages = dict.fromkeys(folder / entry.file for entry in entries)
        residency = ane.total([ane.check(package).prediction for package in packages])
    return entries, arch.kv_cache("float16"), residency, ("coremltools",)


def _write_coreai(
    arch: Architecture, weights: QuantizedWeights, plan: Plan, _delegate: str, _text: TextSide, folder: Path
) -> Written:
    extras.require("coreai_torch", "coreai")  # here, where nobody sees what it says
    from exporter.formats.coreai import write_coreai

    return (
        write_coreai(arch, weights, plan.context, folder),
        arch.kv_cache("float16"),
        None,
        ("coreai-torch", "coreai-core"),
    )


_WRITERS = {
    "onnx": _write_onnx,
    "executorch": _write_executorch,
    "coreml": _write_coreml,
    "coreai": _write_coreai,
}


def _for_hexagon(
    source: Checkpoint, arch: Architecture, plan: Plan, stage: Staging, made: list[Any], progress: Progress
) -> list[Any]:
    """A variant for each chip before the CPU's: static graphs over the CPU's weights, and what QNN makes of them."""
    from exporter.formats.onnx import DATA
    from exporter.formats.onnx_hexagon import write_hexagon
    from exporter.npu import hexagon

    (cpu,), compilation = made, plan.compilation
    assert compilation

    def write(folder: Path) -> Any:
        entries, data = write_hexagon(source, arch, compilation, plan.context, folder, progress)
        return {"entries": [entry.model_dump(mode="json") for entry in entries], "data": data}

    def compile_all(folder: Path) -> Any:
        done = hexagon.compile_graphs(
            entries, graphs["data"], compilation.chips, folder, lambda what: progress(what, 0, 0)
        )
        return [result.model_dump(mode="json") for result in done]

    graphs = stage.step("hexagon graphs", write)
    entries = tuple(EntryPoint(**entry) for entry in graphs["entries"])
    past = next(spec for e in entries for spec in e.inputs if spec.name.startswith("past_key_values"))
    results = stage.step("hexagon binaries", compile_all)
    variants = []
    for chip, found in zip(compilation.chips, results, strict=True):
        result, npu = hexagon.Result(**found), hexagon.npu(chip)
        compiled = [
            entry
            if entry.name == "embed"
            else entry.model_copy(update={"file": hexagon.compiled_name(chip.id, entry.name)})
            for entry in entries
        ]
        embed = next(entry for entry in entries if entry.name == "embed")
        files = {embed.file, DATA, *result.files}
        variant = Variant(
            name=f"{plan.format}-{HEXAGON}-{plan.scheme}-{chip.id}",
            format=plan.format,
            engine=plan.engine,
            delegate=HEXAGON,
            chips=(chip.id,),
            scheme=plan.scheme,
            context=plan.context,
            last_logits_only=True,
            entry_points=tuple(compiled),
            kv_cache=arch.kv_cache(past.dtype, shared_buffer=False, held_by="caller"),
            files=tuple(sorted(files)),
            residency=hexagon.residency(result, {e.name: stage.folder / e.file for e in entries}),
            allows_cpu_ops=compilation.wishes.allow_cpu_ops,
            compiled=Compiled(
                chip=npu.soc_model,
                arch=npu.arch,
                sdk=result.sdk,
                minimum_sdk=getattr(chip.npu, "min_qnn_sdk", None),
                sources=entries,
            ),
            toolchain=_toolchain("onnx", "onnxruntime", "onnxruntime-qnn"),
        )
        variants.append({**cpu, "variant": variant.model_dump(mode="json")})
    return [*variants, cpu]


def _manifest(source: Checkpoint, plan: Plan, text: TextSide, stage: Staging, made: list[Any]) -> Manifest:
    arch = source.architecture
    return Manifest(
        gochu=_version(),
        model=ModelInfo(
            name=source.name,
            source=source.source,
            revision=source.revision,
            family=arch.family,
            parameters=arch.parameters,
            layers=arch.layers,
            hidden=arch.hidden,
            heads=arch.heads,
            kv_heads=arch.kv_heads,
            head_dim=arch.head_dim,
            vocab=arch.vocab,
            trained_context=arch.context,
        ),
        device=plan.device.name if plan.device else None,
        plan=plan.choices,
        prediction=plan.prediction.figures() if plan.prediction else {},
        recipe=plan.recipe.model_dump(mode="json"),
        tensors=tuple(TensorReport(**report) for report in made[0]["tensors"]),
        variants=tuple(Variant(**each["variant"]) for each in made),
        tokens=text.tokens,
        chat_template=text.chat_template,
        probes=text.probes,
        files=stage.entries(),
        gate=Gate(status="unverified"),
    )


def _pass_gate(
    stage: Staging,
    source: Checkpoint,
    weights: Source,
    plan: Plan,
    found: Found,
    bounds: QualityBounds | None,
    progress: Progress,
) -> Gate:
    """Run the gate on the staged bundle; a bundle that fails is thrown away."""
    try:
        bundle = Bundle.open(stage.folder)
        gate = run_gate(bundle, lambda check: progress(f"verify {check}", 0, 0))
        if not bounds:
            return gate

        def quantized() -> QuantizedWeights:
            return QuantizedWeights(weights, plan.decisions, found=found)

        checks = require_passed(hold(bundle, source, bounds, quantized, progress, folded(weights)))
        return gate.model_copy(update={"checks": (*gate.checks, *checks)})
    except GochuError:
        discard(stage)
        raise


def _toolchain(*packages: str) -> dict[str, str]:
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"gochu": _version(), "python": platform.python_version(), **versions}


def _version() -> str:
    return importlib.metadata.version("gochu")
