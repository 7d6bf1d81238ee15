"""Measure on phones of AWS Device Farm, through boto3, in one of two ways.

With an app and its UI test (`app`, `tests`): the bundle goes there as extra data, which Device Farm unpacks into the
external storage of an Android device, or into the sandbox of an iOS app. With a program (`runner`): no app, no test;
bundle and program go into a test package, and a test spec written here pushes both to the device over adb and runs
`./runner . job.json` there (https://docs.aws.amazon.com/devicefarm/latest/developerguide/
custom-test-environment-test-spec.html). Credentials are boto3's: environment, or its usual files.

Tried with boto3 against a stand-in alone: Device Farm itself was never reached.
"""

import functools
import json
import math
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from runtimes import farm, farm_devices, farm_package, farm_run
from runtimes.errors import TargetError, UsageError
from runtimes.extras import require
from runtimes.farm_devices import Chosen, Offered
from runtimes.farm_package import FOLDER, JOB
from runtimes.farm_run import Errand, Logs, Outcome
from runtimes.measurement import Measurement
from runtimes.workload import Workload

TARGET = "aws-device-farm"
REGION = "us-west-2"  # no other has Device Farm (docs.aws.amazon.com/general/latest/gr/devicefarm.html)
_LONGEST = 150.0  # minutes of a run (docs.aws.amazon.com/devicefarm/latest/developerguide/limits.html)
_MOST = 4e9  # bytes of an app (same page), and of extra data (.../test-runs.html)
RUNNER = "runner"
_RUN = re.compile(r"arn:aws:devicefarm:[^:]*:[^:]*:run:\S+")
_LOGS = (
    "DEVICE_LOG",
    "MESSAGE_LOG",
    "INSTRUMENTATION_OUTPUT",
    "XCTEST_LOG",
    "TESTSPEC_OUTPUT",
    "CUSTOMER_ARTIFACT",
    "CUSTOMER_ARTIFACT_LOG",
)
_TESTS = {  # system -> kind of app, kind of test package, type of test
    "android": ({".apk": "ANDROID_APP"}, {".apk": "INSTRUMENTATION_TEST_PACKAGE"}, "INSTRUMENTATION"),
    "ios": ({".ipa": "IOS_APP"}, {".ipa": "XCTEST_UI_TEST_PACKAGE"}, "XCTEST_UI"),
}


