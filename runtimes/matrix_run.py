"""Run a matrix: what is done already is kept, the rest runs as far as there is room, each row is written as it comes.

The file of results is the only memory. A cell is done when all its rows are in it, none of them interrupted; a rerun
measures the others. What failed stands beside it, a sentence for each: `results.jsonl` -> `results.failed.jsonl`.
"""

import fcntl
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as first
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from runtimes import matrix, measurement
from runtimes.bundle import Strict
from runtimes.errors import ResultsError, TargetError, UsageError
from runtimes.matrix import Cell, Matrix
from runtimes.matrix_cell import STOPPED, Outcome, Stop, Task, perform
from runtimes.measurement import Measurement, Origin

EXPORT = "export"  # kind of a task
_TICK = 0.2  # s


class Export(NamedTuple):
    """A bundle that is exported first; `task` is None if it is there already, from the same export."""

    output: Path
    task: Task | None


Exports = Callable[
    [Sequence[Mapping[str, Any]], Path], Sequence[Export]
]  # of a file's tables, from its folder


class Failure(Strict):
    """A task that failed, and its sentence; `cell` is its id, of an export its output."""

    cell: str
    label: str
    error: str
    exit_code: int


class Result(NamedTuple):
    """All rows of a matrix's cells, earlier runs' too; what failed; whether it was stopped."""

    rows: list[Measurement]
    failures: list[Failure]
    stopped: bool


class Executor(Protocol):
    """Where tasks run: `Local`, or a Ray cluster."""

    def room(self, pool: str) -> int:
        """How many tasks of a pool run at once."""

    def submit(self, task: Task) -> Any: ...

    def wait(self, running: Sequence[Any]) -> list[Any]:
        """Those that have ended, after a moment at most."""

    def outcome(self, ended: Any, task: Task) -> Outcome: ...

    def stop(self, running: Sequence[Any], at_once: bool) -> None: ...


@dataclass
class Board:
    """How far a run is: by kind (target, or export) how many tasks are kept, left, running, done, failed."""

    counts: dict[str, Counter[str]]
    pools: dict[str, int]
    running: dict[str, tuple[Task, float]] = field(default_factory=dict)
    _left: Counter[str] = field(default_factory=Counter)  # by pool, with those that run
    _spent: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, tasks: Sequence[Task], kept: Sequence[str], pools: Mapping[str, int]) -> "Board":
        """Before anything runs. `kept`: kinds of what earlier runs did."""
        counts: dict[str, Counter[str]] = {}
        for kind, state in [*((kind, "kept") for kind in kept), *((task.kind, "left") for task in tasks)]:
            counts.setdefault(kind, Counter())[state] += 1
        return cls(counts, dict(pools), _left=Counter(task.pool for task in tasks))

    def begin(self, task: Task) -> str:
        """Note that a task runs; a line that says so."""
        self.running[task.id] = (task, time.monotonic())
        self.counts[task.kind].update(left=-1, running=1)
        return f"{self._place()} began {task.label}"

    def end(self, outcome: Outcome) -> str:
        """Note what came of a task; a line that says so."""
        task, _ = self.running.pop(outcome.id)
        state = "left" if outcome.exit_code == STOPPED else "failed" if outcome.error else "done"
        self.counts[task.kind].update({"running": -1, state: 1})
        self._left[task.pool] -= 1
        if not outcome.error:
            self._spent.setdefault(task.pool, []).append(outcome.seconds)
        verdict = "stopped" if state == "left" else state
        why = f": {outcome.error}" if state == "failed" else ""
        return f"{self._place()} {verdict} {task.label} ({outcome.seconds:.1f} s){why}"

    def seconds_left(self) -> float | None:
        """By the mean of what is done, pool by pool; None while one of them has nothing done."""
        left = {pool: count for pool, count in self._left.items() if count}
        if not left or any(pool not in self._spent for pool in left):
            return None
        means = {pool: sum(self._spent[pool]) / len(self._spent[pool]) for pool in left}
        return max(means[pool] * count / max(self.pools.get(pool, 1), 1) for pool, count in left.items())

    def _place(self) -> str:
        total = sum(sum(count.values()) for count in self.counts.values())
        ended = sum(count[state] for count in self.counts.values() for state in ("kept", "done", "failed"))
        return f"[{ended}/{total}]"


