"""Firebase Test Lab, asked by Google's own clients; Test Lab, Cloud Storage and the token's issuer are a stand-in."""

import base64
import email.parser
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import pytest

from runtimes.bundle import file_sha256
from runtimes.errors import MissingExtra, SomeFailed, TargetError, UsageError
from runtimes.measurement import Measurement

pytest.importorskip("googleapiclient", reason="the client of Firebase Test Lab")
pytest.importorskip("google.cloud.storage", reason="the client of Cloud Storage")
google_crc32c = pytest.importorskip("google_crc32c", reason="checks what Cloud Storage was sent")
rsa = pytest.importorskip(
    "cryptography.hazmat.primitives.asymmetric.rsa", reason="makes the key of a service account"
)

from cryptography.hazmat.primitives import serialization  # noqa: E402

from runtimes.targets import firebase_test_lab  # noqa: E402

TOKEN = "ya29.access-token-of-a-test"
PROJECT, BUCKET, MATRIX = "gochu-project", "gochu-bucket", "matrix-3f1abc"
S24, PIXEL = ("e3q", "34"), ("tokay", "35")


def model(id: str, name: str, brand: str, versions: list[str], **more: Any) -> dict:
    return {
        "id": id,
        "name": name,
        "brand": brand,
        "form": "PHYSICAL",
        "supportedVersionIds": versions,
    } | more


class TestLab:
    """Speaks Test Lab's and Cloud Storage's REST. `faults`: for a request, the replies before the right one."""

    __test__ = False

    def __init__(self, reply: Any) -> None:
        self._reply = reply
        self.url = ""
        self.models = [
            model("e3q", "Galaxy S24 Ultra", "Samsung", ["34"]),
            model("tokay", "Pixel 9", "Google", ["34", "35"]),
            model("MediumPhone.arm", "Galaxy S23", "Generic", ["34"], form="VIRTUAL"),
        ]
        self.faults: dict[str, list[Any]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}  # of files that are not all there yet
        self.states = ["VALIDATING", "PENDING", "RUNNING", "FINISHED"]
        self.why = ""  # of an INVALID matrix
        self.logs: dict[tuple[str, str], tuple[str, str]] = {}  # phone -> state, log
        self.runs: dict[str, str] = {}  # id of the request -> of the matrix
        self.matrix: dict[str, Any] = {}

    def reply(self, request: Any) -> Any:
        short = self.short(request)
        self.asked.append((short, request))
        if faults := self.faults.get(short):
            return faults.pop(0)
        if short == "POST token":
            return self._reply({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._reply(
                {"error": {"code": 401, "message": "no token", "status": "UNAUTHENTICATED"}}, 401
            )
        return self._reply(*self.answer(request, short))

    def short(self, request: Any) -> str:
        path = request.path.strip("/")
        for long, name in (
            ("v1/testEnvironmentCatalog/ANDROID", "catalog"),
            (f"v1/projects/{PROJECT}/testMatrices", "matrices"),
            (f"upload/storage/v1/b/{BUCKET}/o", "upload"),
            (f"download/storage/v1/b/{BUCKET}/o", "download"),
            (f"storage/v1/b/{BUCKET}/o", "objects"),
        ):
            if path.startswith(long):
                rest = path.removeprefix(long).strip("/")
                rest = "" if name in ("download", "objects") else rest
                return f"{request.method} {name}{' ' + rest if rest else ''}"
        return f"{request.method} {path}"

    def answer(self, request: Any, short: str) -> tuple[Any, ...]:
        name = unquote(request.path.partition("/o/")[2])
        if short == "GET catalog":
            assert request.query["projectId"] == PROJECT
            return ({"androidDeviceCatalog": {"models": self.models}},)
        if short == "GET objects" and name:
            return ({"name": name, "size": "1"},) if name in self.objects else ({"error": {"code": 404}}, 404)
        if short == "GET objects":
            there = [n for n in sorted(self.objects) if n.startswith(request.query["prefix"])]
            return ({"items": [{"name": n, "bucket": BUCKET} for n in there]},)
        if short == "POST upload" and request.query["uploadType"] == "resumable":
            name = json.loads(request.body)["name"]
            self.parts[name] = b""
            where = f"{self.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={quote(name)}"
            return {}, 200, {"Location": where}
        if short == "PUT upload":
            return self.resume(request)
        if short == "POST upload":
            assert request.query["uploadType"] == "multipart"
            header = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
            form = email.parser.BytesParser().parsebytes(header + request.body)
            about, data = form.get_payload()
            name = json.loads(about.get_payload())["name"]
            self.objects[name] = data.get_payload(decode=True)
            return ({"name": name, "bucket": BUCKET},)
        if short == "GET download":
            return (self.objects[name],)
        if short == "POST matrices":
            return (self.start(request),)
        if short == f"GET matrices {MATRIX}":
            return (self.look(),)
        if short == f"POST matrices {MATRIX}:cancel":
            self.states = ["CANCELLED"]
            return ({"testState": "CANCELLED"},)
        return ({"error": {"code": 404, "message": f"no {short}"}}, 404)

    def resume(self, request: Any) -> tuple[Any, ...]:
        """A part of a file."""
        name, total = request.query["upload_id"], int(request.headers["content-range"].rpartition("/")[2])
        self.parts[name] += request.body
        if len(self.parts[name]) < total:
            return ("", 308, {"Range": f"bytes=0-{len(self.parts[name]) - 1}"})
        self.objects[name] = self.parts.pop(name)
        checksum = base64.b64encode(google_crc32c.Checksum(self.objects[name]).digest()).decode()
        return ({"name": name, "bucket": BUCKET, "crc32c": checksum},)

    def start(self, request: Any) -> dict:
        """A request's id starts one matrix, however often it comes."""
        self.runs.setdefault(request.query["requestId"], MATRIX)
        self.matrix = request.json | {"testMatrixId": MATRIX, "state": "VALIDATING"}
        self.write_logs()
        return self.matrix

    def write_logs(self) -> None:
        where = self.matrix["resultStorage"]["googleCloudStorage"]["gcsPath"].removeprefix(f"gs://{BUCKET}/")
        for (phone, version), (_, log) in self.logs.items():
            folder = f"{where}/{phone}-{version}-en_US-portrait"
            if log:
                self.objects[f"{folder}/logcat"] = log.encode()
            self.objects[f"{folder}/video.mp4"] = b"a video"

    def look(self) -> dict:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        executions = [
            {
                "state": ended,
                "environment": {"androidDevice": {"androidModelId": phone, "androidVersionId": version}},
                "testDetails": {} if ended == "FINISHED" else {"errorMessage": "기기 없음: no such phone"},
            }
            for (phone, version), (ended, _) in self.logs.items()
        ]
        why = {"invalidMatrixDetails": self.why} if self.why else {}
        return self.matrix | {"state": state, "testExecutions": executions} | why

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.asked)


def error(make: Any, status: int, word: str, message: str) -> Any:
    return make({"error": {"code": status, "message": message, "status": word}}, status)


@pytest.fixture(scope="module")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()).decode()


