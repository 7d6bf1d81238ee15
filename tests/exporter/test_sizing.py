"""What fits a phone, refusals that name what would, predictions; and laws that hold for all."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import architecture

import profiles
from exporter.architecture import read_architecture
from exporter.errors import PlanRefused
from exporter.plan import make_plan
from exporter.quantization.recipe import Recipe
from exporter.sizing import memory_budget


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


def test_more_than_80_percent_is_taken_only_for_a_roomy_context() -> None:
    arch = architecture("Qwen2.5-7B")
    plan = make_plan(arch, device="Pixel 9")
    budget = memory_budget(profiles.find("Pixel 9"))
    assert budget
    assert plan.prediction.memory.value < 0.8 * budget
    asked = make_plan(arch, device="Pixel 9", scheme="int4", context=4096)
    assert asked.prediction.memory.value > 0.8 * budget
    assert "tight" in asked.warnings[0]


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
