"""A changed file is noticed before it answers, and an unchanged one is hashed once."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtimes import bundle as bundles
from runtimes import checksums, measuring
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, ChecksumError, EngineError, UsageError
from runtimes.generate import load
from runtimes.targets import host

CHANGED = "is not what was exported"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own. Files may be remembered at once, though the test has just made them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_SETTLED_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read and hashed."""
    names: list[str] = []

    def count(path: Path, hash: Callable[[Path], str] = bundles.file_sha256) -> str:
        names.append(path.name)
        return hash(path)

    monkeypatch.setattr(bundles, "file_sha256", count)
    return names


def check(folder: Path) -> None:
    bundle = Bundle.open(folder)
    checksums.check(bundle, bundle.manifest.variants[0])


def flip(path: Path) -> None:
    """Change one byte in place, and leave no trace in size or modification time."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


FILES = ["model.onnx", "model.onnx.data", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_run_gives_no_answer_from_a_changed_file(gochu: Callable, copy: Path, name: str) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    arguments = ("run", copy, "--prompt", "hot", "--max-tokens", 4, "--threads", 1)
    assert gochu(*arguments)[0] == 0
    flip(copy / name)
    code, out, err = gochu(*arguments)
    assert (code, out) == (3, "")
    assert f"{name} {CHANGED}" in err
    assert err.count("\n") == 1


def test_bench_measures_no_changed_file(gochu: Callable, copy: Path) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    flip(copy / "model.onnx.data")
    code, out, err = gochu("bench", copy, "--threads", 1)
    assert (code, out) == (3, "")
    assert CHANGED in err


def test_bench_hashes_before_it_measures(
    toy: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(module: str, job: measuring.Job, *_: Any) -> measuring.Samples:
        assert sorted(hashed) == FILES
        raise EngineError("that is enough")

    monkeypatch.setattr(measuring, "spawn", measured)
    pytest.importorskip("onnxruntime", reason="chooses a variant that can run")
    with pytest.raises(EngineError, match="enough"):
        host.measure(toy, "smoke", threads=1, context=96)


def test_an_unchanged_bundle_is_hashed_once(copy: Path, cache: Path, hashed: list[str]) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    with load(copy, threads=1) as model:
        first = model.generate("hot", max_tokens=4).tokens
    assert sorted(hashed) == FILES
    with load(copy, threads=1) as model:
        assert model.generate("hot", max_tokens=4).tokens == first
    assert sorted(hashed) == FILES
    assert len(list(cache.rglob("*"))) == 2 + 3, "two folders, and one note for each file"


def test_verifying_reads_all_bytes_anew(copy: Path, cache: Path, hashed: list[str]) -> None:
    check(copy)
    hashed.clear()
    Bundle.open(copy).verify_checksums()
    assert sorted(hashed) == FILES


def test_a_change_in_place_is_noticed(copy: Path, cache: Path) -> None:
    """Same size, same modification time, same inode: the inode's own time tells."""
    check(copy)
    flip(copy / "model.onnx.data")
    with pytest.raises(ChecksumError, match=CHANGED):
        check(copy)


