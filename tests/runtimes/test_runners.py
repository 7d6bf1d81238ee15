"""What runners on phones are told, and what they print: samples after the runners' own sources."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtimes import runners
from runtimes.bundle import Variant
from runtimes.errors import BundleError, TargetError
from runtimes.workload import Case

# ExecuTorch 1.5: extension/llm/runner/stats.h, with its log lines around the line that counts.
LLAMA_MAIN = """I 00:00:00.000501 executorch:cpuinfo_utils.cpp:71] Reading file /sys/devices/soc0/image_version
I 00:00:00.014512 executorch:main.cpp:87] Resetting threadpool with num threads = 4
I 00:00:00.051231 executorch:llm_runner_helper.cpp:52] Loaded tokenizer
the small pepper is the hot one. {"a": 1}
PyTorchObserver {"prompt_tokens":64,"generated_tokens":127,"model_load_start_ms":1732450000123,\
"model_load_end_ms":1732450001623,"inference_start_ms":1732450001700,"inference_end_ms":1732450005200,\
"prompt_eval_end_ms":1732450002025,"first_token_ms":1732450002026,"aggregate_sampling_time_ms":52,\
"SCALING_FACTOR_UNITS_PER_SECOND":1000}
I 00:00:06.513212 executorch:stats.h:111] \tPrompt Tokens: 64    Generated Tokens: 127
I 00:00:06.513218 executorch:stats.h:117] \tModel Load Time:\t\t1.500000 (seconds)
I 00:00:06.513222 executorch:stats.h:127] \tTotal inference time:\t\t3.500000 (seconds)
"""
# onnxruntime-genai: benchmark/c/main.cpp, of one repetition.
MODEL_BENCHMARK = """Batch size: 1, prompt tokens: 64, tokens to generate: 128
Prompt processing (time to first token):
\tavg (us):       320000
\tavg (tokens/s): 200
\tp50 (us):       320000
\tstddev (us):    0
\tn:              1 * 64 token(s)
Token generation:
\tavg (us):       2.5e+04
\tavg (tokens/s): 40
\tp50 (us):       24810.5
\tstddev (us):    812.31
\tn:              127 * 1 token(s)
Token sampling:
\tavg (us):       150.25
\tavg (tokens/s): 6655.57
\tp50 (us):       150.25
\tstddev (us):    0
\tn:              1 * 1 token(s)
E2E generation (entire generation loop):
\tavg (ms):       3495.2
\tp50 (ms):       3495.2
\tstddev (ms):    0
\tn:              1
Peak working set size: 512000000 bytes (488.28 MB)
"""
# llama.cpp: tools/llama-bench/README.md, with a line of a backend's before it.
LLAMA_BENCH = """ggml_opencl: device: 'QUALCOMM Adreno(TM) 750'
[
  {
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "cpu_info": "",
    "gpu_info": "QUALCOMM Adreno(TM) 750",
    "backends": "OpenCL",
    "model_filename": "../../bundles/0123456789abcdef/model.gguf",
    "model_type": "qwen2 1B Q4_0",
    "model_size": 428730112,
    "model_n_params": 494032768,
    "n_threads": 4,
    "n_gpu_layers": 99,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2025-04-24T11:58:50Z",
    "avg_ns": 72135640,
    "stddev_ns": 1453752,
    "avg_ts": 7100.002165,
    "stddev_ts": 140.341520,
    "samples_ns": [ 64000000, 128000000 ],
    "samples_ts": [ 8000, 4000 ]
  }
]
"""


def variant(engine: str, *files: str) -> Variant:
    return Variant.model_construct(name="v", engine=engine, files=files)


def task(of: Variant, byte_level: Path, **changes: Any) -> runners.Task:
    bundle: Any = SimpleNamespace(file=lambda path: byte_level)
    given = {
        "threads": 4,
        "warmup": 1,
        "repeats": 5,
        "context": 96,
        "case": Case(prompt_tokens=64, new_tokens=32),
    }
    return runners.Task(program="./runner", folder="../b", bundle=bundle, variant=of, **given | changes)


def test_llama_main_is_read() -> None:
    said = runners.read_llama_main(LLAMA_MAIN)
    assert said.samples == {
        "ttft": [0.326],
        "load_time": [1.5],
        "prefill_speed": [64 / 0.325],
        "decode_speed": [127 / 3.175],
    }
    assert (said.prompt_tokens, said.new_tokens, said.processors) == (64, 128, ())


def test_llama_main_that_was_warm_tells_no_load_time() -> None:
    warm = LLAMA_MAIN.replace("1732450000123", "0").replace("1732450001623", "0")
    assert "load_time" not in runners.read_llama_main(warm).samples


def test_model_benchmark_is_read() -> None:
    said = runners.read_model_benchmark(MODEL_BENCHMARK)
    assert said.samples == {
        "ttft": [pytest.approx(0.32015025)],
        "prefill_speed": [200.0],
        "decode_speed": [40.0],
    }
    assert (said.prompt_tokens, said.new_tokens, said.peak_memory) == (64, 128, 512_000_000)


def test_llama_bench_is_read() -> None:
    said = runners.read_llama_bench(LLAMA_BENCH)
    assert said.samples == {"prefill_speed": [8000.0, 4000.0]}
    assert (said.prompt_tokens, said.threads, said.processors) == (512, 4, ("OpenCL",))
    answer = LLAMA_BENCH.replace('"n_prompt": 512', '"n_prompt": 0').replace('"n_gen": 0', '"n_gen": 128')
    said.add(runners.read_llama_bench(answer.replace('"n_depth": 0', '"n_depth": 512')))
    assert said.samples["decode_speed"] == [2000.0, 1000.0]
    assert (said.prompt_tokens, said.new_tokens) == (512, 128)


@pytest.mark.parametrize(
    ("read", "printed"),
    [
        (runners.read_llama_main, ""),
        (runners.read_llama_main, LLAMA_MAIN.replace('"prompt_tokens":64,', "")),
        (runners.read_llama_main, LLAMA_MAIN.replace("PyTorchObserver {", "PyTorchObserver {{")),
        (runners.read_model_benchmark, MODEL_BENCHMARK.replace("320000", "0")),
        (runners.read_model_benchmark, MODEL_BENCHMARK.partition("\n")[2]),
        (runners.read_llama_bench, LLAMA_BENCH[:200]),
        (runners.read_llama_bench, "[]"),
        (runners.read_llama_bench, "[1]"),
        (runners.read_llama_bench, LLAMA_BENCH.replace("64000000", "0")),
    ],
)
def test_what_is_not_whole_is_not_read(read: Any, printed: str) -> None:
    with pytest.raises(TargetError, match=r"ended without an error, but .* is it another program"):
        read(printed)


def test_llama_main_is_told_its_files_and_a_prompt_of_that_length(byte_level: Path) -> None:
    from runtimes.tokenizer import Tokenizer

    runner = runners.kind("llama_main-arm64", "executorch")
    assert runner
    (words,) = runner.commands(task(variant("executorch", "a b.pte", "weights.ptd"), byte_level))
    assert words[:4] == [
        "./runner",
        "--model_path=../b/a b.pte",
        "--data_paths=../b/weights.ptd",
        "--tokenizer_path=../b/tokenizer.json",
    ]
    prompt = words[4].removeprefix("--prompt=")
    length = len(Tokenizer(byte_level).encode(prompt, add_special=False))
    assert 55 < length <= 64
    assert words[5:] == [
        "--max_new_tokens=32",
        "--temperature=0",
        "--ignore_eos=true",
        "--warmup=true",
        "--cpu_threads=4",
    ]


def test_model_benchmark_is_told_the_folder_of_its_configuration(byte_level: Path) -> None:
    runner = runners.kind("model_benchmark", "onnxruntime")
    assert runner
    (words,) = runner.commands(task(variant("onnxruntime", "model.onnx", "genai_config.json"), byte_level))
    assert words == ["./runner", "-i", "../b", "-l", "64", "-g", "32", "-r", "1", "-w", "1"]
    with pytest.raises(BundleError, match=r"has no genai_config\.json"):
        runner.commands(task(variant("onnxruntime", "model.onnx"), byte_level))


def test_llama_bench_measures_the_answer_after_the_prompt(byte_level: Path) -> None:
    runner = runners.kind("llama-bench", "llama_cpp")
    assert runner
    common = ["./runner", "-m", "../b/m.gguf", "-r", "5", "-o", "json", "-t", "4"]
    gguf = variant("llama_cpp", "m.gguf")
    assert runner.commands(task(gguf, byte_level)) == [
        [*common, "-p", "64", "-n", "0"],
        [*common, "-p", "0", "-n", "32", "-d", "64"],
    ]
    only_prompt = task(gguf, byte_level, case=Case(prompt_tokens=64, new_tokens=1), threads=None)
    assert runner.commands(only_prompt) == [[*common[:-2], "-p", "64", "-n", "0"]]
    with pytest.raises(BundleError, match=r"has 2 files that end in .gguf where runner takes one"):
        runner.commands(task(variant("llama_cpp", "m.gguf", "n.gguf"), byte_level))


def test_a_program_is_known_by_its_name() -> None:
    assert runners.kind("my_app", "onnxruntime") is None
    assert [runners.expected(engine) for engine in ("executorch", "qnn")] == ["llama_main", None]
    with pytest.raises(
        TargetError, match=r"llama-bench runs llama_cpp variants, and this one is for executorch"
    ):
        runners.kind("llama-bench", "executorch")


def test_prompts_reach_a_runner_of_ones_own(byte_level: Path) -> None:
    words = runners.own_command(task(variant("qnn"), byte_level, prompts=("안녕 $(x)",), answer_tokens=8))
    assert words[-2:] == ["--ask", "안녕 $(x)"]
    assert words[words.index("--answer-tokens") + 1] == "8"
    assert "--answer-tokens" not in runners.own_command(task(variant("qnn"), byte_level))


@pytest.mark.parametrize(
    ("effective", "processors", "fell"),
    [
        ({}, (), False),
        ({"decode": {"CPU": 3}}, (), True),
        ({"decode": {"NPU": 3}, "prefill": {"CPU": 3}}, (), True),
        ({"decode": {"NPU": 3, "CPU": 1}}, (), False),
        ({}, ("CPU",), True),
        ({}, ("OpenCL", "CPU"), False),
    ],
)
def test_when_the_cpu_did_it(effective, processors, fell) -> None:
    assert runners.fell_back(effective, processors) is fell
