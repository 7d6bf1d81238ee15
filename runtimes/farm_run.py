"""A run on a device farm from its beginning to its measurements: the story that all app farms share.

A farm's target says how its farm is asked (`Service`); here is in which order. What devices measured is kept when
others fail; a run that fails, is late or is given up is cancelled, and its logs are kept all the same.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from runtimes import checksums, farm, farm_devices, measuring
from runtimes.bundle import Bundle, Variant
from runtimes.engines import named_variant
from runtimes.errors import SomeFailed, TargetError, UsageError
from runtimes.farm_devices import Chosen, Offered
from runtimes.farm_package import Job
from runtimes.measurement import Measurement, Subject
from runtimes.measurement_line import WORD, read
from runtimes.workload import Workload, preset


@dataclass(frozen=True)
class Outcome:
    """What one device of a run left: its logs, one after the other, and in the farm's words why it failed, if so."""

    device: Chosen
    log: str
    failure: str = ""


class Service(Protocol):
    """How a farm is asked. All of these raise TargetError with one sentence if the farm refuses."""

    @property
    def secrets(self) -> Sequence[str | None]:
        """What nobody may see; a token is known only once it was asked for."""
        ...

    def offered(self) -> Sequence[Offered]: ...
    def start(self, errand: "Errand", devices: Sequence[Chosen]) -> str:
        """Send what is needed and start a run; its id."""
        ...

    def ended(self, run: str) -> bool: ...
    def cancel(self, run: str) -> None: ...
    def outcomes(self, run: str, logs: "Logs") -> Iterable[Outcome]: ...


@dataclass(frozen=True)
class Logs:
    """The folder in which a run's logs are kept, with each secret in them replaced."""

    folder: Path
    run: str
    secrets: Sequence[str | None]
    _kept: set[Path] = field(default_factory=set)

    def keep(self, device: str, name: str, data: bytes) -> str:
        """Write a log as RUN/DEVICE/NAME; its text, if it is one. Of several of that name, each is kept."""
        first = self.folder / _plain(self.run.rpartition("/")[2]) / _plain(device) / _plain(name)
        numbered = (first.with_stem(f"{first.stem} {number}") for number in itertools.count(2))
        path = next(each for each in itertools.chain([first], numbered) if each not in self._kept)
        self._kept.add(path)
        for secret in filter(None, self.secrets):
            data = data.replace(secret.encode(), b"[secret]")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise UsageError(
                f"the log {path} cannot be written: {error.strerror}; give another folder with --option logs=DIR"
            ) from None
        return data.decode("utf-8", "replace")


def _plain(name: str) -> str:
    """A name that a farm gave, as that of a file or folder, which leads nowhere else."""
    kept = "".join(letter if letter.isalnum() or letter in " ._-()" else "_" for letter in name)
    return kept.strip(" .") or "unnamed"


@dataclass(frozen=True)
class Errand:
    """What is to be measured, and what of the command line repeats it (`options`, those of the target alone)."""

    target: str  # as in where.target
    key: farm_devices.Farm  # of profiles
    bundle: Bundle
    variant: Variant
    job: Job
    device: str | None
    limits: farm.Limits
    logs: Path | None = None
    run: str | None = None  # go on waiting for it
    allow_fallback: bool = False
    progress: Callable[[str], None] = lambda what: None
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        return measuring.subject(self.bundle, self.variant)

    def command(self, measurement: Measurement, device: Chosen) -> str:
        """How this is measured again on that device."""
        alone = self.device and "," not in self.device
        default = farm.Limits()
        limits = {
            "max_minutes": (self.limits.minutes, default.minutes),
            "max_device_minutes": (self.limits.device_minutes, default.device_minutes),
        }
        return measuring.command(
            self.bundle,
            self.job.workload.name,
            measurement.answers,
            on=self.target,
            variant=self.variant.name,
            device=self.device if alone else device.id,
            **self.options,
            allow_fallback=self.allow_fallback or None,
            **{name: f"{value:g}" for name, (value, usual) in limits.items() if value != usual},
        )


def errand(
    target: str,
    key: farm_devices.Farm,
    bundle_path: str | os.PathLike[str],
    workload: Workload | str,
    *,
    variant: str | None,
    context: int | None,
    device: str | None,
    limits: farm.Limits,
    logs: Path | None,
    run: str | None,
    allow_fallback: bool,
    progress: Callable[[str], None],
    **options: object,
) -> Errand:
    """Check what can be checked here. Raises UsageError, BundleError or ChecksumError."""
    bundle = Bundle.open(bundle_path)
    chosen = _variant(bundle, variant)
    workload = preset(workload) if isinstance(workload, str) else workload
    if context is not None and not 1 <= context <= chosen.context:
        raise UsageError(
            f"variant {chosen.name} has a context of at most {chosen.context} tokens, not {context}: ask for less"
        )
    length = context or chosen.context
    workload.clipped(length)
    if run is None:
        farm_devices.names(device)
        checksums.check(bundle, chosen)
    return Errand(
        target,
        key,
        bundle,
        chosen,
        Job(variant=chosen.name, context=length, workload=workload),
        device,
        limits,
        logs,
        run,
        allow_fallback,
        progress,
        {"context": context, **options},
    )


