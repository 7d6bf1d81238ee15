"""Measure on Android phones that are connected over adb, with a runner that you name (`runtimes.runners`).

The variant's files and the runner go to each phone once, are kept there, and are compared by their SHA-256. The runner
is started apart from the connection, so that a pulled cable costs nothing but the wait; while it runs, the phone notes
its memory and heat. Several phones measure at once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import profiles
from runtimes import android, checksums, runners
from runtimes.bundle import MANIFEST, Bundle, Variant, file_sha256
from runtimes.engines import named_variant, settle
from runtimes.errors import GochuError, SomeFailed, TargetError, UsageError
from runtimes.farm import Clock
from runtimes.measurement import Measurement, Place
from runtimes.phone import FOLDER, Phone, Server, Stopped, unauthorized
from runtimes.phone_work import ON_CPU, Asked, Work, noted
from runtimes.workload import Workload, preset

CLOCK = Clock()
_SYSTEMS = ("executorch", "onnxruntime", "llama_cpp", "qnn")  # engines that Android has

_Found = tuple[
    list[Measurement], GochuError | None
]  # of a phone: what was measured, and what went wrong then


def check() -> None:
    """TargetError if no adb server answers, MissingExtra without adbutils."""
    Server().check()


def measure(
    bundle_path: str | os.PathLike[str],
    workload: Workload | str = "standard",
    *,
    variant: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    runner: str | None = None,
    libraries: str | None = None,
    max_minutes: float = 60.0,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Measurement]:
    """Measure a bundle on connected Android phones: of each phone one measurement for each case of the workload.

    `device`: serial numbers, or names (as "Galaxy S24 Ultra", "SM-S928N"), with commas; or `all`; needed if several are
    connected. `runner`: a program built for the phone, or a folder of such, of which the variant's engine decides
    (default: what the environment variable GOCHU_RUNNERS names).
    `libraries`: a folder of shared libraries that it needs. `max_minutes`: for one process of it. `allow_fallback`:
    take figures of the CPU where another processor was asked for. Without `variant` it is the one for the phone's chip,
    else the first for a CPU. `threads`: default what the runner takes.

    Figures: as far as the runner tells them, load_time, ttft (s), prefill_speed, decode_speed (tokens/s); peak_memory,
    peak_anonymous_memory, peak_mapped_memory and, where the phone's drivers tell it, peak_accelerator_memory (bytes).

    Raises SomeFailed if a phone failed and others, or itself before that, were measured; else TargetError, UsageError,
    MissingExtra, BundleError, ChecksumError.
    """
    bundle = Bundle.open(bundle_path)
    workload = preset(workload) if isinstance(workload, str) else workload
    runner = runner or os.environ.get("GOCHU_RUNNERS")
    asked = Asked(
        bundle, workload, variant, device, threads, context, runner, libraries, max_minutes, allow_fallback
    )
    asked.check()
    server, stop = Server(), Event()
    phones = _choose(server, device, progress, stop)
    with ThreadPoolExecutor(len(phones), thread_name_prefix="adb") as pool:
        work = [(phone, pool.submit(_measure, phone, asked)) for phone in phones]
        stopped = _wait([each for _, each in work], stop)
    found, failures = _gathered(work)
    if stopped and not found:
        raise KeyboardInterrupt
    if failures and not found:
        raise (
            failures[0][1]
            if len(failures) == 1
            else TargetError(
                "no phone gave figures: " + "; ".join(f"{phone.name}: {error}" for phone, error in failures)
            )
        )
    if stopped and not any("interrupted" in row.marks for row in found):
        found[-1] = noted(found[-1], ["this one is whole; the command was stopped meanwhile"], "interrupted")
    if failures:
        raise SomeFailed("; ".join(f"{phone.name} failed: {error}" for phone, error in failures), found)
    return found


def _choose(server: Server, device: str | None, progress: Callable[[str], None], stop: Event) -> list[Phone]:
    """The phones that are meant; UsageError if that is not clear, TargetError if they cannot be used."""
    states = server.states()
    ready = [serial for serial, state in states.items() if state == "device"]
    if not ready and not (device and set(device.split(",")) & set(states)):
        seen = ", ".join(f"{serial} is {state}" for serial, state in states.items())
        if "unauthorized" in states.values():
            raise TargetError(unauthorized(next(s for s, state in states.items() if state == "unauthorized")))
        raise TargetError(
            f"no phone is connected over adb ({seen or 'the adb server knows of none'}): connect one, and turn on USB "
            "debugging in its developer options"
        )
    phones = {serial: Phone(server, serial, CLOCK, progress, stop) for serial in ready}
    if device is None or device == "all":
        if device is None and len(phones) > 1:
            raise UsageError(
                f"{len(phones)} phones are connected: say which with --device: {_listed(phones)}, or all"
            )
        return list(phones.values())
    found: dict[str, Phone] = {}
    for name in filter(None, (part.strip() for part in device.split(","))):
        if name in states and name not in phones:
            state = states[name]
            raise TargetError(
                unauthorized(name) if state == "unauthorized" else f"{name} is {state}: connect it again"
            )
        matching = [name] if name in phones else [s for s, phone in phones.items() if _is_called(phone, name)]
        if not matching:
            raise UsageError(f"no connected phone is called {name!r}; there are {_listed(phones)}")
        if len(matching) > 1:
            raise UsageError(
                f"{len(matching)} phones are called {name}: give a serial number: {', '.join(matching)}"
            )
        found[matching[0]] = phones[matching[0]]
    if not found:
        raise UsageError(f"{device!r} names no phone; there are {_listed(phones)}")
    return list(found.values())


def _is_called(phone: Phone, name: str) -> bool:
    """Whether that is the phone's model code, or a name by which the profiles know its model."""
    model = phone.properties(("ro.product.model",))["ro.product.model"]
    if model.casefold() == name.casefold():
        return True
    known = android.device({"ro.product.model": model})
    with suppress(profiles.UnknownDevice, profiles.AmbiguousDevice):
        return known is not None and profiles.find(name).id == known.id
    return False


