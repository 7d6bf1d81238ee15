"""What a runner measures on a phone, case by case: it is run there, and what it printed becomes measurements.

The phone's state is asked for before and after; while the runner runs, the phone notes its memory and heat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes import android, measurement_line, measuring, runners
from runtimes.bundle import Bundle, Variant
from runtimes.engines import named_variant
from runtimes.errors import TargetError, UsageError
from runtimes.farm import Clock
from runtimes.measurement import Answer, Backend, Condition, Figure, Mark, Measurement, Method, Place, sampled
from runtimes.phone import LOOK, Ended, Phone, Stopped
from runtimes.workload import Case, Workload

COOLING = 300.0  # s, for a phone that is too hot to begin
ON_CPU = ("", "xnnpack")  # delegates that compute there
_TAIL = 400  # characters of a runner's errors that are shown


@dataclass(frozen=True)
class Asked:
    """What the user asks for, the same for every phone."""

    bundle: Bundle
    workload: Workload
    variant: str | None
    device: str | None
    threads: int | None
    context: int | None
    runner: str | None
    libraries: str | None
    max_minutes: float
    allow_fallback: bool

    def check(self) -> None:
        """UsageError for what is wrong whatever the phone is."""
        if self.runner is None:
            raise UsageError(
                "target adb needs a program that measures on the phone: name it with --option runner=PATH, or in "
                "GOCHU_RUNNERS (llama_main, model_benchmark or llama-bench, built for Android; see docs/adb.md)"
            )
        if not Path(self.runner).exists():
            raise UsageError(
                f"there is no runner {self.runner}: name a program built for Android, or a folder of such"
            )
        if self.libraries is not None and not Path(self.libraries).is_dir():
            raise UsageError(
                f"{self.libraries} is no folder of libraries: name the one that holds the runner's .so files"
            )
        if self.max_minutes <= 0:
            raise UsageError(
                f"{self.max_minutes:g} minutes measure nothing: allow some with --option max_minutes=..."
            )
        if self.variant is not None:
            named_variant(self.bundle, self.variant)

    def program(self, variant: Variant) -> tuple[Path, runners.Runner | None]:
        """The program that runs this variant, and its kind (None: it prints measurement lines)."""
        place = Path(self.runner or "")
        if place.is_dir():
            name = runners.expected(variant.engine)
            found = sorted(each for each in place.iterdir() if name and each.name.casefold().startswith(name))
            if len(found) != 1:
                raise UsageError(
                    f"{place} has {len(found)} programs whose name begins with {name or 'that of a known runner'}, "
                    f"where variant {variant.name} needs one: name the program itself with --option runner=PATH"
                )
            place = found[0]
        return place, runners.kind(place.name, variant.engine)


@dataclass(frozen=True)
class Work:
    """A runner and a variant, ready on a phone."""

    phone: Phone
    clock: Clock
    asked: Asked
    task: runners.Task
    runner: runners.Runner | None
    place: Place
    libraries: str  # a folder, from a run's own
    why: str  # this variant

    def case(self, cut: str) -> list[Measurement]:
        """Measure the task's case. After Ctrl-C, with what was done until then; Stopped if that is nothing."""
        self.phone.rest(self.asked.workload.cool_down)
        before = self._cool()
        done, times, interrupted = self._rounds()
        try:
            after = self._condition()
        except Stopped:  # the phone is gone, and the user does not wait for it
            after = None
        marks: list[Mark] = ["interrupted"] if interrupted else []
        heats = [android.severity(each.thermal) or 0 for each in done]
        if max([*heats, _severity(after)]) >= android.SEVERE:
            marks.append("throttled")
        context = _Context(before, after, tuple(marks), (self.why, cut), self._memory(done))
        if self.runner is None:
            return [self._theirs(each, context) for ended in done for each in self._lines(ended)]
        return [self._ours(self.runner, done, times, context)]

    def _rounds(self) -> tuple[list[Ended], list[float], bool]:
        """Run the case's processes: once, as often as the workload repeats, or for its minutes. Times: when each round
        began, in seconds since the first."""
        commands = self.runner.commands(self.task) if self.runner else [runners.own_command(self.task)]
        minutes = self.task.minutes if self.runner else 0.0  # a runner of one's own keeps to them itself
        once = self.runner is None or self.runner.repeats_itself
        rounds = 1 if once else self.asked.workload.repeats
        done: list[Ended] = []
        times: list[float] = []
        now = start = self.clock.now()
        case = f"{self.task.case.prompt_tokens} + {self.task.case.new_tokens} tokens"
        try:
            while not times or (now - start < 60 * minutes if minutes else len(times) < rounds):
                doing = f"{self.place.engine}, {case}" + (
                    f", {len(times) + 1} of {rounds}" if rounds > 1 else ""
                )
                ended = [self._one(command, doing) for command in commands]
                done += ended
                times.append(now - start)
                now = self.clock.now()
        except Stopped:
            if not done:
                raise
            return done, times, True
        return done, times, False

    def _one(self, command: list[str], doing: str) -> Ended:
        ended = self.phone.run(command, self.libraries, self.asked.max_minutes, doing)
        if ended.code != 0:
            said = ended.err.strip()[-_TAIL:] or ended.out.strip()[-_TAIL:] or "nothing"
            how = (
                f"was ended by signal {ended.code - 128}"
                if ended.code > 128
                else f"ended with code {ended.code}"
            )
            raise TargetError(
                f"{self.place.engine} {how} on {self.phone.name} and said: {said!r}; try it there with `adb shell`, or "
                "a shorter context if memory was short"
            )
        return ended

    def _ours(
        self, runner: runners.Runner, done: Sequence[Ended], times: Sequence[float], context: "_Context"
    ) -> Measurement:
        """A measurement from what a known runner printed."""
        reading, *others = [runner.read(each.out) for each in done]
        for other in others:
            reading.add(other)
        case = Case(prompt_tokens=max(reading.prompt_tokens, 1), new_tokens=max(reading.new_tokens, 1))
        workload = self.asked.workload
        moments = times if workload.minutes else ()
        figures = [
            sampled(name, runners.UNITS[name], samples, times=moments if len(moments) == len(samples) else ())
            for name, samples in reading.samples.items()
        ]
        memory = dict(context.memory)
        if reading.peak_memory:
            memory["peak_memory"] = max(reading.peak_memory, memory.get("peak_memory", 0))
        figures += _bytes(memory)
        marks = list(context.marks)
        speeds = reading.samples.get("decode_speed") or reading.samples["prefill_speed"]
        if workload.minutes and measuring.slowed([1 / speed for speed in speeds]):
            marks.append("throttled")
        backend, fallback = self._backend(Backend(requested=self._requested()), reading.processors)
        marks += fallback
        wanted = self.task.case
        notes = (
            *context.notes,
            *runner.notes,
            "" if case == wanted else f"{wanted.prompt_tokens} + {wanted.new_tokens} tokens were asked for",
            _says(reading.processors, runner.name, backend.requested),
            _MEMORY_NOTE if context.memory else "",
            f"{runner.name} answers no prompts" if self.task.prompts else "",
        )
        how = Method(
            workload=workload.name,
            prompt_tokens=case.prompt_tokens,
            new_tokens=case.new_tokens,
            context=self.task.context,
            warmup=min(workload.warmup, 1) if runner.name != "model_benchmark" else workload.warmup,
            repeats=len(next(iter(reading.samples.values()), [])) or 1,
            sustained_minutes=workload.minutes,
            cool_down=workload.cool_down,
            notes=tuple(filter(None, notes)),
        )
        place = self.place.model_copy(
            update={
                "engine": reading.engine,
                "threads": reading.threads or self.asked.threads,
                "backend": backend,
            }
        )
        return self._measurement(place, how, figures, marks, context)

    def _lines(self, ended: Ended) -> list[Measurement]:
        """The measurements that a runner of one's own printed; TargetError if there are none, or of something else."""
        found = measurement_line.decode(ended.out)
        if not found:
            raise TargetError(
                f"{self.place.engine} ended without an error on {self.phone.name} and printed no measurement "
                f"({ended.out.strip()[-200:]!r}): a program that is not called {_names()} must print the lines of "
                f"{measurement_line.WORD}"
            )
        subject = measuring.subject(self.asked.bundle, self.task.variant)
        for each in found:
            if (each.what.bundle, each.what.variant) != (subject.bundle, subject.variant):
                raise TargetError(
                    f"{self.place.engine} measured variant {each.what.variant} of another bundle than the one that was "
                    f"asked for, or another variant than {subject.variant}: it must open the folder that it is given"
                )
        return found

    def _theirs(self, row: Measurement, context: "_Context") -> Measurement:
        """A runner's own measurement, with what was seen from here."""
        backend, fallback = self._backend(row.where.backend or Backend(requested=self._requested()), ())
        known = {figure.name for figure in row.figures}
        memory = _bytes({name: size for name, size in context.memory.items() if name not in known})
        place = self.place.model_copy(
            update={"engine": row.where.engine, "threads": row.where.threads, "backend": backend}
        )
        how = row.how.model_copy(update={"workload": self.asked.workload.name})
        made = self._measurement(
            place, how, [*row.figures, *memory], [*row.marks, *context.marks, *fallback], context, row.answers
        )
        return noted(made, [*context.notes, _MEMORY_NOTE if memory else ""])

    def _measurement(
        self,
        place: Place,
        how: Method,
        figures: Sequence[Figure],
        marks: Sequence[Mark],
        context: "_Context",
        answers: Sequence[Answer] = (),
    ) -> Measurement:
        asked = self.asked
        return measuring.measurement(
            measuring.subject(asked.bundle, self.task.variant),
            place,
            how,
            figures,
            asked.bundle,
            marks=tuple(dict.fromkeys(marks)),
            answers=answers,
            before=context.before,
            after=context.after,
            on="adb",
            variant=asked.variant,
            device=asked.device and self.phone.serial,
            threads=asked.threads,
            context=asked.context,
            runner=asked.runner,
            libraries=asked.libraries,
            max_minutes=asked.max_minutes if asked.max_minutes != 60.0 else None,
            allow_fallback=asked.allow_fallback,
        )

    def _requested(self) -> str:
        """Which processor the variant is made for."""
        variant = self.task.variant
        if variant.delegate in ON_CPU and variant.engine != "qnn":
            return "CPU"
        return variant.residency.accelerator if variant.residency else variant.delegate

    def _backend(self, backend: Backend, processors: Sequence[str]) -> tuple[Backend, list[Mark]]:
        """What was asked for and got; TargetError if the CPU did all where it should not, unless that is allowed."""
        backend = backend.model_copy(update={"requested": self._requested()})
        if backend.requested == "CPU" or not runners.fell_back(backend.effective, processors):
            return backend, []
        if not self.asked.allow_fallback:
            raise TargetError(
                f"variant {self.task.variant.name} is for {backend.requested}, but {self.place.engine} computed on "
                f"the CPU of {self.phone.name}: does it find its libraries (--option libraries=DIR)? --allow-fallback "
                "takes such figures"
            )
        return backend, ["cpu_fallback"]

    def _memory(self, done: Sequence[Ended]) -> dict[str, int]:
        """The largest of each kind of memory over all processes, in bytes."""
        found = android.memory_peaks("\n".join(each.memory for each in done))
        buffers = android.accelerator_memory(
            "\n".join(each.meminfo for each in done), "\n".join(each.fdinfo for each in done)
        )
        return found | ({"peak_accelerator_memory": buffers} if buffers else {})

    def _condition(self) -> Condition:
        return android.condition(self.phone.dumpsys("thermalservice"), self.phone.dumpsys("battery"))

    def _cool(self) -> Condition:
        """The phone's state when it is cool enough to begin; TargetError if it does not become so."""
        end = self.clock.now() + COOLING
        while _severity(condition := self._condition()) >= android.SEVERE:
            if self.clock.now() >= end:
                raise TargetError(
                    f"{self.phone.name} is too hot to measure on (thermal status {condition.thermal}"
                    + (f", {condition.celsius:g} °C" if condition.celsius else "")
                    + f", after {COOLING / 60:.0f} minutes of rest): let it cool, without its case and not charging"
                )
            self.phone.rest(10.0)
        return condition


