"""Outputs appear whole or not at all, and what was cut off goes on where it stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from exporter import export, pipeline
from exporter.errors import OutputError, OutputExists
from exporter.formats import onnx as onnx_format
from exporter.staging import staging, write_whole

OPTIONS = {"scheme": "int4", "context": 64, "verify": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def two_files(at: Path) -> str:
    """A step."""
    (at / "a").write_text("1", encoding="utf-8")
    (at / "b").write_text("2", encoding="utf-8")
    return "made"


def never(*_: Any) -> Any:
    raise AssertionError("a finished step was done again")


class Crash(BaseException):
    """What no step expects."""


def test_the_output_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staging(out, 1) as stage:
        assert stage.step("one", two_files) == "made"
        assert not out.exists()
    assert contents(out) == {"a": b"1", "b": b"2"}
    assert list(out.parent.iterdir()) == [out]


def test_an_empty_folder_is_no_output_yet(tmp_path):
    (tmp_path / "out").mkdir()
    with staging(tmp_path / "out", 1) as stage:
        stage.step("one", two_files)
    assert sorted(contents(tmp_path / "out")) == ["a", "b"]


def crash_after_one(out: Path, fingerprint: object = 1, force: bool = False) -> None:
    """An export that is cut off in its second step."""

    def half(at: Path) -> None:
        (at / "c").write_text("half", encoding="utf-8")
        raise Crash

    def run() -> None:
        with staging(out, fingerprint, force) as stage:
            stage.step("one", two_files)
            stage.step("two", half)

    with pytest.raises(Crash):
        run()


def test_a_rerun_keeps_finished_steps_and_their_results(tmp_path):
    out = tmp_path / "out"
    crash_after_one(out)
    assert not out.exists()
    with staging(out, 1) as stage:
        assert stage.step("one", never) == "made"
        assert not (stage.folder / "c").exists()
        stage.step("two", lambda at: write_whole(at / "c", "whole"))
    assert contents(out) == {"a": b"1", "b": b"2", "c": b"whole"}


@pytest.mark.parametrize("damage", ["change", "cut", "remove", "forget", "scramble"])
def test_a_rerun_does_damaged_steps_again(tmp_path, damage):
    out = tmp_path / "out"
    crash_after_one(out)
    partial = tmp_path / ".out.partial"
    if damage == "change":
        (partial / "a").write_text("9", encoding="utf-8")
    elif damage == "cut":
        (partial / "a").write_text("", encoding="utf-8")
    elif damage == "remove":
        (partial / "a").unlink()
    elif damage == "forget":
        (partial / ".progress.json").unlink()
    else:
        (partial / ".progress.json").write_text('{"finger', encoding="utf-8")
    with staging(out, 1) as stage:
        stage.step("one", two_files)
    assert contents(out) == {"a": b"1", "b": b"2"}


def test_files_in_folders_are_kept_and_removed_with_them(tmp_path):
    def nested(at: Path) -> None:
        (at / "m.mlpackage" / "Data").mkdir(parents=True)
        (at / "m.mlpackage" / "Data" / "w").write_text("1", encoding="utf-8")

    def broken(at: Path) -> None:
        (at / "n.mlpackage").mkdir()
        (at / "n.mlpackage" / "half").write_text("2", encoding="utf-8")
        raise Crash

    out = tmp_path / "out"

    def run() -> None:
        with staging(out, 1) as stage:
            stage.step("one", nested)
            stage.step("two", broken)

    with pytest.raises(Crash):
        run()
    assert not (tmp_path / ".out.partial" / "n.mlpackage").exists()
    with staging(out, 1) as stage:
        stage.step("one", never)
        assert [entry.path for entry in stage.entries()] == ["m.mlpackage/Data/w"]
    assert (out / "m.mlpackage" / "Data" / "w").read_text(encoding="utf-8") == "1"


def test_what_is_spent_goes_when_the_step_that_spends_it_is_done(tmp_path):
    out = tmp_path / "out"

    def spends(at: Path) -> None:
        assert (at / "a").read_text(encoding="utf-8") == "1"
        (at / "c").write_text("3", encoding="utf-8")

    def fails(at: Path) -> None:
        raise Crash

    def run(second: Any) -> None:
        with staging(out, 1) as stage:
            stage.step("one", two_files)
            stage.step("two", second, spent=["a"])
            assert not (stage.folder / "a").exists()
            raise Crash

    with pytest.raises(Crash):
        run(fails)
    assert (tmp_path / ".out.partial" / "a").is_file()  # it will be needed again
    with pytest.raises(Crash):
        run(spends)
    assert not (tmp_path / ".out.partial" / "a").exists()
    with staging(out, 1) as stage:
        assert stage.step("one", never) == "made"
        stage.step("two", never, spent=["a"])
    assert contents(out) == {"b": b"2", "c": b"3"}


def test_a_workspace_is_kept_for_a_rerun_and_no_part_of_the_output(tmp_path):
    out = tmp_path / "out"

    def cut_off() -> None:
        with staging(out, 1) as stage:
            stage.workspace().step("hidden", two_files)
            stage.step("shown", lambda at: write_whole(at / "c", "3"))
            raise Crash

    with pytest.raises(Crash):
        cut_off()
    with staging(out, 1) as stage:
        work = stage.workspace()
        assert work.is_done("hidden")
        assert work.step("hidden", never) == "made"
        stage.step("shown", never)
        assert [entry.path for entry in stage.entries()] == ["c"]
    assert contents(out) == {"c": b"3"}
    shutil.rmtree(out)
    with pytest.raises(Crash):
        cut_off()
    with staging(out, 2) as stage:  # another export
        assert not stage.workspace().is_done("hidden")


def test_another_export_takes_nothing_up(tmp_path):
    out = tmp_path / "out"
    crash_after_one(out, fingerprint={"scheme": "int8"})
    with staging(out, {"scheme": "int4"}) as stage:
        assert stage.step("one", lambda at: "new") == "new"
    assert contents(out) == {}


def test_two_exports_to_one_output(tmp_path):
    out, inside, done = tmp_path / "out", threading.Event(), threading.Event()

    def first() -> None:
        with staging(out, 1) as stage:
            stage.step("one", two_files)
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with pytest.raises(OutputError, match="another export is writing"), staging(out, 1):
        pass
    done.set()
    thread.join()
    assert contents(out) == {"a": b"1", "b": b"2"}


def test_what_is_there_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("x", encoding="utf-8")
    for force in (False, True):  # even then: it is no bundle
        with pytest.raises(OutputExists), staging(out, 1, force):
            pass
    assert contents(out) == {"x": b"x"}


def test_force_replaces_a_bundle_only_when_the_new_one_stands(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old", encoding="utf-8")
    crash_after_one(out, force=True)
    assert contents(out) == {"manifest.json": b"old"}
    with staging(out, 1, force=True) as stage:
        stage.step("one", never)
    assert contents(out) == {"a": b"1", "b": b"2"}
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_cannot_be_made():
    with pytest.raises(OutputError, match="could not be written"), staging(Path("/proc/gochu/out"), 1):
        pass


# whole exports, killed


def kill_in(function: str, after: int, *arguments: object) -> None:
    """Run an export in a process that is killed at the `after`th call of a function of the pipeline's."""
    script = f"""
import os, signal, sys
import exporter.pipeline, exporter.formats.onnx_graph
module, name = {function!r}.rsplit(":", 1)
owner = sys.modules[module.partition("/")[0]]
for part in module.split("/")[1:]:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0
def deadly(*rest, **more):
    global calls
    calls += 1
    if calls == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*rest, **more)
setattr(owner, name, deadly)
from exporter.cli import main
sys.argv = ["gochu", *{[str(a) for a in arguments]!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_before_the_gate(checkpoints, tmp_path, gochu, monkeypatch):
    """The rerun takes up the very files that are there, and ends as an export that was never killed."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    arguments = ["export", checkpoints.folder("qwen2"), "--scheme", "int4", "--context", 64, "-o"]
    kill_in("exporter.pipeline:run_gate", 1, *arguments, out)
    assert not out.exists()
    kept = (tmp_path / ".out.partial" / "model.onnx.data").stat().st_ino
    code, _, err = gochu(*arguments, fresh)
    assert code == 0, err
    monkeypatch.setattr(onnx_format, "write_onnx", never)
    code, _, err = gochu(*arguments, out)
    assert code == 0, err
    assert (out / "model.onnx.data").stat().st_ino == kept
    assert contents(out) == contents(fresh)