def _variant(bundle: Bundle, name: str | None) -> Variant:
    """The variant of that name, or the only one: what an app there can run is not known here."""
    if name is not None:
        return named_variant(bundle, name)
    only, *others = bundle.manifest.variants
    if others:
        names = ", ".join(each.name for each in bundle.manifest.variants)
        raise UsageError(f"{bundle.path} has variants {names}: say with --variant which to measure")
    return only


def carry_out(service: Service, errand: Errand) -> list[Measurement]:
    """Have a farm measure. TargetError if no device measured anything, SomeFailed if some did not."""
    run = errand.run or _start(service, errand)
    late = None
    try:
        with farm.cancelling(lambda: service.cancel(run), run):
            farm.wait(
                lambda: service.ended(run) or None, f"run {run}", errand.limits, progress=errand.progress
            )
    except TargetError as error:  # what finished before that is kept
        late = error
    errand.progress(f"run {run}: collecting logs")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            logs = Logs(errand.logs or Path(scratch), run, service.secrets)
            outcomes = list(service.outcomes(run, logs))
        except TargetError as error:
            raise (late or error) from None
    found, faults = [], [str(late)] if late else []
    for outcome in outcomes:
        measured, wrong = _measured(outcome, run, errand)
        found += measured
        faults += wrong
    if not found:
        raise TargetError(
            "; ".join(faults) if faults else f"run {run} has no device: look at it on the farm's web page"
        )
    if faults:
        raise SomeFailed("; ".join(faults), found)
    return found


def _start(service: Service, errand: Errand) -> str:
    wanted = farm_devices.names(errand.device)
    errand.limits.check(wanted)
    errand.progress("asking the farm for its devices")
    devices = farm_devices.choose(wanted, errand.key, service.offered(), errand.variant)
    run = service.start(errand, devices)
    errand.progress(f"run {run} was started on {', '.join(each.offered.label for each in devices)}")
    return run


def _measured(outcome: Outcome, run: str, errand: Errand) -> tuple[list[Measurement], list[str]]:
    """What a device measured, as far as it can be believed, and what is wrong with the rest."""
    name = outcome.device.name
    reading = read(outcome.log)
    faults = [outcome.failure, *reading.faults]
    found = []
    for line in reading.found:
        try:
            found.append(_believed(line, outcome.device, run, errand))
        except TargetError as error:
            faults.append(str(error))
    expected = len(errand.job.workload.clipped(errand.job.context))
    if not any(faults) and not found:
        faults.append(f"its logs hold no line with {WORD}: does the app print one, and find the bundle?")
    elif not any(faults) and len(found) < expected:
        faults.append(
            f"it measured {len(found)} of the {expected} cases of workload {errand.job.workload.name}"
        )
    return found, [f"{name} in run {run}: {fault}" for fault in faults if fault]


def _believed(line: Measurement, device: Chosen, run: str, errand: Errand) -> Measurement:
    """A measurement that an app printed, if it is of this bundle and of the processor that was asked for."""
    subject = errand.subject
    if line.what.bundle != subject.bundle or line.what.variant != subject.variant:
        raise TargetError(
            f"a measurement of variant {line.what.variant} of bundle {line.what.bundle[:12]} was found, and this is "
            f"variant {subject.variant} of {subject.bundle[:12]}: build the app with this bundle"
        )
    how, job = line.how, errand.job
    cases = {(case.prompt_tokens, case.new_tokens) for case, _ in job.workload.clipped(job.context)}
    if how.workload != job.workload.name or (how.prompt_tokens, how.new_tokens) not in cases:
        raise TargetError(
            f"the app measured {how.prompt_tokens} + {how.new_tokens} tokens of workload {how.workload}, which is no "
            f"case of {job.workload.name}: name the same --workload and --context as when the run was started"
        )
    if "cpu_fallback" in line.marks and not errand.allow_fallback:
        raise TargetError(
            "another processor computed than the one asked for: allow that with --allow-fallback, or export for "
            "this chip"
        )
    said, profile = line.where.chip, device.profile
    if said and profile and not farm_devices.is_chip(said, profile.soc):
        raise TargetError(
            f"the app found the chip {said}, and {profile.name} has {profile.chip}: name the device by its model code"
        )
    chip = profile.chip if profile else said
    where = line.where.model_copy(
        update={"target": errand.target, "run": run, "device": device.name, "chip": chip}
    )
    return line.model_copy(update={"what": subject, "where": where, "command": errand.command(line, device)})
