"""Checkpoints by repository id, from a stand-in of the hub that the real client library talks to."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")

from exporter.pepper import checkpoint_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "gochu/pepper"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one repository; `served` collects what was fetched."""

    served: ClassVar[list[str]] = []
    files: ClassVar[dict[str, Path]] = {path.name: path for path in sorted(checkpoint_path().iterdir())} | {
        "pytorch_model.bin": Path(__file__)
    }

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            rest = path.removeprefix(f"/api/models/{REPOSITORY}")
            if rest not in ("", "/revision/main", f"/revision/{COMMIT}") and not rest.startswith("/tree/"):
                self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in self.files]
            listing = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": name}
                for name, p in self.files.items()
            ]
            answer = listing if "/tree/" in rest else {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(answer).encode(), body)
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            if name not in self.files:
                self.reply(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                return
            data = self.files[name].read_bytes()
            if body:
                self.served.append(name)
            self.reply(200, data, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'})
        else:
            self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.served = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def gochu(*words: str, endpoint: str, cache: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    command = [sys.executable, "-m", "exporter.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False, timeout=120)


def test_fetches_only_what_is_safe_and_pins_the_commit(hub: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", REPOSITORY, "-o", str(out), "--scheme", "int8", "--no-verify", "--json")
    done = gochu(*words, endpoint=hub, cache=tmp_path / "cache", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert (model["source"], model["revision"]) == (REPOSITORY, COMMIT)
    assert "model.safetensors" in Hub.served
    assert "pytorch_model.bin" not in Hub.served
    assert "hf_secret" not in done.stdout + done.stderr
    # the hub gone, the copy in the cache serves
    again = gochu("plan", REPOSITORY, "--json", endpoint="http://127.0.0.1:9", cache=tmp_path / "cache")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((REPOSITORY, "--revision", "nowhere"), "no revision 'nowhere'"),
        (("gochu/absent",), "no Hugging Face repository 'gochu/absent'"),
    ],
)
def test_what_is_not_there(hub: str, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = gochu("plan", *words, endpoint=hub, cache=tmp_path)
    assert done.returncode == 3
    assert says in done.stderr
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_offline_is_a_sentence(tmp_path: Path, more: dict[str, str]) -> None:
    done = gochu("plan", REPOSITORY, endpoint="http://127.0.0.1:9", cache=tmp_path, **more)
    assert done.returncode == 3
    assert "cannot be reached" in done.stderr
    assert done.stderr.strip().count("\n") == 0
