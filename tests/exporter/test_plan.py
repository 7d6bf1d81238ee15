"""Plans for public models on known phones, refusals that name what would do, and laws that hold for all."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import profiles
from exporter.architecture import Architecture, read_architecture
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.plan import Plan, make_plan
from exporter.quantization.recipe import Recipe, Rule
from exporter.sizing import memory_budget
from profiles import AmbiguousDevice, UnknownDevice
from runtimes.bundle import Choice

_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
_PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32064,
}
# Values of config.json at https://huggingface.co/<owner>/<name>; the factors of LongRoPE are stand-ins.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "head_dim": 64,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "Phi-3-mini-4k": _PHI3 | {"max_position_embeddings": 4096, "sliding_window": 2047},
    "Phi-3-mini-128k": _PHI3
    | {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": _LONGROPE,
        "sliding_window": 262144,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "head_dim": 256,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 26,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "small": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}


def architecture(name: str, **changes: Any) -> Architecture:
    return read_architecture(CONFIGS[name] | changes)


def choice(plan: Plan, topic: str) -> Choice:
    (found,) = [made for made in plan.choices if made.topic == topic]
    return found


@pytest.mark.parametrize(
    ("model", "device", "scheme", "context"),
    [
        ("Llama-3.2-1B", "SM-S921N", "int4", 4096),
        ("Llama-3.2-1B", "Raspberry Pi 5", "int4", 4096),
        ("Llama-3.2-1B", None, "int4", 4096),
        ("Qwen2.5-7B", "Pixel 9", "int4", 2048),  # 4096 would pass 80 % of the memory
        ("Qwen2.5-7B", "Pixel 8", "int4-g128", 1024),
        ("gemma-2-2b", "픽셀 9", "int4", 4096),
        ("small", "Galaxy S24 Ultra", "int8", 512),
        ("small", None, "int8", 512),
    ],
)
def test_scheme_and_context_follow_from_model_and_memory(
    model: str, device: str | None, scheme: str, context: int
) -> None:
    plan = make_plan(architecture(model), device=device)
    assert (plan.scheme, plan.context) == (scheme, context)
    assert (plan.format, plan.engine, plan.last_logits_only) == ("onnx", "onnxruntime", True)
    assert plan.decisions == Recipe.uniform(scheme).resolve(architecture(model))
    assert all(made.value and made.reason for made in plan.choices)


@pytest.mark.parametrize(
    ("model", "device", "delegate", "scheme", "context"),
    [
        ("Phi-3-mini-4k", "iPhone 14", "ane", "pal4-g8", 1024),
        ("Phi-3-mini-4k", "iPhone 16 Pro", "ane", "pal4-g8", 2048),
        ("Llama-3.2-1B", "iPhone 16 Pro", "ane", "pal4-g8", 4096),
        ("Llama-3.2-1B", "MacBook Air M2", "gpu", "int4", 4096),
        ("small", "iPhone 14", "ane", "int8", 512),
    ],
)
def test_apples_devices_get_core_ml(
    model: str, device: str, delegate: str, scheme: str, context: int
) -> None:
    plan = make_plan(architecture(model), device=device)
    assert (plan.format, plan.engine, plan.delegates) == ("coreml", "coreml", (delegate,))
    assert (plan.scheme, plan.context) == (scheme, context)
    assert f"--delegate {'gpu' if delegate == 'ane' else 'ane'}" in choice(plan, "backend").reason


def test_schemes_that_the_neural_engine_cannot_have_go_to_the_gpu_or_the_cpu() -> None:
    assert make_plan(architecture("small"), device="iPhone 14", scheme="int4").delegates == ("gpu",)
    assert make_plan(architecture("small"), device="iPhone 14", scheme="fp32").format == "onnx"
    with pytest.raises(RecipeError, match="no scales for groups of inputs"):
        make_plan(architecture("small"), device="iPhone 14", scheme="int4", delegate="ane")


def test_every_topic_has_its_choice() -> None:
    topics = [made.topic for made in make_plan(architecture("Llama-3.2-1B"), device="SM-S928N").choices]
    assert topics == (
        "format|backend|fallback|scheme|activations|context|entry points|threads|memory|chips|graphs".split(
            "|"
        )
    )


def test_what_is_asked_for_is_planned() -> None:
    plan = make_plan(
        architecture("Llama-3.2-1B"),
        device="Galaxy S24 Ultra",
        scheme="int8",
        algorithm="rtn-absmax",
        context=8192,
    )
    assert (plan.scheme, plan.context) == ("int8", 8192)
    assert {decision.algorithm for decision in plan.decisions.values()} == {"rtn-absmax"}
    assert choice(plan, "scheme").reason == "as asked for"
    assert "as asked for" in choice(plan, "context").reason


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("Galaxy S24 Ultra", ("NPU (Hexagon) stands idle", "as asked for")),
        ("galaxy-s24-exynos", ("NPU (Exynos NPU (17K MAC)) stands idle", "Samsung")),
        ("Pixel 9", ("NPU (Tensor Processing Unit) stands idle", "Google's compiler")),
        ("iPhone 14", ("NPU (Neural Engine) stands idle", "as asked for")),
        ("MacBook Air M2", ("NPU (Neural Engine) stands idle", "as asked for")),
        ("Raspberry Pi 5", ("every phone and computer",)),
        (None, ("every phone and computer",)),
    ],
)
def test_the_backend_says_what_stands_idle(device: str | None, words: tuple[str, ...]) -> None:
    plan = make_plan(architecture("Llama-3.2-1B"), device=device, format="onnx", delegate="cpu")
    backend = choice(plan, "backend")
    assert backend.value == "CPU (ONNX Runtime)"
    assert all(word in backend.reason for word in words)


def test_every_profile_can_be_planned_for() -> None:
    for device in profiles.devices():
        plan = make_plan(architecture("small"), device=device.id)
        assert plan.device == device
        assert (plan.prediction.decode is None) == (device.soc.bandwidth_bytes_per_s is None)


def test_unknown_bandwidth_is_said_instead_of_guessed() -> None:
    chips = [d.id for d in profiles.devices() if d.soc.bandwidth_bytes_per_s is None]
    for device in chips:
        plan = make_plan(architecture("small"), device=device)
        assert plan.prediction.decode is None
        assert any("bandwidth" in warning for warning in plan.warnings)
    plan = make_plan(architecture("small"), device="Galaxy S24 Ultra")
    assert plan.prediction.decode is not None
    assert plan.warnings == ()


def test_the_time_to_the_first_token_is_predicted_where_it_was_published() -> None:
    """ExecuTorch's prompt speed was published for a Snapdragon 8 Gen 3, and for no 8 Gen 2."""
    arch = architecture("Llama-3.2-1B")
    known = make_plan(arch, device="OnePlus 12", format="executorch", scheme="int4").prediction
    assert known.first is not None
    assert known.first.value == pytest.approx(128 / 260.5, rel=0.1)  # the tokens/s of its README
    assert known.unknown == ()
    plan = make_plan(arch, device="OnePlus 11", format="executorch", scheme="int4")
    assert plan.prediction.first is None
    assert "executorch on this chip's CPU" in plan.to_dict()["not_predicted"]["first token"]
    assert plan.prediction.decode is not None
    assert "on other chips" in plan.prediction.decode.explain


