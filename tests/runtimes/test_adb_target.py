"""The target adb from end to end: adbutils, a real adb server, and a phone that is a folder (adb_phone.py)."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("adbutils", reason="adbutils is not installed")
if sys.platform != "linux":
    pytest.skip("the phone of these tests is made of Linux's /proc and tools", allow_module_level=True)

sys.path.append(str(Path(__file__).parent))

import adbutils
from adb_phone import Phone, thermal

from runtimes import android, measurement_line, phone, phone_work
from runtimes.bundle import file_sha256
from runtimes.errors import ChecksumError, SomeFailed, TargetError, UsageError
from runtimes.farm import Clock
from runtimes.measurement import Backend, Measurement, Method, Place, Subject, sampled
from runtimes.targets import adb
from runtimes.workload import Case, Workload

LLAMA_MAIN = """#!/bin/sh
printf '%s\\n' "$@" >>"$GOCHU_PHONE/calls"
{do}
echo "I 00:00:00.000123 executorch:main.cpp:87] Resetting threadpool with num threads = 4"
echo 'PyTorchObserver {{"prompt_tokens":16,"generated_tokens":15,"model_load_start_ms":1000,"model_load_end_ms":1500,\
"inference_start_ms":2000,"inference_end_ms":2260,"prompt_eval_end_ms":2080,"first_token_ms":2081,\
"aggregate_sampling_time_ms":3,"SCALING_FACTOR_UNITS_PER_SECOND":1000}}'
"""
LLAMA_BENCH = """#!/bin/sh
case "$*" in *"-n 0"*) p=16 n=0 d=0 t='8000000, 10000000' ;; *) p=0 n=16 d=16 t='400000000, 500000000' ;; esac
cat <<END
[
  {{
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "backends": "{backends}",
    "n_threads": 4,
    "n_prompt": $p,
    "n_gen": $n,
    "n_depth": $d,
    "samples_ns": [ $t ]
  }}
]
END
"""
MEMINFO = """Applications Memory Usage (in Kilobytes):
Uptime: 4411552 Realtime: 4411552

