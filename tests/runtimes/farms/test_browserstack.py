"""BrowserStack, asked by httpx itself; the farm is a stand-in on this machine."""

import base64
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from runtimes.bundle import file_sha256
from runtimes.errors import MissingExtra, SomeFailed, TargetError, UsageError
from runtimes.measurement import Measurement

httpx = pytest.importorskip("httpx", reason="the client of BrowserStack")

from runtimes.targets import browserstack  # noqa: E402

NAME, KEY = "gochu_user", "access-key-of-a-test"
BUILD = "741c219db523cb51d4cdf35723ce3bfc592fb74a"
RUN = f"espresso/{BUILD}"
S24, PIXEL, IPHONE = ("Samsung Galaxy S24 Ultra", "14.0"), ("Google Pixel 9", "15.0"), ("iPhone 15 Pro", "17")


class BrowserStack:
    """Speaks App Automate's API. `faults`: for a request, the replies that it gives before the right one."""

    def __init__(self, reply: Any) -> None:
        self._reply = reply
        self.url = ""
        self.devices = [("android", *S24), ("android", *PIXEL), ("ios", *IPHONE)]
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.status = ["queued", "running", "passed"]
        self.logs: dict[tuple[str, str], tuple[str, str]] = {}  # device -> status, log
        self.elsewhere: BrowserStack | None = None  # where logs lie, if not here
        self.cases = True  # whether sessions tell of their tests

    def reply(self, request: Any) -> Any:
        short = request.path.removeprefix("/app-automate/")
        login = base64.b64encode(f"{NAME}:{KEY}".encode()).decode()
        known = request.headers.get("authorization") == f"Basic {login}"
        is_json = request.headers.get("content-type") == "application/json"
        self.asked.append((f"{request.method} {short}", request.json if is_json else (known, request.body)))
        if faults := self.faults.get(f"{request.method} {short}"):
            return faults.pop(0)
        if short.startswith("public/"):
            return self._reply(self.log(short))
        if not known:
            return self._reply("Unauthorized", 401)
        return self._reply(*self.answer(request, short))

    def log(self, short: str) -> str:
        return next(log for (name, _), (_, log) in self.logs.items() if name.replace(" ", "") in short)

    def answer(self, request: Any, short: str) -> tuple[Any, ...]:
        _, _, rest = short.partition("/v2/")
        if short == "devices.json":
            return (
                [{"os": o, "os_version": v, "device": d, "realMobile": True} for o, d, v in self.devices],
            )
        if rest == "app":
            return ({"app_name": "app", "app_url": "bs://app"},)
        if rest == "test-suite":
            return ({"test_suite_url": "bs://tests"},)
        if rest == "build":
            return ({"message": "Success", "build_id": BUILD},)
        if rest == f"builds/{BUILD}":
            return (self.build(),)
        if rest == f"builds/{BUILD}/stop":
            self.status = ["stopped"]
            return ({"message": "Success"},)
        if rest.endswith("devicelogs"):
            return (self.log(rest),)
        if rest.startswith(f"builds/{BUILD}/sessions/"):
            name = rest.rpartition("/")[2]
            where = (self.elsewhere or self).url
            case = {
                "name": "측정 measures",
                "status": "passed",
                "device_log": f"{where}/app-automate/public/{name}/devicelogs",
                "instrumentation_log": "",
            }
            data = [{"class": "io.gochu.Bench", "testcases": [case]}] if self.cases else []
            return ({"id": name, "testcases": {"count": len(data), "data": data}},)
        return ({"error": "Not found"}, 404)

    def build(self) -> dict:
        status = self.status.pop(0) if len(self.status) > 1 else self.status[0]
        return {
            "id": BUILD,
            "status": status,
            "devices": [
                {
                    "device": name,
                    "os": "ios" if name.startswith("iP") else "android",
                    "os_version": version,
                    "sessions": [{"id": name.replace(" ", ""), "status": ended}],
                }
                for (name, version), (ended, _) in self.logs.items()
            ],
        }

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.asked)

    def sent(self, what: str) -> Any:
        return next(body for name, body in reversed(self.asked) if name == what)


@pytest.fixture
def farm(serve, make_reply, printed, monkeypatch: pytest.MonkeyPatch) -> BrowserStack:
    monkeypatch.setenv("BROWSERSTACK_USERNAME", NAME)
    monkeypatch.setenv("BROWSERSTACK_ACCESS_KEY", KEY)
    farm = serve(BrowserStack(make_reply))
    farm.logs = {S24: ("passed", printed())}
    monkeypatch.setenv("GOCHU_BROWSERSTACK_ENDPOINT", farm.url)
    return farm


