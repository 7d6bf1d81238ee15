"""Bytes that are counted from shapes and schemes, against files whose sizes are published."""

from pathlib import Path

import pytest

import profiles
from runtimes import observed
from runtimes.observed import count, rows

MIB, GB = 1 << 20, 1e9


def counted(model: str, engine: str, scheme: str) -> observed.Counted:
    tables = observed._tables()
    of_model = next(entry for entry in tables["models"] if model in entry["names"])
    of_scheme = next(e for e in tables["schemes"] if e["engine"] == engine and scheme in e["names"])
    return count(of_model, of_scheme)


@pytest.mark.parametrize(
    ("model", "engine", "scheme", "published"),
    [
        # pytorch/executorch: examples/models/llama/README.md
        ("meta-llama/Llama-3.2-1B-Instruct", "executorch", "bf16", 2358 * MIB),
        ("meta-llama/Llama-3.2-1B-Instruct", "executorch", "SpinQuant 8da4w g32", 1083 * MIB),
        ("meta-llama/Llama-3.2-3B-Instruct", "executorch", "bf16", 6129 * MIB),
        ("meta-llama/Llama-3.2-3B-Instruct", "executorch", "SpinQuant 8da4w g32", 2435 * MIB),
        # huggingface.co/software-mansion/react-native-executorch-qwen-3
        ("Qwen/Qwen3-1.7B", "executorch", "bf16", 3.44 * GB),
        ("Qwen/Qwen3-1.7B", "executorch", "8da4w", 2.16 * GB),
        ("Qwen/Qwen3-4B", "executorch", "8da4w", 3.7 * GB),
        # ggml-org/llama.cpp: docs/backend/snapdragon/README.md, tools/quantize/README.md
        ("meta-llama/Llama-3.2-1B-Instruct", "llama.cpp", "Q4_0", 729.75 * MIB),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama.cpp", "Q4_K_M", 4.58 * 1024 * MIB),
        # ai.google.dev/edge/litert-lm/overview
        ("google/gemma-4-E2B-it", "litert-lm", "4-bit", 2.58 * GB),
    ],
)
def test_a_file_is_as_large_as_it_was_published(
    model: str, engine: str, scheme: str, published: float
) -> None:
    assert counted(model, engine, scheme).file == pytest.approx(published, rel=0.055)


def test_what_does_not_divide_into_groups_stays_float32() -> None:
    """SmolLM2-360M has 960 inputs, which are no groups of 128: only mlp.down's 2560 are."""
    divided = 32 * 2560 * 960
    body = 32 * (2 * 960 * 960 + 2 * 320 * 960 + 3 * 2560 * 960)
    head = 49152 * 960 * 4.25 / 8
    read = counted("HuggingFaceTB/SmolLM2-360M-Instruct", "executorch", "8da4w").read
    assert read == pytest.approx(divided * 4.25 / 8 + (body - divided) * 4 + head)


def test_no_run_is_left_out_but_by_the_rule() -> None:
    """Every shipped model and scheme is counted; only AGX Orin's bandwidth is not known."""
    seen = profiles.observations()
    for quantity, figure in [("decode", "decode_speed"), ("memory", "peak_memory")]:
        of_figure = [each for each in seen if each.figure == figure]
        unknown = [each for each in of_figure if each.soc.bandwidth_bytes_per_s is None]
        assert len(rows(seen, quantity)) == len(of_figure) - len(unknown)
        assert {each.soc.id for each in unknown} <= {"agx-orin"}


def test_a_prompt_is_counted_once() -> None:
    """From the speed where it is given, else from the time to the first token of a prompt of known length."""
    seen = profiles.observations()
    found = rows(seen, "prefill")
    speeds = [each for each in seen if each.figure == "prefill_speed"]
    assert len(speeds) < len(found) < len(speeds) + len([each for each in seen if each.figure == "ttft"])
    genie = next(row for row in found if row.printed == "37.065 ms")
    assert genie.value == pytest.approx(0.037065 / 128)
    assert genie.units == 16


OWN = """
[[tables]]
source = "the phone on my desk"
engine = "llama.cpp"
backend = "cpu"
device = "galaxy-s25"
runs = [
    { model = "Qwen/Qwen3-0.6B", scheme = "Q4_0", decode_speed = "50 tokens/s" },
    { model = "Qwen/Qwen3-0.6B", scheme = "Q4_0", prompt = 2000, generated = 96, decode_speed = "50.00 tokens/s" },
    { model = "mine/고추", scheme = "Q4_0", decode_speed = "50 tokens/s" },
    { model = "Qwen/Qwen3-0.6B", scheme = "mine", decode_speed = "50 tokens/s" },
]
"""


def test_own_runs_are_counted_where_model_and_scheme_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "observations").mkdir()
    (tmp_path / "observations" / "mine.toml").write_text(OWN, encoding="utf-8")
    monkeypatch.setenv("GOCHU_PROFILES", str(tmp_path))
    short, long = (
        row for row in rows(profiles.observations(), "decode") if row.source == "the phone on my desk"
    )
    assert short.value == pytest.approx(0.02)
    assert short.rounding == pytest.approx(0.01)
    assert long.rounding == pytest.approx(0.0001)
    cached = 2 * 28 * 8 * 128 * 2  # bytes of a token's keys and values
    assert long.size - short.size == pytest.approx((2048 - 512) * cached / 84.8e9)