** MEMINFO in pid 4711 [llama_main] **
                   Pss  Private  Private     Swap      Rss     Heap     Heap     Heap
                 Total    Dirty    Clean    Dirty    Total     Size    Alloc     Free
                ------   ------   ------   ------   ------   ------   ------   ------
  Native Heap     1012     1012        0        0     2024        0        0        0
      Gfx dev      100      100        0        0      100
   EGL mtrack     2000     2000        0        0     2000
    GL mtrack     3000     3000        0        0     3000
      Unknown      500      500        0        0      500
        TOTAL     6612     6612        0        0     7624        0        0        0

 App Summary
             Graphics:     5100                           5100
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real adb server on a port of its own, with a home of its own; its port."""
    program = next(Path(adbutils.__file__).parent.glob("binaries/adb*"), None)
    if program is None:
        pytest.skip("adbutils came without an adb program")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    home = tmp_path_factory.mktemp("adb")
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-L", f"tcp:{port}", "nodaemon", "server"],
            env={"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"], "ADB_MDNS": "0"},
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    pytest.skip(f"no adb server starts here: {(home / 'log').read_text()[-300:]}")
                time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


class Fast:
    """A clock that goes fast: it is asked to sleep seconds, and sleeps milliseconds. Looking at it takes 10 ms."""

    def __init__(self) -> None:
        self.time, self._lock = 0.0, threading.Lock()

    def now(self) -> float:
        with self._lock:
            self.time += 0.01
        return self.time

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.time += seconds
        time.sleep(min(seconds / 50, 0.02))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Fast:
    fast = Fast()
    monkeypatch.setattr(adb, "CLOCK", Clock(now=fast.now, sleep=fast.sleep))
    monkeypatch.setattr(phone, "LOOK", 0.05)
    return fast


@pytest.fixture
def connect(
    server: int, clock: Fast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Phone]]:
    """`connect(...)`: a phone that the adb server knows."""
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server))
    client = adbutils.AdbClient(host="127.0.0.1", port=server)
    phones: list[Phone] = []

    def connect(state: str = "device", **options: Any) -> Phone:
        made = Phone(tmp_path / f"phone-{len(phones)}", **options)
        phones.append(made)
        made.plug()
        client.connect(made.serial)
        until(lambda: {each.serial: each.state for each in client.list()}.get(made.serial) == state)
        return made

    yield connect
    for each in phones:
        each.unplug()
        client.disconnect(each.serial)
        each.kill_all()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


@pytest.fixture
def bundle(
    tmp_path: Path, byte_level: Path, rewrite: Callable[..., dict], make_variant: Callable[..., dict]
) -> Path:
    """A bundle with a variant for each runner. Its names are such as a shell would trip over."""
    folder = tmp_path / "작은 고추; touch 'x' $(y)"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(byte_level.read_bytes())
    names = (
        "모델 1's $(touch z).pte",
        "model.gguf",
        "model.onnx",
        "genai_config.json",
        "npu.bin",
        "npu.onnx",
    )
    for name in names:
        (folder / name).write_text(name * 10)

    def variant(name: str, engine: str, *files: str, **changes: Any) -> dict:
        entry = make_variant()["entry_points"][0] | {"file": files[0]}
        return make_variant(name=name, engine=engine, files=list(files), entry_points=[entry], **changes)

    rewrite(
        folder,
        variants=[
            variant("pte", "executorch", names[0], format="executorch", delegate="xnnpack"),
            variant("gguf", "llama_cpp", names[1], format="gguf"),
            variant("onnx", "onnxruntime", names[2], names[3]),
            variant("npu", "qnn", names[5], names[4], chips=["sm8450"], delegate="hexagon"),
            variant("gpu", "llama_cpp", names[1], format="gguf", delegate="opencl"),
        ],
    )
    return folder


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., Path]:
    """`runner(name, script)`: a program for the phone."""

    def make(name: str, script: str = LLAMA_MAIN, **words: str) -> Path:
        place = tmp_path / "runners of mine" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(script.format(**{"do": "", "backends": "CPU"} | words), encoding="utf-8")
        return place

    return make


def own(folder: Path, variant: str, **changes: Any) -> str:
    """A runner that prints a measurement line, as an app of one's own does."""
    row = Measurement(
        what=Subject(
            model="toy",
            bundle=file_sha256(folder / "manifest.json"),
            variant=variant,
            format="onnx",
            scheme="float32",
            bytes=1,
        ),
        where=Place(target="app", device="app", os="app", engine="onnxruntime 1.27", threads=4),
        how=Method(workload="app", prompt_tokens=16, new_tokens=16, context=96, warmup=1, repeats=2),
        figures=(sampled("ttft", "s", [0.1, 0.2]),),
        command="app",
        time="2026-01-01T00:00:00+00:00",
    )
    where = row.where.model_copy(update={"backend": changes.pop("backend", None)})
    what = row.what.model_copy(update=changes)
    lines = measurement_line.encode(row.model_copy(update={"where": where, "what": what}))
    text = (
        "\n".join(f"01-01 00:00:00.000  100  100 I Gochu: {line}" for line in lines)
        .replace("{", "{{")
        .replace("}", "}}")
    )
    return f"#!/bin/sh\nprintf '%s\\n' \"$@\" >\"$GOCHU_PHONE/calls\"\nsleep 0.5\ncat <<'END'\n{text}\nEND\n"


