"""Commands over recipes: `gochu quantize`, which makes one, and `gochu recipes`, which shows those that are shipped."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporter.cli_options import CheckpointArgument, Json, RevisionOption, print_json

if TYPE_CHECKING:
    from exporter.quantization.mixed import Mixed

_QUANTIZE = """Write a recipe of mixed precision: few bits, and more for the weights that lose the model most.

It measures what each weight costs alone, in nats of KL divergence from the float model on a calibration text, and
raises the worst for each bit that it takes until the average is reached. Scales are not counted.

Examples:

  gochu quantize pepper --target-bits 4.5 -o recipe.toml

  gochu quantize ./Qwen2.5-0.5B-Instruct --target-bits 4.5 --algorithm gptq --calibration 대화.jsonl

  gochu quantize pepper --target-bits 5 --scheme int4-g128 --raise-to int8 --measure kl --json

  gochu export pepper --recipe recipe.toml -o out/
"""
_RECIPES = """List the recipes that are shipped, or print one: the start of one's own.

Examples:

  gochu recipes

  gochu recipes --json

  gochu recipes show portable-int4-gptq > mine.toml

  gochu export pepper --recipe portable-int4-gptq -o out/
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(help=_QUANTIZE)(quantize)
    app.command(help=_RECIPES)(recipes)


def quantize(
    target_bits: Annotated[
        float, typer.Option("--target-bits", metavar="BITS", help="Bits a weight on average, such as 4.5.")
    ],
    checkpoint: CheckpointArgument = "pepper",
    scheme: Annotated[str, typer.Option(help="What most weights become.")] = "int4",
    raise_to: Annotated[str, typer.Option("--raise-to", help="What the most sensitive become.")] = "int8",
    measure: Annotated[
        str,
        typer.Option(
            help="hessian (one run forward and backward, a layer in memory) or kl (a run for each weight)."
        ),
    ] = "hessian",
    algorithm: Annotated[
        str, typer.Option(help="How integers are found, as for gochu export: rtn, gptq, ...")
    ] = "rtn",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="A .txt or .jsonl file of the model's kind of text; self: the model writes it.",
            dir_okay=False,
        ),
    ] = None,
    revision: RevisionOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe's file.", dir_okay=False)] = Path(
        "recipe.toml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    as_json: Json = False,
) -> None:
    from exporter import console
    from exporter.checkpoint import open_checkpoint
    from exporter.quantization.mixed import quantize
    from runtimes import extras

    extras.check("torch", "onnx")
    with open_checkpoint(checkpoint, revision) as source, console.progress() as progress:
        mixed = quantize(
            source,
            output,
            target_bits=target_bits,
            scheme=scheme,
            raise_to=raise_to,
            measure=measure,
            algorithm=algorithm,
            calibration=calibration,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json({"output": str(output), **mixed.to_dict()})
        return
    _show(mixed, output)


def _show(mixed: "Mixed", output: Path) -> None:
    from exporter import console

    console.show_mixed(mixed)
    console.console.print(
        f"wrote {output}: {mixed.bits:.4g} bits a weight, {len(mixed.raised)} of {len(mixed.weights)} raised; "
        f"try: gochu export --recipe {output}",
        markup=False,
    )


def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[show NAME]", help="Print the TOML of this one.")
    ] = None,
    as_json: Json = False,
) -> None:
    from exporter import console
    from exporter.errors import UsageError
    from exporter.quantization.recipe import find_recipe, purpose, recipe_text, shipped_recipes

    if words:
        if len(words) != 2 or words[0] != "show":
            raise UsageError(
                "`gochu recipes` lists those that are shipped, and `gochu recipes show NAME` prints one, such as "
                "`gochu recipes show portable-int4`"
            )
        text = recipe_text(words[1])
        if as_json:
            print_json(find_recipe(words[1]).model_dump(mode="json"))
        else:
            print(text, end="")
        return
    found = [
        {
            "name": name,
            "purpose": purpose(recipe_text(name)),
            "schemes": list(dict.fromkeys(rule.scheme for rule in find_recipe(name).rules)),
            "algorithms": list(dict.fromkeys(rule.algorithm for rule in find_recipe(name).rules)),
        }
        for name in shipped_recipes()
    ]
    if as_json:
        print_json(found)
    else:
        console.show_recipes(found)
