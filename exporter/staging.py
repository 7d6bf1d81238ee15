"""An output folder that appears whole or not at all, and work on it that can be resumed.

Files are made in a hidden folder beside the output (`.NAME.partial`). Each finished step is written down
with the checksums of its files; a rerun of the same export keeps those that are still intact. When all is
done the folder takes the output's name in one rename.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from exporter.errors import OutputError, OutputExists
from runtimes.bundle import MANIFEST, FileEntry, file_sha256

_PROGRESS = ".progress.json"
_LOCK = ".lock"
_WORK = ".work"


class Staging:
    """The folder being filled; made by `staging`."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._steps: dict[str, dict[str, Any]] = self._load()

    def workspace(self, name: str = "") -> "Staging":
        """A folder within for steps whose files are no part of the output; it goes when the output stands.

        `name` tells several apart.
        """
        folder = self.folder / _WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        return Staging(folder, self._fingerprint)

    def clear(self) -> None:
        """Forget all steps: the next one begins anew."""
        self._steps.clear()

    def is_empty(self) -> bool:
        """Whether there is nothing here that a rerun could go on with."""
        return not self._steps and files_in(self.folder) <= {_LOCK}

    def is_done(self, name: str) -> bool:
        """Whether an earlier run made this step, and its files are intact."""
        done = self._steps.get(name)
        return done is not None and all(self._intact(FileEntry(**entry)) for entry in done["files"])

    def step(self, name: str, make: Callable[[Path], Any], spent: Iterable[str] = ()) -> Any:
        """Run `make(folder)`, or take its result (JSON) from an earlier run that was cut off.

        `spent`: files of earlier steps that go when this one is done; those steps count as done without them.
        """
        if self.is_done(name):
            return self._steps[name]["result"]
        others = [step for other, step in self._steps.items() if other != name]
        before = {entry["path"] for step in others for entry in step["files"]}
        self._remove(self._files() - before)
        try:
            result = make(self.folder)
        except BaseException:
            self._remove(self._files() - before)  # a full disk needs the room
            raise
        files = [self._entry(path).model_dump() for path in sorted(self._files() - before)]
        self._steps[name] = {"result": result, "files": files}
        gone = set(spent)
        for step in self._steps.values():
            step["files"] = [entry for entry in step["files"] if entry["path"] not in gone]
        text = json.dumps({"fingerprint": self._fingerprint, "steps": self._steps}, ensure_ascii=False)
        write_whole(self.folder / _PROGRESS, text)
        self._remove(gone)
        return result

    def entries(self) -> tuple[FileEntry, ...]:
        """The files of all steps, by path."""
        files = [FileEntry(**entry) for step in self._steps.values() for entry in step["files"]]
        return tuple(sorted(files, key=lambda entry: entry.path))

    def _load(self) -> dict[str, dict[str, Any]]:
        try:
            saved = json.loads((self.folder / _PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            saved = {}
        return saved["steps"] if saved.get("fingerprint") == self._fingerprint else {}

    def _files(self) -> set[str]:
        names = files_in(self.folder) - {_PROGRESS, _LOCK, MANIFEST}
        return {name for name in names if not name.startswith(f"{_WORK}/")}

    def _remove(self, names: set[str]) -> None:
        for name in names:
            (self.folder / name).unlink()
        for folder in sorted((path for path in self.folder.rglob("*") if path.is_dir()), reverse=True):
            if _WORK not in folder.relative_to(self.folder).parts and not any(folder.iterdir()):
                folder.rmdir()

    def _entry(self, name: str) -> FileEntry:
        path = self.folder / name
        return FileEntry(path=name, size=path.stat().st_size, sha256=file_sha256(path))

    def _intact(self, entry: FileEntry) -> bool:
        return (self.folder / entry.path).is_file() and self._entry(entry.path) == entry


@contextlib.contextmanager
def staging(output: Path, fingerprint: Any, force: bool = False) -> Iterator[Staging]:
    """Fill a folder that becomes `output` when the block ends well.

    Raises OutputExists (something is there, and no `force`, or it is no bundle), OutputError (disk full,
    no permission, another export at work). After an error what is there already stays as it was; finished
    steps wait for a rerun.
    """
    output = Path(os.path.abspath(output))
    _refuse_existing(output, force)
    with _locked(output, fingerprint) as stage:
        yield stage
        shutil.rmtree(stage.folder / _WORK, ignore_errors=True)
        for name in (_PROGRESS, _LOCK):
            (stage.folder / name).unlink()
        _replace(stage.folder, output)


@contextlib.contextmanager
def working_for(output: Path, fingerprint: Any, force: bool = False) -> Iterator[Staging]:
    """A folder for the work on a file that the block writes; it goes when the block ends well.

    Raises as `staging`, and after an error a rerun goes on.
    """
    output = Path(os.path.abspath(output))
    if output.is_dir() or (output.exists() and not force):
        raise OutputExists(f"{output} exists already: choose another file, or replace it with --force")
    with _locked(output, fingerprint) as stage:
        yield stage
        shutil.rmtree(stage.folder)


@contextlib.contextmanager
def _locked(output: Path, fingerprint: Any) -> Iterator[Staging]:
    """The hidden folder beside `output`, for this process alone."""
    folder = output.parent / f".{output.name}.partial"
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _LOCK, "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another export is writing {output}: wait for it or choose another folder"
                ) from None
            stage = Staging(folder, digest)
            try:
                yield stage
            except BaseException:
                if stage.is_empty():
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise OutputError(
            f"{output} could not be written ({error.strerror or error}): free space or choose another folder; "
            "a rerun goes on where this stopped"
        ) from None


def files_in(folder: Path) -> set[str]:
    """Paths of all files below a folder, as a manifest writes them."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def discard(stage: Staging) -> None:
    """Remove what was made: it must not be used."""
    shutil.rmtree(stage.folder)


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _refuse_existing(output: Path, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise OutputExists(f"{output} exists already: choose another folder, or replace it with --force")
    if not (output / MANIFEST).is_file():
        raise OutputExists(
            f"{output} is not a bundle, and --force only replaces bundles: choose another folder"
        )


def _replace(folder: Path, output: Path) -> None:
    """Give `folder` the name `output`; what was there goes only once the new one stands."""
    if not output.exists():
        folder.rename(output)
        return
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    folder.rename(output)
    shutil.rmtree(old)