@pytest.fixture
def farm(
    serve, make_reply, printed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, private_key: str
) -> TestLab:
    farm = serve(TestLab(make_reply))
    account = {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key_id": "1",
        "private_key": private_key,
        "client_email": f"gochu@{PROJECT}.iam.gserviceaccount.com",
        "token_uri": f"{farm.url}/token",
    }
    path = tmp_path / "account.key"
    path.write_text(json.dumps(account))
    farm.logs = {S24: ("FINISHED", printed())}
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", farm.url)
    monkeypatch.setenv("GOCHU_TEST_LAB_ENDPOINT", farm.url)
    return farm


@pytest.fixture
def measure(farm: TestLab, toy: Path, apps: dict[str, Path]):
    """`measure(...)`: the toy on the stand-in's Galaxy S24 Ultra."""

    def measure(**options: Any) -> list[Measurement]:
        given = {
            "device": "Galaxy S24 Ultra",
            "app": apps["app.apk"],
            "tests": apps["test.apk"],
            "bucket": BUCKET,
        } | options
        return firebase_test_lab.measure(toy, given.pop("workload", "smoke"), **given)

    return measure


def test_a_phone_is_measured_from_the_command_line(
    gochu, farm, toy, apps, tmp_path, nowhere, clock, private_key
) -> None:
    options = [
        f"app={apps['app.apk']}",
        f"tests={apps['test.apk']}",
        f"bucket={BUCKET}",
        f"logs={tmp_path / '로그'}",
    ]
    arguments = [word for option in options for word in ("--option", option)]
    code, said, complained = gochu(
        "bench", toy, "--on", "firebase-test-lab", "--device", "갤럭시 S24 울트라", "--json", *arguments
    )
    assert (code, complained) == (0, "")
    (found,) = map(Measurement.model_validate, json.loads(said))
    assert (found.where.target, found.where.device) == ("firebase-test-lab", "Galaxy S24 Ultra")
    assert (found.where.chip, found.where.run) == ("sm8650", MATRIX)
    assert found.what.bundle == file_sha256(toy / "manifest.json")
    assert f"--option bucket={BUCKET}" in found.command
    phones = farm.matrix["environmentMatrix"]["androidDeviceList"]["androidDevices"]
    assert [(each["androidModelId"], each["androidVersionId"]) for each in phones] == [S24]
    asked = farm.matrix["testSpecification"]
    assert asked["testTimeout"] == "1800s"
    pushed = {
        each["regularFile"]["devicePath"]: each["regularFile"]["content"]["gcsPath"].removeprefix(
            f"gs://{BUCKET}/"
        )
        for each in asked["testSetup"]["filesToPush"]
    }
    there = "/data/local/tmp/gochu"
    assert set(pushed) == {
        f"{there}/{name}"
        for name in ("manifest.json", "tokenizer.json", "model.onnx", "model.onnx.data", "job.json")
    }
    for name in ("manifest.json", "model.onnx.data"):
        assert farm.objects[pushed[f"{there}/{name}"]] == (toy / name).read_bytes()
    assert json.loads(farm.objects[pushed[f"{there}/job.json"]])["workload"]["name"] == "smoke"
    (log,) = (path for path in (tmp_path / "로그").rglob("*") if path.is_file())
    assert log.parts[-2:] == ("Samsung Galaxy S24 Ultra (e3q-34)", "logcat")
    assert clock.slept == [5.0, 7.5, 11.25]
    assert farm.count(f"POST matrices {MATRIX}:cancel") == 0
    nowhere([TOKEN, *private_key.splitlines()[1:3]], said, complained)


