"""Measure a Hexagon variant on phones of Qualcomm AI Hub.

What is sent is what an app would ship: of each function the ONNX file that names the context binary, with that
binary; or, on request, the graphs that it was made from, which AI Hub then compiles itself. The inputs of one step go
with them, so the answer is checked against the same graph on this machine's CPU. The client cannot stop a job: one that
is left goes on, and is fetched later by its id.

Tried with the real client against a stand-in server alone: it has never reached AI Hub.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes import checksums, farm, hexagon, measuring
from runtimes.ai_hub import Hub, Phone, Profile, model_folder, system
from runtimes.bundle import MANIFEST, Bundle, EntryPoint, Variant, file_sha256
from runtimes.errors import MissingExtra, TargetError, UsageError
from runtimes.measurement import Backend, Figure, Mark, Measurement, Method, Place, quantile, sampled
from runtimes.workload import Workload, preset

TARGET = "qai-hub"
_FUNCTIONS = ("prefill", "decode")
_OTHERS = ("CPU", "GPU")  # processors that no graph should come to
_NOTES = (
    "speeds are of single runs of prefill and of decode, which AI Hub repeats as often as it sees fit; looking up the "
    "embedding and placing new rows in the KV cache, both on the CPU, are not in them",
    "load times are of all graphs together, each in a process of its own; peak memory is the largest of them",
    "TTFT is not measured: no process on AI Hub runs prefill and then decode",
)


@dataclass
class _Step:
    """A graph on a device: its entry point, and the job that compiles or runs it, once there is one."""

    phone: Phone
    variant: Variant
    entry: EntryPoint
    job: Any = None
    ended: bool = False

    @property
    def function(self) -> str:
        return self.entry.name.partition(".")[0]


def check() -> None:
    """MissingExtra without AI Hub's client, TargetError if that finds no token; AI Hub is not asked."""
    Hub()


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "smoke",
    *,
    variant: str | None = None,
    device: str | None = None,
    recompile: bool = False,
    run: str | None = None,
    logs: Path | None = None,
    max_minutes: float = 30.0,
    max_device_minutes: float = 120.0,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Measure a bundle's Hexagon variant on AI Hub's phones: a measurement for each, whatever the workload's cases.

    A function's shapes are fixed, so there is one kind of run of each. Figures: prefill_speed, decode_speed (tokens/s),
    load_time, warm_load_time, compile_time (s), peak_memory (bytes), logits_correlation; `where.backend` has the layers
    of each function by processor. `device`: names, by AI Hub or by the profiles, with commas. `variant`: default the
    one for the device's chip. `recompile`: send graphs and have AI Hub compile them. `run`: ids of jobs to go on
    waiting for, joined by +. `logs`: a folder for the jobs' logs and profiles. Raises TargetError (no token, AI Hub or
    a job fails, time is up, a layer on the CPU unless `allow_fallback`, other logits), UsageError, MissingExtra,
    BundleError, ChecksumError.
    """
    bundle = Bundle.open(bundle_path)
    workload = preset(workload) if isinstance(workload, str) else workload
    limits = farm.Limits(max_minutes, max_device_minutes)
    fitting = [hexagon.named(bundle, variant)] if variant else hexagon.variants(bundle)
    hub = Hub()
    jobs = [hub.job(id) for id in run.split("+")] if run else []
    wanted = device.split(",") if device else list(dict.fromkeys(_labelled(bundle, job) for job in jobs))
    if not wanted:
        raise UsageError('AI Hub has many devices: say which with --device, as "Galaxy S24 Ultra"')
    phones = hub.phones([name.strip() for name in wanted])
    limits.check([phone.name for phone in phones])
    steps = [
        _Step(phone, chosen, entry)
        for phone in phones
        for chosen in [_for_phone(fitting, phone, recompile, named=variant is not None)]
        for entry in _graphs(chosen, recompile)
    ]
    for chosen in {step.variant.name: step.variant for step in steps}.values():
        checksums.check(bundle, chosen)
    _resume(bundle, steps, jobs)
    known, unchecked = _on_cpu(bundle, [step.variant for step in steps])
    session = _Session(hub, bundle, known, recompile, logs, progress)
    with _kept(steps):
        session.finish(steps, limits)
        return [
            session.measurement(
                [step for step in steps if step.phone == phone],
                workload,
                unchecked,
                variant=variant,
                allow_fallback=allow_fallback,
            )
            for phone in phones
        ]


def _for_phone(fitting: Sequence[Variant], phone: Phone, recompile: bool, named: bool) -> Variant:
    """The variant for a phone's chip; any one where AI Hub compiles, and the one that was named where the chip is
    unknown."""
    for each in fitting:
        if phone.chip in each.chips:
            return each
    if recompile or (named and phone.chip is None):
        return fitting[0]
    chips = ", ".join(chip for each in fitting for chip in each.chips)
    raise UsageError(
        f"this bundle is compiled for {chips}, and {phone.name} has {phone.chip or 'a chip that no profile knows'}: "
        f"export it for that phone, or let AI Hub compile it with --option recompile=true"
    )


def _graphs(variant: Variant, recompile: bool) -> list[EntryPoint]:
    """What runs on the NPU: all but the embedding."""
    assert variant.compiled
    entries = variant.compiled.sources if recompile else variant.entry_points
    return [entry for entry in entries if entry.name.partition(".")[0] in _FUNCTIONS]


# inputs, and what the CPU makes of them


def _on_cpu(bundle: Bundle, variants: Sequence[Variant]) -> tuple[dict[tuple[str, str], hexagon.Run], str]:
    """By variant and entry point, a run of each graph on this machine's CPU: a full chunk of a prompt, and the token
    after it. Without its library none, and a note."""
    found: dict[tuple[str, str], hexagon.Run] = {}
    try:
        for variant in {each.name: each for each in variants}.values():
            found |= {(variant.name, name): run for name, run in hexagon.runs_on_cpu(bundle, variant).items()}
    except MissingExtra as error:
        return {}, f"random inputs, and whether the answers are right was not checked: {error}"
    return found, ""


# jobs


def _label(bundle: Bundle, step: _Step) -> str:
    """What a job is called: by it, it is known again."""
    return f"gochu {file_sha256(bundle.path / MANIFEST)[:12]} {step.variant.name} {step.entry.name}"


def _labelled(bundle: Bundle, job: Any) -> str:
    """The device of a job; UsageError if it is not of this bundle."""
    word, *rest = str(job.name).split()
    if word != "gochu" or rest[:1] != [file_sha256(bundle.path / MANIFEST)[:12]]:
        raise UsageError(f"AI Hub's job {job.job_id} ({job.name}) did not run this bundle: name its own jobs")
    return str(job.device.name)


def _resume(bundle: Bundle, steps: Sequence[_Step], jobs: Sequence[Any]) -> None:
    """Give each step the job that there already is; UsageError if a job belongs to none."""
    for job in jobs:
        name = _labelled(bundle, job)
        own = [step for step in steps if step.phone.name == name and _label(bundle, step) == job.name]
        if not own:
            raise UsageError(
                f"AI Hub's job {job.job_id} ({job.name} on {name}) is none of what was asked for: say the same "
                "--device, --variant and recompile as when it began"
            )
        own[0].job = job


def _ids(steps: Sequence[_Step]) -> str:
    return "+".join(step.job.job_id for step in steps if step.job)


@contextmanager
def _kept(steps: Sequence[_Step]) -> Iterator[None]:
    """Say how to go on with jobs that are left, by Ctrl-C or an error: AI Hub has them, and the client cannot stop
    them."""
    try:
        yield
    except TargetError as error:
        if ids := _ids(steps):
            raise TargetError(f"{error}; what AI Hub has begun is kept: --option run={ids}") from None
        raise
    except KeyboardInterrupt:
        if ids := _ids(steps):
            print(f"gochu: AI Hub goes on; fetch what it does with --option run={ids}", file=sys.stderr)
        raise


class _Session:
    """Begins the jobs of steps, waits for them, and reads what came of them."""

    def __init__(
        self,
        hub: Hub,
        bundle: Bundle,
        known: dict[tuple[str, str], hexagon.Run],
        recompile: bool,
        logs: Path | None,
        progress: Callable[[str], None],
    ) -> None:
        self._hub, self._bundle, self._known, self._recompile = hub, bundle, known, recompile
        self._logs, self._progress = logs, progress
        self._models: dict[str, Any] = {}  # by file; uploaded once for all devices
        self._options: dict[str, str] = {}

    def finish(self, steps: Sequence[_Step], limits: farm.Limits) -> None:
        """Have all steps run on their devices."""
        for step in steps:
            if step.job is None:
                self._begin(step)
        self._progress(f"AI Hub works; to go on after a break: --option run={_ids(steps)}")
        farm.wait(
            lambda: self._all_ended(steps) or None,
            f"AI Hub's work on {len(steps)} graphs",
            limits,
            progress=self._progress,
            fate="goes on there, since its client cannot stop it: allow more with max_minutes",
        )

    def _all_ended(self, steps: Sequence[_Step]) -> bool:
        """Each is looked at, so that none waits for another."""
        ended = [self._ended(step) for step in steps]
        return all(ended)

    def _begin(self, step: _Step) -> None:
        label = _label(self._bundle, step)
        key = step.entry.file
        if key not in self._models:
            self._progress(f"uploading {step.entry.name} of {step.variant.name}")
            with tempfile.TemporaryDirectory(prefix="gochu-") as folder:
                model = model_folder(self._bundle, step.entry, Path(folder))
                self._models[key] = self._hub.upload(model, f"{step.entry.name} of {step.variant.name}")
        if self._recompile:
            step.job = self._hub.compile(self._models[key], step.phone.name, label)
        else:
            self._profile(step, self._models[key], self._option(step.variant))

    def _profile(self, step: _Step, model: Any, options: str = "") -> None:
        known = self._known.get((step.variant.name, step.entry.name))
        inputs = {spec.name: known.inputs[spec.name] for spec in step.entry.inputs} if known else None
        step.job = self._hub.profile(model, step.phone.name, _label(self._bundle, step), options, inputs)

    def _option(self, variant: Variant) -> str:
        assert variant.compiled
        sdk = variant.compiled.sdk
        if sdk not in self._options:
            self._options[sdk] = self._hub.qairt_option(sdk)
        return self._options[sdk]

    def _ended(self, step: _Step) -> bool:
        """Whether a step's model has run; what was compiled is sent on. TargetError with AI Hub's own words if a job
        failed."""
        if step.ended:
            return True
        status = self._hub.status(step.job)
        if not status.finished:
            return False
        if not status.success:
            raise self._failure(step, status)
        if self._hub.is_compilation(step.job):
            self._profile(step, self._hub.compiled(step.job))
            return False
        step.ended = True
        return True

    def _failure(self, step: _Step, status: Any) -> TargetError:
        """What AI Hub says of a job that failed, whose logs are kept; it is no longer one to go on with."""
        failed, step.job = step.job, None
        said = f"AI Hub's job {failed.job_id} ({step.entry.name} on {step.phone.name}) failed, and says: "
        said += f"{self._hub.reason(status)}; look at {failed.url}"
        if self._logs:
            try:
                self._hub.keep_logs(failed, self._logs, {})
            except TargetError as error:
                said += f" ({error})"
        return TargetError(said)

    def measurement(
        self,
        steps: Sequence[_Step],
        workload: Workload,
        unchecked: str,
        *,
        variant: str | None,
        allow_fallback: bool,
    ) -> Measurement:
        """The measurement of one device, whose jobs have all succeeded. `unchecked`: a note; the rest: as asked for."""
        phone, chosen = steps[0].phone, steps[0].variant
        profiles: dict[str, list[Profile]] = {function: [] for function in _FUNCTIONS}
        checked: list[Figure] = []
        for step in steps:
            raw, profile = self._hub.result(step.job)
            if self._logs:
                self._hub.keep_logs(step.job, self._logs, raw)
            profiles[step.function].append(profile)
            checked += self._checked(step)
        effective = {name: _processors(each) for name, each in profiles.items() if _processors(each)}
        marks = _fallback(phone, effective, allow_fallback)
        decode = _together([each.runs for each in profiles["decode"]])
        if measuring.slowed(decode):
            marks.append("throttled")
        lengths = {step.function: hexagon.length(step.entry) for step in steps}
        unsaid = (
            "" if len(effective) == len(_FUNCTIONS) else "AI Hub did not tell which processor computed what"
        )
        job = self._hub.job(steps[-1].job.job_id)  # as AI Hub has it, with its version
        return measuring.measurement(
            measuring.subject(self._bundle, chosen),
            Place(
                target=TARGET,
                device=phone.name,
                os=system(job.device),
                engine=self._hub.version(job),
                chip=phone.chip,
                backend=Backend(requested="NPU", effective=effective),
                run=_ids(steps),
            ),
            Method(
                workload=workload.name,
                prompt_tokens=lengths["prefill"],
                new_tokens=2,
                context=chosen.context,
                warmup=0,
                repeats=len(decode),
                notes=(*_NOTES, *filter(None, (unchecked, unsaid))),
            ),
            [*_figures(profiles, lengths), *checked],
            self._bundle,
            marks=marks,
            on=TARGET,
            device=phone.name,
            variant=variant,
            recompile=self._recompile,
            allow_fallback=allow_fallback,
        )

    def _checked(self, step: _Step) -> list[Figure]:
        """How a graph's logits on the device correlate with the CPU's, if it has some and those are known."""
        spec = next((each for each in step.entry.outputs if each.name == "logits"), None)
        run = self._known.get((step.variant.name, step.entry.name))
        if spec is None or run is None:
            return []
        from runtimes.engines.qnn import real

        found = self._hub.outputs(step.job)
        if spec.name not in found or found[spec.name].size != run.outputs[spec.name].size:
            raise TargetError(
                f"AI Hub's job {step.job.job_id} gave {', '.join(found)} where {spec.name} of "
                f"{run.outputs[spec.name].size} numbers was expected; look at {step.job.url}"
            )
        theirs = found[spec.name].reshape(-1)
        # AI Hub may give numbers where the graph gives integers that stand for them
        ours = theirs if theirs.dtype.kind == "f" else real(theirs, spec)
        cpu = real(run.outputs[spec.name].reshape(-1), spec)
        return [hexagon.correlation_figure(hexagon.correlations([ours], [cpu]), step.phone.name, "measured")]


# what came of it


def _figures(profiles: dict[str, list[Profile]], lengths: dict[str, int]) -> Iterator[Figure]:
    """Speeds of each function over its graphs; loads of all graphs; memory of the largest."""
    for name, length in lengths.items():
        seconds = _together([each.runs for each in profiles[name]])
        yield sampled(f"{name}_speed", "tokens/s", [length / each for each in seconds])
    every = [each for name in _FUNCTIONS for each in profiles[name]]
    for name, times in (
        ("load_time", [each.first_loads for each in every]),
        ("warm_load_time", [each.warm_loads for each in every]),
        ("compile_time", [each.compiles for each in every]),
    ):
        if all(times):
            yield sampled(name, "s", _together(times))
    if peaks := [each.peak_memory for each in every if each.peak_memory]:
        yield sampled("peak_memory", "bytes", [max(peaks)])


def _together(parts: Sequence[tuple[float, ...]]) -> list[float]:
    """Seconds of graphs that run after each other: of each run, or of the medians where they ran unequally often."""
    if len({len(each) for each in parts}) == 1:
        return [sum(each) for each in zip(*parts, strict=True)]
    return [sum(quantile(each, 0.5) for each in parts)]


def _processors(parts: Sequence[Profile]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in parts:
        for name, count in each.processors.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def _fallback(phone: Phone, effective: dict[str, dict[str, int]], allow: bool) -> list[Mark]:
    """TargetError if a layer came to another processor and that is not allowed."""
    strays = [
        f"{count} of {name} on the {processor}"
        for name, counts in effective.items()
        for processor, count in counts.items()
        if processor in _OTHERS
    ]
    if strays and not allow:
        raise TargetError(
            f"{phone.name} did not compute all layers on its NPU ({', '.join(strays)}): choose another scheme, or take "
            "such figures with --allow-fallback"
        )
    return ["cpu_fallback"] if strays else []