class Local:
    """Tasks on this machine, as many of each pool at once as its limit says."""

    def __init__(self, limits: Mapping[str, int], stop: Stop) -> None:
        self._limits = limits
        self._stop = stop
        self._threads = ThreadPoolExecutor(sum(limits.values()))

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.asked = True  # what still runs does so after an error
        self._threads.shutdown()

    def room(self, pool: str) -> int:
        return self._limits[pool]

    def submit(self, task: Task) -> Future[Outcome]:
        return self._threads.submit(perform, task, self._stop)

    def wait(self, running: Sequence[Future[Outcome]]) -> list[Future[Outcome]]:
        return list(first(running, _TICK, FIRST_COMPLETED).done)

    def outcome(self, ended: Future[Outcome], task: Task) -> Outcome:
        return ended.result()

    def stop(self, running: Sequence[Future[Outcome]], at_once: bool) -> None:
        """Each thread sees for itself that it must stop."""


def run(
    file: Path,
    out: Path,
    *,
    exports: Exports | None = None,
    ray: str | None = None,
    again: bool = False,
    watch: Callable[[Board, str], None] = lambda board, line: None,
) -> Result:
    """Measure a matrix file's cells and add their rows to `out`; those that are done are kept, unless `again`.

    `exports` makes exports of the file's tables; `ray`: the address of a cluster, or "local". `watch` sees each change.
    Whatever can be found wrong is found before anything runs: UsageError, BundleError, TargetError, MissingExtra,
    ResultsError. A cell that fails is in the result's failures, and the others go on. Ctrl-C ends it in order: running
    cells are given time to stop (a second one kills them), and what is measured is kept.
    """
    told = matrix.read(file)
    folder = file.parent.resolve()
    if told.exports and exports is None:
        raise UsageError(f"matrix {file} has exports, and nothing here exports: use `gochu bench --matrix`")
    wanted = exports(told.exports, folder) if exports else ()
    pending = [each.task for each in wanted if each.task]
    cells = _cells(file, told, folder, wanted)
    out = out.resolve()
    stop = Stop()
    pools = {task.pool for task in pending} | {cell.pool for cell in cells}
    with _sole_writer(out), _executor(ray, told.limits(), pools, stop) as executor, stopping(stop):
        book = Book(out, again)
        if pending:
            made = {task.id for task in _carried_out(executor, pending, [], stop, watch, book)}
            there = [each for each in wanted if each.task is None or each.task.id in made]
            cells = _cells(file, told, folder, there, [each.output for each in wanted if each not in there])
        left = [_task(cell, told) for cell in cells if cell.id not in book.done]
        kept = [cell.target for cell in cells if cell.id in book.done]
        if not stop.asked:
            _carried_out(executor, left, kept, stop, watch, book)
        stopped = stop.asked
    rows = [row for cell in cells for row in book.done.get(cell.id, {}).values()]
    return Result(rows, book.failures, stopped)


def _cells(
    file: Path, told: Matrix, folder: Path, there: Sequence[Export], coming: Sequence[Path] = ()
) -> list[Cell]:
    """All cells of bundles that are there, those of exports too; what is `coming` may be missing."""
    missing = [*coming, *(each.output for each in there if not each.output.exists())]
    found = [str(each.output) for each in there if each.output not in missing]
    bundles = matrix.find_bundles(
        told.model_copy(update={"bundles": (*told.bundles, *found)}), folder, missing
    )
    try:
        return matrix.cells(told, bundles, whole=not missing)
    except UsageError as error:
        raise UsageError(f"matrix {file}: {error}") from None


def _task(cell: Cell, told: Matrix) -> Task:
    options = cell.options | ({"variant": cell.variant} if cell.variant else {})
    return Task(
        id=cell.id,
        label=str(cell),
        kind=cell.target,
        pool=cell.pool,
        function="runtimes.matrix_cell:measure",
        data={
            "bundle": cell.bundle,
            "digest": cell.digest,
            "target": cell.target,
            "options": options,
            "workload": cell.workload.model_dump(mode="json"),
        },
        retries=told.retries,
    )


