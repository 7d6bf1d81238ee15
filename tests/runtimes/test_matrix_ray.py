"""A matrix on Ray: a real cluster of one machine, started as its owner would."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from runtimes import matrix_ray, matrix_run, measurement
from runtimes.errors import TargetError, UsageError
from runtimes.extras import installed

pytestmark = pytest.mark.skipif(not installed("ray"), reason="ray is not installed")

TWELVE = (
    "workloads = ['smoke', 'pp8,tg8']\nask = ['안녕']\n[[targets]]\nname = 'kettle'\nlimit = 2\n"
    "water = [1, 2, 3]\ntrouble = ['', 'talk']\n"
)


TOKEN = "0123456789abcdef0123456789abcdef"  # without one Ray writes one into the home


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def token():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def cluster(installed_kettle, token):
    """The address of a cluster with two places for kettles and none for machines."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="gochu-ray-") as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [
            f"--port={port}",
            "--num-cpus=2",
            '--resources={"gochu-kettle": 2}',
            f"--temp-dir={folder}",
        ]
        command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
        with open(Path(folder) / "said", "w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
            try:
                deadline = time.monotonic() + 60
                while "Ray runtime started" not in (Path(folder) / "said").read_text():
                    assert process.poll() is None, (Path(folder) / "said").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                yield f"127.0.0.1:{port}"
            finally:
                process.terminate()
                process.wait(20)


def what(rows):
    """Of rows all that is no figure, in an order of their own."""
    return sorted(
        (each.cell.id, each.cell.row, each.cell.of, each.where.device, each.how.prompt_tokens, each.answers)
        for each in rows
    )


def test_the_same_rows_as_without_it(cluster, kettle, matrix_file, gochu) -> None:
    file = matrix_file(TWELVE)
    here = matrix_run.run(file, file.with_name("here.jsonl"))
    kettle.forget()
    code, out, err = gochu("bench", "--matrix", file, "--ray", cluster, "--json")
    assert code == 0, err
    rows = measurement.read(file.with_name("matrix.results.jsonl"))
    assert what(rows) == what(here.rows)
    assert len({row.cell.id for row in rows}) == 12
    assert len(rows) == 18
    assert [row["cell"] for row in json.loads(out)] == [row.cell.model_dump() for row in here.rows]
    assert {row.answers[0].prompt for row in rows} == {"안녕"}
    assert all(line.startswith("[") for line in err.splitlines()), "Ray is not heard"
    assert len(err.splitlines()) == 24
    assert TOKEN not in out + err
    assert gochu("bench", "--matrix", file, "--ray", cluster, "--json")[1] == out
    assert len(kettle.calls) == 12, "what is done is kept"


def test_a_worker_that_is_killed_loses_no_row_and_doubles_none(cluster, kettle, matrix_file) -> None:
    file = matrix_file(
        "retries = 0\n[[targets]]\nname = 'kettle'\nlimit = 1\nwater = [1, 2]\ntrouble = ['talk', 'hold', 'cold']\n"
    )
    killed = []

    def kill() -> None:
        process, worker, *_ = first_held(kettle)
        os.kill(int(worker), signal.SIGKILL)
        held, deadline = 0, time.monotonic() + 20
        while (held < 3 or alive(int(process))) and time.monotonic() < deadline:
            time.sleep(0.02)
            held = sum(call[2] == "hold" for call in kettle.calls)  # both, and the first again
        killed.append((held, alive(int(process))))
        kettle.go()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = matrix_run.run(file, file.with_name("r.jsonl"), ray=cluster)
    thread.join()
    assert killed == [(3, False)], "the cell of a dead worker stops, and runs again"
    rows = measurement.read(file.with_name("r.jsonl"))
    assert Counter(row.cell.id for row in rows) == {row.cell.id: 1 for row in found.rows}
    assert len(rows) == 4
    assert Counter(call[2] for call in kettle.calls) == {"talk": 2, "hold": 3, "cold": 2}
    assert [each.error for each in found.failures] == ["주전자가 차갑다: plug it in"] * 2


def first_held(kettle) -> list[str]:
    while not (held := [call for call in kettle.calls if call[2] == "hold"]):
        time.sleep(0.02)
    return held[0]


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ctrl_c_stops_what_runs_on_the_cluster(cluster, kettle, matrix_file, gochu) -> None:
    file = matrix_file("[[targets]]\nname = 'kettle'\nlimit = 1\ntrouble = ['talk', 'hold', 'nap', 'cold']\n")
    command = [sys.executable, "-m", "exporter.cli", "bench", "--matrix", str(file), "--ray", cluster]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        cell = int(first_held(kettle)[0])
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 130, err
    assert "stopped kettle" in err
    for _ in range(200):
        if not alive(cell):
            break
        time.sleep(0.05)
    assert not alive(cell)
    file.write_text(file.read_text(encoding="utf-8").replace(", 'cold'", ""), encoding="utf-8")
    kettle.go()
    code, out, err = gochu("bench", "--matrix", file, "--ray", cluster, "--json")
    assert (code, len(json.loads(out))) == (0, 3), err


def test_a_cluster_without_the_place_for_a_target(cluster, kettle, matrix_file, gochu) -> None:
    file = matrix_file("[[targets]]\nname = 'kettle'\n")
    code, out, err = gochu("bench", "--matrix", file, "--ray", cluster)
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert f"no machine of the Ray cluster {cluster} has the resource gochu-machine" in err
    assert not kettle.calls


def test_a_cluster_of_its_own(kettle, matrix_file, gochu, monkeypatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    file = matrix_file("[[targets]]\nname = 'kettle'\nwater = [1, 2]\n")
    code, out, err = gochu("bench", "--matrix", file, "--ray", "local", "--json")
    assert (code, len(json.loads(out))) == (0, 2), err
    assert len(err.splitlines()) == 4
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_no_cluster_is_one_sentence(matrix_file, gochu, installed_kettle) -> None:
    file = matrix_file("[[targets]]\nname = 'kettle'\n")
    code, out, err = gochu("bench", "--matrix", file, "--ray", f"127.0.0.1:{free_port()}")
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert "no Ray cluster answers at 127.0.0.1:" in err
    code, out, err = gochu("bench", "--matrix", file, "--ray", "elsewhere")
    assert (code, err.count("\n")) == (2, 1)
    assert "'elsewhere' is no address of a Ray cluster" in err
    with pytest.raises(UsageError, match="no address"):
        matrix_ray.Cluster("host:99999", {}, set())


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", b""])
def test_what_answers_may_be_no_cluster(answer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(TargetError, match="no Ray cluster"):
            matrix_ray.Cluster(f"127.0.0.1:{server.getsockname()[1]}", {}, set())
        thread.join()


def test_ray_may_be_missing(matrix_file, gochu, monkeypatch, installed_kettle) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = matrix_file("[[targets]]\nname = 'kettle'\n")
    code, out, err = gochu("bench", "--matrix", file, "--ray", "local")
    assert (code, out) == (5, "")
    assert err == "gochu: ray is not installed; install it with `pip install 'gochu[ray]'`\n"
