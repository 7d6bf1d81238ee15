"""AWS Device Farm, asked by boto3 itself; the farm is a stand-in on this machine."""

import io
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import file_sha256
from runtimes.errors import MissingExtra, SomeFailed, TargetError, UsageError
from runtimes.measurement import Measurement, read

boto3 = pytest.importorskip("boto3", reason="the client of AWS Device Farm")

from runtimes.targets import aws_device_farm  # noqa: E402

ARN = "arn:aws:devicefarm:us-west-2"
KEY, SECRET, TOKEN = "AKIAGOCHUTEST0000000", "gochu/secret+key/of/a/test", "gochu-session-token-of-a-test"
PROJECT, RUN = f"{ARN}:123456789012:project:고추", f"{ARN}:123456789012:run:project/run-0001"
S24, PIXEL, IPHONE = (f"{ARN}::device:{name}" for name in ("S24ULTRA", "PIXEL9", "IPHONE15PRO"))


def device(arn: str, name: str, model: str, system: str, version: str, available: str = "AVAILABLE") -> dict:
    return {
        "arn": arn,
        "name": name,
        "model": name,
        "modelId": model,
        "platform": system,
        "os": version,
        "availability": available,
    }


class DeviceFarm:
    """Speaks Device Farm's protocol. `faults`: for an operation, the replies that it gives before the right one."""

    def __init__(self, reply: Any) -> None:
        self._reply = reply
        self.url = ""
        self.devices = [
            device(S24, "Samsung Galaxy S24 Ultra", "SM-S928U1", "ANDROID", "14"),
            device(PIXEL, "Google Pixel 9", "Pixel 9", "ANDROID", "15"),
            device(IPHONE, "Apple iPhone 15 Pro", "MTQR3LL/A", "IOS", "17.4"),
        ]
        self.projects = [{"name": "고추", "arn": PROJECT}]
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, dict]] = []
        self.uploads: dict[str, tuple[str, str, bytes]] = {}  # ARN -> kind, name, bytes
        self.refused: dict[str, str] = {}  # kind of an upload that fails -> why
        self.status = ["SCHEDULING", "RUNNING", "COMPLETED"]
        self.logs: dict[str, tuple[str, str]] = {}  # device's ARN -> result, log
        self.broken_log = False

    def reply(self, request: Any) -> Any:
        if request.path.startswith("/s3/"):
            return self.storage(request)
        operation = request.headers["x-amz-target"].partition(".")[2]
        assert request.headers["authorization"].startswith(f"AWS4-HMAC-SHA256 Credential={KEY}/")
        self.asked.append((operation, request.json))
        if self.faults.get(operation):
            return self.faults[operation].pop(0)
        return self._reply(getattr(self, operation)(request.json))

    def storage(self, request: Any) -> Any:
        assert request.query["X-Amz-Signature"] == "presigned-and-secret"
        self.asked.append((f"{request.method} {request.path}", {}))
        if self.faults.get(request.method):
            return self.faults[request.method].pop(0)
        if request.method == "PUT":
            arn = next(a for a in self.uploads if a.endswith(request.path.removeprefix("/s3/")))
            self.uploads[arn] = (*self.uploads[arn][:2], request.body)
            return self._reply()
        return self._reply(
            next(log for arn, (_, log) in self.logs.items() if request.path.endswith(arn[-4:]))
        )

    def ListProjects(self, _: dict) -> dict:  # noqa: N802
        return {"projects": self.projects}

    def ListDevices(self, asked: dict) -> dict:  # noqa: N802
        """In pages of two."""
        begin = int(asked.get("nextToken", "page0")[4:])
        more = {"nextToken": f"page{begin + 2}"} if begin + 2 < len(self.devices) else {}
        return {"devices": self.devices[begin : begin + 2], **more}

    def CreateUpload(self, asked: dict) -> dict:  # noqa: N802
        number = f"{len(self.uploads):04}"
        arn = f"{ARN}:123456789012:upload:project/{number}"
        self.uploads[arn] = (asked["type"], asked["name"], b"")
        return {"upload": {"arn": arn, "url": self.at(number)}}

    def at(self, name: str) -> str:
        return f"{self.url}/s3/{name}?X-Amz-Signature=presigned-and-secret"

    def GetUpload(self, asked: dict) -> dict:  # noqa: N802
        kind, _, data = self.uploads[asked["arn"]]
        upload = {"arn": asked["arn"], "status": "SUCCEEDED" if data else "PROCESSING"}
        if kind in self.refused:
            upload |= {"status": "FAILED", "message": self.refused[kind]}
        return {"upload": upload}

    def ScheduleRun(self, asked: dict) -> dict:  # noqa: N802
        return {"run": {"arn": RUN, "status": "SCHEDULING"}}

    def GetRun(self, asked: dict) -> dict:  # noqa: N802
        assert asked["arn"] == RUN
        status = self.status.pop(0) if len(self.status) > 1 else self.status[0]
        return {"run": {"arn": RUN, "status": status, "resultCode": "PARSING_FAILED"}}

    def StopRun(self, asked: dict) -> dict:  # noqa: N802
        self.status = ["COMPLETED"]
        return {"run": {"arn": RUN, "status": "STOPPING"}}

    def ListJobs(self, asked: dict) -> dict:  # noqa: N802
        return {
            "jobs": [
                {
                    "arn": f"{ARN}:123456789012:job:{arn[-4:]}",
                    "device": next(each for each in self.devices if each["arn"] == arn),
                    "result": result,
                    "message": "" if result == "PASSED" else "the device went away 기기가 사라짐",
                }
                for arn, (result, _) in self.logs.items()
            ]
        }

    def ListArtifacts(self, asked: dict) -> dict:  # noqa: N802
        if asked["type"] != "LOG":
            return {"artifacts": []}
        artifact = {
            "name": "Logcat",
            "type": "DEVICE_LOG",
            "extension": "logcat",
            "url": self.at(asked["arn"][-4:]),
        }
        video = {"name": "Video", "type": "VIDEO", "extension": "mp4", "url": self.at("video")}
        return {"artifacts": [artifact, video]}

    def count(self, operation: str) -> int:
        return sum(name == operation for name, _ in self.asked)

    def sent(self, operation: str) -> dict:
        return next(body for name, body in reversed(self.asked) if name == operation)