def test_a_phone_is_measured(connect, bundle, runner, gochu, monkeypatch) -> None:
    handset, seen = connect(), []
    count = android.accelerator_memory
    monkeypatch.setattr(android, "accelerator_memory", lambda *texts: seen.append(texts) or count(*texts))
    handset.says("meminfo", MEMINFO)
    program = runner("llama_main_android", do="sleep 0.8")
    libraries = program.parent / "libs"
    libraries.mkdir()
    (libraries / "libone.so").write_text("one")
    code, out, err = gochu(
        "bench", bundle, "--on", "adb", "--threads", 3, "--json",
        "--option", f"runner={program}", "--option", f"libraries={libraries}",
    )  # fmt: skip
    assert code == 0, err
    (row,) = [Measurement.model_validate(each) for each in json.loads(out)]
    assert (row.where.target, row.where.chip, row.where.threads) == ("adb", "sm8650", 3)
    assert row.where.device == "Galaxy S24 Ultra (SM-S928N)"
    assert row.where.os == "Android 15 (AP3A.240905.015)"
    assert row.where.backend == Backend(requested="CPU")
    assert row.what.variant == "pte"
    assert (row.how.prompt_tokens, row.how.new_tokens, row.how.repeats) == (16, 16, 2)
    assert row.figure("load_time").samples == (0.5, 0.5)
    assert row.figure("ttft").samples == (0.081, 0.081)
    assert row.figure("prefill_speed").value == 200.0
    assert row.figure("decode_speed").value == 15 / 0.18
    assert row.figure("peak_accelerator_memory").value == 5100 * 1024
    assert re.search(r"^look\n/proc/\d+/fdinfo/\d+:pos:\t", seen[0][1], re.MULTILINE)
    assert row.figure("peak_memory").value > row.figure("peak_anonymous_memory").value > 4096
    assert row.figure("peak_mapped_memory").value > 4096
    assert {figure.kind for figure in row.figures} == {"measured"}
    assert (row.before.thermal, row.before.celsius, row.before.battery, row.before.charging) == (
        "none",
        36.5,
        83,
        True,
    )
    assert row.after == row.before
    assert row.marks == ()
    assert any("the first for a CPU; none is for the chip sm8650" in note for note in row.how.notes)
    assert row.command.startswith("gochu bench ")
    assert f"--option 'runner={program}'" in row.command
    assert "--on adb" in row.command
    assert "--device" not in row.command
    called = (handset.folder / "calls").read_text().splitlines()
    assert next(word for word in called if word.startswith("--model_path")).endswith(
        "/모델 1's $(touch z).pte"
    )
    assert {"--max_new_tokens=16", "--cpu_threads=3", "--warmup=true", "--ignore_eos=true"} <= set(called)
    assert (handset.folder / "disk/gochu/runs").is_dir()
    assert list((handset.folder / "disk/gochu/runs").iterdir()) == []
    assert not list(handset.folder.rglob("[xyz]"))
    assert len(handset.pushed) == 3 + 2 + 2  # manifest, tokenizer and model; runner and library; two jobs


def test_what_is_on_the_phone_is_not_sent_again(connect, bundle, runner) -> None:
    handset = connect()
    program = runner("llama_main")
    adb.measure(bundle, "smoke", runner=str(program), variant="pte")
    sent = [path for path in handset.pushed if "/runs/" not in path]
    assert len(sent) == 4
    handset.pushed.clear()
    damaged = handset.path(next(path for path in sent if path.endswith(".pte")))
    damaged.write_text("x" * damaged.stat().st_size)
    adb.measure(bundle, "smoke", runner=str(program), variant="pte")
    assert [path.rpartition("/")[2] for path in handset.pushed if "/runs/" not in path] == [
        "모델 1's $(touch z).pte"
    ]


def test_the_variant_for_the_phones_chip_is_taken(connect, bundle, runner) -> None:
    connect(
        **{"ro.soc.model": "SM8450", "ro.product.model": "없는 전화기", "ro.product.manufacturer": "회사"}
    )
    backend = Backend(requested="?", effective={"decode": {"NPU": 9, "CPU": 1}})
    (row,) = adb.measure(bundle, "smoke", runner=str(runner("my_app", own(bundle, "npu", backend=backend))))
    assert (row.what.variant, row.where.chip, row.where.device) == ("npu", "sm8450", "회사 없는 전화기")
    assert row.where.backend == Backend(requested="hexagon", effective={"decode": {"NPU": 9, "CPU": 1}})
    assert any("it is for this phone's chip, sm8450" in note for note in row.how.notes)


def test_a_runner_of_ones_own_prints_measurement_lines(connect, bundle, runner) -> None:
    handset = connect()
    program = runner("my_app", own(bundle, "onnx"))
    (row,) = adb.measure(bundle, "pp16+tg16", runner=str(program), variant="onnx", context=64)
    assert row.figure("ttft").samples == (0.1, 0.2)
    assert (row.where.target, row.where.engine, row.where.threads) == ("adb", "onnxruntime 1.27", 4)
    assert (row.how.workload, row.how.repeats) == ("pp16+tg16", 2)
    assert row.before.battery == 83
    assert row.figure("peak_memory").value > 0
    called = (handset.folder / "calls").read_text().split("\n")
    assert called[called.index("--prompt-tokens") + 1] == "16"
    assert called[called.index("--context") + 1] == "64"
    assert called[called.index("--bundle") + 1].startswith("../../bundles/")
    files = {path.rpartition("/")[2] for path in handset.pushed if "/bundles/" in path}
    assert files == {"manifest.json", "tokenizer.json", "model.onnx", "genai_config.json"}