def test_what_is_in_the_bucket_already_is_not_sent_again(farm, measure, toy) -> None:
    measure()
    first = farm.count("POST upload")
    farm.states = ["FINISHED"]
    measure()
    assert first == 7, "four files of the bundle, the job, the app, its test"
    assert farm.count("POST upload") == first + 1, "the job alone: it is a few bytes"


def test_of_a_large_file_only_the_lost_part_is_sent_again(
    farm, make_reply, measure, tmp_path, monkeypatch
) -> None:
    """From 8 MiB on, Google's client sends a file in parts."""
    monkeypatch.setattr(firebase_test_lab, "_PART", 4 << 20)
    app = tmp_path / "큰 앱.apk"
    app.write_bytes(bytes(range(256)) * (9 << 12))
    farm.faults = {"PUT upload": [make_reply(status=503)]}
    measure(app=app)
    (name,) = (name for name in farm.objects if name.endswith("큰 앱.apk"))
    assert farm.objects[name] == app.read_bytes()
    sizes = [len(request.body) >> 20 for what, request in farm.asked if what == "PUT upload"]
    assert sizes == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("where", "status", "word", "message", "words"),
    [
        (
            "GET catalog",
            401,
            "UNAUTHENTICATED",
            f"token {TOKEN} has expired",
            r"\[secret\] has expired\); sign in again",
        ),
        (
            "GET catalog",
            403,
            "PERMISSION_DENIED",
            "API is off",
            r"status 403: API is off\); may that account use Test",
        ),
        (
            "POST matrices",
            429,
            "RESOURCE_EXHAUSTED",
            "Quota exceeded",
            "status 429: Quota .* until tomorrow, or raise it",
        ),
        (
            "POST upload",
            403,
            "FORBIDDEN",
            "no right to write",
            "sending manifest.json failed .status 403: .*no right",
        ),
        (
            "GET objects",
            401,
            "UNAUTHENTICATED",
            "expired",
            r"failed \(status 401: .*\); sign in again: `gcloud",
        ),
    ],
)
def test_what_google_refuses_is_one_sentence(
    gochu, farm, make_reply, toy, apps, nowhere, where, status, word, message, words
) -> None:
    farm.faults[where] = [
        error(make_reply, status, word, message)
    ] * 3  # a 401 has the token renewed, and is repeated
    options = [f"app={apps['app.apk']}", f"tests={apps['test.apk']}", f"bucket={BUCKET}"]
    arguments = [word for option in options for word in ("--option", option)]
    code, out, err = gochu(
        "bench", toy, "--on", "firebase-test-lab", "--device", "Galaxy S24 Ultra", *arguments
    )
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert re.search(words, err)
    nowhere([TOKEN], out, err)


