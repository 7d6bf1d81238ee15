"""Measure a Core ML variant on a connected iPhone, through coremltools' remote device API (experimental, version 9.0).

coremltools builds an app that runs models (Xcode, signed for your team), installs and starts it, sends each function of
each package there and asks it to predict; times are taken on the phone, around Core ML's own call. That app makes a
state, the KV cache, for each function that it loads (modelrunner/ModelRunner/ModelService.swift in coremltools' wheel
for macOS), and from here it cannot be read, reset or shared: enough to time a run of prefill and a run of decode, since
their shapes are fixed and their time does not depend on what the cache holds; not enough to generate text, nor for the
time to the first token. The app does not tell its memory.

Tried with stand-ins for coremltools, devicectl and xcodebuild alone: it has never run on an iPhone.
"""

import asyncio
import hashlib
import importlib
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from runtimes import apple, checksums, measuring
from runtimes.bundle import Bundle, EntryPoint, Variant
from runtimes.errors import MissingExtra, TargetError, UsageError
from runtimes.extras import require
from runtimes.measurement import Backend, Measurement, Method, Place, sampled
from runtimes.mil.library import EXTRA
from runtimes.quiet import quiet
from runtimes.workload import Workload, preset, prompt_ids

TEAM = "GOCHU_APPLE_TEAM"
_TEAM_ID = re.compile(r"[A-Z0-9]{10}")
_EXPERIMENTAL = "coremltools.models.ml_program.experimental"
_IOS = 18  # the first whose Core ML has states
_UNLOCK = "keep the iPhone connected and unlocked, and try again"
_WAIT = f"{_UNLOCK}; coremltools asks 20 times for an answer, so what Core ML compiles for longer cannot be measured so"
_NOTES = (
    "speeds are of single runs of prefill and of decode, timed on the phone around Core ML's own call; each function "
    "has a KV cache of its own in coremltools' app, so no text was generated",
    "the load time is the phone's, of both functions; the packages were compiled on the Mac",
    "TTFT and memory are not told by coremltools' remote device API: measure them in an app",
)


def check() -> None:
    """TargetError where there is no Mac, MissingExtra where there is no Xcode on it."""
    apple.require_macos("iphone")
    _require_xcode()


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    device: str | None = None,
    compute_units: str | None = None,
) -> list[Measurement]:
    """Measure a bundle's Core ML variant on a connected iPhone: one measurement, whatever the workload's cases.

    A function's shapes are fixed, so there is one kind of run of each: of the workload, `repeats` alone counts.
    Figures: load_time (s, all functions), prefill_speed and decode_speed (tokens/s); `where.backend` says which
    processors Core ML plans for them. `device`: the phone's name or UDID, needed if several are connected.
    `compute_units` are as for the target mac. The environment variable GOCHU_APPLE_TEAM holds the ID of the Apple
    development team that the app is signed for. Raises TargetError (no Mac, no iPhone, or Apple's tools fail),
    MissingExtra (coremltools, Xcode), UsageError, BundleError, ChecksumError.
    """
    apple.require_macos("iphone")
    bundle = Bundle.open(bundle_path)
    chosen = apple.choose(bundle, variant, "iphone")
    workload = preset(workload) if isinstance(workload, str) else workload
    units = apple.compute_units(chosen, compute_units)
    engine = importlib.import_module("runtimes.engines.coreml")
    chain = [(engine.package_folder(bundle, link), link) for link in engine.links(chosen)]
    team = _team()
    _require_xcode()
    checksums.check(bundle, chosen)
    with quiet():  # coremltools draws progress bars
        session = _Session(units, team, workload.repeats)
        phone = session.choose(device)
        runs = asyncio.run(session.measure(phone, chain, bundle.manifest.model.vocab))
    chunk = engine.chunk_length(chain[0][1].prefill)
    lengths = {engine.PREFILL: chunk, engine.DECODE: 1}
    return [
        measuring.measurement(
            measuring.subject(bundle, chosen),
            _place(phone, units, runs),
            _method(workload, chunk, chosen),
            [
                sampled("load_time", "s", [sum(each.load for each in runs.values())]),
                *(
                    sampled(f"{name}_speed", "tokens/s", [lengths[name] / s for s in each.seconds])
                    for name, each in runs.items()
                ),
            ],
            bundle,
            on="iphone",
            variant=variant,
            device=device,
            compute_units=compute_units,
        )
    ]


