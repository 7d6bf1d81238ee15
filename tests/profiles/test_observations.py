"""What others published: every figure is on a known device or chip, and no faster than its memory."""

from pathlib import Path

import pytest

import profiles
from profiles import Observation, ProfileError
from profiles.observation import Publication

SHIPPED = profiles.observations()


def one(model: str, scheme: str, figure: str, place: str, engine: str) -> Observation:
    (found,) = [
        o
        for o in SHIPPED
        if (o.model, o.scheme, o.figure, o.engine) == (model, scheme, figure, engine)
        and place == (o.device.id if o.device else o.soc.id)
    ]
    return found


def test_there_are_enough_from_many_engines_and_places() -> None:
    assert len(SHIPPED) >= 300
    assert len({(o.model, o.scheme, o.soc.id, o.engine, o.backend) for o in SHIPPED}) >= 150
    assert len({o.engine for o in SHIPPED}) == 8
    assert {o.backend for o in SHIPPED} == {"cpu", "gpu", "npu"}
    assert len({o.soc.id for o in SHIPPED}) >= 20


def test_each_names_its_source_and_its_place() -> None:
    for o in SHIPPED:
        assert "http" in o.source or "/" in o.source, o
        assert o.device is None or o.soc == o.device.soc
        assert o.value > 0


def test_a_phone_sold_with_two_chips_is_never_guessed() -> None:
    """A source that says "Galaxy S24" does not say which; only the one that AI Hub has is known."""
    names = {device.name for device in profiles.devices() if device.market not in (None, "every market")}
    assert {o.engine for o in SHIPPED if o.device and o.device.name in names} == {"genie"}


def test_units() -> None:
    oneplus = ("meta-llama/Llama-3.2-1B-Instruct", "SpinQuant 8da4w g32")
    speed = one(*oneplus, "decode_speed", "oneplus-12", "executorch")
    assert (speed.value, speed.unit, speed.printed) == (50.2, "tokens/s", "50.2 tokens/s")
    memory = one(*oneplus, "peak_memory", "oneplus-12", "executorch")
    assert (memory.value, memory.unit) == (1921 * 2**20, "bytes")
    first = one("meta-llama/Llama-3.2-1B-Instruct", "w4a16", "ttft", "sm8750", "genie")
    assert (first.value, first.unit) == (pytest.approx(0.037065), "s")


def test_no_token_is_faster_than_its_weights_can_be_read() -> None:
    """A typing error in a figure, or a wrong chip, would show: decoding reads every weight once."""
    billions = {
        "Llama-3.2-1B": 1.24,
        "Llama-3.2-3B": 3.21,
        "Llama-3.1-8B": 8.03,
        "Llama-3-8B": 8.03,
        "Qwen3-4B": 4.02,
        "Qwen2.5-7B": 7.61,
        "Llama-2-7b": 6.74,
    }
    asked = 0
    for o in SHIPPED:
        size = next((size for name, size in billions.items() if name in o.model), None)
        bandwidth = o.soc.bandwidth_bytes_per_s
        if o.figure == "decode_speed" and size and o.bits and bandwidth:
            asked += 1
            assert o.value * size * 1e9 * o.bits / 8 < bandwidth, o
    assert asked >= 60


RUN = """
[[tables]]
source = "the phone on my desk"
date = "2026-11-24"
engine = "llama.cpp"
backend = "cpu"
device = "galaxy-s25"
runs = [
    { model = "Qwen/Qwen3-0.6B", scheme = "Q4_0", bits = 4, threads = 4, decode_speed = "55.5 tokens/s" },
    { model = "Qwen/Qwen3-0.6B", scheme = "Q4_0", backend = "gpu", ttft = "120 ms", peak_memory = "1.5 GB" },
]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOCHU_PROFILES", str(tmp_path))
    (tmp_path / "observations").mkdir()
    return tmp_path / "observations" / "mine.toml"


def test_own_observations_follow_the_shipped_ones(file: Path) -> None:
    file.write_text(RUN, encoding="utf-8")
    mine = profiles.observations()[len(SHIPPED) :]
    assert [(o.backend, o.figure, o.value) for o in mine] == [
        ("cpu", "decode_speed", 55.5),
        ("gpu", "ttft", 0.12),
        ("gpu", "peak_memory", 1.5e9),
    ]
    assert {(o.soc.id, o.date) for o in mine} == {("sm8750", "2026-11-24")}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('device = "galaxy-s25"', 'device = "galaxy-s99"', ["'galaxy-s99' has no profile"]),
        ('device = "galaxy-s25"', "", ["either its device or its chip"]),
        (
            'device = "galaxy-s25"',
            'device = "galaxy-s25"\nchip = "sm8750"',
            ["either its device or its chip"],
        ),
        ('decode_speed = "55.5 tokens/s"', "prompt = 8", ["at least one figure"]),
        ("55.5 tokens/s", "55.5", ["runs.0.decode_speed", "55.5"]),
        ("120 ms", "120 minutes", ["runs.1.ttft"]),
        ("llama.cpp", "vllm", ["runs.0.engine", "vllm"]),
        ("threads = 4", "cores = 4", ["runs.0.cores", "unknown"]),
        ('source = "the phone on my desk"', "", ["runs.0.source", "missing"]),
        ("[[tables]]", "[[table]]", ["'runs' is missing"]),
        ("runs = [", "run = [", ["a list of [[tables]]"]),
    ],
)
def test_a_wrong_observation_is_one_sentence(file: Path, old: str, new: str, said: list[str]) -> None:
    assert old in RUN
    file.write_text(RUN.replace(old, new), encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        profiles.observations()
    message = str(caught.value)
    assert "\n" not in message
    for words in [str(file), *said]:
        assert words in message


def test_a_publication_says_something() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Publication.model_validate({"runs": []})