@pytest.mark.parametrize(
    ("device", "way", "said"),
    [
        ("OnePlus 12", {"format": "executorch"}, "executorch on this chip"),
        (
            "OnePlus 12",
            {"format": "onnx", "delegate": "cpu"},
            "no speed of onnxruntime on a CPU was published",
        ),
        ("OnePlus 12", {"format": "executorch", "delegate": "vulkan"}, "executorch on a GPU was published"),
        ("Galaxy S25", {"format": "onnx", "delegate": "hexagon"}, "genie on this chip"),
        ("iPhone 17 Pro", {"format": "coreml", "delegate": "ane"}, "coreml on this chip"),
        ("iPhone 17 Pro", {"format": "coreml", "delegate": "gpu"}, "coreml on other chips"),
    ],
)
def test_a_speed_is_predicted_for_what_computes(device: str, way: dict[str, Any], said: str) -> None:
    prediction = make_plan(architecture("Llama-3.2-1B"), device=device, **way).prediction
    assert prediction.decode is not None
    assert said in prediction.decode.explain


def test_this_computer_has_no_speeds_and_says_why() -> None:
    unknown = dict(make_plan(architecture("small")).prediction.unknown)
    assert unknown.keys() == {"first token", "decode"}
    assert all("bandwidth" in why for why in unknown.values())


