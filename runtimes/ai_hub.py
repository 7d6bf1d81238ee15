"""Qualcomm AI Hub through its own client (https://workbench.aihub.qualcomm.com/docs): one sentence for what goes wrong,
and the token in none.

The client finds the token itself, in the file that `qai-hub configure` writes or that QAIHUB_CLIENT_INI names.
"""

import configparser
import difflib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import profiles
from profiles.lookup import normalized
from runtimes import farm
from runtimes.bundle import Bundle, EntryPoint
from runtimes.errors import BundleError, GochuError, TargetError, UsageError
from runtimes.extras import require

T = TypeVar("T")
EXTRA = "qai-hub"
_SETUP = "get a token on AI Hub's account page and run `qai-hub configure --api_token ...`"
_UNAUTHORIZED = 401
_FRAME = re.compile(r"[┌┐└┘─|]+")  # the client draws boxes around what it says
_LONGEST = 300  # characters of the client's words in an error


@dataclass(frozen=True)
class Phone:
    """A device of AI Hub by AI Hub's name, and the id of its chip in the profiles, if they know it."""

    name: str
    chip: str | None


@dataclass(frozen=True)
class Profile:
    """What AI Hub measured of a graph: seconds of each run and each load, bytes, layers by processor."""

    runs: tuple[float, ...]
    first_loads: tuple[float, ...]
    warm_loads: tuple[float, ...]
    compiles: tuple[float, ...]
    peak_memory: int | None
    processors: dict[str, int]


