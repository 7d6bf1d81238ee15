"""Decisions that an expert would sign, each with the rules that made it; and the table of rules itself."""

import dataclasses
import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
from plans import choice

import profiles
from exporter import known, routes
from exporter.backend import Asked
from exporter.errors import PlanRefused, RecipeError, UsageError
from exporter.npu.hexagon_plan import Wishes
from exporter.plan import Plan, choose
from exporter.quantization.recipe import find_recipe
from exporter.quantization.scheme import SCHEMES
from exporter.sizing import memory_budget

MODELS = known.catalogue()
RULES = Path(routes.__file__).parent / "rules.toml"
HEXAGON, ANE, GPU = "Hexagon NPU (ONNX Runtime, QNN)", "Neural Engine (Core ML)", "GPU (Core ML)"
CPU = "CPU (ONNX Runtime)"


def plan(
    model: str, device: str | None, compilers: frozenset[str] = routes.EVERY_COMPILER, **asked: Any
) -> Plan:
    target = profiles.find(device) if device else None
    return choose(target, MODELS[model], Asked(**asked), compilers)


@pytest.mark.parametrize(
    ("model", "device", "backend", "scheme", "context", "rules"),
    [
        ("Llama 3.2 1B", "Galaxy S24 Ultra", HEXAGON, "int4", 4096, ["hexagon-portable"]),
        ("Llama 3.2 1B", "SM-S928N", HEXAGON, "int4", 4096, ["hexagon-portable"]),
        ("Llama 3.2 1B", "갤럭시 S25", HEXAGON, "int4", 4096, ["hexagon-portable"]),
        ("Llama 3.2 3B", "Galaxy S23", HEXAGON, "int4", 4096, ["hexagon-portable"]),
        ("Llama 3.2 1B", "snapdragon-x-elite-laptop", HEXAGON, "int4", 4096, ["hexagon-portable"]),
        ("Llama 3.2 1B", "galaxy-s22-snapdragon", HEXAGON, "hexagon-w8a16", 4096, ["hexagon-integers"]),
        ("Qwen 2.5 0.5B", "xiaomi-12", HEXAGON, "hexagon-w8a16", 4096, ["hexagon-integers"]),
        ("Qwen 2.5 7B", "galaxy-s22-snapdragon", CPU, "int4-g128", 1024, ["cpu-onnx", "hexagon-fp16"]),
        ("Llama 3.2 1B", "sa8295p-car", CPU, "int4", 4096, ["cpu-onnx", "hexagon-fp16"]),
        ("Llama 3.2 1B", "SM-S921N", CPU, "int4", 4096, ["cpu-onnx", "exynos-chips"]),
        ("Llama 3.2 1B", "galaxy-s22-exynos", CPU, "int4", 4096, ["cpu-onnx", "exynos-chips"]),
        ("Llama 3.2 1B", "galaxy-s26-exynos", CPU, "int4", 4096, ["cpu-onnx", "exynos-partial"]),
        ("Llama 3.2 1B", "Galaxy Z Flip7", CPU, "int4", 4096, ["cpu-onnx", "exynos-partial"]),
        ("Llama 3.2 1B", "Galaxy A55", CPU, "int4", 4096, ["cpu-onnx", "exynos-chips"]),
        ("Llama 3.2 1B", "Pixel 9", CPU, "int4", 4096, ["cpu-onnx", "tensor-compiler"]),
        ("Gemma 2 2B", "Pixel 10 Pro", CPU, "int4", 4096, ["cpu-onnx", "tensor-compiler"]),
        ("Llama 3.2 1B", "vivo X200", CPU, "int4", 4096, ["cpu-onnx", "mediatek-sdk"]),
        ("Llama 3.2 1B", "Raspberry Pi 5", CPU, "int4", 4096, ["cpu-onnx"]),
        ("Llama 3.2 1B", "Jetson Orin Nano", CPU, "int4", 4096, ["cpu-onnx"]),
        ("Llama 3.2 1B", None, CPU, "int4", 4096, ["cpu-onnx"]),
        ("Llama 3.2 1B", "iPhone 13", ANE, "pal4-g8", 4096, ["coreml-ane"]),
        ("Llama 3.2 1B", "iPhone 16 Pro", ANE, "pal4-g8", 4096, ["coreml-ane"]),
        ("Phi-3 mini", "iPhone 14", ANE, "pal4-g8", 1024, ["coreml-ane"]),
        ("Llama 3.2 3B", "iPhone17,1", ANE, "pal4-g8", 4096, ["coreml-ane"]),
        ("Llama 3.2 1B", "MacBook Air M2", GPU, "int4", 4096, ["coreml-gpu"]),
        ("Llama 3.2 3B", "ipad-pro-11-m4", GPU, "int4", 4096, ["coreml-gpu"]),
        ("Qwen 2.5 7B", "Galaxy S24 Ultra", HEXAGON, "int4", 4096, ["hexagon-portable"]),
        ("Qwen 2.5 7B", "Pixel 8", CPU, "int4-g128", 1024, ["cpu-onnx", "tensor-compiler"]),
    ],
)
def test_decisions(
    model: str, device: str | None, backend: str, scheme: str, context: int, rules: list[str]
) -> None:
    made = plan(model, device)
    found = choice(made, "backend")
    assert (found.value, made.scheme, made.context) == (backend, scheme, context)
    assert list(found.rules) == rules


