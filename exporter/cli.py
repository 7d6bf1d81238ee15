"""The command line: parses, calls the function that a Python user would call, and shows what came back.

Nothing heavy is imported here: `gochu --help` answers at once. JSON goes to standard output, and so does
text that a model generates; everything else goes to standard error.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exporter import cli_fit, cli_quality, cli_quantize, cli_report, cli_target
from exporter.errors import GochuError

if TYPE_CHECKING:
    from exporter.npu.hexagon_plan import Wishes
    from exporter.quantization.recipe import Recipe
    from runtimes.generate import Chat, Generation, Model
    from runtimes.measurement import Measurement

app = typer.Typer(
    name="gochu",
    help="Small language models from a Hugging Face checkpoint to a phone. 작은 고추가 맵다.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_target.app, name="target")

CheckpointArgument = Annotated[
    str,
    typer.Argument(help="A folder, a Hugging Face repository id (org/model), or pepper, the embedded model."),
]
BundleArgument = Annotated[Path, typer.Argument(help="The bundle's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output, and no tables.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", "-d", help="The phone: its name, model code or chip. See `gochu devices`."),
]
SchemeOption = Annotated[
    str | None, typer.Option(help="fp32, fp16, int8, int4, int4-g128 (default: planned for the device).")
]
AlgorithmOption = Annotated[
    str,
    typer.Option(
        help="How integers are found: rtn (least error), rtn-absmax; gptq, gptq-act-order, qat (on a calibration text)."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Which tensor gets which scheme: a TOML file, or one that is shipped (see `gochu recipes`)."
    ),
]
ContextOption = Annotated[int | None, typer.Option(help="Tokens that the graph can hold (default: planned).")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="onnx, executorch, coreml or coreai (default: planned).")
]
DelegateOption = Annotated[
    str | None,
    typer.Option(
        help="What computes beside the CPU: hexagon (ONNX); ane, gpu (Core ML); vulkan, coreml, qualcomm, mediatek "
        "(ExecuTorch); or cpu, nothing (default: planned for the device)."
    ),
]
ChipsOption = Annotated[
    str,
    typer.Option(help="With --delegate hexagon: the chips to compile for (sm8650,sm8750), or all."),
]
CpuOpsOption = Annotated[
    bool, typer.Option("--allow-cpu-ops", help="Accept operations that the NPU does not take.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="For what is found on a text (gptq, clip, qat, awq, smoothquant, w8a16, w4a16): a .txt or .jsonl file of "
        "the model's kind; self: the model writes it.",
        dir_okay=False,
    ),
]
PrepareOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME]",
        help="What is done to the float weights before: hadamard; awq or smoothquant (on a calibration text).",
    ),
]
QatStepsOption = Annotated[
    int | None,
    typer.Option("--qat-steps", help="How many steps --algorithm qat trains (default: 100).", min=0),
]
SplitOption = Annotated[
    bool, typer.Option("--split/--no-split", help="Cut a model that is too large for one graph of the NPU.")
]
OnOption = Annotated[str | None, typer.Option("--on", help="Run it in a simulator: htp-simulator.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads (default: the physical cores).", min=1)]
VariantOption = Annotated[str | None, typer.Option(help="Which variant (default: the first that runs here).")]


def _help(text: str, *examples: str) -> str:
    return f"{text}\n\nExamples:\n\n" + "\n\n".join(f"  {example}" for example in examples)


@app.command(
    help=_help(
        "Export a checkpoint to a verified bundle for a device.",
        'gochu export pepper --device "Galaxy S24 Ultra" -o out/',
        "gochu export ./Qwen2.5-0.5B-Instruct --device SM-S928N --scheme int4 -o out/ --json",
        "gochu export org/model --revision main --device 'iPhone 16 Pro' --context 2048 -o out/",
        "gochu export ./Llama-3.2-1B-Instruct --scheme int4-g128 --algorithm gptq --calibration 대화.jsonl -o out/",
        "gochu export pepper --scheme int4-g128 --algorithm gptq --prepare hadamard -o out/",
        "gochu export pepper --scheme int4 --algorithm gptq --max-kl 0.05 --min-agreement 95 -o out/",
        "gochu export pepper --format executorch --delegate vulkan --device 'Galaxy S24' -o out/",
        "gochu export pepper --delegate hexagon --chips sm8550,sm8650 --scheme int4 -o out/",
        "gochu export pepper --delegate hexagon --device 'Galaxy S23' --recipe hexagon-w4a16 -o out/",
        "gochu export ./Llama-3.2-1B-Instruct --device 'Galaxy S24 Ultra' --delegate cpu -o out/",
    )
)
def export(
    checkpoint: CheckpointArgument = "pepper",
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.")] = Path("out"),
    device: DeviceOption = None,
    scheme: SchemeOption = None,
    algorithm: AlgorithmOption = "rtn",
    recipe: RecipeOption = None,
    context: ContextOption = None,
    format: FormatOption = None,
    delegate: DelegateOption = None,
    chips: ChipsOption = "",
    allow_cpu_ops: CpuOpsOption = False,
    split: SplitOption = True,
    calibration: CalibrationOption = None,
    prepare: PrepareOption = "",
    qat_steps: QatStepsOption = None,
    revision: RevisionOption = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Pass the gate, or leave the bundle marked unverified."),
    ] = True,
    max_kl: Annotated[
        float | None,
        typer.Option(help="The gate's bound on the KL divergence from the float model, in nats a token."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Its bound on tokens after which both find the same one likeliest, in percent."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    as_json: Json = False,
) -> None:
    from exporter import console
    from exporter.pipeline import export
    from exporter.quality_gate import QualityBounds
    from runtimes.engines import runs_here

    with console.progress() as progress, _told_when_stopped():
        bundle = export(
            checkpoint,
            output,
            device=device,
            scheme=scheme,
            algorithm=algorithm,
            recipe=_recipe(recipe),
            context=context,
            format=format,
            delegate=delegate,
            wishes=_wishes(chips, split, allow_cpu_ops),
            calibration=calibration,
            prepare=_names(prepare),
            qat_steps=qat_steps,
            revision=revision,
            verify=verify,
            bounds=QualityBounds(max_kl, min_agreement),
            force=force,
            progress=progress,
        )
    manifest = bundle.manifest
    if as_json:
        summary = manifest.model_dump(mode="json", include={"model", "device", "plan", "prediction", "gate"})
        variants = [
            v.model_dump(mode="json", include={"name", "format", "scheme", "context"})
            for v in manifest.variants
        ]
        _print_json({"bundle": str(output), "bytes": bundle.size(), **summary, "variants": variants})
        return
    console.show_choices(
        f"Plan: {manifest.model.name} for {manifest.device or 'this computer'}", manifest.plan
    )
    console.show_gate(manifest.gate)
    verb = "run" if any(runs_here(variant) for variant in manifest.variants) else "inspect"
    console.console.print(
        f"wrote {output} ({console.size(bundle.size())}); try: gochu {verb} {output}", markup=False
    )


@app.command(
    help=_help(
        "Show what an export would do and why, and what it would need, before anything is computed.",
        'gochu plan "Llama 3.2 1B" --device "갤럭시 S24 울트라"',
        "gochu plan ./Llama-3.2-1B-Instruct --device 'Pixel 8' --scheme int8 --json",
        "gochu plan pepper --format executorch --device 'Galaxy Z Flip7'",
    )
)
def plan(
    checkpoint: CheckpointArgument = "pepper",
    device: DeviceOption = None,
    scheme: SchemeOption = None,
    algorithm: AlgorithmOption = "rtn",
    recipe: RecipeOption = None,
    context: ContextOption = None,
    format: FormatOption = None,
    delegate: DelegateOption = None,
    chips: ChipsOption = "",
    allow_cpu_ops: CpuOpsOption = False,
    split: SplitOption = True,
    calibration: CalibrationOption = None,
    prepare: PrepareOption = "",
    qat_steps: QatStepsOption = None,
    revision: RevisionOption = None,
    as_json: Json = False,
) -> None:
    from exporter.known import describe_model
    from exporter.plan import make_plan

    name, arch = describe_model(checkpoint, revision)
    made = make_plan(
        arch,
        device=device,
        scheme=scheme,
        algorithm=algorithm,
        recipe=_recipe(recipe),
        context=context,
        format=format,
        delegate=delegate,
        wishes=_wishes(chips, split, allow_cpu_ops),
        calibration=calibration,
        prepare=_names(prepare),
        qat_steps=qat_steps,
    )
    if as_json:
        _print_json({"checkpoint": name, **made.to_dict()})
        return
    from exporter import console

    console.show_plan(name, made)


@app.command(
    help=_help(
        "List the devices that Gochu knows: all, or those that meet what is asked; or show what is known of one.",
        "gochu devices",
        "gochu devices galaxy --chip sm8650 --json",
        "gochu devices --npu hexagon-v75 --ram-at-least 12GB",
        'gochu devices show "갤럭시 S24 울트라"',
        "gochu devices show iPhone17,1 --json",
    )
)
def devices(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUERY | show NAME]", help="Part of a name, model code or chip."),
    ] = None,
    chip: Annotated[str, typer.Option(help="With this chip: its name, its id, or a part of them.")] = "",
    npu: Annotated[
        str, typer.Option(help="With this NPU: hexagon, v75, ane, exynos, apu, tpu, or its name.")
    ] = "",
    ram_at_least: Annotated[
        str, typer.Option(metavar="SIZE", help="With so much RAM as it is sold by, such as 8GB.")
    ] = "",
    as_json: Json = False,
) -> None:
    import profiles
    from exporter.errors import UsageError

    words = query or []
    if words[:1] == ["show"]:
        if chip or npu or ram_at_least or len(words) == 1:
            raise UsageError(
                "`gochu devices show` takes the name of one device and no filter, such as "
                "`gochu devices show 'Galaxy S24 Ultra'`"
            )
        device = profiles.find(" ".join(words[1:]))
        if as_json:
            figures = ("ram_bytes", "app_memory_bytes", "entitled_app_memory_bytes", "app_memory_reason")
            _print_json(
                {**device.model_dump(mode="json"), **{name: getattr(device, name) for name in figures}}
            )
            return
        from exporter import console

        console.show_device(device)
        return
    found = profiles.search(
        " ".join(words), chip=chip, npu=npu, ram_at_least_gib=cli_fit.ram_gib(ram_at_least)
    )
    if as_json:
        _print_json(
            [
                {
                    "id": device.id,
                    "name": device.name,
                    "aliases": device.aliases,
                    "os": device.os,
                    "chip": device.soc.id,
                    "npu": device.soc.npu.family if device.soc.npu else None,
                    "model_codes": device.model_codes,
                    "ram_bytes": device.ram_bytes,
                    "app_memory_bytes": device.app_memory_bytes,
                }
                for device in found
            ]
        )
        return
    from exporter import console

    console.show_devices(found)


@app.command(
    help=_help(
        "Chat with a bundle, or answer one prompt.",
        "gochu run out/",
        'gochu run out/ --prompt "23 더하기 45는?" --temperature 0 --json',
        'gochu run out/ --on htp-simulator --prompt "23 더하기 45는?"',
        "gochu run out/ --prompt 'Once upon a time' --raw --max-tokens 64 --top-p 0.9 --temperature 0.7 --seed 1",
    )
)
def run(
    bundle: BundleArgument = Path("out"),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and stop.")] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message, where the model's template takes one.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; higher is more varied.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest that make up this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Make tokens that occurred less likely; 1 = no.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    variant: VariantOption = None,
    on: OnOption = None,
    threads: ThreadsOption = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens to hold in memory (default: all the bundle can).")
    ] = None,
    as_json: Json = False,
) -> None:
    from runtimes.generate import Chat, load
    from runtimes.sampling import Sampling

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if prompt is None and (as_json or raw):
        raise typer.BadParameter("needs a --prompt", param_hint="--json" if as_json else "--raw")
    with load(bundle, variant=variant, threads=threads, context=context, on=on) as model:
        if prompt is None:
            _converse(Chat(model, system=system, sampling=sampling), max_tokens)
            return
        messages = [{"role": "system", "content": system}] if system else []
        given: Any = prompt if raw or not system else [*messages, {"role": "user", "content": prompt}]
        stream = model.stream(given, max_tokens=max_tokens, sampling=sampling, raw=raw)
        if not as_json:
            for piece in stream:
                print(piece, end="", flush=True)
            print()
        _report(model, stream.finish(), as_json)


def _converse(chat: "Chat", max_tokens: int) -> None:
    """Read lines and answer them until the end of input."""
    from runtimes.errors import PromptError

    print("Write something; Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        try:
            for piece in chat.send(line.rstrip("\n"), max_tokens=max_tokens):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr)
        except PromptError as error:
            print(f"{error}; the conversation begins anew", end="", file=sys.stderr)
            chat.reset()
        print()


def _report(model: "Model", generation: "Generation", as_json: bool) -> None:
    if as_json:
        _print_json(
            {
                "text": generation.text,
                "tokens": list(generation.tokens),
                "prompt_tokens": generation.prompt_tokens,
                "finish_reason": generation.finish_reason,
                "timings": generation.timings,
            }
        )
        return
    speed = generation.timings.get("decode_tokens_per_s")
    print(
        f"[{generation.prompt_tokens} + {len(generation.tokens)} tokens, first after "
        f"{generation.timings['ttft_s'] * 1e3:.0f} ms{f', then {speed:.0f} tokens/s' if speed else ''}, "
        f"{generation.finish_reason}]",
        file=sys.stderr,
    )


@app.command(
    help=_help(
        "Measure a bundle, on this machine or another target: load time, TTFT, prefill and decode speed, peak memory. "
        "Or trace it: the time that each operator takes.",
        "gochu bench out/",
        "gochu bench out/ --workload standard --threads 4 --json",
        "gochu bench out/ --on mac --option compute_units=ane",
        "gochu bench out/ --on host,iphone --device 'Test iPhone' --out results.jsonl",
        "gochu bench out/ --ask '23 더하기 45는?'",
        "gochu bench out/ --trace --plot trace.png",
        "gochu bench --matrix matrix.toml --out results.jsonl",
        "gochu bench --matrix matrix.toml --ray local",
    )
)
def bench(
    call: typer.Context,
    bundle: BundleArgument = Path("out"),
    on: Annotated[
        str,
        typer.Option(
            metavar="TARGET[,TARGET...]", help="Where: host is this machine; gochu target tells all others."
        ),
    ] = "host",
    workload: Annotated[
        str,
        typer.Option(
            help="smoke (seconds), standard (prompts of 64, 256, 1024), sustained (10 minutes), or as pp512,tg128."
        ),
    ] = "smoke",
    variant: VariantOption = None,
    threads: ThreadsOption = None,
    context: Annotated[int | None, typer.Option(help="Tokens the KV cache holds (default: all).")] = None,
    device: Annotated[
        str | None, typer.Option(help="Which phone: its name, serial number or UDID; several with commas.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="What a target knows besides.")
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Also answer this, greedily; what was said stands in the results."),
    ] = None,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Take figures of another processor than asked for.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Add the measurements to this file (JSON Lines).", dir_okay=False)
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Time by operator, in prefill and in decode, instead of the whole."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the trace into this file, .png or .svg.", dir_okay=False)
    ] = None,
    matrix: Annotated[
        Path | None,
        typer.Option(
            help="Measure every cell of this TOML file: bundles x targets x workloads.", dir_okay=False
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="With --matrix: on this Ray cluster; local starts one."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="With --matrix: measure also the cells that are done already.")
    ] = False,
    as_json: Json = False,
) -> None:
    if matrix is not None:
        _alone(call, "matrix", "ray", "again", "out", "as_json")
        from exporter import cli_matrix

        cli_matrix.bench(matrix, out, ray, again, as_json)
        return
    if ray is not None or again:
        raise typer.BadParameter("goes with --matrix", param_hint="--again" if again else "--ray")
    if trace:
        if on != "host" or any((device, option, ask, out)):
            raise typer.BadParameter(
                "traces are made on this machine: leave out --on, --device, --option, --ask and --out",
                param_hint="--trace",
            )
        _trace(bundle, workload, variant, threads, context, plot, as_json)
        return
    if plot is not None:
        raise typer.BadParameter("draws a trace: give --trace with it", param_hint="--plot")
    from exporter import console
    from runtimes import measurement, targets
    from runtimes.errors import SomeFailed
    from runtimes.workload import preset

    asked = preset(workload).model_copy(update={"prompts": tuple(ask or ())})
    measurements: list[Measurement] = []
    with console.progress() as progress:
        options = {
            "variant": variant,
            "threads": threads,
            "context": context,
            "device": device,
            "allow_fallback": allow_fallback,
            "progress": lambda what: progress(what, 0, 0),
            **_pairs(option or []),
        }
        chosen = targets.choose(on, options)
        try:
            for target, known in chosen:
                lost = None
                try:
                    found = target.measure(bundle, asked, **known)
                except SomeFailed as error:
                    found, lost = list(error.measured), error
                measurements += found
                if out is not None:
                    measurement.append(out, found)
                if lost:
                    raise lost
                if any("interrupted" in each.marks for each in found):
                    raise KeyboardInterrupt
        except BaseException:
            if measurements:  # what one target said is not lost when the next one fails
                _show_measurements(measurements, as_json)
            raise
    _show_measurements(measurements, as_json)


def _alone(call: typer.Context, option: str, *others: str) -> None:
    """Refuse what was given beside an option, but those others that it goes with."""
    for name in call.params:
        source = call.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in (option, *others):
            what = "a bundle" if name == "bundle" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"the file says it all: leave out {what}", param_hint=f"--{option}")


def _pairs(options: list[str]) -> dict[str, str]:
    """--option name=value, as often as it was given."""
    for option in options:
        if not option.partition("=")[0].isidentifier() or "=" not in option:
            raise typer.BadParameter(f"{option!r} is not of the form name=value", param_hint="--option")
    return dict(option.split("=", 1) for option in options)


def _show_measurements(measurements: "list[Measurement]", as_json: bool) -> None:
    from exporter import console
    from runtimes import report

    if as_json:
        print(report.to_json(measurements), end="")
    else:
        report.show(measurements, console.console)


def _trace(
    bundle: Path,
    workload: str,
    variant: str | None,
    threads: int | None,
    context: int | None,
    file: Path | None,
    as_json: bool,
) -> None:
    from exporter import console
    from runtimes import plot, report
    from runtimes.trace import trace_workload

    if file is not None:
        plot.check(file)  # before anything is run
    traces = trace_workload(bundle, workload, threads, variant=variant, context=context)
    if file is not None:
        plot.plot(traces, file)
    if as_json:
        print(report.to_json(traces), end="")
        return
    report.show_traces(traces, console.console)
    if file is not None:
        console.console.print(f"drew {file}", markup=False)


@app.command(
    help=_help(
        "Check a bundle again: checksums, tokenizer, integers, and its tokens against the reference decoder.",
        "gochu verify out/",
        "gochu verify out/ --json",
    )
)
def verify(bundle: BundleArgument = Path("out"), as_json: Json = False) -> None:
    from exporter import console
    from exporter.gate import verify
    from runtimes.bundle import Bundle

    opened = Bundle.open(bundle)
    with console.progress() as progress:
        gate = verify(opened, lambda check: progress(f"verify {check}", 0, 0))
    if as_json:
        _print_json(gate.model_dump(mode="json"))
    else:
        console.show_gate(gate)


@app.command(
    help=_help(
        "Show what a bundle is: model, plan with reasons, variants, files, gate.",
        "gochu inspect out/",
        "gochu inspect out/ --tensors",
        "gochu inspect out/ --json | jq .gate",
    )
)
def inspect(
    bundle: BundleArgument = Path("out"),
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also every tensor with its scheme and error.")
    ] = False,
    as_json: Json = False,
) -> None:
    from runtimes.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        print(opened.manifest.to_json(), end="")
        return
    from exporter import console

    console.show_bundle(opened, tensors)


@app.command(
    help=_help(
        "Ask a bundle of pepper questions that it was never trained on, and count the exact answers.",
        "gochu score out/",
        "gochu score out/ --questions 1000 --json",
        "gochu score out/ --on htp-simulator --questions 50",
    )
)
def score(
    bundle: BundleArgument = Path("out"),
    questions: Annotated[int, typer.Option(help="How many held-out questions to ask.", min=1)] = 300,
    variant: VariantOption = None,
    on: OnOption = None,
    threads: ThreadsOption = None,
    as_json: Json = False,
) -> None:
    from exporter import console
    from exporter.pepper.questions import held_out
    from exporter.pepper.score import score
    from runtimes.generate import load

    with load(bundle, variant=variant, threads=threads, on=on) as model:
        result = score(lambda prompt: model.generate(prompt, max_tokens=32).text, held_out(questions))
    if as_json:
        _print_json(result.to_dict())
    else:
        console.show_score(result)


@contextmanager
def _told_when_stopped() -> Iterator[None]:
    """Ctrl-C loses nothing: say so."""
    try:
        yield
    except KeyboardInterrupt:
        print("gochu: stopped; the same command goes on where it was", file=sys.stderr)
        raise


def _wishes(chips: str, split: bool, allow_cpu_ops: bool) -> "Wishes":
    """What is asked of an NPU's compiler."""
    from exporter.npu.hexagon_plan import Wishes

    return Wishes(_names(chips), split, allow_cpu_ops)


def _names(listed: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _recipe(name: str | None) -> "Recipe | None":
    if name is None:
        return None
    from exporter.quantization.recipe import find_recipe

    return find_recipe(name)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


cli_quantize.register(app)
cli_report.register(app)
cli_quality.register(app)
cli_fit.register(app)


def main() -> None:
    """Entry point: an error of ours is one sentence on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Korean, whatever the locale
    try:
        app()
    except GochuError as error:
        print(f"gochu: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
