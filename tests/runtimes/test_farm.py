"""What farms share: limits, waiting, trying again, cancelling, secrets; and names of devices, and what is sent."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from runtimes import farm, farm_devices, farm_package, farm_run
from runtimes.bundle import Bundle, Manifest
from runtimes.errors import TargetError, UsageError
from runtimes.farm_devices import Offered
from runtimes.workload import preset


class FakeClock:
    """Goes on by what is slept."""

    def __init__(self) -> None:
        self.time, self.slept = 100.0, []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# limits and waiting


@pytest.mark.parametrize(
    ("limits", "devices", "words"),
    [
        (farm.Limits(0), ["a"], "a run of 0 minutes measures nothing"),
        (
            farm.Limits(50),
            ["a", "b", "c"],
            r"3 devices for up to 50 minutes each are 150 device minutes, and 120 are",
        ),
    ],
)
def test_limits_are_checked_before_anything_is_spent(limits, devices, words) -> None:
    with pytest.raises(UsageError, match=words):
        limits.check(devices)


def test_limits_that_are_kept_are_not_spoken_of() -> None:
    farm.Limits(60, 120).check(["a", "b"])


def test_waiting_is_slower_and_slower_up_to_a_minute(clock) -> None:
    answers, said = iter([None] * 9 + ["done"]), []
    assert farm.wait(lambda: next(answers), "run 1", farm.Limits(), clock, said.append) == "done"
    assert clock.slept[:3] == [5.0, 7.5, 11.25]
    assert clock.slept[-2:] == [60.0, 60.0]
    assert said[0] == "run 1: 0 of at most 30 minutes"
    assert said[-1] == "run 1: 4 of at most 30 minutes"


def test_waiting_ends_when_the_time_is_up(clock) -> None:
    with pytest.raises(TargetError, match="run 1 was not done after 3 minutes and was cancelled: allow more"):
        farm.wait(lambda: None, "run 1", farm.Limits(3), clock)
    assert sum(clock.slept) == 180, "not a second more: the last pause is cut"


def test_what_passes_is_tried_again(clock) -> None:
    failures = [ConnectionError(), ConnectionError()]

    def request() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert farm.retried(request, lambda error: isinstance(error, ConnectionError), clock) == "answer"
    first, second = clock.slept
    assert 0.5 <= first <= 1 <= second <= 2


def test_what_does_not_pass_is_raised(clock) -> None:
    asked = []

    def request() -> None:
        asked.append(1)
        raise ValueError if len(asked) == 2 else ConnectionError

    with pytest.raises(ValueError, match=r"^$"):
        farm.retried(request, lambda error: isinstance(error, ConnectionError), clock)
    assert len(asked) == 2
    with pytest.raises(ConnectionError):
        farm.retried(request, lambda error: isinstance(error, ConnectionError), clock)
    assert len(asked) == 2 + farm.TRIES


@pytest.mark.parametrize("ending", [KeyboardInterrupt, TargetError, SystemExit])
def test_a_run_that_does_not_end_is_cancelled(ending, capfd) -> None:
    cancelled = []
    with pytest.raises(ending), farm.cancelling(lambda: cancelled.append(1), "고추-1"):
        raise ending
    assert cancelled == [1]
    assert capfd.readouterr().err == "gochu: run 고추-1 was cancelled\n"


def test_a_run_that_ends_is_not_cancelled(capfd) -> None:
    cancelled = []
    with farm.cancelling(lambda: cancelled.append(1), "1"):
        pass
    assert (cancelled, capfd.readouterr().err) == ([], "")


@pytest.mark.parametrize(
    ("failure", "why"),
    [(TargetError("the token expired"), "the token expired"), (OSError("secret"), "OSError")],
)
def test_a_run_that_cannot_be_cancelled_is_named_and_the_first_error_stands(capfd, failure, why) -> None:
    def cancel() -> None:
        raise failure

    with pytest.raises(KeyboardInterrupt), farm.cancelling(cancel, "1"):
        raise KeyboardInterrupt
    assert capfd.readouterr().err == (
        f"gochu: run 1 could not be cancelled ({why}): do it on the farm's web page\n"
    )


def test_secrets_are_replaced() -> None:
    assert (
        farm.without("key k1, token t1, k1", ["k1", None, "t1", ""])
        == "key [secret], token [secret], [secret]"
    )


# names of devices


def variant(toy: Path, **changes: Any) -> Any:
    return Bundle.open(toy).manifest.variants[0].model_copy(update=changes)


def offered(label: str, *names: str, version: str = "14", **more: Any) -> Offered:
    return Offered(
        **{"id": label, "label": label, "names": (label, *names), "os": "android", "version": version} | more
    )


S24_ULTRA = offered("Samsung Galaxy S24 Ultra", "SM-S928U1")


@pytest.mark.parametrize(
    "name", ["Galaxy S24 Ultra", "갤럭시 S24 울트라", "SM-S928N", "samsung galaxy s24 ultra"]
)
def test_a_device_answers_to_all_its_names(toy, name) -> None:
    (found,) = farm_devices.choose([name], "device_farm", [offered("Pixel 8"), S24_ULTRA], variant(toy))
    assert (found.offered, found.profile.id) == (S24_ULTRA, "galaxy-s24-ultra")


def test_a_phone_with_two_chips_is_told_by_its_model_code(toy) -> None:
    """The Galaxy S24 has a Snapdragon in America and an Exynos elsewhere."""
    american, other = offered("Galaxy S24", "SM-S921U1", id="1"), offered("Galaxy S24", "SM-S921N", id="2")
    (found,) = farm_devices.choose(["SM-S921N"], "device_farm", [american, other], variant(toy))
    assert (found.offered, found.profile.chip) == (other, "exynos-2400")
    (found,) = farm_devices.choose(["SM-S921U"], "device_farm", [american, other], variant(toy))
    assert (found.offered, found.profile.chip) == (american, "sm8650")


def test_one_that_is_there_now_goes_before_a_newer_one(toy) -> None:
    busy = offered("Pixel 9", version="16", id="busy", available=False)
    ready, old = offered("Pixel 9", version="15", id="ready"), offered("Pixel 9", version="9", id="old")
    (found,) = farm_devices.choose(["Pixel 9"], "firebase", [old, busy, ready], variant(toy))
    assert found.offered == ready


def test_a_device_is_chosen_once(toy) -> None:
    found = farm_devices.choose(["SM-S928N", "Galaxy S24 Ultra"], "device_farm", [S24_ULTRA], variant(toy))
    assert len(found) == 1


def test_a_farm_without_such_a_device_names_near_ones(toy) -> None:
    with pytest.raises(
        UsageError, match=r"the farm has no Galaxy S23 for this account; it has .*Galaxy S24 Ultra"
    ):
        farm_devices.choose(["Galaxy S23"], "device_farm", [S24_ULTRA], variant(toy))
    with pytest.raises(UsageError, match="it has nothing like it: name another device"):
        farm_devices.choose(["Galaxy S23"], "device_farm", [offered("Zzz")], variant(toy))


def test_a_variant_for_another_chip_is_refused(toy) -> None:
    made = variant(toy, chips=("sm8750",))
    with pytest.raises(UsageError, match=r"variant cpu was made for sm8750, and Galaxy S24 Ultra has sm8650"):
        farm_devices.choose(["Galaxy S24 Ultra"], "device_farm", [S24_ULTRA], made)


def test_names_are_read_from_a_list() -> None:
    assert farm_devices.names(" 갤럭시 S24, Pixel 9,갤럭시 S24,") == ["갤럭시 S24", "Pixel 9"]


# what is sent


def test_the_same_bundle_gives_the_same_bytes(copy, tmp_path) -> None:
    bundle = Bundle.open(copy)
    contents = {**farm_package.files(bundle, bundle.manifest.variants[0]), "job.json": "작업"}
    first = farm_package.pack(contents, tmp_path / "1.zip").read_bytes()
    (copy / "manifest.json").touch()
    second = farm_package.pack(dict(reversed(contents.items())), tmp_path / "2.zip").read_bytes()
    assert first == second
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.testzip() is None
        assert {each.date_time[0] for each in archive.infolist()} == {1980}
        assert archive.namelist()[-1] == "gochu/tokenizer.json"
        assert archive.read("gochu/job.json").decode() == "작업"


def test_only_the_files_of_the_variant_are_sent(toy) -> None:
    """And those that belong to no variant, as the chat template; not what a simulator runs."""
    bundle = Bundle.open(toy)
    data = bundle.manifest.model_dump(mode="json")
    entry = data["files"][0] | {"size": 1}
    data["files"] += [
        entry | {"path": path} for path in ("npu.bin", "npu-source.onnx", "chat_template.jinja")
    ]
    compiled = {
        "chip": 57,
        "arch": "v75",
        "sdk": "2",
        "sources": [{"name": "decode", "file": "npu-source.onnx", "inputs": [], "outputs": []}],
    }
    npu = {"name": "npu", "files": ["npu.bin", "npu-source.onnx", "model.onnx.data"], "compiled": compiled}
    npu["entry_points"] = [{"name": "decode", "file": "npu.bin", "inputs": [], "outputs": []}]
    data["variants"].append(data["variants"][0] | npu)
    bundle.manifest = Manifest.model_validate(data)
    cpu_files = farm_package.files(bundle, bundle.manifest.variants[0])
    common = {"manifest.json", "tokenizer.json", "chat_template.jinja", "model.onnx.data"}
    assert set(cpu_files) == common | {"model.onnx"}
    assert set(farm_package.files(bundle, bundle.manifest.variants[1])) >= common | {"npu.bin"}
    assert "model.onnx" not in farm_package.files(bundle, bundle.manifest.variants[1])


def test_a_job_says_what_to_measure() -> None:
    asked = preset("smoke").model_copy(update={"prompts": ("삼백이십은?",)})
    text = farm_package.Job(variant="cpu", context=96, workload=asked).to_json()
    assert text.isascii(), "it goes through shells and instrumentation options"
    assert json.loads(text)["workload"]["prompts"] == ["삼백이십은?"]
    assert farm_package.Job.model_validate_json(text).workload == asked


# what comes back


def test_logs_are_kept_by_run_and_device_each_one(tmp_path) -> None:
    logs = farm_run.Logs(tmp_path, "arn:run:project/고추-1", ["secret"])
    assert logs.keep("갤럭시 S24", "logcat.txt", b"one secret") == "one [secret]"
    assert logs.keep("갤럭시 S24", "logcat.txt", b"\xfftwo") == "\N{REPLACEMENT CHARACTER}two"
    assert logs.keep("../Pixel", "../../etc/passwd", b"three") == "three"
    assert logs.keep("..", ".", b"four") == "four"
    found = {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert found == {
        "고추-1/갤럭시 S24/logcat.txt": b"one [secret]",
        "고추-1/갤럭시 S24/logcat 2.txt": b"\xfftwo",
        "고추-1/_Pixel/_.._etc_passwd": b"three",
        "고추-1/unnamed/unnamed": b"four",
    }


def test_a_folder_that_cannot_be_written_is_said(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UsageError, match=r"cannot be written: .*; give another folder with --option logs=DIR"
    ):
        farm_run.Logs(tmp_path / "file", "1", []).keep("Pixel", "log", b"")