@pytest.mark.parametrize(
    ("model", "device", "topic", "value", "rule"),
    [
        ("Llama 3.2 1B", "Galaxy S24 Ultra", "fallback", CPU, "fallback-cpu"),
        ("Llama 3.2 1B", "Galaxy S24 Ultra", "entry points", "embed, prefill and decode", "fixed-shapes"),
        ("Llama 3.2 1B", "Galaxy S24 Ultra", "activations", "float16", "activations-hexagon"),
        ("Llama 3.2 1B", "galaxy-s22-snapdragon", "activations", "uint16", "activations-hexagon"),
        ("Llama 3.2 1B", "galaxy-s22-snapdragon", "scheme", "hexagon-w8a16", "hexagon-integers-8"),
        ("Llama 3.2 1B", "Galaxy S24 Ultra", "graphs", "1 for each entry point", "hexagon-graph-bytes"),
        ("Llama 3.2 3B", "Galaxy S24 Ultra", "graphs", "3 for each entry point", "hexagon-graph-bytes"),
        ("Llama 3.2 3B", "iPhone 16 Pro", "packages", "about 2", "ane-package-bytes"),
        ("Llama 3.2 1B", "iPhone 16 Pro", "packages", "1", "ane-package-bytes"),
        ("Llama 3.2 1B", "iPhone 16 Pro", "scheme", "pal4-g8", "ane-tables"),
        ("Qwen 2.5 7B", "Pixel 8", "scheme", "int4-g128", "int4-coarse"),
        ("Qwen 2.5 7B", "Pixel 8", "context", "1024 tokens", "context-memory"),
        ("TinyLlama 1.1B", "Pixel 9", "context", "2048 tokens", "context-trained"),
        ("Llama 3.2 1B", "Pixel 9", "context", "4096 tokens", "context-chat"),
        ("Llama 3.2 1B", "Pixel 9", "fallback", "none", "fallback-none"),
    ],
)
def test_other_decisions(model: str, device: str, topic: str, value: str, rule: str) -> None:
    found = choice(plan(model, device), topic)
    assert (found.value, found.rules[0]) == (value, rule)


@pytest.mark.parametrize(
    ("model", "device", "other", "rule", "words"),
    [
        ("Llama 3.2 1B", "galaxy-s24-exynos", "Exynos NPU (ExecuTorch, ENN)", "exynos-chips", "Exynos 2400"),
        ("Llama 3.2 1B", "vivo X200", "APU (ExecuTorch, NeuroPilot)", "mediatek-sdk", "--delegate mediatek"),
        ("Llama 3.2 1B", "iPhone 16 Pro", GPU, "in-order", "integers in groups"),
        ("Llama 3.2 1B", "MacBook Air M2", ANE, "ane-layout", "more bandwidth"),
        ("Llama 3.2 1B", "Galaxy S24 Ultra", CPU, "in-order", "every phone"),
        ("Llama 3.2 1B", "Galaxy S24 Ultra", "GPU (ExecuTorch, Vulkan)", "vulkan-speed", "34 tokens/s"),
    ],
)
def test_what_was_not_chosen_says_why(model: str, device: str, other: str, rule: str, words: str) -> None:
    (found,) = [one for one in choice(plan(model, device), "backend").alternatives if one.value == other]
    assert found.rule == rule
    assert words in found.reason


def test_a_small_model_stays_on_the_cpu() -> None:
    small = dataclasses.replace(MODELS["Qwen 2.5 0.5B"], layers=2, vocab=4096)
    made = choose(profiles.find("Galaxy S24 Ultra"), small)
    assert choice(made, "backend").rules == ("cpu-onnx", "hexagon-small")
    assert "33 M parameters" in choice(made, "backend").reason
    asked = choose(profiles.find("Galaxy S24 Ultra"), small, Asked(delegate="hexagon"))
    assert asked.delegates == ("hexagon",)
    assert any("[hexagon-small]" in warning for warning in asked.warnings)