def test_threads_are_the_fast_cores() -> None:
    plan = make_plan(architecture("small"), device="iPhone 14")
    assert choice(plan, "threads").value == "2"
    assert "4 efficiency cores" in choice(plan, "threads").reason


def test_tight_memory_is_a_warning() -> None:
    plan = make_plan(architecture("Phi-3-mini-4k"), device="iPhone 14", format="onnx")
    *_, warning = plan.warnings
    assert warning.startswith("tight: 2.6 GB is 9")
    assert "iPhone 14" in warning


def test_more_than_80_percent_is_taken_only_for_a_roomy_context() -> None:
    arch = architecture("Qwen2.5-7B")
    plan = make_plan(arch, device="Pixel 9")
    budget = memory_budget(profiles.find("Pixel 9"))
    assert budget
    assert plan.prediction.memory.value < 0.8 * budget
    asked = make_plan(arch, device="Pixel 9", scheme="int4", context=4096)
    assert asked.prediction.memory.value > 0.8 * budget
    assert "tight" in asked.warnings[0]


@pytest.mark.parametrize(
    ("asked", "value"), [(4096, "short factors"), (4097, "long factors"), (None, "short factors")]
)
def test_longrope_says_which_factors(asked: int | None, value: str) -> None:
    made = choice(make_plan(architecture("Phi-3-mini-128k"), context=asked), "rope")
    assert made.value == value
    assert "4096" in made.reason


def test_sliding_windows_are_told_where_they_matter() -> None:
    gemma = architecture("gemma-2-2b")
    assert choice(make_plan(gemma, context=8192), "sliding window").value == "4096 tokens in 13 of 26 layers"
    assert all(made.topic != "sliding window" for made in make_plan(gemma, context=4096).choices)


def test_groups_that_do_not_divide_are_told_one_by_one() -> None:
    arch = architecture("small", hidden_size=336, intermediate_size=1000, head_dim=32)
    plan = make_plan(arch, scheme="int4")
    groups = [made for made in plan.choices if made.topic == "tensors"]
    assert [(made.value, made.reason) for made in groups] == [
        (
            "31 tensors at int4-g16",
            "attention.k, attention.q, attention.v, embedding, mlp.gate, mlp.up: "
            "336 inputs are no multiple of 32: groups of 16",
        ),
        (
            "6 tensors at int8-channel",
            "mlp.down: 1000 inputs are no multiple of 32, nor of a smaller group: 8 bits per channel",
        ),
    ]
    assert choice(plan, "activations").value == "int8 and float32"


