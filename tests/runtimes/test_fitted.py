"""The model that was fitted: its arithmetic by hand, its doubt about what was never measured, and when it is silent."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.fitted import Setting, down_to, effects, guess, kind, shipped, workspace

AT = Setting("mine", "cpu", "integer", "chip")


def data(**rate: tuple[float, float]) -> dict[str, Any]:
    """Constants of decoding with these effects on the rate, `_` for a space, and none of the engine's overhead."""
    return {
        "decode": {
            "noise": 0.1,
            "width": 1.5,
            "sizes": {},
            "spread": {"group": 3.0, "engine": 0.3, "kernel": 0.4, "chip": 0.5, "pair": 0.2},
            "overhead_spread": {"group": 3.0, "engine": 0.7},
            "rate": {name.replace("_", " "): list(effect) for name, effect in rate.items()},
            "overhead": {"cpu": [math.log(1e-3), 0.2]},
        }
    }


KNOWN = {
    "cpu": (math.log(2), 0.3),
    "cpu_mine": (0.1, 0.2),
    "cpu_mine_integer": (0.2, 0.15),
    "cpu_mine_on_chip": (-0.3, 0.12),
    "cpu_mine_integer_on_chip": (0.05, 0.1),
}


def test_a_figure_is_size_times_rate_and_units_times_overhead() -> None:
    found = guess("decode", AT, 0.01, 16, data(**KNOWN))
    assert found is not None
    assert found.rate == pytest.approx(2 * math.exp(0.1 + 0.2 - 0.3 + 0.05))
    assert found.overhead == pytest.approx(1e-3)
    assert found.value == pytest.approx(0.01 * found.rate + 16e-3)
    share = 0.01 * found.rate / found.value
    deviation = math.sqrt(0.1**2 + (share * 0.1) ** 2 + (1 - share) ** 2 * (0.2**2 + 0.7**2))
    assert found.high / found.value == pytest.approx(math.exp(1.5 * deviation))
    assert found.low * found.high == pytest.approx(found.value**2)


@pytest.mark.parametrize(
    ("known", "variance"),
    [
        (1, 0.3**2 + 0.3**2 + 0.4**2 + 0.5**2 + 0.2**2),  # each kind of effect adds its own
        (2, 0.2**2 + 0.4**2 + 0.5**2 + 0.2**2),
        (3, 0.15**2 + 0.5**2 + 0.2**2),
        (5, 0.1**2),
    ],
)
def test_what_was_never_measured_widens_the_interval(known: int, variance: float) -> None:
    found = guess("decode", AT, 0.01, 0, data(**dict(list(KNOWN.items())[:known])))
    assert found is not None
    assert math.log(found.high / found.value) == pytest.approx(1.5 * math.sqrt(0.1**2 + variance))
    assert len(found.known) == known + 1  # and the overhead of the backend


def test_kernel_and_chip_are_known_apart_from_each_other() -> None:
    apart = {name: effect for name, effect in KNOWN.items() if name != "cpu_mine_integer_on_chip"}
    found = guess("decode", AT, 0.01, 0, data(**apart))
    assert found is not None
    # both deviations are of sums that share backend and engine, and the whole is no surer than the surest of them
    variance = max(0.2**2 + (0.15**2 - 0.2**2) + (0.12**2 - 0.2**2), 0.12**2) + 0.2**2
    assert math.log(found.high / found.value) == pytest.approx(1.5 * math.sqrt(0.1**2 + variance))


def test_nothing_is_said_of_a_backend_that_nobody_measured() -> None:
    assert guess("decode", replace(AT, backend="gpu"), 0.01, 16, data(**KNOWN)) is None


def test_a_prompt_is_only_predicted_on_a_chip_that_was_measured() -> None:
    at = Setting("executorch", "cpu", "integer", "sm8650")
    assert guess("prefill", at, 1.0, 0) is not None
    assert guess("prefill", replace(at, chip="sm8550"), 1.0, 0) is None
    assert guess("prefill", replace(at, engine="onnxruntime"), 1.0, 0) is None


def test_memory_is_not_extrapolated() -> None:
    at = Setting("executorch", "cpu", "integer")
    smallest, largest = shipped()["memory"]["sizes"]["cpu executorch"]
    for size, known in [(smallest, True), (largest, True), (0.99 * smallest, False), (1.01 * largest, False)]:
        assert (guess("memory", at, size, 2e8) is not None) == known
    assert guess("memory", replace(at, engine="onnxruntime"), 1e9, 2e8) is None


def test_effects_have_a_kind_and_those_above_them() -> None:
    rate, overhead = effects("decode", AT)
    assert [kind(name) for name in rate] == ["group", "engine", "kernel", "chip", "pair"]
    assert [kind(name) for name in overhead] == ["group", "engine"]
    assert down_to(rate, "cpu mine on chip") == ("cpu", "cpu mine", "cpu mine on chip")
    assert down_to(rate, rate[-1]) == rate
    assert effects("prefill", AT) == (rate, ())
    assert effects("memory", AT) == (("cpu", "cpu mine"), ("any", "cpu mine"))


def test_workspace_is_counted_in_bytes() -> None:
    assert workspace(1000, 64, 200, 10) == 100e6 + 2 * 2048 * 1000 + 4 * 10 * (128 + 600)


settings = st.builds(
    Setting,
    st.sampled_from(["executorch", "onnxruntime", "coreml", "genie", "new"]),
    st.sampled_from(["cpu", "gpu", "npu"]),
    st.sampled_from(["float", "integer", "unfolded"]),
    st.sampled_from(["sm8650", "apple-a19-pro", "unheard-of", None]),
)


@given(settings, st.floats(1e-5, 10), st.integers(1, 100))
def test_more_takes_longer_and_bounds_enclose(at: Setting, size: float, layers: int) -> None:
    found, larger = guess("decode", at, size, layers), guess("decode", at, 2 * size, layers)
    assert found is not None
    assert larger is not None
    assert 0 < found.low < found.value < found.high
    assert found.value < larger.value < 2 * found.value
