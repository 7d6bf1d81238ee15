"""`gochu target`: where a bundle can be measured, and making ready what that needs."""

from typing import Annotated

import typer

from exporter.cli_options import Json, print_json

app = typer.Typer(
    help="Where bundles are measured (`gochu bench --on`): list the targets, set one up.\n\n"
    "Examples:\n\n  gochu target list\n\n  gochu target setup arm64-emulator",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def target(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_targets(as_json=False)


@app.command(
    "list",
    help="List the targets: what each is, whether it works here, and what can be said to it.\n\n"
    "Examples:\n\n  gochu target list\n\n  gochu target list --json",
)
def list_targets(as_json: Json = False) -> None:
    from runtimes import targets

    found = [targets.about(name) for name in targets.known()]
    if as_json:
        print_json([each.model_dump() for each in found])
        return
    from exporter import console

    console.show_targets(found)


@app.command(
    help="Make ready what a target needs on this machine; what is there already is not made again.\n\n"
    "Examples:\n\n  gochu target setup arm64-emulator\n\n  gochu target setup arm64-emulator --json",
)
def setup(
    name: Annotated[str, typer.Argument(help="The target: see `gochu target list`.")], as_json: Json = False
) -> None:
    from exporter import console
    from runtimes import targets

    with console.progress() as progress:
        folder = targets.setup(name, lambda what: progress(what, 0, 0))
    if as_json:
        print_json({"target": name, "folder": str(folder)})
    else:
        console.console.print(
            f"target {name} is ready ({folder}); try: gochu bench out/ --on {name}", markup=False
        )
