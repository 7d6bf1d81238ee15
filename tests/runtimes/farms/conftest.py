"""What the tests of the farms share: a loopback server, a clock that does not wait, and an app's printed measurements.

Each farm's own stand-in stands in its test file: a class with `reply`, which says what the farm says.
"""

import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import pytest

from runtimes import farm, measuring
from runtimes.bundle import Bundle
from runtimes.measurement import Measurement, Method, Place, sampled
from runtimes.measurement_line import encode
from runtimes.workload import preset


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """What the farm answers. A status of 0 hangs up."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()


class StandIn(Protocol):
    url: str

    def reply(self, request: Request) -> Reply: ...


@pytest.fixture
def make_reply() -> type[Reply]:
    """In importlib mode a test file cannot import this one."""
    return Reply


@pytest.fixture
def serve() -> Iterator[Callable[[StandIn], Any]]:
    """`serve(stand_in)`: have it answer at `stand_in.url`, until the test is over."""
    servers = []

    def serve(stand_in: StandIn) -> StandIn:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                parts = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(parts.query).items()}
                headers = {key.lower(): value for key, value in self.headers.items()}
                reply = stand_in.reply(Request(self.command, parts.path, query, headers, body))
                if reply.status == 0:
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for key, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(reply.data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.data)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Not a word: the tests look at what is printed."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append((server, thread))
        stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
        return stand_in

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class FakeClock:
    """A clock that goes on by what is slept. `interrupt_at`: which sleep is ended by Ctrl-C, counted from 1."""

    time: float = 0.0
    slept: list[float] = field(default_factory=list)
    interrupt_at: int | None = None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        if len(self.slept) == self.interrupt_at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(farm, "Clock", lambda: fake)
    return fake


@pytest.fixture
def printed(toy: Path) -> Callable[..., str]:
    """`printed(workload, where=..., what=..., ...)`: what an app says in logcat, case by case."""

    def printed(
        workload: str = "smoke", *, bundle: Path = toy, cases: int | None = None, **changes: Any
    ) -> str:
        opened = Bundle.open(bundle)
        subject = measuring.subject(opened, opened.manifest.variants[0])
        lines = []
        for case, _ in preset(workload).clipped(96)[:cases]:
            measurement = Measurement(
                what=subject.model_copy(update=changes.get("what", {})),
                where=Place(
                    target="app", device="모델 SM-S928N", os="Android 14", engine="onnxruntime 1.22"
                ).model_copy(update=changes.get("where", {})),
                how=Method(
                    workload=workload,
                    prompt_tokens=case.prompt_tokens,
                    new_tokens=case.new_tokens,
                    context=96,
                    warmup=1,
                    repeats=2,
                ),
                figures=(sampled("decode_speed", "tokens/s", [20.0, 22.0]),),
                marks=changes.get("marks", ()),
                command="an app",
                time="2026-01-01T00:00:00+00:00",
            )
            lines += encode(measurement)
        noise = "11-24 12:00:00.000  1234  1234 D Gochu: 고추 로그 한 줄"
        return "\n".join(
            [noise, *(f"11-24 12:00:01.000  1234  1234 I Gochu: {line}" for line in lines), noise, ""]
        )

    return printed


@pytest.fixture
def apps(toy: Path, tmp_path: Path) -> dict[str, Path]:
    """An app with the bundle in it, and its test, as each farm wants them."""
    folder = tmp_path / "앱"
    folder.mkdir()
    for name in ("app.apk", "app.ipa"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.write(toy / "manifest.json", "assets/gochu/manifest.json")
    for name in ("test.apk", "test.ipa", "test.zip"):
        (folder / name).write_bytes(b"a test")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., None]:
    """`nowhere(secrets, *texts)`: no secret is in a text, in a log of the process, or in a file of the test."""
    caplog.set_level("INFO")

    def nowhere(secrets: list[str], *texts: str) -> None:
        said = "\n".join([*texts, caplog.text])
        files = [
            path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".key"
        ]
        for secret in secrets:
            assert secret not in said
            assert not any(secret.encode() in data for data in files)

    return nowhere