@pytest.fixture
def measure(farm: BrowserStack, toy: Path, apps: dict[str, Path]):
    """`measure(...)`: the toy on the stand-in's Galaxy S24 Ultra."""

    def measure(**options: Any) -> list[Measurement]:
        given = {"device": "Galaxy S24 Ultra", "app": apps["app.apk"], "tests": apps["test.apk"]} | options
        return browserstack.measure(toy, given.pop("workload", "smoke"), **given)

    return measure


def test_a_phone_is_measured_from_the_command_line(gochu, farm, toy, apps, tmp_path, nowhere, clock) -> None:
    options = [f"app={apps['app.apk']}", f"tests={apps['test.apk']}", f"logs={tmp_path / '로그'}"]
    arguments = [word for option in options for word in ("--option", option)]
    code, said, complained = gochu(
        "bench", toy, "--on", "browserstack", "--device", "SM-S928N", "--json", *arguments
    )
    assert (code, complained) == (0, "")
    (found,) = map(Measurement.model_validate, json.loads(said))
    assert (found.where.target, found.where.device, found.where.run) == (
        "browserstack",
        "Galaxy S24 Ultra",
        RUN,
    )
    assert found.what.bundle == file_sha256(toy / "manifest.json")
    assert "--on browserstack --variant cpu --device SM-S928N --option 'app=" in found.command
    assert "max_minutes" not in found.command
    build = farm.sent("POST espresso/v2/build")
    assert (build["app"], build["testSuite"]) == ("bs://app", "bs://tests")
    assert build["devices"] == ["Samsung Galaxy S24 Ultra-14.0"]
    assert (build["deviceLogs"], build["idleTimeout"]) == (True, 900)
    assert json.loads(build["instrumentationOptions"]["gochuJob"])["workload"]["name"] == "smoke"
    _, form = farm.sent("POST espresso/v2/app")
    assert apps["app.apk"].read_bytes() in form
    (log,) = (tmp_path / "로그").rglob("*.txt")
    assert log.parts[-2:] == ("Samsung Galaxy S24 Ultra-14.0", "01 측정 measures device_log.txt")
    assert clock.slept == [5.0, 7.5]
    assert farm.count(f"POST espresso/v2/builds/{BUILD}/stop") == 0
    nowhere([KEY, base64.b64encode(f"{NAME}:{KEY}".encode()).decode()], said, complained)


def test_an_ios_app_is_tested_by_xcuitest(farm, measure, printed, apps) -> None:
    farm.logs = {IPHONE: ("passed", printed())}
    (found,) = measure(device="iPhone 15 Pro", app=apps["app.ipa"], tests=apps["test.zip"])
    assert (found.where.device, found.where.run) == ("iPhone 15 Pro", f"xcuitest/{BUILD}")
    build = farm.sent("POST xcuitest/v2/build")
    assert json.loads(build["setEnvVariables"]["gochuJob"])["variant"] == "cpu"


def test_an_app_without_the_bundle_is_refused_before_it_is_sent(farm, measure, toy, tmp_path, apps) -> None:
    app = tmp_path / "other.apk"
    with zipfile.ZipFile(app, "w") as archive:
        archive.writestr("assets/gochu/manifest.json", (toy / "manifest.json").read_bytes() + b" ")
    with pytest.raises(
        UsageError, match=r"other\.apk does not hold this bundle, and BrowserStack cannot bring it"
    ):
        measure(app=app)
    with pytest.raises(UsageError, match="is no app: it is not a zip file"):
        measure(app=apps["test.apk"])
    assert farm.count("POST espresso/v2/app") == 0
    (found,) = measure(app=app, fetches=True)
    assert "--option fetches=True" in found.command


def test_a_session_without_tests_gives_the_devices_log(farm, measure) -> None:
    farm.cases = False
    assert len(measure()) == 1
    assert farm.count(f"GET espresso/v2/builds/{BUILD}/sessions/SamsungGalaxyS24Ultra/devicelogs") == 1


def test_the_access_key_is_shown_to_nobody_else(farm, measure, serve, make_reply, monkeypatch) -> None:
    """A log that lies on another host is fetched without it."""
    other = serve(BrowserStack(make_reply))
    other.logs = farm.logs
    other.url = other.url.replace("127.0.0.1", "localhost")
    farm.elsewhere = other
    assert len(measure()) == 1
    (known, _) = other.sent("GET public/SamsungGalaxyS24Ultra/devicelogs")
    assert not known
    farm.elsewhere = None
    farm.status = ["passed"]
    measure()
    assert farm.sent("GET public/SamsungGalaxyS24Ultra/devicelogs")[0], "its own host is asked with it"


