"""What a plan says of itself: its decisions' reasons, and its warnings."""

import pytest
from plans import architecture, choice

import profiles
from exporter.plan import make_plan


def test_every_topic_has_its_choice() -> None:
    topics = [made.topic for made in make_plan(architecture("Llama-3.2-1B"), device="SM-S928N").choices]
    assert topics == (
        "format|backend|fallback|scheme|activations|context|entry points|threads|memory|chips|graphs".split(
            "|"
        )
    )


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("Galaxy S24 Ultra", ("NPU (Hexagon) stands idle: as asked for",)),
        ("galaxy-s24-exynos", ("NPU (Exynos NPU (17K MAC)) stands idle", "Samsung")),
        ("Pixel 9", ("NPU (Tensor Processing Unit) stands idle", "Google's compiler")),
        ("iPhone 14", ("NPU (Neural Engine) stands idle: as asked for",)),
        ("MacBook Air M2", ("NPU (Neural Engine) stands idle: the GPU of the M2",)),
        ("Raspberry Pi 5", ("every phone and computer",)),
        (None, ("every phone and computer",)),
    ],
)
def test_the_backend_says_what_stands_idle(device: str | None, words: tuple[str, ...]) -> None:
    plan = make_plan(architecture("Llama-3.2-1B"), device=device, format="onnx", delegate="cpu")
    backend = choice(plan, "backend")
    assert backend.value == "CPU (ONNX Runtime)"
    assert all(word in backend.reason for word in words)


@pytest.mark.parametrize(
    ("model", "device", "others"),
    [
        ("Qwen2.5-7B", "Pixel 8", {"int4": "ram-budget"}),  # int4-g128 is planned
        ("Llama-3.2-1B", "Pixel 9", {"int4-g128": "in-order"}),  # int4 is
    ],
)
def test_schemes_before_leave_too_little_memory_and_those_after_would_do(
    model: str, device: str, others: dict[str, str]
) -> None:
    found = choice(make_plan(architecture(model), device=device), "scheme").alternatives
    assert {one.value: one.rule for one in found} == others


def test_unknown_bandwidth_is_said_instead_of_guessed() -> None:
    chips = [d.id for d in profiles.devices() if d.soc.bandwidth_bytes_per_s is None]
    for device in chips:
        plan = make_plan(architecture("small"), device=device)
        assert plan.prediction.decode is None
        assert any("bandwidth" in warning for warning in plan.warnings)
    plan = make_plan(architecture("small"), device="Galaxy S24 Ultra")
    assert plan.prediction.decode is not None
    assert plan.warnings == ()


def test_threads_are_the_fast_cores() -> None:
    plan = make_plan(architecture("small"), device="iPhone 14")
    assert choice(plan, "threads").value == "2"
    assert "4 efficiency cores" in choice(plan, "threads").reason


def test_tight_memory_is_a_warning() -> None:
    plan = make_plan(architecture("Phi-3-mini-4k"), device="iPhone 14", format="onnx")
    *_, warning = plan.warnings
    assert warning.startswith("tight: 2.6 GB is 9")
    assert "iPhone 14" in warning


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
