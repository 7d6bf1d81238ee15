"""`gochu bench --matrix` with exports first, and the table that moves while it runs."""

import inspect
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from exporter import cli, cli_matrix
from exporter.errors import OutputExists, UsageError
from runtimes import matrix_run
from runtimes.bundle import Bundle
from runtimes.matrix_cell import Task

MATRIX = """
bundles = ["out/*"]
workloads = ["pp4+tg2"]
ask = ["23 더하기 45는?"]
targets = [{ name = "host", threads = 1 }]

[[exports]]
output = "out/고추"
scheme = "int8"
context = 64
verify = false
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.toml"
    path.write_text(MATRIX, encoding="utf-8")
    return path


def test_a_matrix_can_say_what_gochu_export_can() -> None:
    asked = set(inspect.signature(cli.export).parameters) - {"as_json"}
    assert asked == cli_matrix.Export.model_fields.keys()


def test_what_is_exported_is_measured_and_is_not_exported_twice(file: Path, gochu) -> None:
    pytest.importorskip("onnxruntime", reason="runs the bundle")
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    bundle = file.parent / "out" / "고추"
    assert Bundle.open(bundle).manifest.variants[0].context == 64
    assert (row["what"]["model"], row["what"]["scheme"]) == ("pepper", "int8")
    assert "68" in row["answers"][0]["text"]
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        "[0/1] began export pepper to out/고추",
        "[1/1] done export pepper to out/고추",
        "[0/1] began host out/고추 pp4+tg2 threads=1",
        "[1/1] done host out/고추 pp4+tg2 threads=1",
    ]
    assert gochu("bench", "--matrix", file, "--json") == (0, out, "")

    file.write_text(MATRIX.replace("64", "96"), encoding="utf-8")
    code, out, err = gochu("bench", "--matrix", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "out/고추 exists already, and not from this export of the matrix" in err
    file.write_text(MATRIX.replace("64", "96") + "force = true", encoding="utf-8")
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert (code, json.loads(out)[0]["how"]["context"]) == (0, 96), err


def test_an_export_that_fails_is_told_and_the_rest_goes_on(file: Path, gochu, bundles) -> None:
    pytest.importorskip("onnxruntime", reason="runs the bundle")
    shutil.copytree(bundles("pepper", "int8").path, file.parent / "out" / "다른")
    file.write_text(MATRIX.replace('"int8"', '"int3"'), encoding="utf-8")
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert (code, len(json.loads(out))) == (6, 1), err
    (line,) = (file.parent / "m.results.failed.jsonl").read_text(encoding="utf-8").splitlines()
    failed = json.loads(line)
    assert failed["label"] == "export pepper to out/고추"
    assert "int3" in failed["error"]
    assert f"failed: export pepper to out/고추: {failed['error']}" in err
    assert not (file.parent / "out" / "고추").exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "export 1 of the matrix: output: Field required"),
        ({"output": "out", "sheme": "int4"}, "export 1 of the matrix: sheme: Extra inputs"),
    ],
)
def test_an_export_that_cannot_be_read(tmp_path: Path, table, words) -> None:
    with pytest.raises(UsageError, match=words):
        cli_matrix.exports([table], tmp_path)


def test_where_exports_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    first, second = cli_matrix.exports(
        [{"output": "a", "checkpoint": "checkpoint"}, {"output": "../b", "checkpoint": "org/model"}], tmp_path
    )
    assert (first.output, second.output) == (tmp_path / "a", tmp_path.parent / "b")
    assert first.task.data["checkpoint"] == str(tmp_path / "checkpoint")
    assert second.task.data["checkpoint"] == "org/model"
    with pytest.raises(UsageError, match="two exports of the matrix write"):
        cli_matrix.exports([{"output": "a"}, {"output": "b/../a"}], tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputExists, match="not from this export"):
        cli_matrix.exports([{"output": "a"}], tmp_path)


def test_the_table_tells_how_far_a_run_is() -> None:
    from rich.console import Console

    tasks = [
        Task(id=str(n), label=f"cell [{n}]", kind="host", pool="machine", function="", data={})
        for n in range(12)
    ]
    board = matrix_run.Board.of(tasks, ["adb"], {"machine": 1})
    for task in tasks[:10]:
        board.begin(task)
    text = io.StringIO()
    Console(file=text, width=200).print(cli_matrix._table(board))
    shown = text.getvalue()
    assert re.search(r"host +0 +0 +10 +0 +2", shown)
    assert re.search(r"adb +1 +0 +0 +0 +0", shown)
    assert "running: cell [0]\nrunning: cell [1]\n" in shown
    assert shown.endswith("running: cell [7]\nand 2 more\n")
    assert "about" not in shown
    board.end(matrix_run.Outcome(id="0", value=[], seconds=60))
    text.truncate(0)
    Console(file=text, width=200).print(cli_matrix._table(board))
    assert "about 11 min left\nrunning: cell [1]\n" in text.getvalue()