class Hub:
    """AI Hub's client, and what is asked of it. Raises TargetError, UsageError, MissingExtra."""

    def __init__(self) -> None:
        self._library: ModuleType = require("qai_hub", EXTRA)
        self._token: str | None = None
        self._client = self._library.Client()
        try:
            self._token = self._ask("reading the token", lambda: self._client.config).api_token
        except configparser.Error:  # its words hold a line of the file
            raise TargetError(
                f"the file that should hold AI Hub's token is no configuration file: {_SETUP}"
            ) from None
        self._client.set_verbose(False)

    def phones(self, names: Sequence[str]) -> list[Phone]:
        """The devices by AI Hub's names, or by any name of their profiles; UsageError if AI Hub has none by that
        name, UnknownDevice and AmbiguousDevice where the profiles do not help."""
        listed = self._ask("listing devices", self._client.get_devices)
        attributes = {each.name: each.attributes for each in listed}
        found = [_called(name, list(attributes)) for name in names]
        return [Phone(name, _chip(name, attributes[name])) for name in dict.fromkeys(found)]

    def qairt_option(self, sdk: str) -> str:
        """The option with which AI Hub runs what version `sdk` of QAIRT, Qualcomm's SDK, compiled: none if its
        default is not older, else the oldest that is not. TargetError if all are."""
        listed = self._ask("listing frameworks", self._client.get_frameworks)
        known = [each for each in listed if each.name.upper() == "QAIRT"]
        able = sorted(
            (each for each in known if _version(each.api_version) >= _version(sdk)),
            key=lambda each: _version(each.api_version),
        )
        if not known or any("default" in each.api_tags for each in able):
            return ""
        if not able:
            newest = max((each.api_version for each in known), key=_version)
            raise TargetError(
                f"QAIRT {sdk} compiled this variant, and AI Hub's newest is {newest}, which cannot load it: let AI Hub "
                "compile it with --option recompile=true"
            )
        return f"--qairt_version {able[0].api_version}"

    def upload(self, folder: Path, name: str) -> Any:
        """Upload a folder of one ONNX file and its data, or its context binary."""
        return self._ask(f"uploading {name}", lambda: self._client.upload_model(str(folder), name=name))

    def compile(self, model: Any, phone: str, name: str) -> Any:
        """Have a model compiled for a device's NPU: the job, which has not ended."""
        return self._ask(
            f"asking for a compilation of {name} for {phone}",
            lambda: self._client.submit_compile_job(
                model,
                self._library.Device(phone),
                name=name,
                options="--target_runtime qnn_context_binary",
                retry=False,
            ),
        )

    def profile(self, model: Any, phone: str, name: str, options: str, inputs: dict[str, Any] | None) -> Any:
        """Have a model run on a device with these inputs, else with random ones: the job, which has not ended."""
        return self._ask(
            f"asking for a run of {name} on {phone}",
            lambda: self._client.submit_inference_job(
                model,
                self._library.Device(phone),
                inputs=inputs and {key: [value] for key, value in inputs.items()},
                name=name,
                options=f"--compute_unit npu {options}".strip(),
                profile=True,
                retry=False,
            ),
        )

    def job(self, id: str) -> Any:
        """A job by its id."""
        return self._ask(f"looking for job {id}", lambda: self._client.get_job(id))

    def version(self, job: Any) -> str:
        """Versions of AI Hub, which ran a job, and of its client."""
        return f"AI Hub {job.hub_version}".strip() + f", qai-hub {self._library.__version__}"

    def is_compilation(self, job: Any) -> bool:
        return isinstance(job, self._library.CompileJob)

    def status(self, job: Any) -> Any:
        """A job's status. The client tries for half a minute; this goes on for some, since the job does too."""
        internal = self._library.InternalError
        return self._ask(
            f"asking after job {job.job_id}",
            lambda: farm.retried(job.get_status, lambda error: isinstance(error, internal)),
        )

    def reason(self, status: Any) -> str:
        """Why a job failed, in AI Hub's words."""
        return farm.without(" ".join((status.message or "nothing").split()), [self._token])

    def compiled(self, job: Any) -> Any:
        """What a compile job that succeeded made."""
        return self._ask(f"fetching what job {job.job_id} compiled", job.get_target_model)

    def result(self, job: Any) -> tuple[dict[str, Any], Profile]:
        """The profile of a job that succeeded, as AI Hub gives it and read; TargetError if it lacks the times."""
        raw = self._ask(f"fetching the profile of job {job.job_id}", job.download_profile)
        summary = raw.get("execution_summary", {})
        runs = _seconds(summary, "all_inference_times", "estimated_inference_time")
        if not runs:
            raise TargetError(
                f"AI Hub's job {job.job_id} succeeded and has no times: a part of its results is missing: ask again, "
                "or measure again"
            )
        processors: dict[str, int] = {}
        for layer in raw["execution_detail"]:
            processors[layer["compute_unit"]] = processors.get(layer["compute_unit"], 0) + 1
        return raw, Profile(
            runs=runs,
            first_loads=_seconds(summary, "all_first_load_times", "first_load_time"),
            warm_loads=_seconds(summary, "all_warm_load_times", "warm_load_time"),
            compiles=_seconds(summary, "all_compile_times", "compile_time"),
            peak_memory=summary.get("estimated_inference_peak_memory") or None,
            processors=processors,
        )

    def outputs(self, job: Any) -> dict[str, Any]:
        """What a job's model gave for its inputs, by name; TargetError if AI Hub has lost it."""
        found = self._ask(f"fetching the outputs of job {job.job_id}", job.download_output_data)
        if not found:
            raise TargetError(
                f"AI Hub's job {job.job_id} succeeded and has no outputs: a part of its results is missing: ask again, "
                "or measure again"
            )
        return {name: batches[0] for name, batches in found.items()}

    def keep_logs(self, job: Any, folder: Path, raw: dict[str, Any]) -> None:
        """Write a job's logs, and its profile if there is one, into `folder`/its id."""
        place = folder / job.job_id
        try:
            place.mkdir(parents=True, exist_ok=True)
            if raw:
                text = farm.without(json.dumps(raw, indent=1), [self._token])
                (place / "profile.json").write_text(text, encoding="utf-8")
            kept = self._ask(
                f"fetching the logs of job {job.job_id}", lambda: job.download_job_logs(str(place))
            )
            for path in map(Path, kept):
                text = path.read_text(encoding="utf-8", errors="replace")
                path.write_text(farm.without(text, [self._token]), encoding="utf-8")
        except OSError as error:
            raise TargetError(
                f"logs cannot be kept in {folder}: {error.strerror}; name another folder"
            ) from None

    def _ask(self, doing: str, request: Callable[[], T]) -> T:
        """What a request gives; TargetError with the client's words, in one line and without the token.

        The client raises errors of its own, of requests, of protobuf and plain ones, which have no common base.
        """
        try:
            return request()
        except (GochuError, configparser.Error):
            raise
        except Exception as error:
            raise TargetError(self._sentence(doing, error)) from None

    def _sentence(self, doing: str, error: Exception) -> str:
        said = " ".join(_FRAME.sub(" ", str(error)).split()) or type(error).__name__
        said = farm.without(said, [self._token])[:_LONGEST]
        if self._token is None:
            return f"AI Hub's client has no token ({said}): {_SETUP}"
        if getattr(error.__context__, "status_code", None) == _UNAUTHORIZED:
            return f"{doing} failed: AI Hub takes the token for wrong or expired: {_SETUP}"
        if isinstance(error, self._library.client.RateLimitedError):
            return (
                f"{doing} failed: AI Hub allows no more for now ({said}); wait until jobs of yours have ended"
            )
        if isinstance(error, self._library.InternalError):
            return f"{doing} failed: AI Hub cannot be reached or has failed ({said}); try again later"
        return f"{doing} failed ({said}); look at AI Hub's web page"