def test_llama_bench_from_a_folder_of_runners(connect, bundle, runner) -> None:
    connect()
    runner("llama_main")
    folder = runner("llama-bench", LLAMA_BENCH).parent
    (row,) = adb.measure(bundle, "smoke", runner=str(folder), variant="gguf")
    assert row.where.engine == "llama.cpp 8cf427ff (5163), llama-bench"
    assert row.figure("prefill_speed").samples == (2000.0, 1600.0)
    assert row.figure("decode_speed").samples == (40.0, 32.0)
    assert row.figure("ttft") is None
    assert (row.how.prompt_tokens, row.how.new_tokens, row.how.repeats, row.where.threads) == (16, 16, 2, 4)


def takes_ten_seconds(monkeypatch: pytest.MonkeyPatch, clock: Fast, handset: Phone) -> None:
    """Each process that the phone starts takes 10 s by the clock, however fast this machine is."""

    def now() -> float:
        return clock.now() + 10 * sum("started" in service for service in handset.served)

    monkeypatch.setattr(adb, "CLOCK", Clock(now=now, sleep=clock.sleep))


def test_a_sustained_run_has_a_sample_for_each_round_with_its_time(
    connect, bundle, runner, clock, monkeypatch
) -> None:
    takes_ten_seconds(monkeypatch, clock, connect())
    asked = Workload(name="half", cases=(Case(prompt_tokens=16, new_tokens=16),), minutes=0.5, cool_down=30.0)
    (row,) = adb.measure(
        bundle,
        asked,
        runner=str(runner("llama-bench", LLAMA_BENCH.replace(", 10000000", ""))),
        variant="gguf",
    )
    speed = row.figure("prefill_speed")
    assert len(speed.samples) == len(speed.times) >= 2
    assert speed.times[0] == 0.0
    assert list(speed.times) == sorted(set(speed.times))
    assert (row.how.sustained_minutes, row.how.cool_down) == (0.5, 30.0)
    assert row.how.repeats == len(speed.samples)


def test_a_sustained_run_that_becomes_slower_is_marked(connect, bundle, runner, clock, monkeypatch) -> None:
    takes_ten_seconds(monkeypatch, clock, connect())
    slower = (
        '#!/bin/sh\necho x >>"$GOCHU_PHONE/begun"; n=$(wc -l <"$GOCHU_PHONE/begun")\n'
        'line=$(cat <<"END"\n{line}\nEND\n)\necho "$line" | sed "s/:2260,/:$((2080 + 100 * n)),/"\n'
    )
    line = LLAMA_MAIN.format(do="").partition("echo 'Py")[2].rstrip("'\n").replace("\\\n", "")
    asked = Workload(name="minutes", cases=(Case(prompt_tokens=16, new_tokens=16),), minutes=1)
    (row,) = adb.measure(
        bundle, asked, runner=str(runner("llama_main", slower, line="Py" + line)), variant="pte"
    )
    assert len(row.figure("decode_speed").samples) >= 5
    assert row.figure("decode_speed").samples[:2] == (150.0, 75.0)
    assert row.marks == ("throttled",)


def test_what_a_phone_measured_before_it_failed_is_kept(connect, bundle, runner) -> None:
    connect()
    fails = 'echo x >>"$GOCHU_PHONE/begun"; [ $(wc -l <"$GOCHU_PHONE/begun") -lt 3 ] || exit 7'
    two = Workload(name="two", cases=tuple(Case(prompt_tokens=n, new_tokens=n) for n in (16, 8)), repeats=2)
    with pytest.raises(SomeFailed, match="failed: llama_main ended with code 7") as failed:
        adb.measure(bundle, two, runner=str(runner("llama_main", do=fails)), variant="pte")
    (row,) = failed.value.measured
    assert (row.how.prompt_tokens, row.marks) == (16, ())


def test_a_runner_of_ones_own_is_told_the_minutes_and_the_prompts(connect, bundle, runner) -> None:
    handset = connect()
    asked = Workload(
        name="own", cases=(Case(prompt_tokens=16, new_tokens=16),), minutes=0.5, prompts=("안녕 $(touch x)",)
    )
    (_row,) = adb.measure(bundle, asked, runner=str(runner("my_app", own(bundle, "onnx"))), variant="onnx")
    called = (handset.folder / "calls").read_text().split("\n")
    assert called[called.index("--minutes") + 1] == "0.5"
    assert called[called.index("--ask") + 1] == "안녕 $(touch x)"