def check() -> None:
    """TargetError without credentials, MissingExtra without boto3."""
    _DeviceFarm(None, None, None, None)


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    context: int | None = None,
    device: str | None = None,
    app: Path | None = None,
    tests: Path | None = None,
    runner: Path | None = None,
    project: str | None = None,
    logs: Path | None = None,
    run: str | None = None,
    max_minutes: float = farm.Limits.minutes,
    max_device_minutes: float = farm.Limits.device_minutes,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Measure a bundle's variant on phones of AWS Device Farm; the figures are those that the app or program prints.

    `app`, `tests`: an .apk and its instrumentation test, or an .ipa and its XCTest UI test. `runner`: instead, a
    program for arm64 Android, or a folder with one of that name and its libraries. `project`: name or ARN, if the
    account has several. `logs`: a folder for all that the devices say. `run`: the ARN of a run to go on waiting for.
    Raises UsageError, TargetError, MissingExtra, BundleError, ChecksumError.
    """
    if run is not None and not _RUN.fullmatch(run):
        raise UsageError(
            f"{run!r} is no run of Device Farm's: its id is an ARN, arn:aws:devicefarm:...:run:..."
        )
    errand = farm_run.errand(
        TARGET,
        "device_farm",
        bundle_path,
        workload,
        variant=variant,
        context=context,
        device=device,
        limits=farm.Limits(max_minutes, max_device_minutes).within(_LONGEST, "Device Farm ends a run"),
        logs=logs,
        run=run,
        allow_fallback=allow_fallback,
        progress=progress,
        app=app,
        tests=tests,
        runner=runner,
        project=project,
    )
    service = _DeviceFarm(app, tests, runner, project)
    return farm_run.carry_out(service, errand)


class _DeviceFarm:
    """Device Farm, asked through boto3. Requests are repeated by `farm.retried`, so boto3 itself repeats none."""

    def __init__(
        self, app: Path | None, tests: Path | None, runner: Path | None, project: str | None
    ) -> None:
        if runner is not None and (app is not None or tests is not None):
            raise UsageError(
                "a runner needs no app and no test: leave out either it, or --option app and tests"
            )
        self._app, self._tests, self._runner, self._wanted = app, tests, runner, project
        boto3 = require("boto3", "aws")
        config: Any = require("botocore.config", "aws")
        self._errors: ModuleType = require("botocore.exceptions", "aws")
        session = boto3.Session()
        with self._step("finding AWS credentials"):
            held = session.get_credentials()
            frozen = held.get_frozen_credentials() if held else None
            self._client: Any = session.client(
                "devicefarm",
                region_name=REGION,
                config=config.Config(retries={"total_max_attempts": 1, "mode": "standard"}),
            )
        if frozen is None:
            raise TargetError(
                "no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
            )
        self.secrets = (frozen.access_key, frozen.secret_key, frozen.token)

    def offered(self) -> list[Offered]:
        return [_offered(each) for each in self._all("list_devices", "devices")]

    def start(self, errand: Errand, devices: Sequence[Chosen]) -> str:
        system = devices[0].offered.os
        contents: dict[str, Path | str] = {**farm_package.files(errand.bundle, errand.variant)}
        contents[JOB] = errand.job.to_json()
        with tempfile.TemporaryDirectory() as folder:
            if self._runner is None:
                test, options = self._app_test(contents, Path(folder), errand, system)
            elif system == "android":
                test, options = self._runner_test(self._runner, contents, Path(folder), errand), {}
            else:
                raise UsageError(
                    "a runner is pushed over adb, so it needs Android devices: give --option app and tests"
                )
        answer = self._ask(
            "schedule_run",
            again=self._refused,  # a request whose answer was lost may have started a run that costs money
            projectArn=self._project,
            name=f"gochu {errand.variant.name}",
            deviceSelectionConfiguration={
                "filters": [
                    {"attribute": "ARN", "operator": "IN", "values": [each.offered.id for each in devices]}
                ],
                "maxDevices": len(devices),
            },
            executionConfiguration={
                "jobTimeoutMinutes": math.ceil(errand.limits.minutes),
                "videoCapture": False,
            },
            test=test,
            **options,
        )
        return str(answer["run"]["arn"])

    def ended(self, run: str) -> bool:
        return bool(self._ask("get_run", arn=run)["run"]["status"] == "COMPLETED")

    def cancel(self, run: str) -> None:
        self._ask("stop_run", arn=run)

    def outcomes(self, run: str, logs: Logs) -> Iterator[Outcome]:
        jobs = self._all("list_jobs", "jobs", arn=run)
        if not jobs:
            ended = self._ask("get_run", arn=run)["run"]
            why = ended.get("message") or ended.get("resultCode") or ended.get("result", "no reason given")
            raise TargetError(f"Device Farm ended run {run} before it had a device ({why}); see its web page")
        for job in jobs:
            device = farm_devices.known(_offered(job["device"]))
            texts, lost = [], []
            for kind in ("LOG", "FILE"):
                for artifact in self._all("list_artifacts", "artifacts", arn=job["arn"], type=kind):
                    if artifact["type"] not in _LOGS:
                        continue
                    name = f"{artifact['name']}.{artifact['extension']}"
                    try:
                        data = self._download(artifact["url"], name)
                    except TargetError as error:
                        lost.append(str(error))
                        continue
                    texts.append(logs.keep(device.offered.label, name, data))
            failure = (
                ""
                if job["result"] == "PASSED"
                else f"{job['result']}: {job.get('message', 'no reason given')}"
            )
            yield Outcome(device, "\n".join(texts), "; ".join(filter(None, [failure, *lost])))

    def _app_test(
        self, contents: dict[str, Path | str], folder: Path, errand: Errand, system: str
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """The test of an app, and what its run needs besides."""
        apps, packages, kind = _TESTS[system]
        app, tests = (
            farm_package.app(self._app, "app", apps),
            farm_package.app(self._tests, "tests", packages),
        )
        data = farm_package.pack(contents, folder / "bundle.zip")
        extra = self._upload(data, "EXTERNAL_DATA", errand)  # first: it is what may be too large
        test = {"type": kind, "testPackageArn": self._upload(*tests, errand)}
        return test, {
            "appArn": self._upload(*app, errand),
            "configuration": {"extraDataPackageArn": extra},
        }

    def _runner_test(
        self, runner: Path, contents: dict[str, Path | str], folder: Path, errand: Errand
    ) -> dict[str, str]:
        """The test of a program: of Appium's kinds the one for web pages needs no app, and its test spec is free."""
        programs = _programs(runner)
        package = farm_package.pack({**contents, **programs}, folder / "package.zip", tuple(programs))
        spec = folder / "spec.yml"
        spec.write_text(device_farm_spec(), encoding="utf-8")
        return {
            "type": "APPIUM_WEB_NODE",
            "testPackageArn": self._upload(package, "APPIUM_WEB_NODE_TEST_PACKAGE", errand),
            "testSpecArn": self._upload(spec, "APPIUM_WEB_NODE_TEST_SPEC", errand),
        }

    @functools.cached_property
    def _project(self) -> str:
        """The ARN of the project that was named, or of the only one."""
        there = {each["name"]: str(each["arn"]) for each in self._all("list_projects", "projects")}
        if self._wanted in there.values():
            return str(self._wanted)
        if self._wanted in there:
            return there[self._wanted]
        if self._wanted is None and len(there) == 1:
            return next(iter(there.values()))
        listed = ", ".join(there) or "none: make one on Device Farm's web page"
        asked = f"no project {self._wanted!r}" if self._wanted else f"{len(there)} projects"
        raise UsageError(f"Device Farm has {asked}: say which with --option project=NAME; there are {listed}")

    def _upload(self, path: Path, kind: str, errand: Errand) -> str:
        """The ARN of a file that was sent to Device Farm, and that it could read."""
        if path.stat().st_size > _MOST:
            raise UsageError(
                f"{path.name} has {path.stat().st_size / 1e9:.1f} GB, and Device Farm takes {_MOST / 1e9:g}: export a "
                "smaller scheme, or a smaller model"
            )
        errand.progress(f"sending {path.name} ({path.stat().st_size / 1e6:.0f} MB)")
        made = self._ask("create_upload", projectArn=self._project, name=path.name, type=kind)["upload"]
        with path.open("rb") as file:

            def send() -> None:
                file.seek(0)
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Content-Length": str(path.stat().st_size),
                }
                request = urllib.request.Request(made["url"], data=file, method="PUT", headers=headers)
                urllib.request.urlopen(request, timeout=600).close()

            with self._step(f"sending {path.name}"):
                farm.retried(send, self._passes)

        def taken() -> dict[str, Any] | None:
            upload: dict[str, Any] = self._ask("get_upload", arn=made["arn"])["upload"]
            return upload if upload["status"] in ("SUCCEEDED", "FAILED") else None

        upload = farm.wait(
            taken,
            f"Device Farm's look at {path.name}",
            errand.limits,
            progress=errand.progress,
            fate="nothing was started: try again later",
        )
        if upload["status"] == "FAILED":
            why = upload.get("message") or upload.get("metadata") or "no reason given"
            raise TargetError(f"Device Farm refuses {path.name} ({why}): build it again")
        return str(upload["arn"])

    def _download(self, url: str, name: str) -> bytes:
        def get() -> bytes:
            with urllib.request.urlopen(url, timeout=600) as answer:
                data: bytes = answer.read()
                return data

        with self._step(f"getting {name}"):
            return farm.retried(get, self._passes)

    def _all(self, operation: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        """All pages of a list."""
        found: list[dict[str, Any]] = []
        more: dict[str, Any] = {}
        while True:
            page = self._ask(operation, **parameters, **more)
            found += page[key]
            if not page.get("nextToken"):
                return found
            more = {"nextToken": page["nextToken"]}

    def _ask(
        self, operation: str, again: Callable[[Exception], bool] | None = None, **parameters: Any
    ) -> Any:
        """What an operation answers; `again`: which failures it is repeated after (default: those that pass)."""
        with self._step(f"Device Farm's {operation}"):
            return farm.retried(lambda: getattr(self._client, operation)(**parameters), again or self._passes)

    def _refused(self, error: Exception) -> bool:
        """Whether Device Farm answered, with a failure of its own."""
        return (
            isinstance(error, self._errors.ClientError)
            and error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
        )

    def _passes(self, error: Exception) -> bool:
        if isinstance(error, urllib.error.HTTPError):
            return error.code >= 500
        lost = (self._errors.HTTPClientError, self._errors.ConnectionError, OSError)
        return self._refused(error) or isinstance(error, lost)

    @contextmanager
    def _step(self, doing: str) -> Iterator[None]:
        """One sentence for what boto3, or the storage behind its addresses, raises; an address there is a secret."""
        try:
            yield
        except self._errors.ClientError as error:
            code, said = error.response["Error"]["Code"], error.response["Error"]["Message"]
            raise TargetError(self._said(f"{doing} failed ({code}: {said}); {_advice(code)}")) from None
        except urllib.error.HTTPError as error:
            raise TargetError(f"{doing} failed (status {error.code}); try again") from None
        except self._errors.NoCredentialsError:
            raise TargetError(
                "no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        except (self._errors.BotoCoreError, OSError) as error:
            raise TargetError(
                self._said(
                    f"{doing} failed ({type(error).__name__}: {error}); is the network there? try again"
                )
            ) from None

    def _said(self, text: str) -> str:
        return farm.without(" ".join(text.split()), getattr(self, "secrets", ()))


def device_farm_spec() -> str:
    """The test spec that runs a program on an Android device, as Device Farm's YAML, version 0.1.

    The program's own exit code is the test's; what it prints is in the test's output, and in the log folder.
    """
    adb = 'adb -s "$DEVICEFARM_DEVICE_UDID"'
    there, log = f"/data/local/tmp/{FOLDER}", '"$DEVICEFARM_LOG_DIR/gochu.txt"'
    phases = {
        "pre_test": [
            f"{adb} shell rm -rf {there}",
            f'{adb} push "$DEVICEFARM_TEST_PACKAGE_PATH/{FOLDER}" {there}',
            f"{adb} shell chmod 755 {there}/{RUNNER}",
        ],
        "test": [
            f'{adb} shell "cd {there} && LD_LIBRARY_PATH=. ./{RUNNER} . {JOB}" > {log}; code=$?; cat {log}; '
            "(exit $code)"
        ],
        "post_test": [f"{adb} shell rm -rf {there}"],
    }
    lines = ["version: 0.1", "android_test_host: amazon_linux_2", "phases:"]
    for phase, commands in phases.items():
        lines += [f"  {phase}:", "    commands:", *(f"      - {json.dumps(each)}" for each in commands)]
    return "\n".join([*lines, "artifacts:", '  - "$DEVICEFARM_LOG_DIR"', ""])


def _programs(runner: Path) -> dict[str, Path]:
    """The program and its libraries, by their names there."""
    if runner.is_file():
        return {RUNNER: runner}
    if (runner / RUNNER).is_file():
        return {each.name: each for each in sorted(runner.iterdir()) if each.is_file()}
    raise UsageError(f"--option runner={runner} is no program, nor a folder with one that is called {RUNNER}")


def _offered(device: dict[str, Any]) -> Offered:
    name, model = device["name"], device.get("modelId", "")
    return Offered(
        id=device["arn"],
        label=name,
        names=tuple(filter(None, (name, device.get("model", ""), model))),
        os=device.get("platform", "").lower(),
        version=device.get("os", ""),
        available=device.get("availability") != "TEMPORARY_NOT_AVAILABLE",
    )


def _advice(code: str) -> str:
    """What to do about an error of AWS, by its code."""
    if code in ("ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException"):
        return "sign in to AWS again"
    if code == "AccessDeniedException":
        return "ask for the right to use Device Farm (devicefarm:*)"
    if code == "LimitExceededException":
        return "the account's quota is used up: wait, or ask AWS for more"
    if code == "NotFoundException":
        return "name a run or project that is there"
    return "try again"
