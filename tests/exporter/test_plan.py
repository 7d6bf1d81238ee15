"""What is asked for, what is planned, and what is not known, for public models on known phones."""

import json
from pathlib import Path
from typing import Any

import pytest
from plans import architecture, choice

import profiles
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.plan import make_plan
from exporter.quantization.recipe import Recipe, Rule
from profiles import AmbiguousDevice, UnknownDevice


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


def test_every_profile_can_be_planned_for() -> None:
    for device in profiles.devices():
        plan = make_plan(architecture("small"), device=device.id)
        assert plan.device == device
        assert (plan.prediction.decode is None) == (device.soc.bandwidth_bytes_per_s is None)


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


def test_a_context_in_blocks_names_the_next_block() -> None:
    arch = architecture("Llama-3.2-1B")
    with pytest.raises(PlanRefused, match=r"1000 tokens was asked for, but coreai .* of 64: ask for 1024$"):
        make_plan(arch, format="coreai", context=1000)
    assert make_plan(arch, format="coreai", context=1024).context == 1024


def test_a_calibration_text_is_for_what_is_found_on_one(tmp_path: Path) -> None:
    text = tmp_path / "대화.txt"
    text.write_text("안녕하세요.", encoding="utf-8")
    arch, found_on_it = architecture("Llama-3.2-1B"), ({"algorithm": "gptq"}, {"prepare": ("awq",)})
    for asked in (*found_on_it, {"device": "Galaxy S24 Ultra", "scheme": "w8a16"}):
        made = make_plan(arch, calibration=text, **{"scheme": "int4", **asked})
        assert choice(made, "calibration").value == "대화.txt"
    with pytest.raises(UsageError, match="--calibration is for what is found on a text"):
        make_plan(arch, calibration=text, scheme="int4")


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