@dataclass
class _Runs:
    """Of one function, over all packages: seconds to load it, of each run; operations that each processor gets."""

    load: float = 0.0
    seconds: tuple[float, ...] = ()
    processors: Counter[str] = field(default_factory=Counter)


class _Session:
    """coremltools' remote device API, and what is asked of it."""

    def __init__(self, units: str, team: str, repeats: int) -> None:
        self._team, self._repeats = team, repeats
        self._tools = require("coremltools", EXTRA)
        self._remote: ModuleType = importlib.import_module(f"{_EXPERIMENTAL}.remote_device")
        self._perf: ModuleType = importlib.import_module(f"{_EXPERIMENTAL}.perf_utils")
        self._units = self._tools.ComputeUnit[apple.COMPUTE_UNITS[units][0]]

    def choose(self, name: str | None) -> Any:
        """The phone by that name or UDID, or the only one that is connected."""
        kind = self._remote.DeviceType.IPHONE
        with self._step("listing devices", "is Xcode set up? try `xcrun devicectl list devices`"):
            phones = self._remote.Device.get_connected_devices(kind)
            others = [] if phones else [d for d in self._remote.Device.get_devices() if d.type == kind]
        if not phones:
            seen = ", ".join(f"{each.name} is {each.state.value}" for each in others) or "Xcode knows of none"
            raise TargetError(
                f"no iPhone is connected ({seen}): connect one with a cable, unlock it and trust this Mac"
            )
        listed = ", ".join(f"{each.name} ({each.udid})" for each in phones)
        if name is None and len(phones) > 1:
            raise UsageError(f"{len(phones)} iPhones are connected: say which with --device: {listed}")
        wanted = [each for each in phones if name is None or name.casefold() in _names(each)]
        if len(wanted) > 1:
            raise UsageError(f"{len(wanted)} iPhones are called {name}: give a UDID with --device: {listed}")
        if not wanted:
            raise UsageError(f"no connected iPhone is called {name!r}; there are {listed}")
        return _usable(wanted[0])

    async def measure(self, phone: Any, chain: Sequence[tuple[Path, Any]], vocab: int) -> dict[str, _Runs]:
        """Build and start coremltools' app on the phone, and measure both functions of each package there."""
        try:
            return await self._measure(phone, chain, vocab)
        except TargetError as error:
            said = str(error)
        # Raised anew: the other's traceback holds coremltools' models, and those must go while this loop still runs.
        raise TargetError(said)

    async def _measure(self, phone: Any, chain: Sequence[tuple[Path, Any]], vocab: int) -> dict[str, _Runs]:
        credentials = self._remote.AppSigningCredentials(
            development_team=self._team, bundle_identifier=_bundle_identifier(self._team)
        )
        runs = {"prefill": _Runs(), "decode": _Runs()}
        with tempfile.TemporaryDirectory() as folder:
            with self._step(
                f"building and starting coremltools' app for {phone.name}",
                f"is {TEAM} your team's ID, and that team an account of Xcode's?",
            ):
                ready = await phone.prepare_for_model_debugging(
                    credentials=credentials, working_directory=Path(folder)
                )
            try:
                for name, of in runs.items():
                    for path, link in chain:
                        await self._function(ready, path, name, getattr(link, name), vocab, of)
            finally:
                ready.session.stop()
        return runs

    async def _function(
        self, phone: Any, path: Path, name: str, entry: EntryPoint, vocab: int, runs: _Runs
    ) -> None:
        """Measure a function of one package, and add that to what the packages before it took."""
        of = f"{name} of {path.name} on {phone.name}"
        with self._step(f"loading {of}", _WAIT):
            model = self._tools.models.MLModel(
                str(path), skip_model_load=True, compute_units=self._units, function_name=name
            )
            benchmarker = self._perf.MLModelBenchmarker(model, phone)
            loaded = await benchmarker.benchmark_load(iterations=1)
        inputs = _inputs(entry, vocab)
        with self._step(f"running {of}", _UNLOCK):
            predicted = await benchmarker.benchmark_predict(inputs, iterations=self._repeats, warmup=True)
        with self._step(f"asking for the plan of {of}", _UNLOCK):
            operations = await benchmarker.benchmark_operation_execution(inputs, iterations=1)
        seconds = [milliseconds / 1e3 for milliseconds in predicted.samples]
        runs.load += loaded.samples[0] / 1e3
        runs.seconds = (
            tuple(map(sum, zip(runs.seconds, seconds, strict=True))) if runs.seconds else tuple(seconds)
        )
        runs.processors.update(
            apple.processor(each.compute_device_usage.preferred_compute_device)
            for each in operations
            if each.compute_device_usage and name in _functions(each.path)
        )

    def _step(self, doing: str, advice: str) -> AbstractContextManager[None]:
        return apple.step(doing, advice, self._team)


