"""Measure on phones of BrowserStack's App Automate, through its REST API.

https://www.browserstack.com/docs/app-automate/api-reference/espresso/builds, and .../xcuitest/builds

It takes an app and a UI test (Espresso: .apk and .apk; XCUITest: .ipa and .zip). It has no way to bring a model to the
device: of files that are no media it takes five of at most 15 MB, and those only as documents (.txt, .csv, .pdf, ...).
So the bundle has to be in the app, which is checked before anything is sent, or be fetched by the app
(`fetches`). What to measure is given to an Espresso test as the instrumentation option `gochuJob`, to an XCUITest as
the environment variable of that name.

Credentials are BROWSERSTACK_USERNAME and BROWSERSTACK_ACCESS_KEY. Tried with httpx against a stand-in alone:
BrowserStack itself was never reached.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError

from runtimes import farm, farm_devices, farm_package, farm_run
from runtimes.bundle import MANIFEST, Bundle
from runtimes.errors import TargetError, UsageError
from runtimes.extras import require
from runtimes.farm_devices import Chosen, Offered
from runtimes.farm_run import Errand, Logs, Outcome
from runtimes.measurement import Measurement
from runtimes.workload import Workload

Told = TypeVar("Told")
TARGET = "browserstack"
USERNAME, ACCESS_KEY = "BROWSERSTACK_USERNAME", "BROWSERSTACK_ACCESS_KEY"
ENDPOINT = (
    "GOCHU_BROWSERSTACK_ENDPOINT"  # another server that speaks the same API, in a test or behind a proxy
)
_API = "https://api-cloud.browserstack.com"
_OWN = ".browserstack.com"  # whose addresses may see the access key
_JOB = "gochuJob"
_IDLE = (
    900  # s that a test may be silent; the most that can be asked for (docs/app-automate/espresso/timeouts)
)
_LONGEST = 120.0  # minutes of a session (same page)
_ENDED = ("done", "passed", "failed", "error", "timedout", "timeout", "skipped", "stopped")
_TESTS = {  # system -> framework, kinds of app, kinds of test
    "android": ("espresso", {".apk": "app", ".aab": "app"}, {".apk": "test-suite"}),
    "ios": ("xcuitest", {".ipa": "app"}, {".zip": "test-suite"}),
}


def check() -> None:
    """UsageError without credentials, MissingExtra without httpx."""
    with _browserstack(None, None, False):
        pass


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    context: int | None = None,
    device: str | None = None,
    app: Path | None = None,
    tests: Path | None = None,
    fetches: bool = False,
    logs: Path | None = None,
    run: str | None = None,
    max_minutes: float = farm.Limits.minutes,
    max_device_minutes: float = farm.Limits.device_minutes,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Measure a bundle's variant on phones of BrowserStack; the figures are those that the app prints.

    `app`, `tests`: an .apk and its Espresso test, or an .ipa and its zipped XCUITest runner. `fetches`: the app gets
    the bundle by itself, so it need not be in there. `logs`: a folder for all that the devices say. `run`: the id of
    a build to go on waiting for, as it was given (framework/id). Raises UsageError, TargetError, MissingExtra,
    BundleError, ChecksumError.
    """
    errand = farm_run.errand(
        TARGET,
        "browserstack",
        bundle_path,
        workload,
        variant=variant,
        context=context,
        device=device,
        limits=farm.Limits(max_minutes, max_device_minutes).within(_LONGEST, "BrowserStack ends a session"),
        logs=logs,
        run=run,
        allow_fallback=allow_fallback,
        progress=progress,
        app=app,
        tests=tests,
        fetches=fetches or None,
    )
    with _browserstack(app, tests, fetches) as service:
        return farm_run.carry_out(service, errand)


@contextmanager
def _browserstack(app: Path | None, tests: Path | None, fetches: bool) -> "Iterator[_BrowserStack]":
    httpx: Any = require("httpx", "browserstack")
    name, key = (os.environ.get(each, "").strip() for each in (USERNAME, ACCESS_KEY))
    if not name or not key:
        raise UsageError(
            f"{USERNAME if not name else ACCESS_KEY} is not set: set {USERNAME} and {ACCESS_KEY} to those of your "
            "account (browserstack.com/accounts/settings)"
        )
    base = os.environ.get(ENDPOINT, _API)
    with httpx.Client(
        base_url=base, auth=(name, key), timeout=httpx.Timeout(60, write=600, read=600)
    ) as client:
        yield _BrowserStack(client, httpx, (key,), app, tests, fetches)


class _Answer(BaseModel):
    """What is used of BrowserStack's answers: one of another shape is refused with a sentence."""


class _Listed(_Answer):
    device: str
    os: str
    os_version: str