def model_folder(bundle: Bundle, graph: EntryPoint, into: Path) -> Path:
    """A folder as AI Hub takes it: one ONNX file, and the one file of weights, or of what was compiled, that it names.

    A name in an ONNX file has its length before it (protobuf).
    """
    folder = into / graph.name
    folder.mkdir()
    content = bundle.file(graph.file).read_bytes()
    paths = [entry.path for entry in bundle.manifest.files if entry.path.endswith((".data", ".bin"))]
    named = [path for path in paths if bytes([len(path.encode()) % 256]) + path.encode() in content]
    if len(named) != 1:
        raise BundleError(
            f"{graph.file} names {' and '.join(named) or 'no file'} where AI Hub takes a graph with one file of "
            "weights: export the bundle again"
        )
    for path in (graph.file, *named):
        shutil.copyfile(bundle.file(path), folder / Path(path).name)
    return folder


def system(device: Any) -> str:
    """The operating system of a device of AI Hub's, with its version."""
    names = {"android": "Android", "windows": "Windows", "linux": "Linux"}
    said = next((each.partition(":")[2] for each in device.attributes if each.startswith("os:")), "")
    return f"{names.get(said, said)} {device.os}".strip()


def _called(name: str, listed: list[str]) -> str:
    """AI Hub's name of a device: that name, with the maker's before it or without, or one of its profile's."""
    known = {normalized(each): each for each in listed}
    short = {normalized(each.partition(" ")[2]): each for each in listed}
    if found := known.get(normalized(name)) or short.get(normalized(name)):
        return found
    try:
        farms = profiles.find(name).farms
    except profiles.UnknownDevice:
        farms = None
    for each in farms.ai_hub if farms else ():
        if each in listed:
            return each
    near = difflib.get_close_matches(normalized(name), known, n=3, cutoff=0.4)
    hint = ", ".join(known[each] for each in near) or f"any of its {len(listed)} devices"
    raise UsageError(f"AI Hub has no device {name!r} now; it has {hint}")


def _chip(name: str, attributes: Iterable[str] | str) -> str | None:
    """The profiles' id of a device's chip: its profile's, or what AI Hub's chipset is in the profiles."""
    for device in profiles.devices():
        if device.farms and name in device.farms.ai_hub:
            return device.chip
    chipsets = {
        normalized(each.partition(":")[2]).removesuffix("forgalaxy")
        for each in attributes
        if each.startswith("chipset:")
    }
    for chip in profiles.chips():
        if {normalized(chip.id), normalized(f"qualcomm {chip.name}")} & chipsets:
            return chip.id
    return None


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(each) for each in re.findall(r"\d+", text)[:2])


def _seconds(summary: dict[str, Any], every: str, one: str) -> tuple[float, ...]:
    """Times that AI Hub gives in µs: each, else their estimate, else none."""
    times = summary.get(every) or [summary.get(one) or 0]
    return tuple(time / 1e6 for time in times if time)