def test_without_the_compiler_the_cpu_is_planned_and_the_extra_named() -> None:
    made = plan("Llama 3.2 1B", "Galaxy S24 Ultra", frozenset())
    backend = choice(made, "backend")
    assert (backend.value, backend.rules) == (CPU, ("cpu-onnx", "hexagon-compiler"))
    assert "gochu[hexagon]" in backend.reason
    assert plan("Llama 3.2 1B", "Galaxy S24 Ultra", frozenset(), delegate="hexagon").engine == "qnn"


@pytest.mark.parametrize(
    ("device", "asked", "error", "rule"),
    [
        ("galaxy-s22-snapdragon", {"delegate": "hexagon", "scheme": "int4"}, PlanRefused, "hexagon-fp16"),
        ("Pixel 9", {"delegate": "hexagon"}, PlanRefused, "hexagon-npu"),
        ("galaxy-s24-exynos", {"delegate": "hexagon", "scheme": "w8a16"}, PlanRefused, "hexagon-npu"),
        ("iPhone 16 Pro", {"delegate": "ane", "scheme": "int4"}, RecipeError, "weights-fit"),
        ("Galaxy S24 Ultra", {"format": "coreml"}, PlanRefused, "apple-only"),
        ("Pixel 9", {"delegate": "ane"}, PlanRefused, "apple-only"),
        ("iPhone 16 Pro", {"delegate": "vulkan"}, PlanRefused, "vulkan-not-apple"),
        ("Pixel 9", {"delegate": "qualcomm", "scheme": "fp16"}, PlanRefused, "qualcomm-only"),
        ("Pixel 9", {"delegate": "mediatek", "scheme": "fp16"}, PlanRefused, "mediatek-only"),
        ("iPhone 13", {"scheme": "fp16"}, PlanRefused, "ram-budget"),
        ("Pixel 9", {"context": 200_000}, PlanRefused, "context-trained"),
        ("Galaxy S24 Ultra", {"scheme": "fp32", "delegate": "hexagon"}, RecipeError, "weights-fit"),
        ("Pixel 9", {"scheme": "pal4"}, RecipeError, "weights-fit"),
    ],
)
def test_what_cannot_work_is_refused_by_its_rule(
    device: str, asked: dict[str, Any], error: type[Exception], rule: str
) -> None:
    with pytest.raises(error) as refused:
        plan("Llama 3.2 1B", device, **asked)
    assert str(refused.value).endswith(f"[{rule}]")
    assert isinstance(refused.value, RecipeError) or refused.value.rule == rule


@pytest.mark.parametrize(
    ("device", "asked", "rule"),
    [
        ("Galaxy S24 Ultra", {"delegate": "cpu"}, "hexagon-portable"),
        ("Galaxy S24 Ultra", {"format": "executorch"}, "hexagon-portable"),
        ("iPhone 16 Pro", {"format": "onnx"}, "coreml-ane"),
        ("Pixel 9", {"delegate": "vulkan"}, "vulkan-speed"),
        ("sa8295p-car", {"delegate": "hexagon"}, "hexagon-v68"),
        ("MacBook Air M2", {"delegate": "ane"}, "ane-layout"),
        ("Pixel 9", {"scheme": "int8"}, "bytes-per-token"),
        ("galaxy-s22-snapdragon", {}, "ram-budget"),  # the variant for the CPU has its weights as floats
    ],
)
def test_what_is_merely_slower_is_taken_with_a_warning(device: str, asked: dict[str, Any], rule: str) -> None:
    assert any(warning.endswith(f"[{rule}]") for warning in plan("Llama 3.2 1B", device, **asked).warnings)


def test_cpu_alone_can_be_asked_for() -> None:
    made = plan("Llama 3.2 1B", "iPhone 16 Pro", delegate="cpu")
    assert (made.format, made.delegates) == ("onnx", ())
    made = plan("Llama 3.2 1B", "iPhone 16 Pro", delegate="cpu", format="executorch")
    assert made.delegates == ("xnnpack",)
    with pytest.raises(UsageError, match="--delegate cpu"):
        plan("Llama 3.2 1B", "iPhone 16 Pro", delegate="cpu", format="coreml")