class _Uploaded(_Answer):
    """`test_url`: what a test suite's address was called before 2021."""

    url: str = Field(validation_alias=AliasChoices("app_url", "test_suite_url", "test_url"))


class _Started(_Answer):
    build_id: str | None = None
    message: Any = None


class _SessionOfBuild(_Answer):
    id: str
    status: str


class _DeviceOfBuild(_Listed):
    sessions: tuple[_SessionOfBuild, ...]


class _Build(_Answer):
    status: str
    devices: tuple[_DeviceOfBuild, ...] = ()


class _Case(_Answer):
    name: str = "test"
    device_log: str | None = None
    instrumentation_log: str | None = None


class _Class(_Answer):
    testcases: tuple[_Case, ...] = ()


class _Classes(_Answer):
    data: tuple[_Class, ...] = ()


class _Session(_Answer):
    testcases: _Classes = _Classes()


class _BrowserStack:
    """BrowserStack, asked through httpx. A run's id is framework/build."""

    def __init__(
        self,
        client: Any,
        httpx: Any,
        secrets: tuple[str, ...],
        app: Path | None,
        tests: Path | None,
        fetches: bool,
    ) -> None:
        self._client, self._httpx, self.secrets = client, httpx, secrets
        self._app, self._tests, self._fetches = app, tests, fetches

    def offered(self) -> list[Offered]:
        devices = self._told(list[_Listed], "GET", "app-automate/devices.json", "listing devices")
        return [_offered(each) for each in devices]

    def start(self, errand: Errand, devices: Sequence[Chosen]) -> str:
        system = devices[0].offered.os
        framework, apps, suites = _TESTS[system]
        app, _ = farm_package.app(self._app, "app", apps)
        tests, _ = farm_package.app(self._tests, "tests", suites)
        if not self._fetches:
            _require_bundle(app, errand.bundle)
        build: dict[str, Any] = {
            "app": self._upload(framework, "app", app, errand),
            "testSuite": self._upload(framework, "test-suite", tests, errand),
            "devices": [each.offered.id for each in devices],
            "project": "gochu",
            "deviceLogs": True,
            "video": False,
            "idleTimeout": min(_IDLE, max(60, round(60 * errand.limits.minutes))),
            "instrumentationOptions" if system == "android" else "setEnvVariables": {
                _JOB: errand.job.to_json()
            },
        }
        answer = self._told(
            _Started,
            "POST",
            f"app-automate/{framework}/v2/build",
            "starting a build",
            again=self._refused,  # a request whose answer was lost may have started a build that costs money
            json=build,
        )
        if not answer.build_id:
            raise TargetError(
                f"BrowserStack started no build ({self._said(str(answer.message))}); see its words"
            )
        return f"{framework}/{answer.build_id}"

    def ended(self, run: str) -> bool:
        return bool(self._build(run).status.lower() in _ENDED)

    def cancel(self, run: str) -> None:
        self._ask("POST", f"{_path(run)}/stop", f"stopping build {run}", self._passes)

    def outcomes(self, run: str, logs: Logs) -> Iterator[Outcome]:
        for device in self._build(run).devices:
            there = farm_devices.known(_offered(device))
            for session in device.sessions:
                text, lost = self._logs(run, session.id, there.offered.label, logs)
                status = session.status.lower()
                failure = "" if status == "passed" else f"its session is {status}"
                yield Outcome(there, text, "; ".join(filter(None, [failure, *lost])))

    def _logs(self, run: str, session: str, device: str, logs: Logs) -> tuple[str, list[str]]:
        """The texts of a session's logs, and which could not be had: those of its tests, or else of the device."""
        where = f"{_path(run)}/sessions/{session}"
        found = self._told(_Session, "GET", where, f"asking for session {session}")
        cases = [case for group in found.testcases.data for case in group.testcases]
        wanted = [
            (f"{number:02} {case.name} {kind}.txt", url)
            for number, case in enumerate(cases, 1)
            for kind, url in (
                ("device_log", case.device_log),
                ("instrumentation_log", case.instrumentation_log),
            )
            if url
        ]
        texts, lost = [], []
        for name, url in wanted or [("device_log.txt", f"{where}/devicelogs")]:
            try:
                texts.append(logs.keep(device, name, self._get(url, name)))
            except TargetError as error:
                lost.append(str(error))
        return "\n".join(texts), lost

    def _build(self, run: str) -> _Build:
        return self._told(_Build, "GET", _path(run), f"asking for build {run}")

    def _get(self, url: str, name: str) -> bytes:
        """A log; the access key goes to BrowserStack's own addresses alone."""
        address = self._client.base_url.join(url)
        own = address.host == self._client.base_url.host or (
            address.scheme == "https" and address.host.endswith(_OWN)
        )
        request: dict[str, Any] = {} if own else {"auth": None}
        data: bytes = self._ask("GET", str(address), f"getting {name}", self._passes, **request).content
        return data

    def _upload(self, framework: str, kind: str, path: Path, errand: Errand) -> str:
        """The address, bs://..., of a file that was sent."""
        errand.progress(f"sending {path.name} ({path.stat().st_size / 1e6:.0f} MB)")

        def send() -> Any:
            with path.open("rb") as file:
                answer = self._client.post(
                    f"app-automate/{framework}/v2/{kind}", files={"file": (path.name, file)}
                )
            return answer.raise_for_status()

        with self._step(f"sending {path.name}"):
            answer = farm.retried(send, self._passes)
        return self._object(_Uploaded, answer, f"sending {path.name}").url

    def _told(
        self,
        kind: type[Told],
        method: str,
        path: str,
        doing: str,
        again: Callable[[Exception], bool] | None = None,
        **request: Any,
    ) -> Told:
        return self._object(kind, self._ask(method, path, doing, again or self._passes, **request), doing)

    def _ask(
        self, method: str, path: str, doing: str, again: Callable[[Exception], bool], **request: Any
    ) -> Any:
        with self._step(doing):
            return farm.retried(
                lambda: self._client.request(method, path, **request).raise_for_status(), again
            )

    def _object(self, kind: type[Told], answer: Any, doing: str) -> Told:
        try:
            return TypeAdapter(kind).validate_json(answer.content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "all of it"
            raise TargetError(
                f"{doing}: BrowserStack's answer is not as it documents it ({place}: {first['msg']}); is there a proxy "
                "in between? try again, or update Gochu"
            ) from None

    def _refused(self, error: Exception) -> bool:
        """Whether BrowserStack answered, with a failure of its own."""
        return isinstance(error, self._httpx.HTTPStatusError) and error.response.status_code >= 500

    def _passes(self, error: Exception) -> bool:
        return self._refused(error) or isinstance(error, self._httpx.TransportError)

    @contextmanager
    def _step(self, doing: str) -> Iterator[None]:
        """One sentence for what httpx raises."""
        try:
            yield
        except self._httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise TargetError(
                f"{doing} failed (status {status}: {self._said(_words(error.response))}); {_advice(status)}"
            ) from None
        except self._httpx.HTTPError as error:
            said = self._said(f"{type(error).__name__}: {error}")
            raise TargetError(f"{doing} failed ({said}); is the network there? try again") from None

    def _said(self, text: str) -> str:
        return farm.without(" ".join(text.split())[:300], self.secrets)


def _require_bundle(app: Path, bundle: Bundle) -> None:
    """UsageError unless an app, which is a zip, holds this bundle's manifest."""
    ours = (bundle.path / MANIFEST).read_bytes()
    try:
        with zipfile.ZipFile(app) as archive:
            inside = [each for each in archive.infolist() if PurePosixPath(each.filename).name == MANIFEST]
            if any(each.file_size == len(ours) and archive.read(each) == ours for each in inside):
                return
    except zipfile.BadZipFile:
        raise UsageError(f"--option app={app} is no app: it is not a zip file; build it again") from None
    raise UsageError(
        f"{app.name} does not hold this bundle, and BrowserStack cannot bring it to a device: put the bundle's folder "
        "among the app's assets, or say --option fetches=yes if the app gets it by itself"
    )


def _path(run: str) -> str:
    """Where a build is asked for; UsageError if it is no id of one."""
    framework, _, build = run.partition("/")
    if framework not in {each for each, *_ in _TESTS.values()} or not build.isalnum():
        raise UsageError(f"{run!r} is no run of BrowserStack's: those are espresso/ID and xcuitest/ID")
    return f"app-automate/{framework}/v2/builds/{build}"


def _offered(listed: _Listed) -> Offered:
    id = f"{listed.device}-{listed.os_version}"
    return Offered(id, id, (listed.device, id), listed.os.lower(), listed.os_version)


def _words(response: Any) -> str:
    """BrowserStack's own words, wherever it puts them."""
    try:
        said = response.json()
    except ValueError:
        return str(response.text) or "no words"
    if isinstance(said, dict):
        said = said.get("error") or said.get("message") or said
    return str(said)


def _advice(status: int) -> str:
    """What to do about a status."""
    if status in (401, 403):
        return f"are {USERNAME} and {ACCESS_KEY} those of your account, and may it use App Automate?"
    if status == 429 or status == 402:
        return "the plan's quota is used up: wait, or buy more"
    return "try again later" if status >= 500 else "see its words"