def test_an_account_that_google_refuses_is_said(farm, make_reply, measure, private_key) -> None:
    refusal = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
    farm.faults["POST token"] = [make_reply(refusal, 400)] * 9
    with pytest.raises(
        TargetError, match=r"listing devices failed \(.*invalid_grant.*application-default login"
    ) as e:
        measure()
    assert private_key.splitlines()[1] not in str(e.value)


def test_missing_credentials_are_said(farm, measure, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "없다.json"))
    with pytest.raises(
        TargetError, match=r"finding Google's credentials failed .*gcloud auth application-default"
    ):
        measure()


@pytest.mark.parametrize(
    ("why", "words"),
    [
        (
            "TEST_QUOTA_EXCEEDED",
            r"refuses matrix matrix-3f1abc \(TEST_QUOTA_EXCEEDED\); the project's quota is used up",
        ),
        ("MALFORMED_APK", r"\(MALFORMED_APK\); build the app and its test again"),
    ],
)
def test_a_matrix_that_test_lab_finds_invalid_is_said(farm, measure, why, words) -> None:
    farm.states, farm.why = ["INVALID"], why
    with pytest.raises(TargetError, match=words):
        measure()


def test_a_farm_that_fails_for_a_while_is_asked_again(farm, make_reply, measure, clock) -> None:
    broken = error(make_reply, 503, "UNAVAILABLE", "try later")
    farm.faults = {
        what: [broken]
        for what in ("GET objects", "POST upload", "GET download", "POST matrices", f"GET matrices {MATRIX}")
    }
    farm.faults["GET catalog"] = [broken, make_reply(status=0)]
    assert len(measure()) == 1
    assert farm.count("GET catalog") == 3
    assert farm.count("POST matrices") == 2
    assert len(farm.runs) == 1, "the request has an id, so that Test Lab starts it once"


def test_a_start_whose_answer_was_lost_starts_one_run(farm, make_reply, measure) -> None:
    farm.faults = {"POST matrices": [make_reply(status=0)]}
    assert len(measure()) == 1
    ids = {request.query["requestId"] for what, request in farm.asked if what == "POST matrices"}
    assert (len(ids), farm.count("POST matrices")) == (1, 2)


def test_a_farm_that_fails_for_ever_is_given_up_and_the_run_cancelled(farm, make_reply, measure) -> None:
    farm.faults = {f"GET matrices {MATRIX}": [error(make_reply, 503, "UNAVAILABLE", "try later")] * 99}
    with pytest.raises(
        TargetError, match=r"asking for matrix .* failed \(status 503: try later\); try again later"
    ):
        measure()
    assert farm.count(f"POST matrices {MATRIX}:cancel") == 1


def test_a_run_that_is_late_is_cancelled_and_its_logs_are_kept(farm, measure, tmp_path, clock) -> None:
    farm.states = ["RUNNING"]
    farm.logs = {S24: ("CANCELLED", "I Gochu: 아직 읽는 중\n")}
    with pytest.raises(
        TargetError, match=r"not done after 10 minutes and was cancelled.*CANCELLED: 기기 없음"
    ):
        measure(max_minutes=10, logs=tmp_path / "logs")
    assert farm.count(f"POST matrices {MATRIX}:cancel") == 1
    assert clock.time == 600
    (log,) = (path for path in (tmp_path / "logs").rglob("*") if path.is_file())
    assert log.read_text(encoding="utf-8") == "I Gochu: 아직 읽는 중\n"


def test_ctrl_c_cancels(farm, measure, clock) -> None:
    farm.states = ["RUNNING"]
    clock.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert farm.count(f"POST matrices {MATRIX}:cancel") == 1


def test_a_run_is_resumed_by_its_id(farm, measure) -> None:
    measure()
    farm.states = ["RUNNING", "FINISHED"]
    farm.asked.clear()
    (found,) = measure(run=MATRIX, app=None, tests=None, device=None, bucket=None)
    assert (found.where.device, found.where.run) == ("Galaxy S24 Ultra", MATRIX)
    assert {what for what, _ in farm.asked if what.startswith("POST")} == {"POST token"}