def test_several_phones_at_once_and_one_that_fails_loses_nothing_of_the_others(
    connect, bundle, runner
) -> None:
    both, here = threading.Event(), []

    def meet(service: str) -> None:
        if "started" in service:
            here.append(service)
            if len(here) == 2:
                both.set()
            assert both.wait(30), "they are measured one after the other"

    one = connect()
    two = connect(**{"ro.product.model": "Pixel 8", "ro.soc.model": "Zuma"})
    three = connect(**{"ro.product.model": "SM-X"})
    one.before = two.before = meet
    three.room = 0
    with pytest.raises(SomeFailed, match=r"^samsung SM-X, 127\.0\.0\.1:.*No space left on device") as failed:
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")), device="all", variant="pte")
    rows = failed.value.measured
    assert sorted(row.where.device for row in rows) == ["Galaxy S24 Ultra (SM-S928N)", "Pixel 8 (Pixel 8)"]
    assert f"--device {one.serial}" in rows[0].command + rows[1].command


def test_runners_can_be_named_once_and_for_all(connect, bundle, runner, monkeypatch) -> None:
    connect()
    monkeypatch.setenv("GOCHU_RUNNERS", str(runner("llama_main").parent))
    (row,) = adb.measure(bundle, "smoke", variant="pte")
    assert "llama_main" in row.where.engine
    monkeypatch.setenv("GOCHU_RUNNERS", "nowhere")
    with pytest.raises(UsageError, match="there is no runner nowhere"):
        adb.measure(bundle, "smoke", variant="pte")


def test_phones_are_called_by_their_names(connect, bundle, runner) -> None:
    connect()
    pixel = connect(**{"ro.product.model": "Pixel 8"})
    program = str(runner("llama_main"))
    for name in ("갤럭시 S24 울트라", "sm-s928n", pixel.serial):
        (row,) = adb.measure(bundle, "smoke", runner=program, device=name, variant="pte")
        assert row.where.device.startswith("Galaxy" if name in ("갤럭시 S24 울트라", "sm-s928n") else "Pixel")
    with pytest.raises(UsageError, match=r"2 phones are connected: .* --device: .*Pixel 8.*, or all"):
        adb.measure(bundle, "smoke", runner=program)
    with pytest.raises(UsageError, match=r"no connected phone is called 'Galaxy S23'; there are .*S24 Ultra"):
        adb.measure(bundle, "smoke", runner=program, device="Galaxy S23")


# What goes wrong.


def test_without_an_adb_server_none_is_started(bundle, runner, monkeypatch, gochu) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/bin/false")  # what adbutils would start
    code, out, err = gochu("bench", bundle, "--on", "adb", "--option", f"runner={runner('llama_main')}")
    assert (code, out) == (6, "")
    assert err == (
        f"gochu: no adb server answers on 127.0.0.1:{port}: start one with `adb start-server` (adb comes with "
        "Android's platform tools, and inside the Python package adbutils)\n"
    )


def test_without_adbutils(bundle, runner, monkeypatch, gochu) -> None:
    monkeypatch.setitem(sys.modules, "adbutils", None)
    code, out, err = gochu("bench", bundle, "--on", "adb", "--option", f"runner={runner('llama_main')}")
    assert (code, out) == (5, "")
    assert err == "gochu: adbutils is not installed; install it with `pip install 'gochu[adb]'`\n"


def test_a_port_that_is_none(bundle, runner, monkeypatch) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "usb")
    with pytest.raises(UsageError, match=r"ANDROID_ADB_SERVER_PORT is 'usb', which is no port"):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")))


def test_without_a_phone(server, clock, bundle, runner, monkeypatch) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server))
    with pytest.raises(
        TargetError, match=r"no phone is connected over adb \(the adb server knows of none\): connect"
    ):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")))


def test_a_phone_that_does_not_let_this_computer_in(connect, bundle, runner) -> None:
    handset = connect("unauthorized", authorized=False)
    for device in (None, handset.serial):
        with pytest.raises(TargetError, match=r"does not let this computer in: unlock it and accept"):
            adb.measure(bundle, "smoke", runner=str(runner("llama_main")), device=device)


