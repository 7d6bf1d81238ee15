"""`gochu quality`: what quantization, or a whole export, costs."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporter.cli_options import Json, PrepareOption, RevisionOption, names

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.quality import Quality

_HELP = """Hold a model against the one it was made of: KL divergence, agreement, perplexity, answers, error by layer.

Each of A and B is a checkpoint or a bundle; without B it is A quantized. A bundle is run by its own engine.

Examples:

  gochu quality pepper out/

  gochu quality pepper --scheme int4 --algorithm gptq --plot quality.png

  gochu quality ./Qwen2.5-0.5B-Instruct out/ --text 대화.jsonl --tokens 8192 --out report.json

  gochu quality pepper --scheme int4 --prepare awq

  gochu quality pepper --scheme int4 --activations onnxruntime --json

  gochu quality out-fp16/ out-int4/
"""
_SHOWN = 5  # tensors that lose most


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(quality)


def quality(
    first: Annotated[str, typer.Argument(metavar="A", help="What is right: a checkpoint or a bundle.")],
    second: Annotated[
        str | None, typer.Argument(metavar="[B]", help="What is held against it (default: A, quantized).")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Quantize the checkpoint B: int8, int4, ...")] = None,
    algorithm: Annotated[
        str, typer.Option(help="How its integers are found: see `gochu export --help`.")
    ] = "rtn",
    recipe: Annotated[
        str | None, typer.Option(help="Or by a recipe: a TOML file, or one that is shipped.")
    ] = None,
    prepare: PrepareOption = "",
    calibration: Annotated[
        Path | None, typer.Option(help="The text that B is calibrated on (.txt, .jsonl).", dir_okay=False)
    ] = None,
    activations: Annotated[
        str,
        typer.Option(help="Round the checkpoint B's activations as an engine does: onnxruntime, executorch."),
    ] = "float",
    variant: Annotated[str | None, typer.Option(help="Which variant of the bundle B.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="The text both are held against (.txt, .jsonl; default: one that calibrates nothing).",
            dir_okay=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of it.", min=1)] = 2048,
    questions: Annotated[
        int | None,
        typer.Option(help="How many of pepper's questions both are asked (default: 200 of pepper).", min=0),
    ] = None,
    revision: RevisionOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw error by layer into this file, .png or .svg.", dir_okay=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the report to this file, as JSON; a stopped run goes on.", dir_okay=False),
    ] = None,
    as_json: Json = False,
) -> None:
    from runtimes import extras

    extras.check("torch", "onnx")
    from exporter import console
    from exporter.errors import UsageError
    from exporter.quality import compare
    from exporter.quantization.recipe import find_recipe
    from exporter.staging import write_whole

    if plot is not None:
        from runtimes.plot import check

        check(plot)  # before anything is computed
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"{out.parent} is not a folder; make it, or write into one that is there")
    with console.progress() as progress, _workspace(out) as work:
        found = compare(
            first,
            second,
            scheme=scheme,
            recipe=find_recipe(recipe) if recipe else None,
            algorithm=algorithm,
            prepare=names(prepare),
            calibration=calibration,
            activations=activations,
            variant=variant,
            revision=revision,
            text=text,
            tokens=tokens,
            questions=questions,
            work=work,
            progress=progress,
        )
        if out is not None:
            write_whole(out, found.model_dump_json(indent=2) + "\n")
    if plot is not None:
        from exporter.quality_plot import plot as draw

        draw(found, plot)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        _show(found)


@contextlib.contextmanager
def _workspace(out: Path | None) -> Iterator[Path | None]:
    """A hidden folder beside the report for what a stopped run has done; it goes when the report stands."""
    if out is None:
        yield None
        return
    folder = out.parent / f".{out.name}.partial"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder)


def _show(found: "Quality") -> None:
    """The figures, then the error by layer and by kind of tensor, and the tensors that lose most."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from exporter.console import console

    def table(*columns: str) -> Table:
        return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)

    first, second = found.first, found.second
    models = table("model", "what", "bits a weight", "perplexity", "exact answers")
    for model in (first, second):
        said = f"{model.answers.right} of {model.answers.asked}" if model.answers else ""
        figures = (f"{model.bits_per_weight:.2f}", f"{model.perplexity:.4g}", said)
        models.add_row(escape(model.name), escape(model.what), *figures)
    console.print(models)
    kl = found.kl
    console.print(
        f"KL divergence {kl.mean:.3g} nats a token (median {kl.median:.2g}, 99 of 100 below {kl.p99:.2g}); the same "
        f"likeliest token after {found.agreement:.2f} % of {found.tokens} tokens ({found.text})\n",
        markup=False,
    )
    if found.layers:
        console.print(
            "Signal to noise in dB: of each layer's output, errors before it included, and of products"
        )
        console.print(_by_layer(found, table))
        console.print(_ends(found) + "\n")
    if lossy := sorted((t for t in found.tensors if t.output_db is not None), key=lambda t: t.output_db or 0):
        console.print("What loses most, in dB")
        worst = table("tensor", "scheme", "weights", "its product")
        for tensor in lossy[:_SHOWN]:
            worst.add_row(tensor.name, tensor.scheme, _db(tensor.weights_db), _db(tensor.output_db))
        console.print(worst)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def _by_layer(found: "Quality", table: "Callable[..., Table]") -> "Table":
    """A row for each layer, a column for each kind of tensor; then what all layers are together."""
    kinds = found.by_kind()
    inside = [kind for kind in kinds if "." in kind]
    products = {(tensor.layer, tensor.kind): _db(tensor.output_db) for tensor in found.tensors}
    grid = table("layer", "output", *inside)
    for i, layer in enumerate(found.layers):
        row = [products[i, kind] for kind in inside]
        grid.add_row(str(i), _db(layer.output_db), *row, end_section=i + 1 == len(found.layers))
    if inside:
        grid.add_row("products", "", *(_db(kinds[kind][1]) for kind in inside))
        grid.add_row("weights", "", *(_db(kinds[kind][0]) for kind in inside))
    return grid


def _ends(found: "Quality") -> str:
    kinds = found.by_kind()
    return ", ".join(
        f"{kind} {_db(kinds[kind][1])} (weights {_db(kinds[kind][0])})" for kind in ("embedding", "head")
    )


def _db(ratio: float | None) -> str:
    return "exact" if ratio is None else f"{ratio:.1f}"