def test_a_replaced_file_is_noticed(copy: Path, cache: Path) -> None:
    check(copy)
    old, new = copy / "model.onnx.data", copy / "new"
    before = old.stat()
    new.write_bytes(old.read_bytes())
    flip(new)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(old)
    after = old.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ino != before.st_ino
    with pytest.raises(ChecksumError, match=CHANGED):
        check(copy)


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_whatever_looks_otherwise_is_hashed_again(
    copy: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    check(copy)
    hashed.clear()
    look = Path.stat

    class Other:
        """A stat result that differs in one field."""

        def __init__(self, found: os.stat_result) -> None:
            self._found = found

        def __getattr__(self, name: str) -> int:
            return getattr(self._found, name) - (name == field)

    bundle = Bundle.open(copy)
    monkeypatch.setattr(Path, "stat", lambda path, **options: Other(look(path, **options)))
    checksums.check(bundle, bundle.manifest.variants[0])
    assert sorted(hashed) == FILES


def test_another_export_at_the_same_place_is_hashed(
    copy: Path, cache: Path, hashed: list[str], rewrite: Callable
) -> None:
    """The manifest says what is right: a note is not about the file alone."""
    check(copy)
    files = [
        {"path": entry.path, "size": entry.size, "sha256": "0" * 64}
        for entry in Bundle.open(copy).manifest.files
    ]
    rewrite(copy, files=files)
    with pytest.raises(ChecksumError, match=CHANGED):
        check(copy)


def test_a_file_that_has_just_changed_is_not_remembered(
    copy: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the same tick of the file system's clock."""
    monkeypatch.setattr(checksums, "_SETTLED_NS", 3600 * 10**9)
    check(copy)
    check(copy)
    assert sorted(hashed) == sorted(FILES * 2)
    monkeypatch.setattr(checksums, "_SETTLED_NS", 0)
    os.utime(copy / "model.onnx", ns=(time.time_ns() + 10**12,) * 2)
    check(copy)
    hashed.clear()
    check(copy)
    assert hashed == ["model.onnx"], "a time that is yet to come proves nothing"


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_then_change(path: Path, hash: Callable[[Path], str] = bundles.file_sha256) -> str:
        found = hash(path)
        flip(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "file_sha256", hash_then_change)
        check(copy)
    with pytest.raises(ChecksumError, match=CHANGED):
        check(copy)


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"[]", b"half"])
def test_a_damaged_cache_costs_time_alone(copy: Path, cache: Path, hashed: list[str], damage: bytes) -> None:
    check(copy)
    for note in (cache / "gochu/checksums").iterdir():
        note.write_bytes(note.read_bytes()[:-9] if damage == b"half" else damage)
    check(copy)
    assert sorted(hashed) == sorted(FILES * 2)
    flip(copy / "model.onnx")
    with pytest.raises(ChecksumError, match=CHANGED):
        check(copy)


def test_a_note_moved_to_another_file_does_not_vouch_for_it(copy: Path, cache: Path) -> None:
    check(copy)
    flip(copy / "model.onnx.data")
    notes = sorted((cache / "gochu/checksums").iterdir())
    texts = [note.read_bytes() for note in notes]
    for shift in (1, 2):
        for note, text in zip(notes, texts[shift:] + texts[:shift], strict=True):
            note.write_bytes(text)
        with pytest.raises(ChecksumError, match=CHANGED):
            check(copy)


def test_a_cache_that_cannot_be_written(
    copy: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be", encoding="utf-8")
    check(copy)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    check(copy)
    assert sorted(hashed) == sorted(FILES * 2)


@pytest.mark.parametrize(("system", "folder"), [("linux", ".cache"), ("darwin", "Library/Caches")])
@pytest.mark.parametrize("given", [None, "", "relative"])
def test_the_users_cache_folder(
    copy: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    folder: str,
    given: str,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr("sys.platform", system)
    check(copy)
    assert len(list((tmp_path / "home" / folder / "gochu" / "checksums").iterdir())) == 3


def test_a_file_without_a_checksum_is_not_run(copy: Path, cache: Path, rewrite: Callable) -> None:
    pytest.importorskip("onnxruntime", reason="chooses a variant that can run")
    entries = [entry.model_dump() for entry in Bundle.open(copy).manifest.files]
    rewrite(copy, files=[entry for entry in entries if entry["path"] != "tokenizer.json"])
    with pytest.raises(BundleError, match=r"no checksum for tokenizer\.json"):
        load(copy)


def test_a_file_that_cannot_be_read_is_one_sentence(copy: Path, cache: Path) -> None:
    bundle = Bundle.open(copy)
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").mkdir()
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read"):
        checksums.check(bundle, bundle.manifest.variants[0])
    (copy / "model.onnx").rmdir()
    with pytest.raises(BundleError, match=r"model\.onnx cannot be read"):
        checksums.check(bundle, bundle.manifest.variants[0])


def test_a_change_explains_why_loading_failed(copy: Path, cache: Path) -> None:
    """Else an intact bundle's own error stands."""
    bundle = Bundle.open(copy)
    variant = bundle.manifest.variants[0]
    with pytest.raises(UsageError, match="mine"), checksums.checked(bundle, variant):
        raise UsageError("mine")
    flip(copy / "model.onnx")
    with pytest.raises(ChecksumError, match=CHANGED), checksums.checked(bundle, variant):
        raise EngineError("a consequence")
