"""The emulated arm64 machine: how it is made, what runs in it, what is made of what comes back, and how it fails.

With stand-ins for apt and QEMU (arm64_standin.py); one test at the end is of the real machine, where it was set up.
"""

import importlib.util
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtimes import arm64, debian, initrd, measuring
from runtimes.errors import BundleError, EngineError, GochuError, MissingExtra, TargetError, UsageError
from runtimes.targets import arm64_emulator, host
from runtimes.workload import Case, Workload, preset

HERE = Path(__file__).parent
standin: Any = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("arm64_standin", HERE / "arm64_standin.py")
)
spec.loader.exec_module(standin)

needs_dpkg = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed: not on Debian"
)
PROMPTS = ("삼백이십 더하기 하나", "the small pepper")
CACHE, SET_UP = arm64.folder().parents[1], not arm64.missing()  # of the user; a test's own is another
TINY = Workload(name="tiny", cases=(Case(prompt_tokens=4, new_tokens=3),), repeats=2)
SAMPLES = measuring.Samples(
    load=1.0,
    prefill=(0.004, 0.0048),
    first_token=(0.005, 0.006),
    decode=(0.006, 0.0062),
    peak_memory=80_000_000,
    peak_anonymous_memory=40_000_000,
    peak_mapped_memory=None,
    idle_memory=30_000_000,
    engine="onnxruntime 9",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A machine that `setup` made through the stand-ins; tests that measure share it."""
    folder = tmp_path_factory.mktemp("arm64")
    variables = standin.environment(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        arm64.setup()
    return folder, variables


@pytest.fixture
def machine(made: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the records of the stand-ins."""
    folder, variables = made
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("STANDIN_QEMU", raising=False)
    return folder


@pytest.fixture
def fresh(made: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins with an empty cache, which is returned."""
    for name, value in made[1].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "apt.log"))
    return tmp_path / "cache"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "qemu.json").read_text())


@needs_dpkg
def test_the_machine_is_made_of_packages_and_wheels_for_arm(machine: Path) -> None:
    home = arm64.folder()
    assert home == machine / "캐시, 둘/gochu/arm64-emulator"
    assert arm64.missing() == []
    names = sorted(each.name.partition("-")[0] for each in home.iterdir())
    assert names == [
        "lock",
        "python",
        "system",
    ]  # nothing unfinished, nothing that was only fetched; QEMU is here
    made = arm64.machine()
    assert (made.release, made.kernel.read_bytes()) == ("6.1.0-9-test", b"a kernel")
    kept = {each.stem: each.read_bytes() for each in (made.system / "modules").iterdir()}
    assert set(kept) == {"9p", "netfs", "9pnet", "9pnet_virtio", "virtio_pci", "virtio_pci_modern_dev"}
    assert kept["netfs"] == standin.module()  # no longer compressed
    root = made.system / "root"
    assert (root / "bin/busybox").read_bytes() == b"a busybox"  # in /usr/bin there
    assert {each.name for each in (root / "gochu").iterdir()} == {"bundle", "wheels", "work"}
    assert not list(root.rglob("vmlinuz*"))
    assert (made.python / "numpy.py").read_text() == "tag = 'cp311-cp311-manylinux_2_28_aarch64'\n"
    log = (machine / "apt.log").read_text().splitlines()
    assert [line.split()[-1] for line in log] == ["update", "libstdc++6"]
    assert all("-o APT::Architecture=arm64 -o APT::Architectures::=arm64" in line for line in log)
    assert "--download-only" in log[1]


@needs_dpkg
def test_a_machine_that_is_there_is_not_made_again(machine: Path, gochu) -> None:
    before = (machine / "apt.log").read_text()
    code, out, err = gochu("target", "setup", "arm64-emulator", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"target": "arm64-emulator", "folder": str(arm64.folder())}
    assert (machine / "apt.log").read_text() == before


@needs_dpkg
def test_a_set_up_that_failed_goes_on_where_it_was(fresh: Path, monkeypatch, gochu) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(fresh.parent))
    code, out, err = gochu("target", "setup", "arm64-emulator")
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert err.startswith("gochu: downloading jinja2==")
    assert "pip said: ERROR: " in err
    assert arm64.missing() == ["python"]
    with pytest.raises(
        MissingExtra, match=r"not set up \(python missing\); run `gochu target setup arm64-emulator`"
    ):
        arm64_emulator.check()
    log = (fresh.parent / "apt.log").read_text()
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr(debian, "wheels", lambda requirements, python, folder: None)
    told: list[str] = []
    arm64.setup(told.append)
    assert told[:2] == ["fetching Python's packages for arm64", "starting the machine for the first time"]
    assert (fresh.parent / "apt.log").read_text() == log
    assert arm64.missing() == []


@needs_dpkg
def test_where_there_is_no_qemu_it_is_fetched_with_its_libraries(
    fresh: Path, made, tmp_path: Path, monkeypatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for tool in ("apt-get", "dpkg-deb", "tar", "rm"):
        (programs / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(programs))
    (tmp_path / "status").write_text("Package: libc6")
    monkeypatch.setattr(debian, "INSTALLED", tmp_path / "status")
    monkeypatch.setattr(debian, "wheels", lambda requirements, python, folder: None)
    assert arm64.missing() == ["qemu-system-aarch64", "system", "python"]
    told: list[str] = []
    home = arm64.setup(told.append)
    assert told[:2] == ["fetching QEMU", "fetching Debian for arm64"]
    assert arm64.machine().qemu == home / "qemu/usr/bin/qemu-system-aarch64"
    assert record(made[0])["libraries"] == str(home / "qemu/usr/lib/x86_64-linux-gnu")
    log = (tmp_path / "apt.log").read_text().splitlines()
    assert [line.split()[-1] for line in log] == ["update", "qemu-system-arm", "update", "libstdc++6"]
    assert not (home / "fetched").exists()


@needs_dpkg
def test_a_damaged_kernel_is_one_sentence(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "linux-image-1_arm64.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(TargetError, match=r"^linux-image-1_arm64\.deb cannot be unpacked"):
        arm64._take_kernel(tmp_path / "linux-image-1_arm64.deb", tmp_path)


@needs_dpkg
def test_what_does_not_work_in_the_guest_is_not_kept(fresh: Path, monkeypatch) -> None:
    monkeypatch.setattr(debian, "wheels", lambda requirements, python, folder: None)
    monkeypatch.setenv("STANDIN_QEMU", "end 1 ImportError: no numpy for you")
    with pytest.raises(TargetError, match=r"does not work there: ImportError: no numpy for you$"):
        arm64.setup()
    assert arm64.missing() == ["python"]


@needs_dpkg
def test_a_debian_that_is_too_old_is_refused(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setenv("STANDIN_PACKAGES", str(standin.packages(tmp_path / "old", "python3.9")))
    with pytest.raises(
        TargetError, match=r"Python 3\.9 for arm64, and 3\.11 is needed: use Debian 12 or newer"
    ):
        arm64.setup()
    assert arm64.missing() == ["system", "python"]


@needs_dpkg
def test_apts_failure_is_one_sentence_with_its_words(fresh: Path, monkeypatch, gochu) -> None:
    monkeypatch.setenv("STANDIN_APT", "Failed to fetch, no route to host")
    code, out, err = gochu("target", "setup", "arm64-emulator")
    assert (code, out) == (6, "")
    assert err == (
        "gochu: asking Debian's mirror for its packages failed, and apt-get said: E: Failed to fetch, no route to "
        "host; try again\n"
    )


def test_without_apt_nothing_is_tried(tmp_path: Path, monkeypatch, gochu) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, err = gochu("target", "setup", "arm64-emulator")
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert err.startswith("gochu: apt-get is not on the path")
    assert not (tmp_path / "cache").exists()


def test_without_pip_nothing_is_tried(fresh: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(MissingExtra, match="pip is not installed"):
        debian.require_tools()


@needs_dpkg
def test_too_little_room_is_said_beforehand(fresh: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 7_000_000))
    with pytest.raises(TargetError, match=r"has 7 MB free, and the emulator needs 1000 MB while it is made"):
        arm64.setup()


@needs_dpkg
def test_a_cache_that_cannot_be_written_is_one_sentence(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        TargetError, match=r"cannot be written to .*Not a directory; make room there, or set XDG_CAC"
    ):
        arm64.setup()


def test_kernel_modules_are_loaded_after_those_that_they_need() -> None:
    files = {
        "a": standin.module("b-1", "c"),
        "b_1": standin.module("c"),
        "c": standin.module(),
        "d": standin.module("built_in"),
        "e": b"no needs told",
    }
    assert initrd.ordered(["a", "d", "e", "elsewhere"], files) == ["c", "b_1", "a", "d", "e"]


def test_the_archive_is_one_that_a_kernel_reads() -> None:
    written = initrd.archive("#!init 고추", b"B" * 5, {"9p": b"M" * 3})
    found, at = {}, 0
    while at < len(written):
        magic, *fields = struct.unpack_from("6s" + "8s" * 13, written, at)
        assert magic == b"070701"
        _, mode, *_, size, _, _, _, _, length, _ = (int(field, 16) for field in fields)
        start = at + 110
        name = written[start : start + length - 1].decode()
        assert written[start + length - 1] == 0
        start = (start + length + 3) // 4 * 4
        found[name] = (mode, written[start : start + size])
        at = (start + size + 3) // 4 * 4
    assert at == len(written)
    assert list(found)[-1] == "TRAILER!!!"
    assert found["init"] == (0o100755, "#!init 고추".encode())
    assert found["bin/busybox"] == (0o100755, b"BBBBB")
    assert found["modules/9p.ko"] == (0o100644, b"MMM")
    assert found["root"] == (0o040755, b"")


@needs_dpkg
def test_the_guest_says_what_this_machine_says(machine: Path, toy: Path) -> None:
    """The same program, over the copy of it that goes into the guest."""
    asked = TINY.model_copy(update={"prompts": PROMPTS, "answer_tokens": 6})
    (there,) = arm64_emulator.measure(toy, asked)
    (here,) = host.measure(toy, asked, 1)
    assert [answer.prompt for answer in there.answers] == list(PROMPTS)
    assert there.answers == here.answers
    assert there.how == here.how
    assert there.what == here.what
    assert there.figure("peak_memory").value == pytest.approx(here.figure("peak_memory").value, rel=0.1)
    assert there.command == (
        f"gochu bench toy --workload tiny --on arm64-emulator --ask '{PROMPTS[0]}' --ask '{PROMPTS[1]}'"
    )


@needs_dpkg
def test_seconds_there_are_instructions_and_no_second_is_reported(
    machine: Path, toy: Path, monkeypatch
) -> None:
    monkeypatch.setenv("STANDIN_QEMU", f"print {SAMPLES.model_dump_json()}")
    (found,) = arm64_emulator.measure(toy, TINY)
    figures = {figure.name: figure for figure in found.figures}
    assert figures["prefill_instructions"].samples == (1_000_000, 1_200_000)  # 4 tokens
    assert figures["decode_instructions"].samples == (3_000_000, 3_100_000)  # 2 tokens after the first
    assert figures["prefill_instructions"].value == 1_100_000
    assert figures["peak_memory"].value == 80_000_000
    assert set(figures) == {
        "prefill_instructions",
        "decode_instructions",
        "peak_memory",
        "peak_anonymous_memory",
        "idle_memory",
    }
    assert {figure.kind for figure in found.figures} == {"emulated"}
    assert {figure.unit for figure in found.figures} == {"instructions", "bytes"}
    where = found.where
    assert (where.target, where.device, where.os) == (
        "arm64-emulator",
        "QEMU 9.9.9, Cortex-A76",
        "Linux 6.1.0-9-test aarch64",
    )
    assert (where.engine, where.threads, found.marks) == ("onnxruntime 9", 1, ())


@needs_dpkg
def test_one_token_has_no_decode(machine: Path, toy: Path, monkeypatch) -> None:
    samples = SAMPLES.model_copy(update={"decode": ()})
    monkeypatch.setenv("STANDIN_QEMU", f"print {samples.model_dump_json()}")
    (found,) = arm64_emulator.measure(toy, "pp4")
    assert found.figure("decode_instructions") is None
    assert found.figure("prefill_instructions") is not None


@needs_dpkg
def test_the_machine_counts_is_alone_and_cannot_change_what_it_is_given(
    machine: Path, toy: Path, tmp_path
) -> None:
    bundle = Path(shutil.copytree(toy, tmp_path / "고추, 매운"))
    arm64_emulator.measure(bundle, TINY, context=64, memory=1500)
    seen = record(machine)
    words = " ".join(seen["arguments"])
    assert "-icount shift=0,sleep=off" in words
    assert "-smp 1 -m 1500" in words
    assert "-nodefaults" in words  # no network
    assert seen["folders"]["bundle"] == str(bundle)  # a comma in its name ends no option
    assert sorted(seen["readonly"]) == ["bundle", "root", "wheels"]
    job = json.loads(seen["stdin"])
    assert (job["threads"], job["context"], job["bundle"]) == (1, 64, "/gochu/bundle")
    init = seen["init"]
    assert "chroot /root /usr/bin/python3 -m runtimes.targets.host <stdin >out 2>err" in init
    assert init.index("insmod /modules/9pnet.ko") < init.index("insmod /modules/9p.ko")
    assert "mali" not in init
    assert "export PYTHONHASHSEED=0\n" in init  # nor is anything random
    assert "norandmaps" in words
    assert "share root /root cache=loose,ro\n" in init
    assert "share bundle /root/gochu/bundle cache=loose,ro\n" in init
    assert not Path(seen["folders"]["work"]).exists()


@needs_dpkg
@pytest.mark.parametrize(
    ("does", "error", "words"),
    [
        (
            "say [1.2] Kernel panic - not syncing: Attempted to kill init!",
            TargetError,
            "^the emulated machine went off before its work was done: Kernel panic - not syncing: Attempted to kill",
        ),
        ("say gochu: cannot mount bundle", TargetError, "done: gochu: cannot mount bundle$"),
        ("say [3.1] Synchronous abort", TargetError, r"its last words were '\[3.1\] Synchronous abort'$"),
        ("say", TargetError, "it printed nothing$"),
        ("end 137", TargetError, "4096 MiB of memory were not enough.*--option memory="),
        ("end 139", TargetError, "the program crashed in the emulated machine, with signal 11"),
        (
            "refuse unsupported machine type",
            TargetError,
            "QEMU could not run .*: unsupported machine type; if that",
        ),
        ("end 6 ONNX Runtime cannot load variant cpu", EngineError, "^ONNX Runtime cannot load variant cpu$"),
        ("end 1 MemoryError", TargetError, "4096 MiB of memory were not enough.*--option memory="),
        (
            "end 6 ONNX Runtime: Failed to allocate memory for it",
            TargetError,
            "MiB of memory were not enough",
        ),
        ("end 1 ValueError: odd", EngineError, "ended with code 1 and said: ValueError: odd"),
        ("print nonsense", EngineError, "printed no samples but 'nonsense'"),
    ],
)
def test_each_way_to_fail_is_one_sentence(machine: Path, toy: Path, monkeypatch, does, error, words) -> None:
    monkeypatch.setenv("STANDIN_QEMU", does)
    with pytest.raises(error, match=words) as caught:
        arm64_emulator.measure(toy, TINY)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6
    assert not Path(record(machine)["folders"]["work"]).exists()


@needs_dpkg
def test_a_guest_that_hangs_is_switched_off(machine: Path, toy: Path, monkeypatch, gochu) -> None:
    monkeypatch.setenv("STANDIN_QEMU", "hang")
    code, out, err = gochu("bench", toy, "--on", "arm64-emulator", "--option", "max_minutes=0.01")
    assert (code, out) == (6, "")
    assert err == (
        "gochu: the emulated machine was not done after 0.01 minutes and was switched off: take a smaller workload, "
        "or allow more with --option max_minutes=...\n"
    )
    assert not standin.alive(record(machine)["pid"])


@needs_dpkg
def test_a_full_disk_is_one_sentence(machine: Path, toy: Path, monkeypatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(
        TargetError, match=r"cannot be kept in .*: No space left on device; make room there, or set TM"
    ):
        arm64_emulator.measure(toy, TINY)


@needs_dpkg
def test_ctrl_c_leaves_nothing_behind(machine: Path, toy: Path, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_QEMU", "hang")

    def stop(told: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arm64_emulator.measure(toy, TINY, progress=stop)
    assert not standin.alive(record(machine)["pid"])
    assert not Path(record(machine)["folders"]["work"]).exists()


@needs_dpkg
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_the_emulator_does_not_outlive_a_killed_process(machine: Path, toy: Path, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_QEMU", "hang")
    monkeypatch.setenv("TMPDIR", str(machine))  # it cannot tidy up
    (machine / "qemu.json").unlink(missing_ok=True)
    code = f"from runtimes.targets import arm64_emulator; arm64_emulator.measure({str(toy)!r}, 'smoke')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parents[1])
    try:
        pid = _eventually(lambda: record(machine)["pid"] if (machine / "qemu.json").exists() else None)
        assert standin.alive(pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _eventually(lambda: None if standin.alive(pid) else True)


def _eventually(ask: Callable[[], Any]) -> Any:
    """What `ask` says once it says something; it is given 20 s."""
    for _ in range(2000):
        try:
            if (answer := ask()) is not None:
                return answer
        except json.JSONDecodeError:  # half written
            pass
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_without_a_set_up_it_says_how(tmp_path: Path, toy: Path, monkeypatch, gochu) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = gochu("bench", toy, "--on", "arm64-emulator")
    assert (code, out) == (5, "")
    assert err == (
        "gochu: the arm64 emulator is not set up (qemu-system-aarch64, system, python missing); run `gochu target "
        "setup arm64-emulator`, which takes a minute or two and fetches some 200 MB\n"
    )


@pytest.mark.parametrize(
    ("workload", "options", "words"),
    [
        (preset("sustained"), {}, "workload sustained shows what minutes .* take another workload"),
        (TINY, {"memory": 64}, "need 128 MiB of memory, and 64 were given"),
        (TINY, {"max_minutes": 0.0}, "in 0 minutes nothing is measured"),
        (TINY, {"context": 1000}, "a context of 1000 tokens was asked for"),
        (TINY, {"variant": "gpu"}, "has no variant 'gpu'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    toy: Path, workload, options, words
) -> None:
    with pytest.raises(UsageError, match=words):
        arm64_emulator.measure(toy, workload, **options)


def test_another_engines_variant_is_refused(copy: Path, rewrite, make_variant) -> None:
    rewrite(
        copy,
        variants=[make_variant(name="pte", engine="executorch"), make_variant(name="npu", chips=["sm8650"])],
    )
    with pytest.raises(
        BundleError, match=r"no variant for ONNX Runtime on a CPU, and .* export one with --format onnx"
    ):
        arm64_emulator.measure(copy, TINY)
    for name in ("pte", "npu"):
        with pytest.raises(UsageError, match=f"variant {name} does not run on ONNX Runtime's CPU"):
            arm64_emulator.measure(copy, TINY, variant=name)


@needs_dpkg
def test_a_file_that_changed_is_found_out_here(machine: Path, copy: Path) -> None:
    (copy / "model.onnx.data").write_bytes(b"\0" * (copy / "model.onnx.data").stat().st_size)
    (machine / "qemu.json").unlink(missing_ok=True)
    with pytest.raises(GochuError, match=r"model\.onnx\.data"):
        arm64_emulator.measure(copy, TINY)
    assert not (machine / "qemu.json").exists()


@pytest.mark.skipif(not SET_UP, reason="the arm64 emulator is not set up: gochu target setup arm64-emulator")
def test_a_real_arm_says_the_same_and_takes_as_much_memory(toy: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    case = Case(prompt_tokens=16, new_tokens=49)
    asked = Workload(name="long", cases=(case,), repeats=5, prompts=PROMPTS, answer_tokens=6)
    (there,) = arm64_emulator.measure(toy, asked)
    (here,) = host.measure(toy, asked, 1)
    assert there.answers == here.answers
    assert there.figure("peak_memory").value == pytest.approx(here.figure("peak_memory").value, rel=0.15)
    assert there.where.os.endswith("aarch64")
    least, *_ = counts = sorted(there.figure("decode_instructions").samples)
    assert least > 10_000
    assert counts[2] < 1.02 * least  # a timer may be in some, but no clock would tell the same so often