def test_a_phone_that_is_lost_while_it_measures_and_comes_back(connect, server, bundle, runner) -> None:
    handset, said = connect(), []
    program = runner("llama_main", do='echo begun >>"$GOCHU_PHONE/begun"; sleep 0.6')
    begun = handset.folder / "begun"

    def pull_the_cable() -> None:
        until(begun.exists)
        handset.unplug()
        adbutils.AdbClient(host="127.0.0.1", port=server).disconnect(handset.serial)  # the server forgets it
        time.sleep(0.2)
        handset.plug()

    thread = threading.Thread(target=pull_the_cable)
    thread.start()
    (row,) = adb.measure(bundle, "smoke", runner=str(program), variant="pte", progress=said.append)
    thread.join()
    assert len(row.figure("ttft").samples) == 2
    assert any(
        re.search("lost while (starting|waiting for) llama_main.* 180 s at most", what) for what in said
    )
    assert begun.read_text().count("begun") == 2, "a run was started twice"


def test_a_phone_that_is_lost_while_files_are_sent(connect, bundle, runner) -> None:
    handset, cuts = connect(), []

    def cut(service: str) -> None:
        if service == "sync:" and len(cuts) < 2:
            cuts.append(service)
            handset.unplug()
            handset.plug()

    handset.before = cut
    (row,) = adb.measure(bundle, "smoke", runner=str(runner("llama_main")), variant="pte")
    assert len(cuts) == 2
    assert row.figure("ttft").value == 0.081


def test_a_phone_that_comes_back_and_does_not_let_this_computer_in(connect, bundle, runner) -> None:
    handset = connect()

    def revoke(service: str) -> None:
        handset.before = lambda service: None
        handset.unplug()
        handset.authorized = False
        handset.plug()

    handset.before = revoke
    with pytest.raises(TargetError, match=r"does not let this computer in: unlock it and accept"):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")), variant="pte")


def test_a_file_that_does_not_arrive_whole(connect, bundle, runner) -> None:
    handset = connect()

    def damage(service: str) -> None:
        for path in handset.pushed:
            if path.endswith(".pte"):
                handset.path(path).write_text("x")

    handset.before = damage
    with pytest.raises(TargetError, match=r"\.pte is on .* not what was sent: try another cable or port"):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")), variant="pte")


def test_a_phone_that_is_lost_for_good(connect, bundle, runner, monkeypatch) -> None:
    handset = connect()
    monkeypatch.setattr(phone, "PATIENCE", 5.0)
    program = runner("llama_main", do='touch "$GOCHU_PHONE/begun"; sleep 60')
    thread = threading.Thread(target=lambda: (until((handset.folder / "begun").exists), handset.unplug()))
    thread.start()
    with pytest.raises(
        TargetError, match=r"was lost while (starting|waiting for) llama_main.* did not come back within 5 s"
    ):
        adb.measure(bundle, "smoke", runner=str(program), variant="pte")
    thread.join()


def test_a_phone_that_restarts_loses_the_run(connect, bundle, runner) -> None:
    handset = connect()
    program = runner("llama_main", do='touch "$GOCHU_PHONE/begun"; sleep 60')

    def restart() -> None:
        until((handset.folder / "begun").exists)
        handset.unplug()
        handset.kill_all()
        handset.plug()

    thread = threading.Thread(target=restart)
    thread.start()
    with pytest.raises(
        TargetError, match=r"vanished from .*, which was restarted or ended it: measure again"
    ):
        adb.measure(bundle, "smoke", runner=str(program), variant="pte")
    thread.join()


def test_a_full_disk(connect, bundle, runner) -> None:
    handset = connect()
    (handset.folder / "free").write_text("1000\n")
    with pytest.raises(TargetError, match=r"has 1 MB free where 0 MB are to be sent: delete something on it"):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")))
    (handset.folder / "free").write_text("1000000\n")
    handset.room = 100
    with pytest.raises(
        TargetError, match=r"does not take .*: couldn't write: No space left on device; make room"
    ):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")))


def test_a_runner_that_crashes(connect, bundle, runner) -> None:
    connect()
    program = str(runner("llama_main", do="echo E: Failed to load 모델 >&2; exit 1"))
    with pytest.raises(
        TargetError, match=r"llama_main ended with code 1 on .* said: 'E: Failed to load 모델'"
    ):
        adb.measure(bundle, "smoke", runner=program)
    program = str(runner("llama_main", do="kill -SEGV $$"))
    with pytest.raises(TargetError, match=r"llama_main was ended by signal 11 on .* and said: '"):
        adb.measure(bundle, "smoke", runner=program)


