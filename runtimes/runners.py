"""Runners: other people's programs that measure a model on a phone, how each is called and what it prints.

| runner | reads | from |
|---|---|---|
| llama_main | ExecuTorch (.pte) | https://github.com/pytorch/executorch, examples/models/llama |
| model_benchmark | ONNX with genai_config.json | https://github.com/microsoft/onnxruntime-genai, benchmark/c |
| llama-bench | GGUF | https://github.com/ggml-org/llama.cpp, tools/llama-bench |
| any other | whatever it can | prints the lines of `runtimes.measurement_line` |

Which one reads a variant is said by the variant's engine; which one a file is, by its name. A program of another name
is called as `own_command` says.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from runtimes.bundle import TOKENIZER, Bundle, Variant
from runtimes.errors import BundleError, TargetError
from runtimes.workload import Case

UNITS = {"load_time": "s", "ttft": "s", "prefill_speed": "tokens/s", "decode_speed": "tokens/s"}
GENAI_CONFIG = "genai_config.json"
_WORDS = "the small pepper is the hot one and "  # of the prompts: any text will do
_OBSERVER = re.compile(r"PyTorchObserver (\{.*\})")
_NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?|inf|-?nan)"


@dataclass(frozen=True)
class Task:
    """What a runner is to do: a case of a variant whose files are in `folder`, a path on the phone."""

    program: str
    folder: str
    bundle: Bundle
    variant: Variant
    case: Case
    context: int
    threads: int | None
    warmup: int
    repeats: int
    minutes: float = 0.0  # instead of `repeats`
    prompts: tuple[str, ...] = ()
    answer_tokens: int = 1

    def file(self, suffix: str) -> str:
        """The variant's file with that ending, on the phone; BundleError if it has not just one."""
        found = [path for path in self.variant.files if path.endswith(suffix)]
        if len(found) != 1:
            raise BundleError(
                f"variant {self.variant.name} has {len(found)} files that end in {suffix} where "
                f"{PurePosixPath(self.program).name} takes one; name another runner"
            )
        return f"{self.folder}/{found[0]}"


@dataclass
class Reading:
    """What a runner said: samples by figure (units: UNITS), and how long prompt and answer were, in tokens.

    `processors`: which ones it says that it used; empty if it does not. `peak_memory`: bytes, if it told.
    """

    engine: str
    samples: dict[str, list[float]]
    prompt_tokens: int
    new_tokens: int
    threads: int | None = None
    processors: tuple[str, ...] = ()
    peak_memory: int | None = None
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set

    def add(self, other: "Reading") -> None:
        """Take in what another process said of the same case."""
        for name, values in other.samples.items():
            self.samples.setdefault(name, []).extend(values)
        self.prompt_tokens = max(self.prompt_tokens, other.prompt_tokens)
        self.new_tokens = max(self.new_tokens, other.new_tokens)
        self.peak_memory = max(self.peak_memory or 0, other.peak_memory or 0) or None
        self.processors = tuple(dict.fromkeys((*self.processors, *other.processors)))
        self.notes |= other.notes


@dataclass(frozen=True)
class Runner:
    """A kind of runner. `commands`: the processes, one after the other, that do a task once; `read`: what one of them
    printed; `repeats_itself`: it does the task's repeats, else it is started for each."""

    name: str
    engine: str
    repeats_itself: bool
    commands: Callable[[Task], list[list[str]]]
    read: Callable[[str], Reading]
    notes: tuple[str, ...]


def kind(file: str, engine: str) -> Runner | None:
    """The kind that a program of this name is, or None for one that prints measurement lines.

    TargetError if it reads another engine's files. A name may say more: llama_main_android is a llama_main.
    """
    for runner in RUNNERS:
        if file.casefold().startswith(runner.name):
            if runner.engine != engine:
                raise TargetError(
                    f"{file} runs {runner.engine} variants, and this one is for {engine}: name a variant for "
                    f"{runner.engine} with --variant, or a runner for {engine}"
                )
            return runner
    return None


def expected(engine: str) -> str | None:
    """The name of the runner that reads an engine's files, or None if there is none but those of one's own."""
    return next((runner.name for runner in RUNNERS if runner.engine == engine), None)