class Book:
    """The file of results and the one beside it, of failures; `done`: rows by cell and number."""

    def __init__(self, out: Path, again: bool) -> None:
        self._out = out
        self._failed = out.with_name(f"{out.stem}.failed.jsonl")
        with _writing(self._failed):
            self._failed.unlink(missing_ok=True)
        self.failures: list[Failure] = []
        self._rows: dict[str, dict[int, Measurement]] = {}
        for row in [] if again else measurement.read(out):
            self._note(row)
        self.done = {id: rows for id, rows in self._rows.items() if _whole(rows)}

    def write(self, task: Task, outcome: Outcome, stopped: bool) -> Outcome:
        """Add a cell's rows, but those that a run that was cut off has written; or its failure. What came of it.
        `stopped`: the whole run is, so that an interrupted row is no failure."""
        try:
            found = [
                measurement.parse(json.dumps(each), f"what {task.label} said") for each in outcome.value or []
            ]
        except ResultsError as error:  # of another Gochu, on another machine
            return self.fail(task, outcome.model_copy(update={"error": str(error)}))
        rows = {
            number: row.model_copy(update={"cell": Origin(id=task.id, row=number, of=len(found))})
            for number, row in enumerate(found, 1)
        }
        fresh = [row for number, row in rows.items() if number not in self._rows.get(task.id, {})]
        measurement.append(self._out, fresh)
        for row in fresh:
            self._note(row)
        if _whole(self._rows.get(task.id, {})):
            self.done[task.id] = self._rows[task.id]
            return outcome
        if rows and stopped:
            return outcome.model_copy(update={"error": "it was stopped", "exit_code": STOPPED})
        why = outcome.error or ("it was interrupted" if rows else "the target measured nothing")
        return self.fail(task, outcome.model_copy(update={"error": why}))

    def fail(self, task: Task, outcome: Outcome) -> Outcome:
        """Write a failure down; one that was stopped is none, and left for the next run."""
        if outcome.exit_code != STOPPED:
            code = outcome.exit_code or TargetError.exit_code
            self.failures.append(Failure(cell=task.id, label=task.label, error=outcome.error, exit_code=code))
            with _writing(self._failed), self._failed.open("a", encoding="utf-8") as file:
                file.write(self.failures[-1].model_dump_json() + "\n")
        return outcome

    def _note(self, row: Measurement) -> None:
        if row.cell and "interrupted" not in row.marks:
            self._rows.setdefault(row.cell.id, {})[row.cell.row] = row


def _whole(rows: Mapping[int, Measurement]) -> bool:
    """Whether all rows of a cell are there."""
    return any(row.cell and row.cell.of == len(rows) for row in rows.values())


def _carried_out(
    executor: Executor,
    tasks: Sequence[Task],
    kept: Sequence[str],
    stop: Stop,
    watch: Callable[[Board, str], None],
    book: Book,
) -> list[Task]:
    """Run tasks, write down what comes of each as it comes, and give those that did not fail."""
    board = Board.of(tasks, kept, {task.pool: executor.room(task.pool) for task in tasks})
    by_id = {task.id: task for task in tasks}
    good = []
    for event in _schedule(executor, tasks, stop):
        if isinstance(event, Task):
            watch(board, board.begin(event))
            continue
        task = by_id[event.id]
        if task.kind != EXPORT:
            event = book.write(task, event, stop.asked)
        elif event.error:
            event = book.fail(task, event)
        watch(board, board.end(event))
        if not event.error:
            good.append(task)
    return good


def _schedule(executor: Executor, tasks: Sequence[Task], stop: Stop) -> Iterator[Task | Outcome]:
    """Start each task when there is room in its pool, in their order; what comes of it, as it ends."""
    waiting = list(tasks)
    running: dict[Any, Task] = {}
    told = Stop()
    while waiting or running:
        if stop.asked:
            waiting.clear()
        if (stop.asked, stop.at_once) != (told.asked, told.at_once):
            told = Stop(stop.asked, stop.at_once)
            executor.stop(list(running), stop.at_once)
        taken = Counter(task.pool for task in running.values())
        for task in list(waiting):
            if taken[task.pool] < executor.room(task.pool):
                taken[task.pool] += 1
                waiting.remove(task)
                running[executor.submit(task)] = task
                yield task
        for ended in executor.wait(list(running)):
            yield executor.outcome(ended, running.pop(ended))


def _executor(
    ray: str | None, limits: Mapping[str, int], pools: set[str], stop: Stop
) -> AbstractContextManager[Executor]:
    if ray is None:
        return Local(limits, stop)
    from runtimes.matrix_ray import Cluster

    return Cluster(ray, limits, pools)


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C (and SIGTERM) ask for an end instead of raising KeyboardInterrupt anywhere, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Make the file of results if there is none, and let nobody else's matrix write to it meanwhile."""
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(
                f"another matrix is adding to {out}: wait for it, or name another file with --out"
            ) from None
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"{path} cannot be written: {error.strerror}; name another file with --out"
        ) from None