def test_a_recipe_is_followed_and_told() -> None:
    rules = (
        Rule(match="embedding", scheme="int8", reason="the head decides the token"),
        Rule(match="*", scheme="int4-g128"),
    )
    recipe = Recipe(name="careful", rules=rules)
    plan = make_plan(architecture("Llama-3.2-1B"), device="Galaxy S24 Ultra", recipe=recipe)
    assert plan.scheme == "careful"
    assert plan.decisions["embedding"].scheme.name == "int8"
    told = choice(plan, "tensors")
    assert (told.value, told.reason) == ("1 tensor at int8", "embedding: the head decides the token")
    for other in ({"scheme": "int4"}, {"algorithm": "rtn-absmax"}):
        with pytest.raises(UsageError, match="recipe"):
            make_plan(architecture("Llama-3.2-1B"), recipe=recipe, **other)


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (
            "Phi-3-mini-4k",
            {"device": "iPhone 14", "scheme": "int8", "format": "onnx"},
            r"at int8 with a context of 256 tokens needs 4\.9 GB, but on iPhone 14 it may use 2\.9 GB "
            r"\(3\.0 GiB is 50% of 6 GiB of RAM; .*increased-memory-limit; 300 MB .*\): "
            r"int4-g128 with up to 512 tokens fits \[ram-budget\]$",
        ),
        (
            "Qwen2.5-7B",
            {"device": "iPhone 14", "format": "onnx"},
            r"\(7\.6 B parameters\) .*: no scheme makes it fit \(int4-g128 with 256 tokens needs .*\), "
            r"take a model of up to about 5\.\d B parameters \[ram-budget\]$",
        ),
        (
            "Llama-3.2-1B",
            {"device": "Galaxy S24 Ultra", "scheme": "int8", "context": 131072},
            r"60% of 12 GiB of RAM; 300 MB .*: int8 with up to 65536 tokens fits \[ram-budget\]$",
        ),
        (
            "Phi-3-mini-4k",
            {"device": "Pixel 8", "scheme": "int4", "context": 4096},
            r": int4 with up to 2048 tokens fits \[ram-budget\]$",
        ),
        ("Phi-3-mini-4k", {"context": 4097}, "trained for 4096: ask for 16 to 4096"),
        ("Llama-3.2-1B", {"context": 15}, "ask for 16 to 131072"),
        ("Llama-3.2-1B", {"context": -1}, "ask for 16 to 131072"),
        ("Llama-3.2-1B", {"context": 0}, "ask for 16 to 131072"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(model: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanRefused, match=message) as refused:
        make_plan(architecture(model), **asked)
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"scheme": "int3"}, RecipeError),
        ({"algorithm": "magic"}, RecipeError),
        ({"device": "Galaxy S24"}, AmbiguousDevice),
        ({"device": "Galaxy S99"}, UnknownDevice),
        ({"device": ""}, UnknownDevice),
    ],
)
def test_what_is_not_known_is_said(asked: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make_plan(architecture("Llama-3.2-1B"), **asked)


def test_the_fingerprint_changes_with_all_that_determines_the_output() -> None:
    arch = architecture("Llama-3.2-1B")
    ways: list[dict[str, Any]] = [
        {},
        {"device": "SM-S928N"},
        {"scheme": "int8"},
        {"context": 512},
        {"algorithm": "rtn-absmax"},
    ]
    prints = [json.dumps(make_plan(arch, **way).fingerprint(), sort_keys=True) for way in ways]
    assert len(set(prints)) == len(ways)
    again = json.dumps(make_plan(arch, device="Galaxy S24 Ultra").fingerprint(), sort_keys=True)
    assert again == prints[1]


def test_the_plan_is_json() -> None:
    made = make_plan(architecture("Llama-3.2-1B"), device="Galaxy S24 Ultra").to_dict()
    assert json.loads(json.dumps(made)) == made
    assert made["device"] == "galaxy-s24-ultra"
    assert {row["name"] for row in made["prediction"]} >= {"file", "peak memory", "decode"}


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int4"])
def test_the_predicted_size_is_that_of_the_files(
    family: str, scheme: str, bundles: Callable[..., Any]
) -> None:
    bundle = bundles(family, scheme)
    written = sum(entry.size for entry in bundle.manifest.files if entry.path.startswith("model.onnx"))
    assert written > 100_000
    assert bundle.manifest.prediction["file_bytes"] == pytest.approx(written, rel=0.02)


sizes = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "qwen2", "phi3"]),
        "hidden_size": st.integers(2, 160).map(lambda n: 32 * n),
        "intermediate_size": st.integers(2, 320).map(lambda n: 64 * n),
        "num_attention_heads": st.sampled_from([8, 16, 32]),
        "num_key_value_heads": st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([32, 64, 128]),
        "num_hidden_layers": st.integers(1, 40),
        "vocab_size": st.integers(500, 256_000),
        "max_position_embeddings": st.integers(64, 131_072),
        "tie_word_embeddings": st.booleans(),
    }
)
phones = st.sampled_from([device.id for device in profiles.devices()])
schemes = st.sampled_from([None, "fp16", "int8", "int4", "int4-g128"])


