"""Measure on Android phones of Firebase Test Lab, through Google's own clients.

An app and its instrumentation test (`app`, `tests`), and each file of the bundle, go to a Cloud Storage bucket of
yours; Test Lab pushes the files to /data/local/tmp/gochu on each phone, starts the test, and writes logs into the
bucket (https://cloud.google.com/testing/docs; discovery document testing v1). Files lie in the bucket under their
SHA-256, so that they are sent once. Test Lab's iPhones take an app only within the zip of its test, and files only
into that app's folder: this target leaves them out.

Credentials are Google's application default credentials. Tried with those clients against a stand-in alone: Test Lab
itself was never reached.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from runtimes import farm, farm_devices, farm_package, farm_run
from runtimes.bundle import file_sha256
from runtimes.errors import TargetError, UsageError
from runtimes.extras import require
from runtimes.farm_devices import Chosen, Offered
from runtimes.farm_package import FOLDER, JOB
from runtimes.farm_run import Errand, Logs, Outcome
from runtimes.measurement import Measurement
from runtimes.workload import Workload

TARGET = "firebase-test-lab"
ENDPOINT = "GOCHU_TEST_LAB_ENDPOINT"  # another server that speaks the same API, in a test
THERE = f"/data/local/tmp/{FOLDER}"
_EXTRA = "firebase"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_LONGEST = (
    45.0  # minutes of a test on a phone (firebase.google.com/docs/test-lab/android/instrumentation-test)
)
_PART = 32 << 20  # bytes of a large file that are sent, and if need be again, at a time
_RUNNING = ("TEST_STATE_UNSPECIFIED", "VALIDATING", "PENDING", "RUNNING")
_TEXTS = (".txt", ".xml", ".results", "logcat")


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    context: int | None = None,
    device: str | None = None,
    app: Path | None = None,
    tests: Path | None = None,
    bucket: str | None = None,
    project: str | None = None,
    logs: Path | None = None,
    run: str | None = None,
    max_minutes: float = farm.Limits.minutes,
    max_device_minutes: float = farm.Limits.device_minutes,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Measure a bundle's variant on phones of Firebase Test Lab; the figures are those that the app prints.

    `app`, `tests`: an .apk and its instrumentation test. `bucket`: of Cloud Storage, for what is sent and for logs.
    `project`: of Google Cloud (default: that of the credentials). `logs`: a folder for all that the phones say. `run`:
    the id of a test matrix to go on waiting for. Raises UsageError, TargetError, MissingExtra, BundleError,
    ChecksumError.
    """
    errand = farm_run.errand(
        TARGET,
        "firebase",
        bundle_path,
        workload,
        variant=variant,
        context=context,
        device=device,
        limits=farm.Limits(max_minutes, max_device_minutes).within(_LONGEST, "Test Lab ends a test"),
        logs=logs,
        run=run,
        allow_fallback=allow_fallback,
        progress=progress,
        app=app,
        tests=tests,
        bucket=bucket,
        project=project,
    )
    service = _TestLab(app, tests, bucket, project)
    return farm_run.carry_out(service, errand)