_MEMORY_NOTE = f"memory was looked at every {LOOK:g} s from outside; the kernel itself keeps the peak of all"


@dataclass(frozen=True)
class _Context:
    """What was seen of a case from outside of the runner."""

    before: Condition
    after: Condition | None
    marks: tuple[Mark, ...]
    notes: tuple[str, ...]
    memory: dict[str, int]


def _severity(condition: Condition | None) -> int:
    return android.STATUSES.index(condition.thermal) if condition and condition.thermal else 0


def _bytes(sizes: dict[str, int]) -> list[Figure]:
    return [sampled(name, "bytes", [size]) for name, size in sizes.items()]


def _says(processors: Sequence[str], runner: str, requested: str) -> str:
    if processors:
        return f"{runner} says that it computes by {', '.join(processors)}"
    return "" if requested == "CPU" else f"{runner} does not tell whether {requested} computed"


def _names() -> str:
    return ", ".join(runner.name for runner in runners.RUNNERS)


def noted(row: Measurement, notes: Sequence[str], *marks: Mark) -> Measurement:
    """A measurement with further notes and marks."""
    how = row.how.model_copy(update={"notes": tuple(dict.fromkeys((*row.how.notes, *filter(None, notes))))})
    return row.model_copy(update={"how": how, "marks": tuple(dict.fromkeys((*row.marks, *marks)))})