def test_phones_that_finish_are_kept_when_one_fails(farm, measure, printed) -> None:
    farm.logs = {S24: ("FINISHED", printed()), PIXEL: ("ERROR", "")}
    with pytest.raises(SomeFailed) as failed:
        measure(device="Galaxy S24 Ultra,Pixel 9")
    (found,) = failed.value.measured
    assert found.where.device == "Galaxy S24 Ultra"
    phones = farm.matrix["environmentMatrix"]["androidDeviceList"]["androidDevices"]
    assert [each["androidVersionId"] for each in phones] == ["34", "35"], "the newest system"
    assert str(failed.value) == f"Pixel 9 in run {MATRIX}: ERROR: 기기 없음: no such phone"


def test_a_phone_that_the_run_cannot_have_is_said(farm, measure) -> None:
    farm.states = ["UNSUPPORTED_ENVIRONMENT"]
    farm.logs = {S24: ("UNSUPPORTED_ENVIRONMENT", "")}
    with pytest.raises(TargetError, match=r"Galaxy S24 Ultra in run .*: UNSUPPORTED_ENVIRONMENT: 기기 없음"):
        measure()


def test_a_measurement_that_was_cut_off_is_none(farm, measure, printed) -> None:
    farm.logs = {S24: ("FINISHED", printed()[: printed().index("GOCHU-MEASUREMENT") + 90])}
    with pytest.raises(TargetError, match=r"Galaxy S24 Ultra in run .* is damaged: its checksum is another"):
        measure()


def test_logs_that_cannot_be_had_are_said(farm, make_reply, measure) -> None:
    farm.faults = {"GET download": [error(make_reply, 404, "NOT_FOUND", "no such object")]}
    with pytest.raises(TargetError, match=r"in run .*: getting logcat failed \(status 404: "):
        measure()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"device": "Galaxy S23"},
            r"the farm has no Galaxy S23 for this account; it has Samsung Galaxy S24 Ultra",
        ),
        ({"bucket": None}, "say with --option bucket=NAME where it may do that"),
        ({"app": Path("app.ipa")}, r"app\.ipa has to be \.apk for these devices"),
        ({"max_minutes": 46}, "Test Lab ends a test after 45 minutes: lower max_minutes"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_costs(farm, measure, options, words) -> None:
    with pytest.raises(UsageError, match=words):
        measure(**options)
    assert farm.count("POST matrices") == farm.count("POST upload") == 0


def test_a_phone_that_is_gone_is_said(farm, measure) -> None:
    farm.models[0]["perVersionInfo"] = [{"versionId": "34", "deviceCapacity": "DEVICE_CAPACITY_NONE"}]
    with pytest.raises(
        TargetError, match=r"the farm has Samsung Galaxy S24 Ultra \(e3q-34\), but not now: try later"
    ):
        measure()


def test_a_missing_extra_is_one_line(farm, measure, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "googleapiclient.discovery", None)
    with pytest.raises(
        MissingExtra, match=r"^googleapiclient is not installed; .*pip install 'gochu\[firebase\]'`$"
    ):
        measure()


def test_storage_that_fails_for_ever_is_given_up(farm, make_reply, measure, clock, monkeypatch) -> None:
    """By Google's client itself, after two minutes of its own."""
    theirs = SimpleNamespace(monotonic=clock.now, sleep=clock.sleep)
    for module in ("retry_unary", "retry_base"):
        monkeypatch.setattr(f"google.api_core.retry.{module}.time", theirs)
    farm.faults = {"POST upload": [error(make_reply, 503, "UNAVAILABLE", "try later")] * 99}
    with pytest.raises(
        TargetError, match=r"sending manifest\.json failed again and again \(.*503.*\); try again later"
    ):
        measure()
    assert 60 < clock.time < 180
    assert farm.count("POST matrices") == 0


def test_a_token_in_a_log_is_replaced(farm, measure, printed, tmp_path, nowhere) -> None:
    farm.logs = {S24: ("FINISHED", printed() + f"Authorization: Bearer {TOKEN}\n")}
    measure(logs=tmp_path / "logs")
    nowhere([TOKEN])
    (log,) = (tmp_path / "logs").rglob("logcat")
    assert "Bearer [secret]" in log.read_text(encoding="utf-8")