@pytest.mark.parametrize(
    ("where", "body", "status", "words"),
    [
        (
            "GET devices.json",
            "Unauthorized",
            401,
            r"\(status 401: Unauthorized\); are BROWSERSTACK_USERNAME and",
        ),
        (
            "GET devices.json",
            {"message": f"key {KEY} has expired"},
            403,
            r"key \[secret\] has expired\); are BROWSER",
        ),
        (
            "POST espresso/v2/build",
            {"error": "[BROWSERSTACK_ALL_PARALLELS_IN_USE] All parallel tests are in use"},
            429,
            r"starting a build failed \(status 429: \[BROWSERSTACK_ALL_.* quota is used up: wait, or buy more",
        ),
        (
            "POST espresso/v2/build",
            {"message": {"devices": "Device Samsung Galaxy S24 Ultra-14.0 is not supported"}},
            422,
            "status 422: .*Galaxy S24 Ultra-14.0 is not supported",
        ),
        (
            "POST espresso/v2/app",
            {"error": "Malformed archive"},
            422,
            r"sending app\.apk failed \(status 422: Malformed",
        ),
        (
            "GET devices.json",
            [{"os": "android"}],
            200,
            r"not as it documents it \(0\.device: Field required\)",
        ),
        (
            "GET devices.json",
            "<html>proxy</html>",
            200,
            "listing devices: BrowserStack's answer is not as it documents it .all of it: Invalid JSON",
        ),
    ],
)
def test_what_browserstack_refuses_is_one_sentence(
    gochu, farm, make_reply, toy, apps, nowhere, where, body, status, words
) -> None:
    farm.faults[where] = [make_reply(body, status)]
    options = ["--option", f"app={apps['app.apk']}", "--option", f"tests={apps['test.apk']}"]
    code, out, err = gochu("bench", toy, "--on", "browserstack", "--device", "Galaxy S24 Ultra", *options)
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert re.search(words, err)
    nowhere([KEY], out, err)


def test_a_build_that_was_not_started_is_said(farm, make_reply, measure) -> None:
    farm.faults["POST espresso/v2/build"] = [make_reply({"message": "your trial is over"})]
    with pytest.raises(TargetError, match=r"BrowserStack started no build \(your trial is over\)"):
        measure()


def test_a_farm_that_fails_for_a_while_is_asked_again(farm, make_reply, measure) -> None:
    broken = make_reply("Bad gateway", 502)
    farm.faults = {
        "GET devices.json": [broken, make_reply(status=0)],
        "POST espresso/v2/app": [broken],
        "POST espresso/v2/build": [broken],
        f"GET espresso/v2/builds/{BUILD}": [broken],
        "GET public/SamsungGalaxyS24Ultra/devicelogs": [broken],
    }
    assert len(measure()) == 1
    assert farm.count("GET devices.json") == 3
    _, form = farm.sent("POST espresso/v2/app")
    assert b"manifest.json" in form, "the file was sent whole again"
    assert farm.count("POST espresso/v2/build") == 2


def test_a_start_whose_answer_was_lost_is_not_repeated(farm, make_reply, measure) -> None:
    """It may have started a build, which costs money."""
    farm.faults = {"POST espresso/v2/build": [make_reply(status=0)]}
    with pytest.raises(
        TargetError, match=r"starting a build failed \(RemoteProtocolError: .*is the network there"
    ):
        measure()
    assert farm.count("POST espresso/v2/build") == 1


def test_a_farm_that_fails_for_ever_is_given_up_and_the_build_stopped(farm, make_reply, measure) -> None:
    farm.faults = {f"GET espresso/v2/builds/{BUILD}": [make_reply("Bad gateway", 502)] * 99}
    with pytest.raises(
        TargetError, match=r"asking for build .* failed \(status 502: Bad gateway\); try again later"
    ):
        measure()
    assert farm.count(f"POST espresso/v2/builds/{BUILD}/stop") == 1


def test_a_build_that_is_late_is_stopped_and_its_logs_are_kept(farm, measure, tmp_path, clock) -> None:
    farm.status = ["running"]
    farm.logs = {S24: ("stopped", "I Gochu: 아직 읽는 중\n")}
    with pytest.raises(
        TargetError, match=r"was not done after 10 minutes and was cancelled.*session is stopped"
    ):
        measure(max_minutes=10, logs=tmp_path / "logs")
    assert farm.count(f"POST espresso/v2/builds/{BUILD}/stop") == 1
    assert clock.time == 600
    (log,) = (tmp_path / "logs").rglob("*.txt")
    assert log.read_text(encoding="utf-8") == "I Gochu: 아직 읽는 중\n"


