"""What several commands of the command line take, and how they read and print it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

CheckpointArgument = Annotated[
    str,
    typer.Argument(help="A folder, a Hugging Face repository id (org/model), or pepper, the embedded model."),
]
BundleArgument = Annotated[Path, typer.Argument(help="The bundle's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output, and no tables.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", "-d", help="The phone: its name, model code or chip. See `gochu devices`."),
]
SchemeOption = Annotated[
    str | None, typer.Option(help="fp32, fp16, int8, int4, int4-g128 (default: planned for the device).")
]
AlgorithmOption = Annotated[
    str,
    typer.Option(
        help="How integers are found: rtn (least error), rtn-absmax, hqq; on a calibration text clip, gptq, "
        "gptq-act-order, gptq-descent, qat. Tables: kmeans, kmeans-hessian."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Which tensor gets which scheme: a TOML file, or one that is shipped (see `gochu recipes`)."
    ),
]
ContextOption = Annotated[int | None, typer.Option(help="Tokens that the graph can hold (default: planned).")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="onnx, executorch, coreml or coreai (default: planned).")
]
DelegateOption = Annotated[
    str | None,
    typer.Option(
        help="What computes beside the CPU: hexagon (ONNX); ane, gpu (Core ML); vulkan, coreml, qualcomm, mediatek "
        "(ExecuTorch); or cpu, nothing (default: planned for the device)."
    ),
]
ChipsOption = Annotated[
    str,
    typer.Option(help="With --delegate hexagon: the chips to compile for (sm8650,sm8750), or all."),
]
CpuOpsOption = Annotated[
    bool, typer.Option("--allow-cpu-ops", help="Accept operations that the NPU does not take.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="For what is found on a text (gptq, clip, qat, awq, smoothquant, w8a16, w4a16): a .txt or .jsonl file of "
        "the model's kind; self: the model writes it.",
        dir_okay=False,
    ),
]
PrepareOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME]",
        help="What is done to the float weights before: hadamard; awq or smoothquant (on a calibration text).",
    ),
]
QatStepsOption = Annotated[
    int | None,
    typer.Option("--qat-steps", help="How many steps --algorithm qat trains (default: 100).", min=0),
]
SplitOption = Annotated[
    bool, typer.Option("--split/--no-split", help="Cut a model that is too large for one graph of the NPU.")
]
OnOption = Annotated[str | None, typer.Option("--on", help="Run it in a simulator: htp-simulator.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads (default: the physical cores).", min=1)]
VariantOption = Annotated[str | None, typer.Option(help="Which variant (default: the first that runs here).")]


def names(listed: str) -> tuple[str, ...]:
    """Names between commas.

    >>> names(" int8, int4 ,")
    ('int8', 'int4')
    """
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """One value on standard output, Korean as it is."""
    print(json.dumps(value, ensure_ascii=False, indent=2))
