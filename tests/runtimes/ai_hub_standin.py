"""A stand-in for Qualcomm AI Hub: its REST API on this machine, as far as qai-hub 0.56 speaks it, and its phones.

A phone computes what it is sent: the graph that lies in the uploaded archive, or, where that is a context binary's
wrapper, the graph in `sources` that was compiled into it.
"""

import io
import re
import tempfile
import threading
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
from qai_hub import public_api_pb2 as pb
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries

from runtimes import qnn

TOKEN = "secret-token-of-a-test-0123456789"
ANDROID = ("os:android", "framework:onnx", "framework:qnn", "framework:tflite")
STATES = ("JOB_STATE_CREATED", "JOB_STATE_PROVISIONING_DEVICE", "JOB_STATE_DONE")


@dataclass
class Phone:
    """A device. `times`: µs of each run; `units`: the processor of each layer; `noise`: what it adds to its outputs,
    as a share of their spread."""

    name: str
    os: str = "14"
    chipset: str = "qualcomm-snapdragon-8gen3"
    times: tuple[int, ...] = (4000, 4100, 4200, 9000)
    units: tuple[str, ...] = ("NPU", "NPU", "NPU")
    noise: float = 0.0

    def pb(self) -> Any:
        attributes = [*ANDROID, f"chipset:{self.chipset}"]
        return pb.Device(name=self.name, os=self.os, attributes=attributes)


@dataclass
class Archive:
    """What was uploaded."""

    names: list[str]
    content: bytes

    @property
    def graph(self) -> onnx.ModelProto:
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            (name,) = (each for each in self.names if each.endswith(".onnx"))
            return onnx.load_from_string(archive.read(name))