@pytest.mark.parametrize("after", [1, 20])
def test_killed_while_weights_are_written(checkpoints, tmp_path, gochu, after):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    arguments = [
        "export",
        checkpoints.folder("qwen2"),
        "--scheme",
        "int4",
        "--context",
        64,
        "--no-verify",
        "-o",
    ]
    kill_in("exporter.formats.onnx_graph/DataFile:append", after, *arguments, out)
    assert not out.exists()
    for folder in (out, fresh):
        code, _, err = gochu(*arguments, folder)
        assert code == 0, err
    assert contents(out) == contents(fresh)
    assert sorted(tmp_path.iterdir()) == [fresh, out]


def test_a_rerun_with_other_options_begins_anew(checkpoints, tmp_path, monkeypatch):
    out, source = tmp_path / "out", checkpoints.folder("qwen2")
    monkeypatch.setattr(pipeline, "_manifest", never)
    with pytest.raises(AssertionError):
        export(source, out, **OPTIONS)
    monkeypatch.undo()
    export(source, out, **OPTIONS | {"scheme": "int8"})
    expected = export(source, tmp_path / "fresh", **OPTIONS | {"scheme": "int8"})
    assert contents(out) == contents(expected.path)


@pytest.mark.parametrize("change", ["weights", "tokenizer", "eos", "template"])
def test_a_rerun_with_another_checkpoint_begins_anew(checkpoints, tmp_path, monkeypatch, change):
    source = tmp_path / "checkpoint"
    shutil.copytree(checkpoints.folder("qwen2"), source)
    monkeypatch.setattr(pipeline, "_manifest", never)
    with pytest.raises(AssertionError):
        export(source, tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    if change == "weights":
        os.utime(source / "model.safetensors", ns=(1, 1))
        path = source / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    elif change == "tokenizer":
        path = source / "tokenizer.json"
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    elif change == "eos":
        path = source / "generation_config.json"
        data = json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": [5, 6]}
        path.write_text(json.dumps(data), encoding="utf-8")
    else:
        (source / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    export(source, tmp_path / "out", **OPTIONS)
    export(source, tmp_path / "fresh", **OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