def _team() -> str:
    """The development team's ID; it goes into a shell's command line inside coremltools, so it is nothing else."""
    team = os.environ.get(TEAM, "").strip()
    if not team:
        raise UsageError(
            f"the app that runs models on an iPhone has to be signed, and {TEAM} is not set: set it to the ID of your "
            "Apple development team, 10 letters and digits (developer.apple.com/account, Membership details)"
        )
    if not _TEAM_ID.fullmatch(team):
        raise UsageError(
            f"what {TEAM} holds is no ID of an Apple development team: those are 10 capital letters and digits"
        )
    return team


def _bundle_identifier(team: str) -> str:
    """An app's identifier belongs to one team, and coremltools' default to whoever came first."""
    return f"io.gochu.modelrunner.t{hashlib.sha256(team.encode()).hexdigest()[:12]}"


def _require_xcode() -> None:
    for tool in ("xcrun", "devicectl", "xcodebuild"):
        if shutil.which(tool) is None:
            raise MissingExtra(
                f"{tool} is not on the path; install Xcode 15 or newer, and select it with `xcode-select --switch`"
            )


def _names(phone: Any) -> set[str]:
    return {phone.name.casefold(), phone.udid.casefold(), phone.identifier.casefold()}


def _usable(phone: Any) -> Any:
    """The phone, unless it is too old or closed to developers."""
    version = phone.os_version.partition(".")[0]
    if version.isdigit() and int(version) < _IOS:
        raise TargetError(
            f"{phone.name} has iOS {phone.os_version}, and Core ML keeps a KV cache from iOS {_IOS} on: update it"
        )
    if phone.developer_mode_state == "disabled":
        raise TargetError(
            f"{phone.name} is not in Developer Mode: turn it on in Settings, Privacy & Security, Developer Mode"
        )
    return phone


def _inputs(entry: EntryPoint, vocab: int) -> dict[str, Any]:
    """Arrays for one run: random tokens at the start of the context, zeros for what another package would give."""
    numpy = importlib.import_module("numpy")
    arrays = {
        spec.name: numpy.zeros(tuple(map(int, spec.shape)), numpy.dtype(spec.dtype)) for spec in entry.inputs
    }
    if "input_ids" in arrays:
        tokens = arrays["input_ids"]
        tokens[...] = numpy.array(prompt_ids(tokens.size, vocab)).reshape(tokens.shape)
    return arrays


def _functions(path: Any) -> set[str]:
    """The functions that coremltools' path to an operation leads through: of its parts, they alone have a name."""
    return {part.name for part in path.components if hasattr(part, "name")}


def _place(phone: Any, units: str, runs: dict[str, _Runs]) -> Place:
    return Place(
        target="iphone",
        device=phone.name,
        os=f"iOS {phone.os_version} ({phone.os_build_number})",
        engine=f"Core ML, coremltools {importlib.metadata.version('coremltools')}",
        backend=Backend(
            requested=apple.COMPUTE_UNITS[units][1],
            effective={name: dict(each.processors) for name, each in runs.items() if each.processors},
        ),
    )


def _method(workload: Workload, chunk: int, variant: Variant) -> Method:
    """A run of prefill is a prompt as long as its input, and gives the first token; one of decode the second."""
    return Method(
        workload=workload.name,
        prompt_tokens=chunk,
        new_tokens=2,
        context=variant.context,
        warmup=1,
        repeats=workload.repeats,
        notes=_NOTES,
    )