@dataclass
class Hub:
    """AI Hub's side: what it has, what it is told to do wrong, and what it was asked."""

    sources: dict[str, Path]  # the graph that was compiled, by its wrapper's name
    phones: list[Phone]
    token: str = TOKEN
    qairt: tuple[tuple[str, str], ...] = (("2.45", "default"), ("2.51", ""), ("2.52", "latest"))
    # "METHOD /path" as a pattern -> answers of errors, each given once: status and text
    faults: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # a job whose name ends so fails, and says that
    lost: str = ""  # "detail" or "outputs": what results lack
    gone: set[str] = field(default_factory=set)  # phones that are listed and cannot be had
    states: tuple[str, ...] = STATES
    asked: list[str] = field(default_factory=list)
    archives: dict[str, Archive] = field(default_factory=dict)  # by model
    models: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)  # how often a job was looked at

    def posted(self, kind: str) -> list[Any]:
        """The jobs of a kind, in the order in which they were asked for."""
        return [getattr(job, kind) for job in self.jobs.values() if job.WhichOneof("job") == kind]

    def fault(self, request: str) -> tuple[int, str] | None:
        for pattern, answers in self.faults.items():
            if answers and re.fullmatch(pattern, request):
                return answers.pop(0)
        return None

    # what the routes do

    def devices(self, query: dict[str, list[str]]) -> Any:
        name = query.get("name", [""])[0]
        found = [each for each in self.phones if name in ("", each.name)]
        if query.get("select") == ["True"]:
            found = [each for each in found if each.name not in self.gone][:1]
        return pb.DeviceList(devices=[each.pb() for each in found], total_query_count=len(found))

    def frameworks(self) -> Any:
        return pb.FrameworkList(
            frameworks=[
                pb.Framework(name="QAIRT", api_version=v, api_tags=[t] if t else [], full_version=f"{v}.0.1")
                for v, t in self.qairt
            ]
        )

    def new_model(self, model: Any) -> Any:
        model.model_id = f"m{len(self.models)}"
        self.models[model.model_id] = model
        return pb.CreateUpdateResponse(id=model.model_id)

    def new_job(self, job: Any) -> Any:
        id = f"j{len(self.jobs)}"
        kind = job.WhichOneof("job")
        part = getattr(job, kind)
        setattr(part, f"{kind}_id", id)
        job.hub_version = "2026.11"
        if kind == "compile_job":
            (device,) = part.devices.devices
            part.device.CopyFrom(device)
            target = pb.Model(model_type=pb.ModelType.Value("MODEL_TYPE_QNN_CONTEXT_BINARY"), name="compiled")
            self.new_model(target)
            self.archives[target.model_id] = self.archives[part.model.model_id]
            part.target_model.CopyFrom(target)
        self.jobs[id] = job
        return pb.CreateUpdateResponse(id=id)

    def job(self, id: str) -> Any:
        """A job, further on each time that it is looked at."""
        job = self.jobs[id]
        part = getattr(job, job.WhichOneof("job"))
        at = self.seen[id] = self.seen.get(id, -1) + 1
        part.job_state = pb.JobState.Value(self.states[min(at, len(self.states) - 1)])
        for ending, said in self.failures.items():
            if part.name.endswith(ending) and part.job_state == pb.JobState.Value("JOB_STATE_DONE"):
                part.job_state, part.failure_reason = pb.JobState.Value("JOB_STATE_FAILED"), said
        job.ClearField("available_artifacts")
        job.available_artifacts.append(pb.JobArtifactType.Value("JOB_ARTIFACT_TYPE_DEVICE_LOG"))
        return job

    def result(self, id: str) -> Any:
        job = self.jobs[id].inference_job
        phone = next(each for each in self.phones if each.name == job.device.name)
        found = pb.InferenceJobResult(inference_job_id=id)
        if self.lost != "detail":
            found.detail.CopyFrom(_detail(phone))
        if self.lost != "outputs" and job.dataset.dataset_id:
            found.output_dataset_id = f"out-{id}"
            self.datasets[found.output_dataset_id] = self._run(job, phone)
        return pb.JobResult(inference_job_result=found)

    def _run(self, job: Any, phone: Phone) -> bytes:
        """The graph's outputs on the job's inputs, as a phone would give them."""
        archive = self.archives[job.model.model_id]
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
                opened.extractall(folder)
            (graph,) = Path(folder).rglob("*.onnx")
            if any(node.op_type == "EPContext" for node in archive.graph.graph.node):
                graph = self.sources[graph.name]
            session = qnn.open_on_cpu(graph)
            with h5py.File(io.BytesIO(self.datasets[job.dataset.dataset_id]), "r") as file:
                entries = h5_to_dataset_entries(file)
            assert list(entries) == [each.name for each in session.get_inputs()]
            names = [each.name for each in session.get_outputs()]
            given = session.run(names, {name: batches[0] for name, batches in entries.items()})
        random = np.random.default_rng(0)
        noisy = [
            (x + phone.noise * np.ptp(x) * random.standard_normal(x.shape)).astype(x.dtype) for x in given
        ]
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            dataset_entries_to_h5({name: [x] for name, x in zip(names, noisy, strict=True)}, file)
        return content.getvalue()