def own_command(task: Task) -> list[str]:
    """How a runner is called that prints measurement lines: it opens the bundle's folder as a runtime does."""
    words = {
        "--bundle": task.folder,
        "--variant": task.variant.name,
        "--prompt-tokens": task.case.prompt_tokens,
        "--new-tokens": task.case.new_tokens,
        "--context": task.context,
        "--warmup": task.warmup,
        "--repeats": task.repeats,
        "--minutes": f"{task.minutes:g}" if task.minutes else None,
        "--threads": task.threads,
        "--answer-tokens": task.answer_tokens if task.prompts else None,
    }
    given = [word for name, value in words.items() if value is not None for word in (name, str(value))]
    return [task.program, *given, *(word for prompt in task.prompts for word in ("--ask", prompt))]


def prompt_text(bundle: Bundle, tokens: int) -> str:
    """A text that becomes so many tokens, or as nearly so as words allow (never more, but one word at least)."""
    from runtimes.tokenizer import Tokenizer

    tokenizer = Tokenizer(bundle.file(TOKENIZER))
    words = (_WORDS * (tokens // len(_WORDS.split()) + 1)).split()

    def length(count: int) -> int:
        return len(tokenizer.encode(" ".join(words[:count]), add_special=False))

    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if length(middle) <= tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def _llama_main_commands(task: Task) -> list[list[str]]:
    """Flags: examples/models/llama/main.cpp."""
    weights = [f"{task.folder}/{path}" for path in task.variant.files if path.endswith(".ptd")]
    return [
        [
            task.program,
            f"--model_path={task.file('.pte')}",
            *([f"--data_paths={','.join(weights)}"] if weights else []),
            f"--tokenizer_path={task.folder}/{TOKENIZER}",
            f"--prompt={prompt_text(task.bundle, task.case.prompt_tokens)}",
            f"--max_new_tokens={task.case.new_tokens}",
            "--temperature=0",
            "--ignore_eos=true",
            f"--warmup={'true' if task.warmup else 'false'}",
            *([f"--cpu_threads={task.threads}"] if task.threads else []),
        ]
    ]


def read_llama_main(printed: str) -> Reading:
    """The line `PyTorchObserver {...}` (extension/llm/runner/stats.h); its clock counts whole milliseconds.

    `generated_tokens` are those of the decode loop; the first token comes from the prompt's pass.
    """
    lines = _OBSERVER.findall(printed)
    try:
        said = json.loads(lines[-1])
        second = said["SCALING_FACTOR_UNITS_PER_SECOND"]
        begun, prompted = said["inference_start_ms"], said["prompt_eval_end_ms"]
        loading = (said["model_load_end_ms"] - said["model_load_start_ms"]) / second
        first = (said["first_token_ms"] - begun) / second
        prefill, decode = (prompted - begun) / second, (said["inference_end_ms"] - prompted) / second
        prompt, generated = said["prompt_tokens"], said["generated_tokens"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise _unread("llama_main", "its line PyTorchObserver {...}", printed) from None
    samples = {"ttft": [first]} | ({"load_time": [loading]} if loading > 0 else {})
    if prefill > 0:
        samples["prefill_speed"] = [prompt / prefill]
    if generated > 0 and decode > 0:
        samples["decode_speed"] = [generated / decode]
    return Reading("ExecuTorch, llama_main", samples, prompt, generated + 1)


def _model_benchmark_commands(task: Task) -> list[list[str]]:
    """Options: benchmark/c/options.cpp. One repetition for each process: of several it prints no single times."""
    if GENAI_CONFIG not in task.variant.files:
        raise BundleError(
            f"variant {task.variant.name} has no {GENAI_CONFIG}, which model_benchmark reads: export it as ONNX for "
            "the CPU, or name another runner"
        )
    words = {
        "-i": f"{task.folder}/{PurePosixPath(GENAI_CONFIG).parent}".removesuffix("/."),
        "-l": task.case.prompt_tokens,
        "-g": task.case.new_tokens,
        "-r": 1,
        "-w": task.warmup,
    }
    return [[task.program, *(word for pair in words.items() for word in map(str, pair))]]


def read_model_benchmark(printed: str) -> Reading:
    """The report of benchmark/c/main.cpp, of one repetition, so that its averages are samples."""
    head = re.search(r"prompt tokens: (\d+), tokens to generate: (\d+)", printed)
    times = {
        name: float(value)
        for name, value in re.findall(
            rf"^([A-Z][^\n]*):\n\s*avg \([mu]s\):\s+{_NUMBER}$", printed, re.MULTILINE
        )
    }
    prompting = times.get("Prompt processing (time to first token)")
    if head is None or not prompting:
        raise _unread("model_benchmark", "its report of prompt processing and token generation", printed)
    prompt, new = int(head[1]), int(head[2])
    sampling, token = times.get("Token sampling", 0.0), times.get("Token generation", 0.0)
    samples = {"ttft": [(prompting + sampling) / 1e6], "prefill_speed": [prompt * 1e6 / prompting]}
    if token > 0:
        samples["decode_speed"] = [1e6 / token]
    peak = re.search(r"^Peak working set size: (\d+) bytes", printed, re.MULTILINE)
    return Reading(
        "ONNX Runtime GenAI, model_benchmark",
        samples,
        prompt,
        new,
        peak_memory=int(peak[1]) if peak else None,
    )


def _llama_bench_commands(task: Task) -> list[list[str]]:
    """The prompt, then the answer after a cache that holds as much as the prompt (-d), as elsewhere."""
    threads = ["-t", str(task.threads)] if task.threads else []
    prompt, new = str(task.case.prompt_tokens), str(task.case.new_tokens)
    common = [task.program, "-m", task.file(".gguf"), "-r", str(task.repeats), "-o", "json", *threads]
    found = [[*common, "-p", prompt, "-n", "0"]]
    if task.case.new_tokens > 1:
        found.append([*common, "-p", "0", "-n", new, "-d", prompt])
    return found


def read_llama_bench(printed: str) -> Reading:
    """The JSON list of `llama-bench -o json`: a test of a prompt or of an answer, with the time of each repeat."""
    try:
        tests = json.loads(printed[printed.index("[") :])
        first = tests[0]
        reading = Reading(
            f"llama.cpp {first['build_commit']} ({first['build_number']}), llama-bench",
            {},
            0,
            1,
            threads=first["n_threads"],
        )
        for test in tests:
            prompt, new = test["n_prompt"], test["n_gen"]
            name = "decode_speed" if new else "prefill_speed"
            seconds = [nanoseconds / 1e9 for nanoseconds in test["samples_ns"]]
            processors = tuple(filter(None, re.split(r"[,+ ]+", test["backends"])))
            speeds = {name: [(new or prompt) / each for each in seconds]}
            length = prompt or test.get("n_depth", 0)
            reading.add(Reading(reading.engine, speeds, length, new or 1, None, processors))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise _unread("llama-bench", "the JSON list of its tests", printed) from None
    return reading


def _unread(runner: str, what: str, printed: str) -> TargetError:
    shown = printed.strip()[-200:]
    return TargetError(
        f"{runner} ended without an error, but {what} is not in what it printed ({shown!r}): is it another program, or "
        "another version?"
    )


RUNNERS: Sequence[Runner] = (
    Runner(
        "llama_main",
        "executorch",
        False,
        _llama_main_commands,
        read_llama_main,
        (
            "each repeat is a process of its own; llama_main counts in milliseconds, and the time of the prompt has "
            "its tokenizing in it",
        ),
    ),
    Runner(
        "model_benchmark",
        "onnxruntime",
        False,
        _model_benchmark_commands,
        read_model_benchmark,
        ("each repeat is a process of its own; model_benchmark tells no load time",),
    ),
    Runner(
        "llama-bench",
        "llama_cpp",
        True,
        _llama_bench_commands,
        read_llama_bench,
        (
            "llama-bench samples no tokens, so there is no TTFT; it tells no load time; prompt and answer are measured "
            "in processes of their own",
        ),
    ),
)


def fell_back(effective: Mapping[str, Mapping[str, int]], processors: Sequence[str]) -> bool:
    """Whether the CPU computed all: of a function, by its operations, or by the processors that the runner names."""
    only_cpu = [set(counts) == {"CPU"} for counts in effective.values() if counts]
    return any(only_cpu) or (bool(processors) and {each.upper() for each in processors} <= {"CPU", "BLAS"})