@pytest.mark.parametrize(
    ("name", "script", "variant", "words"),
    [
        (
            "llama_main",
            "#!/bin/sh\necho hello",
            "pte",
            r"PyTorchObserver .* \('hello'\): is it another program",
        ),
        (
            "llama-bench",
            "#!/bin/sh\necho '| model | size |'",
            "gguf",
            r"llama-bench ended without an error, but the JSON",
        ),
        (
            "model_benchmark",
            "#!/bin/sh\necho Batch size: 1",
            "onnx",
            r"model_benchmark ended without an error",
        ),
        ("my_app", "#!/bin/sh\necho nothing", "onnx", r"printed no measurement \('nothing'\)"),
    ],
)
def test_a_runner_that_prints_nothing_that_can_be_read(
    connect, bundle, runner, name, script, variant, words
) -> None:
    connect()
    with pytest.raises(TargetError, match=words):
        adb.measure(bundle, "smoke", runner=str(runner(name, script)), variant=variant)


def test_a_runner_that_measured_another_bundle(connect, bundle, runner) -> None:
    connect()
    program = runner("my_app", own(bundle, "onnx", bundle="0" * 64))
    with pytest.raises(TargetError, match="measured variant onnx of another bundle"):
        adb.measure(bundle, "smoke", runner=str(program), variant="onnx")


def test_a_runner_that_never_ends(connect, bundle, runner, clock) -> None:
    handset = connect()
    program = runner("llama_main", do="sleep 600")
    with pytest.raises(TargetError, match=r"was not done after 0.2 minutes and was ended: .*max_minutes"):
        adb.measure(bundle, "smoke", runner=str(program), variant="pte", max_minutes=0.2)
    until(lambda: not list(handset.processes()))


def test_a_phone_that_is_too_hot_is_given_time_to_cool(connect, bundle, runner, clock, monkeypatch) -> None:
    monkeypatch.setattr(phone_work, "COOLING", 60.0)
    handset = connect()
    handset.says("thermalservice", thermal(3, 47.5))
    with pytest.raises(
        TargetError, match=r"too hot to measure on \(thermal status severe, 47.5 °C, after 1 minutes"
    ):
        adb.measure(bundle, "smoke", runner=str(runner("llama_main")), variant="pte")
    assert clock.time >= phone_work.COOLING
    assert not any("started" in service for service in handset.served)


def test_a_phone_that_becomes_hot_meanwhile_is_marked(connect, bundle, runner) -> None:
    handset = connect()
    (handset.folder / "hot").write_text(thermal(4, 48.0))
    program = runner("llama_main", do='cp "$GOCHU_PHONE/hot" "$GOCHU_PHONE/dumpsys/thermalservice"')
    (row,) = adb.measure(bundle, "smoke", runner=str(program), variant="pte")
    assert row.marks == ("throttled",)
    assert (row.before.thermal, row.after.thermal, row.after.celsius) == ("none", "critical", 48.0)


def test_a_runner_for_another_processor_is_not_sent(connect, bundle, tmp_path) -> None:
    handset = connect()
    program = tmp_path / "llama_main"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(44))
    with pytest.raises(
        TargetError, match=r"llama_main is built for x86_64, and .* executes arm64-v8a, armeabi-v7a"
    ):
        adb.measure(bundle, "smoke", runner=str(program), variant="pte")
    assert handset.pushed == []


def test_the_cpu_in_place_of_an_accelerator_is_no_measurement_unless_allowed(connect, bundle, runner) -> None:
    connect()
    on_cpu = Backend(requested="CPU", effective={"prefill": {"CPU": 10}, "decode": {"CPU": 10}})
    program = str(runner("my_app", own(bundle, "npu", backend=on_cpu)))
    with pytest.raises(TargetError, match=r"variant npu is for hexagon, but my_app computed on the CPU"):
        adb.measure(bundle, "smoke", runner=program, variant="npu")
    (row,) = adb.measure(bundle, "smoke", runner=program, variant="npu", allow_fallback=True)
    assert row.marks == ("cpu_fallback",)
    assert "--allow-fallback" in row.command
    bench = str(runner("llama-bench", LLAMA_BENCH))
    with pytest.raises(TargetError, match=r"variant gpu is for opencl, but llama-bench computed on the CPU"):
        adb.measure(bundle, "smoke", runner=bench, variant="gpu")
    bench = str(runner("llama-bench", LLAMA_BENCH, backends="OpenCL,CPU"))
    (row,) = adb.measure(bundle, "smoke", runner=bench, variant="gpu")
    assert row.marks == ()