def test_chips_are_for_the_npu() -> None:
    """The oldest of them says by which route; a phone without a Hexagon NPU has none unless it is asked for."""
    old_and_new = Wishes(("sm8450", "sm8650"))
    made = plan("Llama 3.2 1B", "Galaxy S24 Ultra", wishes=old_and_new)
    assert (made.delegates, made.scheme) == (("hexagon",), "hexagon-w8a16")
    assert plan("Llama 3.2 1B", None, delegate="hexagon", wishes=Wishes(("all",))).scheme == "int4"
    with pytest.raises(UsageError, match="--delegate hexagon"):
        plan("Llama 3.2 1B", "Pixel 9", wishes=old_and_new)


def test_a_recipe_for_the_npu_goes_there() -> None:
    made = plan("Llama 3.2 1B", "Galaxy S24 Ultra", recipe=find_recipe("hexagon-w4a16"))
    assert (made.delegates, made.scheme) == (("hexagon",), "hexagon-w4a16")


def test_where_the_npu_cannot_hold_the_model_the_cpu_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.npu import hexagon

    table = hexagon.table()
    monkeypatch.setattr(
        hexagon, "table", lambda: table | {"limits": table["limits"] | {"graph_bytes": 50_000_000}}
    )
    made = plan("Llama 3.2 1B", "Galaxy S24 Ultra")
    assert choice(made, "backend").rules == ("cpu-onnx", "hexagon-graph-bytes")
    with pytest.raises(PlanRefused, match="hexagon-graph-bytes"):
        plan("Llama 3.2 1B", "Galaxy S24 Ultra", delegate="hexagon")


def test_every_device_model_and_scheme_is_planned_or_refused() -> None:
    """Nothing but a refusal that names its rule; what is planned fits. Of devices that are alike for a plan but
    for their names, one is walked."""
    planned, refused = 0, []
    alike = {(d.soc.id, d.os, d.app_memory_bytes, d.versions): d for d in profiles.devices()}
    for device, arch in itertools.product(alike.values(), MODELS.values()):
        for scheme in (None, *SCHEMES, "w8a16", "w4a16", "pal4-g8"):
            try:
                made = choose(device, arch, Asked(scheme=scheme))
            except (PlanRefused, RecipeError) as refusal:
                refused.append(str(refusal))
                continue
            assert made.prediction.memory.value <= (memory_budget(device) or 0)
            assert (made.prediction.decode is None) == (device.soc.bandwidth_bytes_per_s is None)
            planned += 1
    assert {text.rpartition("[")[2].rstrip("]") for text in refused} <= routes.entries().keys()
    assert planned > 2000
    assert len(refused) > 500


def test_every_decision_rests_on_rows_of_the_table() -> None:
    for device, (_, arch) in itertools.product(
        ("Galaxy S24 Ultra", "iPhone 16 Pro", "Pixel 9"), MODELS.items()
    ):
        try:
            made = choose(profiles.find(device), arch)
        except PlanRefused:
            continue
        for one in made.choices:
            assert one.rules, one.topic
            assert one.source, one.topic
            named = {*one.rules, *(other.rule for other in one.alternatives)}
            assert named <= routes.entries().keys()


def test_the_table_has_no_idle_row() -> None:
    """Every source is cited, every rule is about routes that there are, and ids are unique."""
    data = tomllib.loads(RULES.read_text(encoding="utf-8"))
    rows = [row for kind in ("routes", "rules", "schemes", "facts") for row in data[kind]]
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids))
    assert {row["source"] for row in rows} == set(data["sources"])
    assert {route for rule in data["rules"] for route in rule["routes"]} <= {r["id"] for r in data["routes"]}
    code = "".join(path.read_text(encoding="utf-8") for path in RULES.parent.rglob("*.py"))
    for row in data["facts"]:
        assert any(text in code for text in (f'"{row["id"]}"', f"'{row['id']}'", f"[{row['id']}]")) or row[
            "id"
        ].startswith("format-")
    for row in data["schemes"]:
        assert any(row["scheme"] in (*r.get("small", ()), *r.get("large", ())) for r in data["routes"])
    for route in routes.routes():
        if not route.format:
            assert all(routes.against(route, {"npu": route.npu, "enn": enn}) for enn in (True, False))


def test_no_code_knows_a_device() -> None:
    names = {d.name for d in profiles.devices()} | {d.id for d in profiles.devices()} - {"laptop"}
    for module in ("plan", "sizing", "reasons", "routes", "backend"):
        text = (RULES.parent / f"{module}.py").read_text(encoding="utf-8")
        assert not [name for name in names if f'"{name}"' in text]
