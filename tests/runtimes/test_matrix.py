"""A matrix: its file, its cells and their ids, what is kept and what is measured again."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from runtimes import matrix, matrix_run, measurement
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, ResultsError, UsageError
from runtimes.matrix_cell import Outcome, Task

KETTLE = "[[targets]]\nname = 'kettle'\n"


def ids(rows):
    return [(row.cell.id, row.cell.row) for row in rows]


def result_of(file: Path, **options):
    lines = []
    found = matrix_run.run(
        file, file.with_name("r.jsonl"), watch=lambda board, line: lines.append(line), **options
    )
    return found, lines


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("bundles = [", 2, "matrix .*matrix.toml is not TOML"),
        ("bundels = []", 2, "bundels: Extra inputs are not permitted"),
        ("", 2, "targets: Field required"),
        ("targets = []\nretries = 1", 2, "targets: Tuple should have at least 1 item"),
        ("retries = -1\n" + KETTLE, 2, "retries: Input should be greater than or equal to 0"),
        (KETTLE + "limit = 0", 2, "targets.0.limit: Input should be greater"),
        (KETTLE + "water = {}", 2, "targets.0.water"),
        ("bundles = []\n" + KETTLE, 2, "names no bundles and no exports"),
        ("[[targets]]\nname = 'kettel'", 2, "there is no target 'kettel'; .*did you mean kettle"),
        ("[[targets]]\nname = 'host,kettle'", 2, "there is no target 'host,kettle'"),
        (KETTLE + "milk = 1", 2, "milk=... means nothing to target kettle"),
        (KETTLE + "water = 'much'", 2, "water=... cannot be 'much': Input should be a valid integer"),
        (KETTLE + "water = true", 2, "water=... cannot be 'True'"),
        (KETTLE + "water = []", 2, "water has no value"),
        (KETTLE + "variant = 'cpu'", 2, "variant is not said there; say variants at the top"),
        (KETTLE + "progress = 1", 2, "progress is not said there"),
        (KETTLE + "limit = 2\n" + KETTLE, 2, "target kettle has two limits"),
        ("workloads = ['enormous']\n" + KETTLE, 2, "there is no workload 'enormous'"),
        ("workloads = []\n" + KETTLE, 2, "workloads: Tuple should have at least 1 item"),
        (
            "variants = ['npu-*']\n" + KETTLE,
            2,
            "no bundle of the matrix has a variant 'npu-.'; there are cpu",
        ),
        (
            "variants = ['cpu']\n[[targets]]\nname = 'iphone'\n[[targets]]\nname = 'mac'\nthreads = 1",
            2,
            "threads",
        ),
        (KETTLE + "[[exclude]]\n", 2, "exclude cannot go by nothing"),
        (
            KETTLE + "water = 1\n[[exclude]]\nmilk = 1",
            2,
            "exclude cannot go by milk; it goes by bundle, .*water",
        ),
        (KETTLE + "water = 1\n[[exclude]]\nwater = 7", 2, "exclude with water = 7 fits no cell"),
        (KETTLE + "[[exclude]]\ntarget = 'kettle'", 2, "the matrix has no cells"),
        ("bundles = ['nowhere']\n" + KETTLE, 3, "nowhere is not a bundle"),
        ("bundles = ['no*']\n" + KETTLE, 3, "no folder that matches 'no.' is a bundle"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_runs(
    kettle, gochu, matrix_file, tmp_path, text, code, words
) -> None:
    import re

    file = matrix_file(text)
    if "bundles" in text:
        file.write_text(text, encoding="utf-8")
    found, out, err = gochu("bench", "--matrix", file)
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert re.search(words, err), err
    assert [path.name for path in file.parent.iterdir()] == ["matrix.toml"]
    assert not kettle.calls


def test_a_file_that_cannot_be_read(gochu, tmp_path) -> None:
    code, out, err = gochu("bench", "--matrix", tmp_path / "없음.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "없음.toml cannot be read: No such file or directory" in err
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    assert "is not TOML" in gochu("bench", "--matrix", tmp_path / "latin.toml")[2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("out", "--matrix", "m"), "leave out a bundle"),
        (("--matrix", "m", "--on", "host"), "leave out --on"),
        (("--matrix", "m", "--trace"), "leave out --trace"),
        (("--matrix", "m", "--allow-fallback"), "leave out --allow-fallback"),
        (("out", "--ray", "local"), "goes with --matrix"),
        (("out", "--again"), "goes with --matrix"),
    ],
)
def test_what_does_not_go_together(gochu, more, words) -> None:
    code, out, err = gochu("bench", *more)
    assert (code, out) == (2, "")
    assert words in " ".join(err.replace("│", " ").split())


def test_cells_are_all_combinations_but_the_excluded(installed_kettle, matrix_file, toy) -> None:
    file = matrix_file(
        "workloads = ['smoke', 'pp8']\nvariants = ['c*']\nask = ['안녕']\n"
        + KETTLE
        + "water = [1, 2, 3]\ntrouble = 'talk'\nlimit = 3\n[[targets]]\nname = 'host'\n"
        "[[exclude]]\nwater = [2, 3]\nworkload = 'pp*'\n"
        "[[exclude]]\ntarget = 'host'\nbundle = '*/toy'\nworkload = 'smoke'"
    )
    told = matrix.read(file)
    cells = matrix.cells(told, matrix.find_bundles(told, file.parent))
    assert [(c.target, c.options.get("water"), c.workload.name, c.pool) for c in cells] == [
        ("kettle", 1, "smoke", "kettle"),
        ("kettle", 1, "pp8", "kettle"),
        ("kettle", 2, "smoke", "kettle"),
        ("kettle", 3, "smoke", "kettle"),
        ("host", None, "pp8", matrix.MACHINE),
    ]
    assert told.limits() == {matrix.MACHINE: 1, "kettle": 3}
    assert {cell.variant for cell in cells} == {"cpu"}
    assert all(cell.workload.prompts == ("안녕",) for cell in cells)
    assert str(cells[0]).endswith("toy cpu smoke water=1 trouble=talk")


def test_an_id_is_of_what_is_measured_and_not_of_where_it_lies(
    installed_kettle, matrix_file, toy, tmp_path
) -> None:
    def only(text, bundles=None):
        told = matrix.read(file := matrix_file(text, bundles))
        return [cell.id for cell in matrix.cells(told, matrix.find_bundles(told, file.parent))]

    base = only(KETTLE)
    other = Path(shutil.copytree(toy, tmp_path / "행렬" / "다른 곳"))
    assert base == only(KETTLE, ["다른 곳"]) == only(KETTLE, ["다른*", "다른 곳", str(toy)])
    assert base == only("retries = 3\n" + KETTLE + "limit = 4")
    assert len(base[0]) == 16
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + " ", encoding="utf-8")
    changed = [
        only(KETTLE, ["다른 곳"]),
        only(KETTLE + "water = 2"),
        only("workloads = ['pp8']\n" + KETTLE),
        only("ask = ['hi']\n" + KETTLE),
        only("variants = ['cpu']\n" + KETTLE),
        only("[[targets]]\nname = 'host'"),
    ]
    assert len({*base, *(id for found in changed for id in found)}) == 7


def test_korean_names_are_compared_composed(matrix_file, toy, tmp_path) -> None:
    import unicodedata

    file = matrix_file("[[targets]]\nname = 'host'\n[[exclude]]\nbundle = '고추'", ["고추*", "toy"])
    for name in ("고추", "toy"):
        shutil.copytree(toy, file.parent / unicodedata.normalize("NFD", name))
    (file.parent / "toy" / "manifest.json").write_text(
        (toy / "manifest.json").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    told = matrix.read(file)
    bundles = {
        unicodedata.normalize("NFD", name): Bundle.open(file.parent / unicodedata.normalize("NFD", name))
        for name in ("고추", "toy")
    }
    assert [cell.label for cell in matrix.cells(told, bundles)] == ["toy"]


def test_rows_come_with_their_cells_and_a_rerun_measures_nothing(kettle, gochu, matrix_file) -> None:
    file = matrix_file("workloads = ['smoke', 'pp8,tg8']\nask = ['안녕']\n" + KETTLE + "water = [1, 2]")
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert code == 0, err
    assert "[4/4] done kettle" in err
    rows = measurement.read(file.with_name("matrix.results.jsonl"))
    assert json.loads(out) == [row.model_dump(mode="json") for row in rows]
    assert [(row.cell.row, row.cell.of) for row in rows] == [(1, 1), (1, 2), (2, 2)] * 2
    assert [row.where.device for row in rows] == ["주전자 1"] * 3 + ["주전자 2"] * 3
    assert len({row.cell.id for row in rows}) == len(kettle.calls) == 4
    assert gochu("bench", "--matrix", file, "--json")[1] == out
    assert len(kettle.calls) == 4
    code, again, _ = gochu("bench", "--matrix", file, "--json", "--again")
    assert (code, len(kettle.calls)) == (0, 8)
    later = measurement.read(file.with_name("matrix.results.jsonl"))
    assert later[:6] == rows
    assert ids(later[6:]) == ids(rows)
    assert json.loads(again) == [row.model_dump(mode="json") for row in later[6:]]


def test_only_what_is_missing_is_measured_again(kettle, matrix_file) -> None:
    """After a run that was cut off in a row of a cell, or in the middle of a line."""
    file = matrix_file("workloads = ['pp8,tg8']\n" + KETTLE + "water = [1, 2]")
    first, _ = result_of(file)
    out = file.with_name("r.jsonl")
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:50], encoding="utf-8")
    second, said = result_of(file)
    assert ids(second.rows) == ids(first.rows) == ids(measurement.read(out))
    assert second.rows[:3] == first.rows[:3]
    assert second.rows[3] != first.rows[3]
    assert (len(kettle.calls), len(said)) == (3, 2)
    assert said[1].startswith("[2/2] done kettle")


def test_a_cell_that_fails_is_told_and_the_others_go_on(kettle, gochu, matrix_file) -> None:
    file = matrix_file(
        "retries = 1\n"
        + KETTLE
        + "trouble = ['cold', 'crash', 'nothing', 'old', 'interrupted', 'once', 'talk']"
    )
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert code == 6
    failed = [
        json.loads(line)
        for line in file.with_name("matrix.results.failed.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(each["label"].rpartition("=")[2], each["exit_code"]) for each in failed] == [
        ("cold", 6),
        ("crash", 6),
        ("nothing", 6),
        ("old", 6),
        ("interrupted", 6),
    ]
    said = [each["error"] for each in failed]
    assert said[0] == "주전자가 차갑다: plug it in"
    assert said[1].startswith("its process was killed by signal 9 and said: nothing")
    assert said[2] == "the target measured nothing"
    assert said[3].endswith("trouble=old said has schema version 1 where this Gochu reads 2: measure again")
    assert said[4] == "it was interrupted"
    assert err.splitlines()[-1].startswith("gochu: 5 of the matrix's cells or exports failed")
    assert "주전자가 차갑다: plug it in" in err.splitlines()[-6]
    assert [row["where"]["target"] for row in json.loads(out)] == ["kettle", "kettle"]
    assert Counter(call[2] for call in kettle.calls) == {
        "cold": 2,
        "crash": 2,
        "nothing": 1,
        "old": 1,
        "interrupted": 1,
        "once": 2,
        "talk": 1,
    }
    kept = measurement.read(file.with_name("matrix.results.jsonl"))
    assert [row.marks for row in kept] == [("interrupted",), (), ()]
    file.write_text(file.read_text(encoding="utf-8").replace("'cold', 'crash', 'nothing', 'old', ", ""))
    code, _, err = gochu("bench", "--matrix", file)
    assert (code, len(kettle.calls)) == (6, 11), "an interrupted row is no measurement that is done"
    assert "kettle" in err


def test_one_at_a_time_and_more_where_a_limit_says_so(kettle, matrix_file) -> None:
    cells = KETTLE + "water = [1, 2, 3]\ntrouble = "
    result_of(matrix_file(cells + "'nap'"))
    begun = [float(call[3]) for call in kettle.calls]
    assert all(later - before >= 0.2 for before, later in itertools.pairwise(begun))
    kettle.forget()
    found = []
    file = matrix_file(cells + "'hold'\nlimit = 2")
    thread = threading.Thread(target=lambda: found.append(result_of(file)))
    thread.start()
    kettle.called(2)  # the first is held until
    assert len(kettle.calls) == 2
    kettle.go()
    thread.join()
    ((result, lines),) = found
    assert len(result.rows) == 3
    assert [line.split()[1] for line in lines][:3] == ["began", "began", "done"]


def test_nobody_else_writes_to_the_same_file(kettle, matrix_file) -> None:
    file = matrix_file(KETTLE + "trouble = 'hold'")
    found = []
    thread = threading.Thread(target=lambda: found.append(result_of(file)[0]))
    thread.start()
    kettle.called(1)
    with pytest.raises(ResultsError, match=r"^another matrix is adding to .*r.jsonl"):
        result_of(file)
    kettle.go()
    thread.join()
    assert len(found[0].rows) == 1
    with pytest.raises(ResultsError, match="cannot be written"):
        matrix_run.run(file, file / "r.jsonl")


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(kettle, matrix_file, gochu, number) -> None:
    file = matrix_file(KETTLE + "trouble = ['talk', 'hold', 'nap']")
    command = [sys.executable, "-m", "exporter.cli", "bench", "--matrix", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        cell = int(kettle.called(2)[0])
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert "[1/3] stopped kettle" in err
        assert "stopped; the same command goes on where it was\n" in err
    deadline = 300
    while alive(cell) and deadline:
        threading.Event().wait(0.05)
        deadline -= 1
    assert not alive(cell), "the cell's process outlived the matrix"
    assert not file.with_name("matrix.results.failed.jsonl").exists()
    kettle.go()
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert code == 0, err
    assert [call[2] for call in kettle.calls] == ["talk", "hold", "hold", "nap"]
    assert len({row["cell"]["id"] for row in json.loads(out)}) == len(json.loads(out)) == 3


def test_a_bundle_that_changes_meanwhile_is_not_measured(kettle, copy, matrix_file) -> None:
    file = matrix_file(KETTLE + "trouble = ['hold', 'talk']", [str(copy)])
    found = []
    thread = threading.Thread(target=lambda: found.append(result_of(file)[0]))
    thread.start()
    kettle.called(1)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + " ", encoding="utf-8")
    kettle.go()
    thread.join()
    assert "is not the bundle that the matrix was read with" in found[0].failures[0].error
    assert (len(found[0].rows), len(kettle.calls)) == (1, 1)


def test_the_host_is_a_target_of_a_matrix(matrix_file, gochu) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    file = matrix_file("workloads = ['pp4+tg2']\nask = ['안녕']\n[[targets]]\nname = 'host'\nthreads = 1")
    code, out, err = gochu("bench", "--matrix", file, "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert (row["where"]["target"], row["where"]["threads"]) == ("host", 1)
    assert row["answers"][0]["prompt"] == "안녕"
    assert row["command"] == "gochu bench toy --workload pp4+tg2 --threads 1 --ask '안녕'"


def test_a_board_tells_how_far_a_run_is() -> None:
    tasks = [
        Task(id=str(n), label=f"cell {n}", kind="host", pool="machine", function="", data={})
        for n in range(4)
    ]
    board = matrix_run.Board.of(tasks, ["host", "adb"], {"machine": 2})
    assert board.seconds_left() is None
    assert board.begin(tasks[0]) == "[2/6] began cell 0"
    assert board.end(Outcome(id="0", value=[], seconds=8)) == "[3/6] done cell 0 (8.0 s)"
    assert board.seconds_left() == 12
    board.begin(tasks[1])
    assert board.end(Outcome(id="1", error="no", exit_code=6, seconds=1)) == "[4/6] failed cell 1 (1.0 s): no"
    board.begin(tasks[2])
    assert dict(board.counts["host"]) == {"kept": 1, "left": 1, "running": 1, "done": 1, "failed": 1}
    assert board.seconds_left() == 8


def test_exports_are_for_who_can_export(matrix_file) -> None:
    file = matrix_file("[[targets]]\nname = 'host'\n[[exports]]\noutput = 'out'")
    with pytest.raises(UsageError, match="nothing here exports"):
        matrix_run.run(file, file.with_name("r.jsonl"))


def test_a_pattern_takes_bundles_and_passes_over_all_else(matrix_file, toy) -> None:
    file = matrix_file("[[targets]]\nname = 'host'", ["o*"])
    shutil.copytree(toy, file.parent / "one")
    (file.parent / "other").mkdir()
    (file.parent / "ok.txt").touch()
    told = matrix.read(file)
    assert list(matrix.find_bundles(told, file.parent)) == ["one"]
    (file.parent / "one" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="schema version None"):
        matrix.find_bundles(told, file.parent)
    assert os.listdir(file.parent / "other") == []


def test_the_example_in_the_docs_is_a_matrix() -> None:
    import tomllib

    texts = []
    for name in ("matrix.md", "matrix.ko.md"):
        text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
        texts.append(text.partition("```toml\n")[2].partition("```")[0])
    english, korean = map(tomllib.loads, texts)
    assert english == korean
    assert matrix.Matrix.model_validate(english).limits() == {matrix.MACHINE: 1, "adb": 2}