class _TestLab:
    """Test Lab and Cloud Storage, asked through Google's clients.

    Requests are repeated by `farm.retried`; a file's upload by the client, part by part.
    """

    def __init__(self, app: Path | None, tests: Path | None, bucket: str | None, project: str | None) -> None:
        discovery: Any = require("googleapiclient.discovery", _EXTRA)
        storage: Any = require("google.cloud.storage", _EXTRA)
        auth: Any = require("google.auth", _EXTRA)
        self._http_error: Any = require("googleapiclient.errors", _EXTRA).HttpError
        self._auth_error: Any = require("google.auth.exceptions", _EXTRA).GoogleAuthError
        self._transport_error: Any = require("google.auth.exceptions", _EXTRA).TransportError
        core: Any = require("google.api_core.exceptions", _EXTRA)
        self._storage_error, self._gave_up = core.GoogleAPICallError, core.RetryError
        self._lost = (
            OSError,  # requests' and urllib3's errors are such, and a timeout
            HTTPException,
            require("httplib2", _EXTRA).HttpLib2Error,
        )
        self._app, self._tests = app, tests
        endpoint = os.environ.get(ENDPOINT)
        with self._step("finding Google's credentials"):
            self._credentials, own = auth.default(scopes=[_SCOPE])
        self._project = project or own
        if not self._project:
            raise UsageError("the credentials belong to no project: say which with --option project=ID")
        self._client: Any = discovery.build(
            "testing",
            "v1",
            credentials=self._credentials,
            static_discovery=True,
            client_options={"api_endpoint": endpoint} if endpoint else None,
        )
        self._storage: Any = storage.Client(project=self._project, credentials=self._credentials)
        self._bucket: Any = self._storage.bucket(bucket) if bucket else None
        self._phones: list[Offered] | None = None

    @property
    def secrets(self) -> tuple[str | None, ...]:
        return (self._credentials.token,)

    def offered(self) -> list[Offered]:
        """Its real Android phones: an emulator's figures say nothing of a phone."""
        if self._phones is None:
            self._phones = self._list()
        return self._phones

    def _list(self) -> list[Offered]:
        asked = self._client.testEnvironmentCatalog().get(environmentType="ANDROID", projectId=self._project)
        catalog = self._execute(asked, "listing devices")
        return [
            Offered(
                id=f"{model['id']}-{version}",
                label=f"{_named(model)} ({model['id']}-{version})",
                names=tuple(
                    filter(None, (model["id"], model.get("name"), _named(model), model.get("codename")))
                ),
                os="android",
                version=version,
                available=_there(model, version),
            )
            for model in catalog["androidDeviceCatalog"].get("models", ())
            if model.get("form") == "PHYSICAL"
            for version in model.get("supportedVersionIds", ())
        ]

    def start(self, errand: Errand, devices: Sequence[Chosen]) -> str:
        app, _ = farm_package.app(self._app, "app", {".apk": "app"})
        tests, _ = farm_package.app(self._tests, "tests", {".apk": "test"})
        if self._bucket is None:
            raise UsageError(
                "Test Lab reads and writes Cloud Storage: say with --option bucket=NAME where it may do that"
            )
        contents = farm_package.files(errand.bundle, errand.variant)
        sent = {path: self._send(source, errand) for path, source in contents.items()}
        sent[JOB] = self._send_text(errand.job.to_json())
        matrix = {
            "clientInfo": {"name": "gochu"},
            "testSpecification": {
                "testTimeout": f"{60 * errand.limits.minutes:.0f}s",
                "disableVideoRecording": True,
                "disablePerformanceMetrics": True,  # it would take a share of what is measured
                "testSetup": {
                    "filesToPush": [
                        {"regularFile": {"content": {"gcsPath": where}, "devicePath": f"{THERE}/{path}"}}
                        for path, where in sent.items()
                    ]
                },
                "androidInstrumentationTest": {
                    "appApk": {"gcsPath": self._send(app, errand)},
                    "testApk": {"gcsPath": self._send(tests, errand)},
                },
            },
            "environmentMatrix": {
                "androidDeviceList": {"androidDevices": [_android(each) for each in devices]}
            },
            "resultStorage": {"googleCloudStorage": {"gcsPath": self._gcs(f"gochu/runs/{uuid.uuid4()}")}},
        }
        made = self._client.projects().testMatrices()
        # The id makes the request one that can be repeated: Test Lab starts it once.
        request = made.create(projectId=self._project, body=matrix, requestId=str(uuid.uuid4()))
        return str(self._execute(request, "starting a test matrix")["testMatrixId"])

    def ended(self, run: str) -> bool:
        return self._matrix(run).get("state") not in _RUNNING

    def cancel(self, run: str) -> None:
        request = self._client.projects().testMatrices().cancel(projectId=self._project, testMatrixId=run)
        self._execute(request, f"cancelling matrix {run}")

    def outcomes(self, run: str, logs: Logs) -> Iterator[Outcome]:
        matrix = self._matrix(run)
        if matrix.get("state") == "INVALID":
            reason = matrix.get("invalidMatrixDetails", "DETAILS_UNAVAILABLE")
            raise TargetError(f"Test Lab refuses matrix {run} ({reason}); {_advice_on(reason)}")
        bucket, folder = _bucket_and_path(matrix["resultStorage"]["googleCloudStorage"]["gcsPath"])
        with self._step("listing the logs"):
            listed = farm.retried(
                lambda: list(self._storage.list_blobs(bucket, prefix=f"{folder}/", retry=None)), self._passes
            )
        phones = {each.id: each for each in self.offered()}
        for execution in matrix.get("testExecutions", ()):
            there = execution["environment"]["androidDevice"]
            model, version = there["androidModelId"], there["androidVersionId"]
            id = f"{model}-{version}"
            bare = Offered(id, id, (model,), "android", version)
            device = farm_devices.known(phones.get(id, bare))
            own = f"{folder}/{id}-"
            texts, lost = [], []
            for blob in listed:
                if not blob.name.startswith(own) or not blob.name.endswith(_TEXTS):
                    continue
                name = PurePosixPath(blob.name).name
                try:
                    with self._step(f"getting {name}"):
                        data = farm.retried(partial(blob.download_as_bytes, retry=None), self._passes)
                except TargetError as error:
                    lost.append(str(error))
                    continue
                texts.append(logs.keep(device.offered.label, name, data))
            yield Outcome(device, "\n".join(texts), "; ".join(filter(None, [_failure(execution), *lost])))

    def _matrix(self, run: str) -> Any:
        request = self._client.projects().testMatrices().get(projectId=self._project, testMatrixId=run)
        return self._execute(request, f"asking for matrix {run}")

    def _send(self, path: Path, errand: Errand) -> str:
        """Where in the bucket a file lies; it is sent unless it is there already."""
        name = f"gochu/files/{file_sha256(path)}/{path.name}"
        blob = self._bucket.blob(name, chunk_size=_PART)
        with self._step(f"sending {path.name}"):
            if not farm.retried(lambda: blob.exists(retry=None), self._passes):
                errand.progress(f"sending {path.name} ({path.stat().st_size / 1e6:.0f} MB)")
                blob.upload_from_filename(str(path))  # tries a part again by itself
        return self._gcs(name)

    def _send_text(self, text: str) -> str:
        name = f"gochu/files/{hashlib.sha256(text.encode()).hexdigest()}/{JOB}"
        with self._step(f"sending {JOB}"):
            farm.retried(lambda: self._bucket.blob(name).upload_from_string(text, retry=None), self._passes)
        return self._gcs(name)

    def _gcs(self, name: str) -> str:
        return f"gs://{self._bucket.name}/{name}"

    def _execute(self, request: Any, doing: str) -> Any:
        with self._step(doing):
            return farm.retried(request.execute, self._passes)

    def _passes(self, error: Exception) -> bool:
        if isinstance(error, self._http_error):
            return int(error.resp.status) >= 500
        if isinstance(error, self._storage_error):
            return error.code is not None and error.code >= 500
        return isinstance(error, (self._transport_error, *self._lost))

    @contextmanager
    def _step(self, doing: str) -> Iterator[None]:
        """One sentence for what Google's clients raise."""
        try:
            yield
        except self._http_error as error:
            status = int(error.resp.status)
            said = self._said(str(error.reason))
            raise TargetError(f"{doing} failed (status {status}: {said}); {_advice(status)}") from None
        except self._storage_error as error:
            said, status = self._said(error.message), int(error.code or 0)
            raise TargetError(f"{doing} failed (status {status}: {said}); {_advice(status)}") from None
        except self._gave_up as error:
            said = self._said(str(error.cause or error))
            raise TargetError(f"{doing} failed again and again ({said}); try again later") from None
        except self._auth_error as error:
            raise TargetError(
                f"{doing} failed ({self._said(str(error))}); sign in with `gcloud auth application-default login`, or "
                "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account"
            ) from None
        except self._lost as error:
            said = self._said(f"{type(error).__name__}: {error}")
            raise TargetError(f"{doing} failed ({said}); is the network there? try again") from None

    def _said(self, text: str) -> str:
        held = getattr(self, "_credentials", None)
        return farm.without(" ".join(text.split())[:300], [getattr(held, "token", None)])