def test_ctrl_c_stops_the_build(farm, measure, clock) -> None:
    farm.status = ["running"]
    clock.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert farm.count(f"POST espresso/v2/builds/{BUILD}/stop") == 1


def test_a_build_is_resumed_by_its_id(farm, measure) -> None:
    (found,) = measure(run=RUN, app=None, tests=None, device=None)
    assert (found.where.device, found.where.run) == ("Galaxy S24 Ultra", RUN)
    assert not [name for name, _ in farm.asked if name.startswith("POST")]
    assert farm.count("GET devices.json") == 0


@pytest.mark.parametrize("run", [BUILD, f"appium/{BUILD}", "espresso/../../users", "espresso/"])
def test_what_is_no_id_of_a_build_is_said(farm, measure, run) -> None:
    with pytest.raises(
        UsageError, match="is no run of BrowserStack's: those are espresso/ID and xcuitest/ID"
    ):
        measure(run=run)
    assert farm.asked == []


def test_devices_that_finish_are_kept_when_one_fails(farm, measure, printed) -> None:
    farm.status = ["failed"]
    farm.logs = {S24: ("passed", printed()), PIXEL: ("timedout", printed()[:-20])}
    with pytest.raises(SomeFailed) as failed:
        measure(device="Galaxy S24 Ultra, Pixel 9")
    found = failed.value.measured
    assert [each.where.device for each in found] == ["Galaxy S24 Ultra", "Pixel 9"]
    assert str(failed.value) == f"Pixel 9 in run {RUN}: its session is timedout"
    assert found[0].where.chip == "sm8650"


def test_a_measurement_that_was_cut_off_is_none(farm, measure, printed) -> None:
    farm.logs = {S24: ("passed", printed()[: printed().index("GOCHU-MEASUREMENT") + 90])}
    with pytest.raises(TargetError, match=r"Galaxy S24 Ultra in run .* is damaged: its checksum is another"):
        measure()


def test_logs_that_cannot_be_had_are_said(farm, make_reply, measure) -> None:
    farm.faults = {"GET public/SamsungGalaxyS24Ultra/devicelogs": [make_reply({"error": "expired"}, 410)]}
    with pytest.raises(
        TargetError, match=r"getting 01 측정 measures device_log\.txt failed \(status 410: expired\)"
    ):
        measure()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"device": "Galaxy S23"},
            r"the farm has no Galaxy S23 for this account; it has Samsung Galaxy S24 Ultra",
        ),
        ({"device": ""}, "say which with --device"),
        ({"tests": None}, r"give --option tests=FILE \(\.apk\)"),
        ({"max_minutes": 121}, "BrowserStack ends a session after 120 minutes: lower max_minutes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_costs(farm, measure, options, words) -> None:
    with pytest.raises(UsageError, match=words):
        measure(**options)
    assert not [name for name, _ in farm.asked if name.startswith("POST")]


def test_the_newest_system_is_taken_unless_the_profile_names_one(farm, measure, printed) -> None:
    farm.devices += [("android", "Google Pixel 9", "16.0"), ("android", "Samsung Galaxy S24 Ultra", "15.0")]
    farm.logs = {S24: ("passed", printed()), ("Google Pixel 9", "16.0"): ("passed", printed())}
    assert len(measure(device="Pixel 9,Galaxy S24 Ultra")) == 2
    assert farm.sent("POST espresso/v2/build")["devices"] == [
        "Google Pixel 9-16.0",
        "Samsung Galaxy S24 Ultra-14.0",
    ]


def test_a_device_can_be_named_as_the_farm_names_it(farm, measure, printed) -> None:
    farm.devices.append(("android", "Poco X3", "10.0"))
    farm.logs = {("Poco X3", "10.0"): ("passed", printed())}
    (found,) = measure(device="Poco X3-10.0")
    assert (found.where.device, found.where.chip) == ("Poco X3-10.0", None)


@pytest.mark.parametrize("name", ["BROWSERSTACK_USERNAME", "BROWSERSTACK_ACCESS_KEY"])
def test_missing_credentials_are_said(farm, measure, monkeypatch, name) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(
        UsageError, match=f"^{name} is not set: set BROWSERSTACK_USERNAME and BROWSERSTACK_ACCESS_KEY"
    ):
        measure()
    assert farm.asked == []


def test_a_missing_extra_is_one_line(farm, measure, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(
        MissingExtra, match=r"^httpx is not installed; .*pip install 'gochu\[browserstack\]'`$"
    ):
        measure()