def error(make: Any, code: str, message: str, status: int = 400) -> Any:
    return make({"__type": code, "message": message}, status)


@pytest.fixture
def farm(serve, make_reply, printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DeviceFarm:
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    farm = serve(DeviceFarm(make_reply))
    farm.logs = {S24: ("PASSED", printed())}
    monkeypatch.setenv("AWS_ENDPOINT_URL_DEVICE_FARM", farm.url)
    return farm


@pytest.fixture
def measure(farm: DeviceFarm, toy: Path, apps: dict[str, Path]):
    """`measure(...)`: the toy on the stand-in's Galaxy S24 Ultra."""

    def measure(**options: Any) -> list[Measurement]:
        given = {"device": "Galaxy S24 Ultra", "app": apps["app.apk"], "tests": apps["test.apk"]} | options
        return aws_device_farm.measure(toy, given.pop("workload", "smoke"), **given)

    return measure


def test_a_phone_is_measured_from_the_command_line(gochu, farm, toy, apps, tmp_path, nowhere, clock) -> None:
    out = tmp_path / "results.jsonl"
    arguments = [
        "bench",
        toy,
        "--on",
        "aws-device-farm",
        "--device",
        "갤럭시 S24 울트라",
        "--out",
        out,
        "--json",
    ]
    options = [
        f"app={apps['app.apk']}",
        f"tests={apps['test.apk']}",
        f"logs={tmp_path / '로그'}",
        "max_minutes=20",
    ]
    code, said, complained = gochu(*arguments, *itertools.chain(*(("--option", each) for each in options)))
    assert (code, complained) == (0, "")
    (found,) = map(Measurement.model_validate, json.loads(said))
    assert (found.where.target, found.where.device, found.where.chip) == (
        "aws-device-farm",
        "Galaxy S24 Ultra",
        "sm8650",
    )
    assert found.where.run == RUN
    assert found.what.bundle == file_sha256(toy / "manifest.json")
    assert found.figure("decode_speed").value == 21
    assert found.command.startswith(
        "gochu bench toy --workload smoke --on aws-device-farm --variant cpu --device"
    )
    assert found.command.endswith("--option max_minutes=20")
    assert read(out) == [found]
    scheduled = farm.sent("ScheduleRun")
    assert scheduled["deviceSelectionConfiguration"]["filters"][0]["values"] == [S24]
    assert scheduled["executionConfiguration"]["jobTimeoutMinutes"] == 20
    assert scheduled["test"]["type"] == "INSTRUMENTATION"
    kinds = {arn: kind for arn, (kind, _, _) in farm.uploads.items()}
    assert kinds[scheduled["appArn"]] == "ANDROID_APP"
    assert kinds[scheduled["test"]["testPackageArn"]] == "INSTRUMENTATION_TEST_PACKAGE"
    _, _, data = farm.uploads[scheduled["configuration"]["extraDataPackageArn"]]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("gochu/model.onnx.data") == (toy / "model.onnx.data").read_bytes()
        job = json.loads(archive.read("gochu/job.json"))
    assert (job["variant"], job["workload"]["name"]) == ("cpu", "smoke")
    (log,) = (tmp_path / "로그").rglob("*.logcat")
    assert "GOCHU-MEASUREMENT 1/" in log.read_text(encoding="utf-8")
    assert log.parent.name == "Samsung Galaxy S24 Ultra"
    assert clock.slept == [5.0, 7.5], "it waits longer each time"
    assert farm.count("StopRun") == 0
    nowhere([SECRET, TOKEN, "presigned-and-secret"], said, complained)


def test_an_ios_app_is_tested_by_xcuitest(farm, measure, printed, apps) -> None:
    farm.logs = {IPHONE: ("PASSED", printed())}
    (found,) = measure(device="iPhone 15 Pro", app=apps["app.ipa"], tests=apps["test.ipa"])
    assert (found.where.device, found.where.chip) == ("iPhone 15 Pro", "apple-a17-pro")
    assert farm.sent("ScheduleRun")["test"]["type"] == "XCTEST_UI"
    with pytest.raises(UsageError, match=r"app\.apk has to be \.ipa for these devices"):
        measure(device="iPhone 15 Pro")


def test_a_program_needs_neither_app_nor_test(farm, measure, tmp_path, toy, printed) -> None:
    """Device Farm's part is played by bash, and the phone's by a folder behind an adb that is a script."""
    program = tmp_path / "runner"
    program.write_text('#!/bin/sh\ntest -f "$1/manifest.json" && grep -q smoke "$2" && cat lines\nexit 3\n')
    (found,) = measure(runner=program, app=None, tests=None)
    assert found.command.endswith(f"--option runner={program}")
    scheduled = farm.sent("ScheduleRun")
    assert "appArn" not in scheduled
    kind, _, spec = farm.uploads[scheduled["test"]["testSpecArn"]]
    assert kind == "APPIUM_WEB_NODE_TEST_SPEC"
    kind, _, package = farm.uploads[scheduled["test"]["testPackageArn"]]
    assert kind == "APPIUM_WEB_NODE_TEST_PACKAGE"

    yaml = pytest.importorskip("yaml", reason="reads the test spec as Device Farm does")
    phases = yaml.safe_load(spec)["phases"]
    assert yaml.safe_load(spec)["version"] == 0.1
    host, phone, logs = (tmp_path / name for name in ("host", "phone", "log dir"))
    for folder in (host, phone, logs):
        folder.mkdir()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        modes = {each.filename: each.external_attr >> 16 for each in archive.infolist()}
        archive.extractall(host / "package")
    assert stat.S_IMODE(modes["gochu/runner"]) == 0o755
    assert stat.S_IMODE(modes["gochu/manifest.json"]) == 0o644
    (host / "package" / "gochu" / "lines").write_text(printed(), encoding="utf-8")
    adb = host / "adb"
    adb.write_text(
        '#!/bin/bash\ntest "$1 $2" = "-s SERIAL" || exit 9\nshift 2\nverb=$1; shift\nroot="$PHONE"\n'
        'if [ "$verb" = push ]; then mkdir -p "$root/data/local/tmp"; cp -r "$1" "$root$2"; exit; fi\n'
        'bash -c "$(echo "$*" | sed "s#/data/local/tmp#$root/data/local/tmp#g")"\n'
    )
    adb.chmod(0o755)
    environment = {
        "PATH": f"{host}:{os.environ['PATH']}",
        "PHONE": str(phone),
        "DEVICEFARM_DEVICE_UDID": "SERIAL",
        "DEVICEFARM_TEST_PACKAGE_PATH": str(host / "package"),
        "DEVICEFARM_LOG_DIR": str(logs),
    }

    def phase(name: str) -> list[subprocess.CompletedProcess]:
        return [
            subprocess.run(["bash", "-c", each], env=environment, capture_output=True, text=True, check=False)
            for each in phases[name]["commands"]
        ]

    assert [each.returncode for each in phase("pre_test")] == [0, 0, 0]
    (ran,) = phase("test")
    assert ran.stdout == printed()
    assert ran.returncode == 3, "the program's exit code is the test's"
    assert (logs / "gochu.txt").read_text(encoding="utf-8") == printed()
    phase("post_test")
    assert not (phone / "data/local/tmp/gochu").exists()


def test_a_folder_of_a_program_and_its_libraries_goes_there_whole(farm, measure, tmp_path) -> None:
    (tmp_path / "runner").write_bytes(b"program")
    (tmp_path / "libengine.so").write_bytes(b"library")
    measure(runner=tmp_path, app=None, tests=None)
    _, _, package = farm.uploads[farm.sent("ScheduleRun")["test"]["testPackageArn"]]
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        assert archive.read("gochu/libengine.so") == b"library"
    with pytest.raises(UsageError, match="is no program, nor a folder with one that is called runner"):
        measure(runner=tmp_path / "model", app=None, tests=None)
    with pytest.raises(UsageError, match="a runner needs no app and no test"):
        measure(runner=tmp_path)
    with pytest.raises(UsageError, match="it needs Android devices"):
        measure(runner=tmp_path, app=None, tests=None, device="iPhone 15 Pro")


@pytest.mark.parametrize(
    ("operation", "code", "message", "status", "words"),
    [
        (
            "ScheduleRun",
            "LimitExceededException",
            "Too many runs",
            400,
            r"LimitExceeded.*the account's quota is used up",
        ),
        (
            "ListDevices",
            "ExpiredTokenException",
            "The security token is expired",
            400,
            "Expired.*sign in to AWS again",
        ),
        (
            "ListDevices",
            "UnrecognizedClientException",
            f"token {TOKEN} is invalid",
            400,
            r"\[secret\].*sign in to AWS",
        ),
        (
            "CreateUpload",
            "AccessDeniedException",
            "not authorized",
            400,
            r"AccessDenied.*the right to use Device Farm",
        ),
    ],
)
def test_what_device_farm_refuses_is_one_sentence(
    gochu, farm, make_reply, toy, apps, nowhere, operation, code, message, status, words
) -> None:
    farm.faults[operation] = [error(make_reply, code, message, status)]
    options = ["--option", f"app={apps['app.apk']}", "--option", f"tests={apps['test.apk']}"]
    code, out, err = gochu("bench", toy, "--on", "aws-device-farm", "--device", "Galaxy S24 Ultra", *options)
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert re.search(words, err)
    nowhere([SECRET, TOKEN, "presigned-and-secret"], out, err)


def test_a_farm_that_fails_for_a_while_is_asked_again(farm, make_reply, measure, clock) -> None:
    broken = error(make_reply, "InternalFailure", "try later", 500)
    farm.faults = {"ListDevices": [broken, make_reply(status=0)], "ScheduleRun": [broken], "GetRun": [broken]}
    farm.faults |= {"PUT": [make_reply(status=503)], "GET": [make_reply(status=500)]}
    assert len(measure()) == 1
    assert farm.count("ListDevices") == 4, "two failures, two pages"
    assert farm.count("ScheduleRun") == 2


def test_a_start_whose_answer_was_lost_is_not_repeated(farm, make_reply, measure) -> None:
    """It may have started a run, which costs money."""
    farm.faults = {"ScheduleRun": [make_reply(status=0)]}
    with pytest.raises(
        TargetError, match=r"schedule_run failed \(ConnectionClosedError.*is the network there"
    ):
        measure()
    assert farm.count("ScheduleRun") == 1


def test_a_farm_that_fails_for_ever_is_given_up_and_the_run_cancelled(farm, make_reply, measure) -> None:
    farm.faults = {"GetRun": [error(make_reply, "InternalFailure", "try later", 500)] * 99}
    farm.logs = {S24: ("STOPPED", "")}
    with pytest.raises(TargetError, match=r"get_run failed \(InternalFailure: try later\); try again"):
        measure()
    assert farm.count("GetRun") == 5
    assert farm.sent("StopRun") == {"arn": RUN}


def test_a_run_that_is_late_is_cancelled_and_its_logs_are_kept(farm, measure, tmp_path, clock) -> None:
    farm.status = ["RUNNING"]
    farm.logs = {S24: ("STOPPED", "11-24 I Gochu: still loading\n")}
    with pytest.raises(
        TargetError, match=r"was not done after 10 minutes and was cancelled: allow more with max_min"
    ):
        measure(max_minutes=10, logs=tmp_path / "logs")
    assert farm.sent("StopRun") == {"arn": RUN}
    assert clock.time == 600
    (log,) = (tmp_path / "logs").rglob("*.logcat")
    assert log.read_text() == "11-24 I Gochu: still loading\n"


def test_ctrl_c_cancels(farm, toy, apps, clock) -> None:
    farm.status = ["RUNNING"]
    clock.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        aws_device_farm.measure(
            toy, "smoke", device="Galaxy S24 Ultra", app=apps["app.apk"], tests=apps["test.apk"]
        )
    assert farm.sent("StopRun") == {"arn": RUN}


def test_a_run_that_cannot_be_cancelled_is_named(farm, make_reply, measure, clock, capfd) -> None:
    farm.faults = {"StopRun": [error(make_reply, "ExpiredTokenException", "expired")]}
    farm.status = ["RUNNING"]
    clock.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        measure()
    said = capfd.readouterr().err
    assert said.startswith(
        f"gochu: run {RUN} could not be cancelled (Device Farm's stop_run failed (ExpiredToken"
    )
    assert said.endswith("sign in to AWS again): do it on the farm's web page\n")


def test_a_run_is_resumed_by_its_id(farm, measure) -> None:
    (found,) = measure(run=RUN, app=None, tests=None, device=None)
    assert (found.where.device, found.where.run) == ("Galaxy S24 Ultra", RUN)
    assert farm.uploads == {}
    assert farm.count("ScheduleRun") == farm.count("ListDevices") == 0


def test_devices_that_finish_are_kept_when_one_fails(farm, measure, printed) -> None:
    farm.logs = {S24: ("PASSED", printed()), PIXEL: ("ERRORED", "")}
    with pytest.raises(SomeFailed) as failed:
        measure(device="Galaxy S24 Ultra, Pixel 9")
    (found,) = failed.value.measured
    assert found.where.device == "Galaxy S24 Ultra"
    assert "--device galaxy-s24-ultra " in found.command, "of the device that is meant, not of all"
    assert farm.sent("ScheduleRun")["deviceSelectionConfiguration"]["maxDevices"] == 2
    assert str(failed.value) == f"Pixel 9 in run {RUN}: ERRORED: the device went away 기기가 사라짐"


@pytest.mark.parametrize(
    ("workload", "cut", "kept", "words"),
    [
        ("smoke", 60, 0, r"Galaxy S24 Ultra in run .* is damaged: its checksum is another"),
        ("pp8,tg8", 60, 1, r"is damaged: its checksum is another"),
    ],
)
def test_a_cut_off_measurement_is_none(farm, measure, printed, workload, cut, kept, words) -> None:
    log = printed(workload)
    end = log.rindex("GOCHU-MEASUREMENT")
    farm.logs = {S24: ("PASSED", log[: end + cut])}
    with pytest.raises(TargetError, match=words) as failed:
        measure(workload=workload)
    assert len(getattr(failed.value, "measured", ())) == kept


def test_logs_that_cannot_be_had_are_said(farm, make_reply, measure) -> None:
    farm.faults = {"GET": [make_reply(status=403)]}
    with pytest.raises(TargetError, match=r"getting Logcat\.logcat failed \(status 403\)") as caught:
        measure()
    assert "presigned" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"what": {"bundle": "0" * 64}}, "of bundle 000000000000 was found.*build the app with this bundle"),
        ({"what": {"variant": "npu"}}, "a measurement of variant npu of bundle .* and this is variant cpu"),
        ({"marks": ("cpu_fallback",)}, "another processor computed.*allow that with --allow-fallback"),
        (
            {"where": {"chip": "exynos-2400"}},
            "the app found the chip exynos-2400, and Galaxy S24 Ultra has sm8650",
        ),
    ],
)
def test_a_measurement_of_something_else_is_refused(farm, measure, printed, changes, words) -> None:
    farm.logs = {S24: ("PASSED", printed(**changes))}
    with pytest.raises(TargetError, match=words):
        measure()