def _detail(phone: Phone) -> Any:
    middle = sorted(phone.times)[len(phone.times) // 2]
    detail = pb.ProfileDetail(
        major_version=1,
        minor_version=2,
        execution_time=middle,
        all_execution_times=phone.times,
        cold_load_time=90_000,
        all_cold_load_times=[90_000],
        warm_load_time=30_000,
        all_warm_load_times=[30_000],
        after_execution_peak_memory=123_000_000,
    )
    for number, unit in enumerate(phone.units):
        detail.layer_details.add(
            name=f"layer {number}",
            layer_type_name="EPContext",
            compute_unit=pb.ComputeUnit.Value(f"COMPUTE_UNIT_{unit}"),
        )
    return detail


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address at which a hub is served, on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *rest: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _say(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def _go(self) -> None:
        body = self._body()
        url = urllib.parse.urlsplit(self.path)
        request = f"{self.command} {url.path}"
        self.hub.asked.append(request)
        if url.path.startswith("/blob/"):
            self._blob(url.path, body)
            return
        if self.headers.get("Authorization") != f"token {self.hub.token}":
            self._say(401, b'{"detail": "Invalid token."}', "application/json")
            return
        if fault := self.hub.fault(request):
            self._say(fault[0], fault[1].encode(), "application/json")
            return
        found = self._route(url.path.removeprefix("/api/v1"), urllib.parse.parse_qs(url.query), body)
        if found is None:
            self._say(404, f'{{"detail": "no {url.path}"}}'.encode(), "application/json")
        else:
            self._say(200, found.SerializeToString(), "application/x-protobuf")

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        base, hub = f"http://{self.headers['Host']}", self.hub
        upload = pb.FileMultipartUploadURL(upload_id="u", max_part_size=1 << 30)
        routes: list[tuple[str, Callable[..., Any]]] = [
            ("GET /devices/", lambda: hub.devices(query)),
            ("GET /frameworks/", hub.frameworks),
            ("POST /models/", lambda: hub.new_model(pb.Model.FromString(body))),
            (
                r"GET /models/(\w+)/multipart_upload/",
                lambda id: pb.FileUploadResponse(
                    multipart_url=pb.FileMultipartUploadURL(
                        urls=[f"{base}/blob/model/{id}"],
                        upload_id=upload.upload_id,
                        max_part_size=upload.max_part_size,
                    )
                ),
            ),
            (r"POST /models/(\w+)/multipart_upload/", lambda id: pb.CreateUpdateResponse(id=id)),
            (r"PATCH /models/(\w+)/", lambda id: pb.CreateUpdateResponse(id=id)),
            ("POST /jobs/", lambda: hub.new_job(pb.Job.FromString(body))),
            (r"GET /jobs/(\w+)/", lambda id: hub.job(id) if id in hub.jobs else None),
            (r"GET /jobs/(\w+)/result/", hub.result),
            (
                r"GET /jobs/(\w+)/device_runs/latest/artifact_list/1/",
                lambda id: pb.NamedArtifactDownloadURLList(
                    artifacts=[
                        pb.NamedArtifactDownloadURL(url=f"{base}/blob/log/{id}", filename="device.log")
                    ]
                ),
            ),
            ("POST /datasets/", lambda: pb.CreateUpdateResponse(id=f"d{len(hub.datasets)}")),
            (
                r"GET /datasets/([\w-]+)/upload_url/",
                lambda id: pb.FileUploadResponse(
                    url=pb.FileUploadURL(url=f"{base}/blob/data/{id}", file_field_name="file", fields={})
                ),
            ),
            (r"PATCH /datasets/([\w-]+)/", lambda id: pb.CreateUpdateResponse(id=id)),
            (r"GET /datasets/([\w-]+)/", lambda id: pb.Dataset(dataset_id=id, file_upload_complete=True)),
            (
                r"GET /datasets/([\w-]+)/download_data/",
                lambda id: pb.FileDownloadResponse(
                    url=pb.FileDownloadURL(url=f"{base}/blob/data/{id}", filename="data.h5")
                ),
            ),
        ]
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(*match.groups())
        return None

    def _blob(self, path: str, body: bytes) -> None:
        _, _, kind, id = path.split("/")
        if kind == "log":
            self._say(200, f"기기 로그: ok, authorization: token {self.hub.token}".encode(), "text/plain")
        elif self.command == "GET":
            self._say(200, self.hub.datasets[id], "application/octet-stream")
        elif kind == "model":
            with zipfile.ZipFile(io.BytesIO(body)) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/")]
            self.hub.archives[id] = Archive(names, body)
            self._say(200, b"", "text/plain", {"ETag": '"e"'})
        else:  # a form with a file: HDF5 begins with its signature, and the rest of a form is no part of it
            start, boundary = body.index(b"\x89HDF"), body[: body.index(b"\r\n")]
            self.hub.datasets[id] = body[start : body.index(b"\r\n" + boundary, start)]
            self._say(204, b"", "text/plain")

    do_GET = do_POST = do_PUT = do_PATCH = _go  # noqa: N815