def _named(model: dict[str, Any]) -> str:
    return f"{model.get('brand') or model.get('manufacturer') or ''} {model.get('name', model['id'])}".strip()


def _there(model: dict[str, Any], version: str) -> bool:
    """Whether Test Lab has such phones now; one of no stated capacity may be there."""
    stated = {each["versionId"]: each.get("deviceCapacity") for each in model.get("perVersionInfo", ())}
    return stated.get(version) != "DEVICE_CAPACITY_NONE"


def _android(device: Chosen) -> dict[str, str]:
    model, _, version = device.offered.id.rpartition("-")
    return {
        "androidModelId": model,
        "androidVersionId": version,
        "locale": "en_US",
        "orientation": "portrait",
    }


def _bucket_and_path(gcs: str) -> tuple[str, str]:
    match = re.fullmatch(r"gs://([^/]+)/(.+?)/?", gcs)
    if match is None:
        raise TargetError(f"Test Lab's logs are not in Cloud Storage but {gcs!r}: look at its web page")
    return match[1], match[2]


def _failure(execution: dict[str, Any]) -> str:
    """Why a phone's test did not end well, in Test Lab's words."""
    state = execution.get("state", "PENDING")
    if state == "FINISHED":
        return ""
    said = execution.get("testDetails", {}).get("errorMessage") or "no reason given"
    return f"{state}: {said}"


def _advice_on(reason: str) -> str:
    """What to do about a matrix that Test Lab finds invalid."""
    if "QUOTA" in reason:
        return "the project's quota is used up: wait until tomorrow, or raise it"
    return "build the app and its test again"


def _advice(status: int) -> str:
    """What to do about a status."""
    if status == 401:
        return "sign in again: `gcloud auth application-default login`"
    if status == 403:
        return "may that account use Test Lab and the bucket, and is the Cloud Testing API turned on?"
    if status == 429:
        return "the project's quota is used up: wait until tomorrow, or raise it"
    return "try again later" if status >= 500 else "see its words"