@settings(deadline=None, max_examples=60)
@given(sizes, phones, schemes, st.none() | st.integers(16, 131_072))
def test_a_plan_fits_and_a_refusal_offers_what_fits(
    config: dict[str, Any], device: str, scheme: str | None, context: int | None
) -> None:
    arch = read_architecture(config)
    if context is not None:
        context = min(context, arch.context)
    budget = memory_budget(profiles.find(device))
    assert budget
    try:
        plan = make_plan(arch, device=device, scheme=scheme, context=context)
    except PlanRefused as refused:
        offers = re.findall(r"(\S+) with up to (\d+) tokens", str(refused))
        for name, tokens in offers:
            offered = make_plan(arch, device=device, scheme=name, context=int(tokens))
            assert offered.prediction.memory.value <= budget
        if not offers:
            with pytest.raises(PlanRefused):
                make_plan(arch, device=device, scheme="int4-g128", context=min(256, arch.context))
        return
    assert plan.prediction.memory.value <= budget
    assert plan.context <= arch.context
    assert plan.context == context or context is None
    assert (plan.prediction.memory.value > 0.8 * budget) == any("tight" in w for w in plan.warnings)


def test_heads_that_onnxruntime_cannot_run_go_to_executorch() -> None:
    arch = architecture("Llama-3.2-1B", head_dim=40)
    with pytest.raises(PlanRefused, match=r"multiples of 16.*--format executorch"):
        make_plan(arch, format="onnx")
    plan = make_plan(arch)
    assert (plan.format, plan.engine, plan.delegates) == ("executorch", "executorch", ("xnnpack",))
    assert "multiples of 16" in choice(plan, "format").reason


def test_executorch_gets_the_schemes_that_xnnpack_multiplies_by() -> None:
    plan = make_plan(architecture("small"), format="executorch")
    assert plan.scheme == "int8"
    assert {decision.scheme.name for decision in plan.decisions.values()} == {"int8-channel"}
    assert "one scale for each output" in choice(plan, "tensors").reason
    with pytest.raises(RecipeError, match="fp16"):
        make_plan(architecture("small"), format="executorch", scheme="fp16")


def test_a_delegate_comes_with_a_variant_for_the_cpu() -> None:
    plan = make_plan(architecture("small"), delegate="vulkan", device="Pixel 9")
    assert (plan.format, plan.delegates) == ("executorch", ("vulkan", "xnnpack"))
    assert choice(plan, "fallback").value == "CPU (ExecuTorch, XNNPACK)"


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"format": "tflite"}, "no format 'tflite'"),
        ({"format": "executorch", "delegate": "cuda"}, "no delegate 'cuda'"),
        ({"format": "onnx", "delegate": "vulkan"}, "vulkan is for --format executorch"),
        ({"format": "coreai", "delegate": "gpu"}, "has no delegates"),
    ],
)
def test_formats_and_delegates_that_are_not_there(wishes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(architecture("small"), **wishes)


@pytest.mark.parametrize(
    ("device", "value", "words"),
    [
        ("galaxy-s26-exynos", "possible: ENN for E9965", "EXYNOS_AI_LITECORE_ROOT"),
        ("Galaxy Z Flip7", "possible: ENN for E9955", "100%"),
        ("galaxy-s24-exynos", "not used", "Vulkan"),
        ("Galaxy S25 FE", "not used", "Exynos 2400"),
    ],
)
def test_an_exynos_phone_is_told_what_its_npu_would_take(device: str, value: str, words: str) -> None:
    plan = make_plan(architecture("small"), format="executorch", device=device)
    assert choice(plan, "npu").value == value
    assert words in choice(plan, "npu").reason