@pytest.fixture
def stopping(connect, runner) -> Callable[[int], tuple[str, Phone, threading.Thread]]:
    """`stopping(n)`: a runner that hangs the nth time, its phone, and a thread that presses Ctrl-C then."""

    def stopping(at: int) -> tuple[str, Phone, threading.Thread]:
        handset = connect()
        begun = handset.folder / "begun"
        hangs = f'echo x >>"$GOCHU_PHONE/begun"; [ $(wc -l <"$GOCHU_PHONE/begun") -lt {at} ] || sleep 60'
        program = runner("llama_main", do=hangs)

        def interrupt() -> None:
            until(lambda: begun.exists() and len(begun.read_text().split()) == at)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        return str(program), handset, thread

    return stopping


def test_ctrl_c_ends_the_runner_and_keeps_what_was_measured(stopping, bundle) -> None:
    program, handset, thread = stopping(3)
    (row,) = adb.measure(bundle, "pp16+tg16", runner=program, variant="pte")
    thread.join()
    assert row.marks == ("interrupted",)
    assert len(row.figure("ttft").samples) == 2
    assert row.after.battery == 83
    until(lambda: not list(handset.processes()))
    assert list((handset.folder / "disk/gochu/bundles").iterdir()), "what is sent once is kept"


def test_ctrl_c_before_anything_was_measured(stopping, bundle) -> None:
    program, handset, thread = stopping(1)
    with pytest.raises(KeyboardInterrupt):
        adb.measure(bundle, "smoke", runner=program, variant="pte")
    thread.join()
    until(lambda: not list(handset.processes()))


def test_ctrl_c_between_two_cases(stopping, bundle) -> None:
    program, _, thread = stopping(3)
    two = Workload(name="two", cases=tuple(Case(prompt_tokens=n, new_tokens=n) for n in (16, 8)), repeats=2)
    (row,) = adb.measure(bundle, two, runner=program, variant="pte")
    thread.join()
    assert row.marks == ("interrupted",)
    assert len(row.figure("ttft").samples) == 2
    assert "this case is whole; the workload was stopped in the next" in row.how.notes


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, UsageError, r"name it with --option runner=PATH"),
        ({"runner": "nowhere"}, UsageError, r"there is no runner nowhere"),
        ({"runner": "llama_main", "variant": "zzz"}, UsageError, r"has no variant 'zzz'"),
        ({"runner": "llama_main", "libraries": "nowhere"}, UsageError, r"nowhere is no folder of libraries"),
        ({"runner": "llama_main", "max_minutes": 0.0}, UsageError, r"0 minutes measure nothing"),
    ],
)
def test_what_is_wrong_whatever_the_phone(bundle, runner, options, error, words) -> None:
    program = runner("llama_main")
    given = {key: str(program) if value == "llama_main" else value for key, value in options.items()}
    with pytest.raises(error, match=words):
        adb.measure(bundle, "smoke", **given)


def test_a_runner_for_another_format_and_a_folder_without_one(connect, bundle, runner) -> None:
    connect()
    program = runner("llama_main")
    with pytest.raises(
        TargetError, match=r"llama_main runs executorch variants, and this one is for llama_cpp"
    ):
        adb.measure(bundle, "smoke", runner=str(program), variant="gguf")
    with pytest.raises(
        UsageError, match=r"has 0 programs whose name begins with llama-bench, where variant gguf"
    ):
        adb.measure(bundle, "smoke", runner=str(program.parent), variant="gguf")
    with pytest.raises(
        UsageError, match=r"context of 9999 tokens was asked for, but variant pte holds 1 to 96"
    ):
        adb.measure(bundle, "smoke", runner=str(program), variant="pte", context=9999)


def test_a_damaged_bundle_is_not_sent(connect, bundle, runner) -> None:
    handset = connect()
    (bundle / "model.gguf").write_text("x" * (bundle / "model.gguf").stat().st_size)
    with pytest.raises(ChecksumError):
        adb.measure(bundle, "smoke", runner=str(runner("llama-bench", LLAMA_BENCH)), variant="gguf")
    assert handset.pushed == []
