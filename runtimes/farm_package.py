"""What is sent to a farm: the files of one variant of a bundle, and a job that says what to measure.

    gochu/manifest.json  gochu/tokenizer.json  gochu/...  gochu/job.json

An app, or a program, that measures there opens that folder as a bundle, does the job, and prints what it found by
`runtimes.measurement_line`.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from runtimes.bundle import MANIFEST, Bundle, Strict, Variant
from runtimes.errors import UsageError
from runtimes.workload import Workload

FOLDER, JOB = "gochu", "job.json"


class Job(Strict):
    """What is to be measured: `variant` of the bundle, in a context of so many tokens."""

    variant: str
    context: int
    workload: Workload

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=True, sort_keys=True)


def files(bundle: Bundle, variant: Variant) -> dict[str, Path]:
    """The bundle's files, by their paths in it, but for those that only other variants or a simulator need."""
    needed = {*variant.files, *(entry.file for entry in variant.entry_points)}
    others = {path for each in bundle.manifest.variants for path in each.files}
    others |= {e.file for each in bundle.manifest.variants if each.compiled for e in each.compiled.sources}
    paths = [
        entry.path for entry in bundle.manifest.files if entry.path in needed or entry.path not in others
    ]
    return {path: bundle.file(path) for path in sorted({MANIFEST, *paths})}


def pack(contents: Mapping[str, Path | str], to: Path, programs: tuple[str, ...] = ()) -> Path:
    """A zip of files, or texts, by their paths in it: the same contents give the same bytes.

    Nothing is compressed: weights cannot be. `programs` may be executed once they are unpacked.
    """
    with zipfile.ZipFile(to, "w") as archive:
        for path, source in sorted(contents.items()):
            entry = zipfile.ZipInfo(f"{FOLDER}/{path}", (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, so that the next line is a file's mode
            entry.external_attr = (0o100755 if path in programs else 0o100644) << 16
            opened = io.BytesIO(source.encode()) if isinstance(source, str) else source.open("rb")
            with opened as data, archive.open(entry, "w", force_zip64=True) as inside:
                while block := data.read(1 << 20):
                    inside.write(block)
    return to


def app(path: Path | None, option: str, kinds: Mapping[str, str]) -> tuple[Path, str]:
    """An app and its kind, by its ending; UsageError if it was not given, is not there, or is of no kind."""
    either = " or ".join(kinds)
    if path is None:
        raise UsageError(f"a farm runs an app: give --option {option}=FILE ({either})")
    if path.suffix.lower() not in kinds:
        raise UsageError(f"--option {option}={path} has to be {either} for these devices")
    if not path.is_file():
        raise UsageError(f"--option {option}={path} is not there: build the app first")
    return path, kinds[path.suffix.lower()]
