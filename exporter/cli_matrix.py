"""`gochu bench --matrix`: shows how far a matrix is, and exports what it lists first."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich import box
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from exporter.console import console
from exporter.errors import OutputExists, UsageError
from exporter.staging import write_whole
from runtimes import matrix_run, report
from runtimes.bundle import MANIFEST, Bundle, Strict, file_sha256
from runtimes.errors import TargetError
from runtimes.matrix import MACHINE
from runtimes.matrix_cell import Task

if TYPE_CHECKING:
    from runtimes.matrix_run import Board, Result

_STATES = ("kept", "done", "running", "failed", "left")
_SHOWN = 8  # running tasks


class Export(Strict):
    """A table of `exports`: what `gochu export` takes, by the same names."""

    output: str
    checkpoint: str = "pepper"
    device: str | None = None
    scheme: str | None = None
    algorithm: str = "rtn"
    recipe: str | None = None
    context: int | None = None
    format: str | None = None
    delegate: str | None = None
    chips: tuple[str, ...] = ()
    allow_cpu_ops: bool = False
    split: bool = True
    calibration: str | None = None
    prepare: tuple[str, ...] = ()
    qat_steps: int | None = None
    revision: str | None = None
    verify: bool = True
    max_kl: float | None = None
    min_agreement: float | None = None
    force: bool = False

    def there(self) -> bool:
        """Whether the bundle is there already, from this very export; OutputExists if something else is."""
        output = Path(self.output)
        if not output.exists():
            return False
        if _read(_note(output)) == self._made(output):
            Bundle.open(output)
            return True
        if self.force:
            return False
        raise OutputExists(
            f"{output} exists already, and not from this export of the matrix: choose another output, remove it, or "
            "say force = true"
        )

    def make(self) -> None:
        """Do it, and note beside the bundle what it was made from."""
        from exporter.npu.hexagon_plan import Wishes
        from exporter.pipeline import export
        from exporter.quality_gate import QualityBounds
        from exporter.quantization.recipe import find_recipe

        output = Path(self.output)
        export(
            self.checkpoint,
            output,
            wishes=Wishes(self.chips, self.split, self.allow_cpu_ops),
            calibration=Path(self.calibration) if self.calibration else None,
            recipe=find_recipe(self.recipe) if self.recipe else None,
            bounds=QualityBounds(self.max_kl, self.min_agreement),
            **self.model_dump(exclude=_READ),
        )
        write_whole(_note(output), json.dumps(self._made(output), ensure_ascii=False))

    def _made(self, output: Path) -> dict[str, Any]:
        asked = self.model_dump(mode="json", exclude={"output", "force"})
        manifest = output / MANIFEST
        return {"export": asked, "manifest": file_sha256(manifest) if manifest.is_file() else ""}


# What `make` passes on in another form.
_READ = {
    *("checkpoint", "output", "chips", "allow_cpu_ops", "split", "calibration", "recipe"),
    *("max_kl", "min_agreement"),
}


def _note(output: Path) -> Path:
    return output.parent / f".{output.name}.export.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def exports(tables: Sequence[Mapping[str, Any]], folder: Path) -> list[matrix_run.Export]:
    """The exports of a matrix file, those that are there already without a task; UsageError if one cannot be read."""
    found: dict[Path, matrix_run.Export] = {}
    for number, table in enumerate(tables, 1):
        try:
            said = Export.model_validate(table)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UsageError(f"export {number} of the matrix: {place}: {first['msg']}") from None
        export = said.model_copy(update=_absolute(said, folder))
        output = Path(export.output)
        if output in found:
            raise UsageError(f"two exports of the matrix write {output}: give each an output of its own")
        task = Task(
            id=hashlib.sha256(export.model_dump_json().encode()).hexdigest()[:16],
            label=f"export {said.checkpoint} to {said.output}",
            kind=matrix_run.EXPORT,
            pool=MACHINE,
            function="exporter.cli_matrix:make",
            data=export.model_dump(mode="json"),
        )
        found[output] = matrix_run.Export(output, None if export.there() else task)
    return list(found.values())


def _absolute(export: Export, folder: Path) -> dict[str, str]:
    """Its paths, from the matrix file's folder. What names no file there is the name of something."""
    paths = {"output": os.path.normpath(folder / Path(export.output).expanduser())}
    for key in ("checkpoint", "recipe", "calibration"):
        if (said := getattr(export, key)) and (folder / Path(said).expanduser()).exists():
            paths[key] = os.path.normpath(folder / Path(said).expanduser())
    return paths


def make(data: dict[str, Any]) -> None:
    """What an export's process does."""
    Export.model_validate(data).make()


def bench(file: Path, out: Path | None, ray: str | None, again: bool, as_json: bool) -> None:
    """Measure a matrix and show its rows; TargetError if a cell failed, KeyboardInterrupt if it was stopped."""
    out = out or file.with_name(f"{file.stem}.results.jsonl")
    with _watching() as watch:
        result = matrix_run.run(file, out, exports=exports, ray=ray, again=again, watch=watch)
    _show(result, out, as_json)
    if result.stopped:
        console.print("stopped; the same command goes on where it was", markup=False)
        raise KeyboardInterrupt
    if result.failures:
        count = len(result.failures)
        raise TargetError(
            f"{count} of the matrix's cells or exports failed, the others' rows are in {out}; the same command tries "
            "again what failed"
        )


@contextlib.contextmanager
def _watching() -> Iterator[Any]:
    """A table that moves, where standard error is a terminal; a line for each change elsewhere."""
    if not console.is_terminal:
        yield lambda board, line: console.print(line, markup=False, soft_wrap=True)
        return
    boards: list[Board] = []
    with Live(
        get_renderable=lambda: _table(boards[-1]) if boards else "", console=console, refresh_per_second=2
    ) as live:

        def watch(board: "Board", line: str) -> None:
            boards.append(board)
            del boards[:-1]
            if " failed " in line:
                live.console.print(line, markup=False)

        yield watch


def _table(board: "Board") -> Group:
    grid = Table("", *_STATES, box=box.SIMPLE_HEAD, pad_edge=False)
    for kind, counts in list(board.counts.items()):
        grid.add_row(escape(kind), *(str(counts[state]) for state in _STATES))
    running = [task.label for task, _ in list(board.running.values())]
    left = board.seconds_left()
    lines = [] if left is None else [f"about {_minutes(left)} left"]
    lines += [f"running: {label}" for label in running[:_SHOWN]]
    lines += [f"and {len(running) - _SHOWN} more"] if len(running) > _SHOWN else []
    return Group(grid, Text("\n".join(lines)))


def _minutes(seconds: float) -> str:
    """
    >>> _minutes(8.2), _minutes(200), _minutes(7300)
    ('8 s', '3 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _show(result: "Result", out: Path, as_json: bool) -> None:
    if as_json:
        print(report.to_json(result.rows), end="")
    elif result.rows:
        report.show(result.rows, console)
    for failure in result.failures:
        console.print(f"failed: {failure.label}: {failure.error}", markup=False, soft_wrap=True)
    if not as_json:
        console.print(f"rows are in {out}", markup=False, soft_wrap=True)