def _listed(phones: dict[str, Phone]) -> str:
    return ", ".join(
        f"{serial} ({android.called(phone.properties(android.PROPERTIES[:2]))})"
        for serial, phone in phones.items()
    )


def _wait(work: Sequence["Future[_Found]"], stop: Event) -> bool:
    """Until all phones are done; whether Ctrl-C ended it. The phones then end their runners."""
    stopped = False
    while True:
        try:
            while wait(
                work, timeout=0.2
            ).not_done:  # a lock that is waited for without an end hears no Ctrl-C
                pass
            return stopped
        except KeyboardInterrupt:
            stopped = True
            stop.set()


def _gathered(
    work: Sequence[tuple[Phone, "Future[_Found]"]],
) -> tuple[list[Measurement], list[tuple[Phone, GochuError]]]:
    """All phones' measurements, and the phones that failed. What is no GochuError is a mistake of ours, and raised."""
    found: list[Measurement] = []
    failures: list[tuple[Phone, GochuError]] = []
    for phone, future in work:
        rows, error = future.result()
        found += rows
        if error is not None:
            failures.append((phone, error))
    return found, failures


def _measure(phone: Phone, asked: Asked) -> _Found:
    """All cases on one phone, or those before it failed. Those that are done when the user stops are kept too, marked
    as interrupted."""
    found: list[Measurement] = []
    try:
        work = _prepare(phone, asked)
        for number, (case, cut) in enumerate(asked.workload.clipped(work.task.context)):
            prompts = () if number else asked.workload.prompts
            work = replace(work, task=replace(work.task, case=case, prompts=prompts))
            found += work.case(cut)
            if "interrupted" in found[-1].marks:
                break
    except Stopped:
        if found:
            found[-1] = noted(
                found[-1], ["this case is whole; the workload was stopped in the next"], "interrupted"
            )
    except GochuError as error:
        return found, error
    return found, None


def _prepare(phone: Phone, asked: Asked) -> "Work":
    """Look at the phone, choose the variant, and bring its files and the runner there."""
    phone.check()
    properties = phone.properties(android.PROPERTIES)
    phone.name = f"{android.called(properties)}, {phone.serial}"
    variant, why = _variant(asked, android.chip(properties))
    context, _ = settle(variant, asked.context, None)
    program, runner = asked.program(variant)
    android.check_abi(program, properties, phone.name)
    checksums.check(asked.bundle, variant)
    manifest = file_sha256(asked.bundle.path / MANIFEST)
    folder, tools = f"bundles/{manifest[:16]}", f"runners/{file_sha256(program)[:16]}"
    phone.install(f"{FOLDER}/{folder}", _files(asked.bundle, variant))
    with_libraries = {each.name: each for each in _libraries(asked.libraries)}
    phone.install(f"{FOLDER}/{tools}", with_libraries | {program.name: program}, executable=[program.name])
    task = runners.Task(
        program=f"../../{tools}/{program.name}",
        folder=f"../../{folder}",
        bundle=asked.bundle,
        variant=variant,
        case=asked.workload.cases[0],
        context=context,
        threads=asked.threads,
        warmup=asked.workload.warmup,
        repeats=1 if asked.workload.minutes else asked.workload.repeats,
        minutes=asked.workload.minutes,
        answer_tokens=asked.workload.answer_tokens,
    )
    place = Place(
        target="adb",
        device=android.called(properties),
        os=android.system(properties),
        engine=program.name,
        chip=android.chip(properties),
        threads=asked.threads,
    )
    return Work(phone, CLOCK, asked, task, runner, place, f"../../{tools}", why)


def _variant(asked: Asked, chip: str | None) -> tuple[Variant, str]:
    """The variant for a phone with this chip, and why."""
    if asked.variant is not None:
        return named_variant(asked.bundle, asked.variant), ""
    able = [each for each in asked.bundle.manifest.variants if each.engine in _SYSTEMS]
    for variant in able:
        if chip in variant.chips:
            return variant, f"variant {variant.name}: it is for this phone's chip, {chip}"
    for variant in able:
        if not variant.chips and variant.delegate in ON_CPU:
            return (
                variant,
                f"variant {variant.name}: the first for a CPU; none is for the chip {chip or 'unknown'}",
            )
    names = ", ".join(each.name for each in asked.bundle.manifest.variants)
    raise UsageError(
        f"no variant of {asked.bundle.path} ({names}) is for the chip {chip or 'unknown'} or for an Android CPU: "
        "export one, or name one with --variant"
    )


def _files(bundle: Bundle, variant: Variant) -> dict[str, Path]:
    """What a runner needs of the bundle: the variant's files, and those that are no variant's own, as the tokenizer."""
    own = {path for each in bundle.manifest.variants for path in each.files}
    listed = [entry.path for entry in bundle.manifest.files]
    wanted = [path for path in listed if path in variant.files or path not in own]
    return {MANIFEST: bundle.path / MANIFEST} | {path: bundle.file(path) for path in wanted}


def _libraries(folder: str | None) -> Iterator[Path]:
    return (each for each in sorted(Path(folder).iterdir()) if each.is_file()) if folder else iter(())
