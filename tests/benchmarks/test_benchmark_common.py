import json
import sys

import pytest
from common import Bound, finish, run_measured, run_or_stop, table

MEGABYTE = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

HOLD = "import time; held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.1)"


def python(code):
    return [sys.executable, "-c", code]


def test_memory_is_that_of_the_process_and_its_children_together():
    empty = run_measured(python("import time, subprocess; time.sleep(0.1)"))
    child = HOLD.format(size=100 * MEGABYTE)
    both = run_measured(
        python(
            "import subprocess, sys\n"
            f"held = bytearray({50 * MEGABYTE}); held[::4096] = b'x' * len(held[::4096])\n"
            f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
        )
    )
    added = (both.peak_anon_bytes - empty.peak_anon_bytes) / MEGABYTE
    assert 148 < added < 180  # 50 + 100, and a second interpreter
    assert both.peak_rss_bytes > both.peak_anon_bytes


def test_pages_of_a_mapped_file_are_not_counted_as_memory_without_a_file(tmp_path):
    (tmp_path / "data").write_bytes(b"x" * 80 * MEGABYTE)
    mapped = run_measured(
        python(
            "import mmap, time\n"
            f"file = open({str(tmp_path / 'data')!r}, 'rb')\n"
            "data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
            "sum(data[i] for i in range(0, len(data), 4096)); time.sleep(0.1)"
        )
    )
    assert mapped.peak_anon_bytes < 40 * MEGABYTE
    assert mapped.peak_rss_bytes > 80 * MEGABYTE


def test_wall_time_output_and_exit_code_are_the_commands(capfd):
    run = run_measured(
        python("import os, sys, time; time.sleep(0.3); print(os.environ['WORD']); sys.exit('갔다')"),
        {"WORD": "고추"},
    )
    assert 0.3 <= run.wall_s < 5
    assert (run.returncode, run.stdout, run.stderr_tail) == (1, "고추\n", "갔다\n")
    assert capfd.readouterr() == ("", "")


def test_a_command_that_fails_ends_the_benchmark_with_what_it_said():
    with pytest.raises(SystemExit, match="no such thing"):
        run_or_stop(python("import sys; sys.exit('no such thing')"))


@pytest.mark.parametrize(
    ("value", "at_least", "check", "code"),
    [
        (0.9, False, True, 0),
        (1.1, False, True, 1),
        (1.1, True, True, 0),
        (0.9, True, True, 1),
        (1.1, False, False, 0),
    ],
)
def test_a_missed_bound_fails_the_command_only_when_checked(capsys, value, at_least, check, code):
    with pytest.raises(SystemExit) as end:
        finish({"benchmark": "x"}, [Bound("ratio", value, 1.0, at_least)], check)
    assert end.value.code == code
    *said, last = capsys.readouterr().out.splitlines()
    assert ("MISSED" in said[0]) == ((value < 1) == at_least)
    kept = (value > 1) == at_least
    assert json.loads(last) == {
        "benchmark": "x",
        "bounds": {"ratio": {"value": value, "limit": 1.0, "kept": kept}},
    }


def test_a_table_shows_every_row(capsys):
    table(
        "Speed",
        [{"case": "pepper", "tok/s": 1.5, "ratio": None}, {"case": "other", "tok/s": 20, "ratio": 2.0}],
    )
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Speed", "pepper", "1.50", "other", "20", "2.00"))
    assert "None" not in printed
