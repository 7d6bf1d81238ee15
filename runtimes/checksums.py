"""Is what is loaded what was exported? Files are hashed while the engine loads them, and once for all.

A file found right is remembered in the user's cache folder, by a note with what it looked like (size, times,
inode) and its SHA-256; one that looks otherwise is hashed again. The note only counts if all of it is as
expected, so a damaged one costs time and nothing else. `gochu verify` neither reads nor writes notes.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from runtimes.bundle import TOKENIZER, Bundle, FileEntry, Variant
from runtimes.engines import ENGINES
from runtimes.errors import BundleError
from runtimes.folders import cache_folder

# A file that changed just before it was hashed may change again and bear the same time (some file systems count
# in steps of 2 s), so it is not remembered: git's "racy" index entries, git-scm.com/docs/racy-git.
_SETTLED_NS = 2_000_000_000


@contextmanager
def checked(bundle: Bundle, variant: Variant) -> Iterator[None]:
    """`check` in a thread while the body loads the same files; before it, where a changed byte can end the process.

    Ends with the check's error if there is one, also where the body failed: a changed file is then the cause.
    """
    if ENGINES[variant.engine].fragile:
        check(bundle, variant)
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="checksums") as pool:
        checking = pool.submit(check, bundle, variant)
        try:
            yield
        finally:
            checking.result()


def check(bundle: Bundle, variant: Variant) -> None:
    """Compare all files that running `variant` reads, the tokenizer among them, with what was exported.

    Raises ChecksumError (one has changed) or BundleError (one cannot be read, or the manifest does not list it).
    """
    entries = {entry.path: entry for entry in bundle.manifest.files}
    sources = variant.compiled.sources if variant.compiled else ()
    graphs = {e.file for e in (*variant.entry_points, *sources) if not bundle.file(e.file).is_dir()}
    for path in sorted({TOKENIZER, *variant.files, *graphs}):
        if path not in entries:
            raise BundleError(
                f"{bundle.path} has no checksum for {path}: it may be any file; export the bundle again"
            )
        _check_file(bundle, entries[path])


def _check_file(bundle: Bundle, entry: FileEntry) -> None:
    place, now = bundle.file(entry.path).resolve(), time.time_ns()
    try:
        seen, changed = _look(place, entry)
        if _is_noted(place, seen):
            return
        bundle.check(entry)
        if changed + _SETTLED_NS < now and _look(place, entry) == (seen, changed):
            _note(place, seen)
    except OSError as error:
        raise BundleError(f"{place} cannot be read: {error}; export the bundle again") from None


def _look(place: Path, entry: FileEntry) -> tuple[str, int]:
    """What a file looks like from outside, as a note says it, and when it last changed (ns).

    The inode's own time is among it: one can set a file's modification time back, but not that.
    """
    stat = place.stat()
    looks = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return json.dumps([str(place), *looks, entry.sha256]), max(stat.st_mtime_ns, stat.st_ctime_ns)


def _is_noted(place: Path, seen: str) -> bool:
    try:
        return _note_path(place).read_text(encoding="ascii") == seen
    except (OSError, UnicodeDecodeError, RuntimeError):
        return False


def _note(place: Path, seen: str) -> None:
    """Remember a file; where that is not possible, it is hashed again next time."""
    with suppress(OSError, RuntimeError):
        path = _note_path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(seen, encoding="ascii")


def _note_path(place: Path) -> Path:
    """One note for each path, so that notes of bundles that were exported again do not pile up.

    RuntimeError if the user has no home.
    """
    return cache_folder() / "checksums" / hashlib.sha256(os.fsencode(place)).hexdigest()
