"""The story of an export: from a checkpoint to a verified bundle."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.gate import verify as run_gate
from exporter.plan import Plan, make_plan
from exporter.quantization.recipe import Recipe
from exporter.staging import Staging, discard, staging, write_whole
from exporter.tokenizer import TextSide, read_text_side
from runtimes import extras
from runtimes.bundle import MANIFEST, Bundle, Gate, Manifest, ModelInfo, TensorReport, Variant
from runtimes.errors import GochuError

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
    verify: bool = True,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Export a checkpoint (folder, repository id, or "pepper") to a bundle at `output`, for a device.

    What is not given (scheme, context in tokens) is planned for the device. Without `verify` the bundle
    says of itself that it is unverified. Every error is a GochuError; after one there is no bundle at
    `output`, or the one that was there before.
    """
    for library in ("onnx", "onnxruntime", "torch") if verify else ("onnx",):
        extras.check(library, "onnx")
    with open_checkpoint(checkpoint, revision) as source:
        arch = source.architecture
        plan = make_plan(
            arch, device=device, scheme=scheme, algorithm=algorithm, recipe=recipe, context=context
        )
        text = read_text_side(source)
        fingerprint = [source.fingerprint(), plan.fingerprint(), text.fingerprint(), _version()]
        with staging(Path(output), fingerprint, force) as stage:
            stage.step("text", lambda folder: _write_text_side(source, text, folder))
            made = stage.step("onnx", lambda folder: _write_onnx(source, plan, text, folder, progress))
            manifest = _manifest(source, plan, text, stage, made)
            write_whole(stage.folder / MANIFEST, manifest.to_json())
            if verify:
                gate = _pass_gate(stage, progress)
                write_whole(stage.folder / MANIFEST, manifest.model_copy(update={"gate": gate}).to_json())
    return Bundle.open(output)


def _write_text_side(source: Checkpoint, text: TextSide, folder: Path) -> None:
    text.copy(folder)
    shutil.copyfile(source.path / "config.json", folder / "config.json")


def _write_onnx(source: Checkpoint, plan: Plan, text: TextSide, folder: Path, progress: Progress) -> Any:
    """Quantize and write the ONNX variant; its manifest entries as JSON."""
    from exporter.formats.genai import write_genai_config
    from exporter.formats.onnx import kv_cache, write_onnx
    from exporter.quantization.weights import QuantizedWeights

    arch, done = source.architecture, 0

    def advance(name: str, count: int) -> None:
        nonlocal done
        done += count
        progress(f"quantize {name}", done, arch.parameters)

    weights = QuantizedWeights(source, plan.decisions, advance)
    entry = write_onnx(arch, weights, plan.context, folder, plan.last_logits_only)
    write_genai_config(arch, text.tokens, entry, plan.context, folder)
    variant = Variant(
        name=f"{plan.format}-{plan.scheme}",
        format=plan.format,
        engine=plan.engine,
        scheme=plan.scheme,
        context=plan.context,
        last_logits_only=plan.last_logits_only,
        entry_points=(entry,),
        kv_cache=kv_cache(arch),
        files=tuple(sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))),
        toolchain=_toolchain("numpy", "onnx", "tokenizers"),
    )
    return {
        "variant": variant.model_dump(mode="json"),
        "tensors": [report.model_dump(mode="json") for report in weights.reports],
    }


def _manifest(source: Checkpoint, plan: Plan, text: TextSide, stage: Staging, made: Any) -> Manifest:
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
        tensors=tuple(TensorReport(**report) for report in made["tensors"]),
        variants=(Variant(**made["variant"]),),
        tokens=text.tokens,
        chat_template=text.chat_template,
        probes=text.probes,
        files=stage.entries(),
        gate=Gate(status="unverified"),
    )


def _pass_gate(stage: Staging, progress: Progress) -> Gate:
    """Run the gate on the staged bundle; a bundle that fails is thrown away."""
    try:
        return run_gate(Bundle.open(stage.folder), lambda check: progress(f"verify {check}", 0, 0))
    except GochuError:
        discard(stage)
        raise


def _toolchain(*packages: str) -> dict[str, str]:
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"gochu": _version(), "python": platform.python_version(), **versions}


def _version() -> str:
    return importlib.metadata.version("gochu")