@pytest.mark.parametrize("chip", ["SM8650", "sm8650", "Snapdragon 8 Gen 3"])
def test_an_app_may_call_the_chip_as_the_system_does(farm, measure, printed, chip) -> None:
    farm.logs = {S24: ("PASSED", printed(where={"chip": chip}))}
    (found,) = measure()
    assert found.where.chip == "sm8650"


def test_a_fallback_can_be_allowed(farm, measure, printed) -> None:
    farm.logs = {S24: ("PASSED", printed(marks=("cpu_fallback", "throttled")))}
    (found,) = measure(allow_fallback=True)
    assert found.marks == ("cpu_fallback", "throttled")
    assert found.command.endswith(" --allow-fallback")


def test_a_run_without_a_device_is_said(farm, measure) -> None:
    farm.logs = {}
    with pytest.raises(TargetError, match=r"ended run .* before it had a device \(PARSING_FAILED\)"):
        measure()


def test_a_log_without_measurements_is_said(farm, measure) -> None:
    farm.logs = {S24: ("PASSED", "nothing")}
    with pytest.raises(
        TargetError, match="its logs hold no line with GOCHU-MEASUREMENT: does the app print one"
    ):
        measure()


def test_a_workload_that_was_measured_in_part_is_said(farm, measure, printed) -> None:
    farm.logs = {S24: ("PASSED", printed("pp8,tg8", cases=1))}
    with pytest.raises(SomeFailed, match="it measured 1 of the 2 cases of workload pp8,tg8") as failed:
        measure(workload="pp8,tg8")
    assert len(failed.value.measured) == 1


def test_another_workload_than_the_runs_is_refused(farm, measure, printed) -> None:
    with pytest.raises(TargetError, match=r"which is no case of pp8: name the same --workload"):
        measure(workload="pp8", run=RUN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"device": "Galaxy S23"},
            r"the farm has no Galaxy S23 for this account; it has Samsung Galaxy S24 Ultra",
        ),
        ({"device": None}, "say which with --device"),
        ({"device": "Galaxy S24 Ultra,iPhone 15 Pro"}, "these devices run android and ios: split them"),
        ({"app": None}, r"a farm runs an app: give --option app=FILE \(\.apk\)"),
        ({"tests": Path("나 없다.apk")}, "나 없다.apk is not there: build the app first"),
        ({"project": "other"}, r"no project 'other': say which with --option project=NAME; there are 고추"),
        ({"max_minutes": 0}, "a run of 0 minutes measures nothing"),
        (
            {"device": "Galaxy S24 Ultra,Pixel 9", "max_minutes": 90},
            "2 devices for up to 90 .* are 180 device minutes",
        ),
        ({"variant": "npu"}, "has no variant 'npu'; it has cpu"),
        ({"max_minutes": 151}, "Device Farm ends a run after 150 minutes: lower max_minutes"),
        ({"run": "run-0001"}, "'run-0001' is no run of Device Farm's: its id is an ARN"),
        ({"context": 4096}, "has a context of at most 96 tokens, not 4096"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_costs(farm, measure, options, words) -> None:
    with pytest.raises(UsageError, match=words):
        measure(**options)
    assert farm.count("ScheduleRun") == 0


def test_what_is_too_large_is_said_before_it_is_sent(farm, measure, monkeypatch) -> None:
    monkeypatch.setattr(aws_device_farm, "_MOST", 10_000)
    with pytest.raises(
        UsageError, match=r"bundle\.zip has 0\.0 GB, and Device Farm takes 1e-05: export a smaller"
    ):
        measure()
    assert farm.count("CreateUpload") == 0


def test_a_missing_extra_is_one_line(farm, measure, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(
        MissingExtra, match=r"^boto3 is not installed; install it with `pip install 'gochu\[aws\]'`$"
    ):
        measure()


def test_a_device_that_is_gone_is_said(farm, measure) -> None:
    farm.devices[0]["availability"] = "TEMPORARY_NOT_AVAILABLE"
    with pytest.raises(TargetError, match="the farm has Samsung Galaxy S24 Ultra, but not now: try later"):
        measure()


def test_an_app_that_device_farm_cannot_read_is_said(farm, measure) -> None:
    farm.refused = {"ANDROID_APP": "not a valid APK"}
    with pytest.raises(
        TargetError, match=r"Device Farm refuses app\.apk \(not a valid APK\): build it again"
    ):
        measure()


def test_a_project_is_named_by_its_name_or_arn(farm, measure) -> None:
    farm.projects.append({"name": "other", "arn": f"{ARN}:123456789012:project:other"})
    with pytest.raises(UsageError, match=r"Device Farm has 2 projects: say which .* there are 고추, other"):
        measure()
    for named in ("other", f"{ARN}:123456789012:project:other"):
        farm.status = ["COMPLETED"]
        measure(project=named)
        assert farm.sent("ScheduleRun")["projectArn"].endswith(":other")


def test_missing_credentials_are_said(farm, measure, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(TargetError, match="no AWS credentials were found: set AWS_ACCESS_KEY_ID and"):
        measure()


def test_a_secret_in_a_log_is_replaced(farm, measure, printed, tmp_path, nowhere) -> None:
    farm.logs = {S24: ("PASSED", printed() + f"env AWS_SECRET_ACCESS_KEY={SECRET}\n")}
    measure(logs=tmp_path / "logs")
    nowhere([SECRET, TOKEN])
    (log,) = (tmp_path / "logs").rglob("*.logcat")
    assert "AWS_SECRET_ACCESS_KEY=[secret]" in log.read_text(encoding="utf-8")
