"""Predictions against what was measured and published, and laws that hold for every decoder."""

import tomllib
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes import fitted
from runtimes.predict import Decoder, Prediction, Weight, predict

MIB = 1 << 20


def decoder(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    *,
    bits: int = 4,
    group: int | None = 32,
    tied: bool = True,
    softcap: bool = False,
) -> Decoder:
    """A Llama-like decoder whose weights are all stored in one way."""
    q, kv = heads * head_dim, kv_heads * head_dim
    layer = [
        (q, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, q),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
    ]
    matrices = [Weight((vocab, hidden), bits, group, multiplied=tied, looked_up=True)]
    matrices += [Weight(shape, bits, group) for shape in layer * layers]
    matrices += [] if tied else [Weight((vocab, hidden), bits, group)]
    vectors = (2 * layers + 1) * hidden
    return Decoder(
        tuple(matrices), vectors, layers, hidden, ffn, heads, kv_heads, head_dim, head_dim, softcap
    )


def qwen(layers: int, bits: int, group: int | None) -> Decoder:
    """Qwen2.5-0.5B with fewer layers (config.json of Qwen/Qwen2.5-0.5B)."""
    return decoder(layers, 896, 4864, 14, 2, 64, 151936, bits=bits, group=group)


LLAMA_1B = decoder(16, 2048, 8192, 32, 8, 64, 128256)  # config.json of meta-llama/Llama-3.2-1B
LLAMA_3B = decoder(28, 3072, 8192, 24, 8, 128, 128256)  # and of Llama-3.2-3B
LLAMA_4_LAYERS = decoder(4, 2048, 8192, 32, 8, 64, 128256)
PHI_4_LAYERS = decoder(4, 3072, 8192, 32, 32, 96, 32064, tied=False)  # microsoft/Phi-3-mini-4k-instruct
CAPPED = decoder(4, 1152, 6912, 8, 4, 128, 32000, softcap=True)


@pytest.mark.parametrize(
    ("model", "context", "measured"),
    [
        pytest.param(qwen(8, 4, 32), 2048, 255.1, id="int4"),
        pytest.param(qwen(8, 4, 128), 2048, 208.6, id="int4-g128"),
        pytest.param(qwen(8, 8, 32), 2048, 383.4, id="int8"),
        pytest.param(qwen(3, 16, None), 2048, 1226.8, id="fp16"),
        pytest.param(qwen(3, 32, None), 2048, 744.6, id="fp32"),
        pytest.param(qwen(3, 8, None), 2048, 1222.8, id="int8-channel"),
        pytest.param(LLAMA_4_LAYERS, 1024, 481.9, id="llama"),
        pytest.param(LLAMA_4_LAYERS, 4096, 530.6, id="llama-4096"),
        pytest.param(PHI_4_LAYERS, 2048, 754.2, id="untied"),
        pytest.param(CAPPED, 1024, 226.7, id="softcap"),
        pytest.param(CAPPED, 4096, 338.4, id="softcap-4096"),
    ],
)
def test_peak_memory_is_what_was_measured(model: Decoder, context: int, measured: float) -> None:
    """Private memory in MiB of onnxruntime 1.32 on x86-64 (RssAnon less that of the bare process), at its peak."""
    memory = predict(model, context).memory
    assert memory.value / MIB == pytest.approx(measured, rel=0.075)
    assert memory.low is not None
    assert memory.high is not None
    assert memory.low < measured * MIB < memory.high


@pytest.mark.parametrize(
    ("model", "context", "measured"),
    [
        pytest.param(qwen(8, 4, 32), 2048, 200.8, id="int4"),
        pytest.param(qwen(8, 8, None), 2048, 308.3, id="int8-channel"),
        pytest.param(qwen(3, 32, None), 2048, 739.2, id="fp32"),
        pytest.param(LLAMA_4_LAYERS, 1024, 370.5, id="llama"),
        pytest.param(LLAMA_4_LAYERS, 4096, 418.6, id="llama-4096"),
        pytest.param(PHI_4_LAYERS, 2048, 593.1, id="untied"),
        pytest.param(CAPPED, 1024, 180.6, id="softcap"),
        pytest.param(CAPPED, 4096, 283.5, id="softcap-4096"),
    ],
)
def test_peak_memory_of_executorch_is_what_was_measured(
    model: Decoder, context: int, measured: float
) -> None:
    """The same of executorch 1.4.1 with XNNPACK, after a prompt that fills the context."""
    memory = predict(model, context, engine="executorch").memory
    assert memory.value / MIB == pytest.approx(measured, rel=0.06)
    assert memory.low is not None
    assert memory.high is not None
    assert memory.low < measured * MIB < memory.high


@pytest.mark.parametrize(
    ("model", "context", "written"),
    [
        pytest.param(qwen(8, 4, 32), 2048, 161927936, id="int4"),
        pytest.param(qwen(8, 8, None), 2048, 258273280, id="int8-channel"),
        pytest.param(qwen(3, 32, None), 2048, 724575616, id="fp32"),
        pytest.param(LLAMA_4_LAYERS, 4096, 319650560, id="llama-4096"),
        pytest.param(PHI_4_LAYERS, 2048, 373516288, id="untied"),
    ],
)
def test_the_size_of_a_program_is_what_was_written(model: Decoder, context: int, written: int) -> None:
    assert predict(model, context, engine="executorch").file.value == pytest.approx(written, rel=0.002)


@pytest.mark.parametrize(
    ("model", "bandwidth", "published"),
    [
        # pytorch/executorch: examples/models/llama/README.md, OnePlus 12 (76.8 GB/s), SpinQuant
        pytest.param(LLAMA_1B, 76.8e9, 50.2, id="OnePlus 12, 1B"),
        pytest.param(LLAMA_3B, 76.8e9, 19.7, id="OnePlus 12, 3B"),
        # software-mansion/react-native-executorch: docs/docs/02-benchmarks, SpinQuant
        pytest.param(LLAMA_1B, 34.1e9, 16.7, id="iPhone 13 Pro, 1B"),
        pytest.param(LLAMA_1B, 60.0e9, 40.6, id="iPhone 16 Pro, 1B"),
        pytest.param(LLAMA_1B, 76.8e9, 36.0, id="iPhone 17 Pro, 1B"),
        pytest.param(LLAMA_3B, 60.0e9, 17.2, id="iPhone 16 Pro, 3B"),
    ],
)
def test_published_cpu_speeds_lie_between_the_bounds(
    model: Decoder, bandwidth: float, published: float
) -> None:
    decode = predict(model, 2048, bandwidth=bandwidth).decode
    assert decode is not None
    assert decode.low is not None
    assert decode.high is not None
    assert decode.low < published < decode.high


def test_without_a_bandwidth_no_speed_is_claimed() -> None:
    prediction = predict(LLAMA_1B, 2048)
    assert prediction.decode is None
    assert not any("tokens" in key for key in prediction.figures())


def on(engine: str, chip: str, bandwidth: float, model: Decoder = LLAMA_1B, **more: Any) -> Prediction:
    return predict(model, 2048, engine=engine, chip=chip, bandwidth=bandwidth, **more)


def test_a_prompt_is_predicted_only_where_its_speed_was_published() -> None:
    known = on("executorch", "sm8650", 76.8e9)
    assert known.first is not None
    assert known.first.low is not None
    assert known.first.high is not None
    assert known.first.low < 64 * 2 / 260.5 < known.first.high  # pytorch/executorch's README: 260.5 tokens/s
    assert known.unknown == ()
    assert {"first_token_s", "first_token_s_low", "first_token_s_high"} < known.figures().keys()
    other = on("executorch", "sm8550", 67.2e9)
    assert other.first is None
    assert [name for name, _ in other.unknown] == ["first token"]
    assert not any("first" in key for key in other.figures())


def test_a_prompt_takes_no_less_than_a_token_of_the_answer() -> None:
    short, long = (on("executorch", "sm8650", 76.8e9, prompt=prompt) for prompt in (1, 1000))
    assert short.first is not None
    assert short.decode is not None
    assert long.first is not None
    assert short.first.value == pytest.approx(1 / short.decode.value)
    assert long.first.value > 10 * short.first.value


def test_no_token_is_predicted_faster_than_its_bytes_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all that was measured ever so fast, or counted wrongly."""
    fast = {**fitted.shipped()["decode"], "rate": {"cpu": [-2.0, 0.1]}, "overhead": {"cpu": [-20.0, 0.1]}}
    monkeypatch.setattr(fitted, "shipped", lambda: {**constants, "decode": fast})
    constants = {"prefill": {"rate": {}, "sizes": {}}, "memory": {"rate": {}, "sizes": {}}}
    found = on("executorch", "sm8650", 76.8e9)
    assert found.decode is not None
    assert found.decode.value == found.decode.high == 76.8e9 / found.streamed.value


def test_resident_memory_is_what_was_published_with_the_mapped_file() -> None:
    """pytorch/executorch: examples/models/llama/README.md, 3B on a OnePlus 12; nothing for a model of a tenth of it."""
    found = on("executorch", "sm8650", 76.8e9, LLAMA_3B).resident
    assert found is not None
    assert found.value == pytest.approx(3726 * MIB, rel=0.15)
    assert on("executorch", "sm8650", 76.8e9, qwen(2, 4, 32)).resident is None
    assert on("onnxruntime", "sm8650", 76.8e9).resident is None


def test_fixed_shapes_read_the_whole_cache() -> None:
    short, long = (predict(LLAMA_1B, context, engine="coreml").streamed.value for context in (1024, 4096))
    assert long - short == 2 * 16 * 8 * 64 * 3072 * 2
    assert predict(LLAMA_1B, 1024).streamed.value == predict(LLAMA_1B, 4096).streamed.value


def test_a_backend_that_nobody_measured_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = {**fitted.shipped(), "decode": {**fitted.shipped()["decode"], "rate": {}}}
    monkeypatch.setattr(fitted, "shipped", lambda: constants)
    found = on("executorch", "sm8650", 76.8e9)
    assert found.decode is None
    assert dict(found.unknown)["decode"] == "no engine's speed on any CPU was published"


def test_the_kv_cache_is_two_float32_buffers_per_layer() -> None:
    assert predict(LLAMA_1B, 1000).cache.value == 2 * 16 * 8 * 64 * 1000 * 4


def test_float16_weights_count_as_the_float32_copy_that_they_become() -> None:
    half, single = qwen(8, 16, None), qwen(8, 32, None)
    assert predict(half, 512).file.value == pytest.approx(predict(single, 512).file.value / 2, rel=0.01)
    assert predict(half, 512).streamed.value == predict(single, 512).streamed.value
    assert predict(half, 512).memory.value > predict(single, 512).memory.value  # both copies as it is loaded


def test_an_embedding_that_is_only_looked_up_stays_in_the_file() -> None:
    tied = predict(replace(PHI_4_LAYERS, weights=PHI_4_LAYERS.weights[1:]), 512)
    untied = predict(PHI_4_LAYERS, 512)
    assert untied.memory.value == tied.memory.value
    assert untied.streamed.value == tied.streamed.value
    assert untied.file.value > tied.file.value


def test_a_figure_for_a_person_has_its_unit_and_bounds() -> None:
    prediction = predict(LLAMA_1B, 2048, bandwidth=76.8e9)
    texts = {row.name: row.text for row in prediction.rows()}
    assert texts["KV cache"] == "134 MB"
    assert texts["decode"] == "33 tokens/s (16 to 70)"  # no speed of ONNX Runtime was ever published
    assert list(texts) == ["file", "peak memory", "KV cache", "read per token", "decode"]
    assert all(row.explain for row in prediction.rows())
    assert set(prediction.figures()) == {
        "file_bytes",
        "peak_memory_bytes",
        "peak_memory_bytes_low",
        "peak_memory_bytes_high",
        "kv_cache_bytes",
        "read_per_token_bytes",
        "decode_tokens_per_s",
        "decode_tokens_per_s_low",
        "decode_tokens_per_s_high",
    }


def test_the_chunk_is_the_one_that_the_engine_feeds() -> None:
    engine = pytest.importorskip("runtimes.engines.onnxruntime")
    costs = tomllib.loads((files("runtimes") / "engines.toml").read_text(encoding="utf-8"))
    assert costs["onnxruntime"]["prefill_chunk"] == engine.CHUNK


decoders = st.builds(
    decoder,
    layers=st.integers(1, 40),
    hidden=st.integers(1, 128).map(lambda n: 32 * n),
    ffn=st.integers(1, 512).map(lambda n: 32 * n),
    heads=st.integers(1, 8).map(lambda n: 4 * n),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([32, 64, 128]),
    vocab=st.integers(256, 256_000),
    tied=st.booleans(),
    softcap=st.booleans(),
)


def stored(model: Decoder, bits: int, group: int | None) -> Decoder:
    return replace(model, weights=tuple(replace(w, bits=bits, group=group) for w in model.weights))


@given(decoders, st.integers(16, 8192), st.integers(1, 8192))
def test_more_context_takes_more(model: Decoder, context: int, more: int) -> None:
    short, long = (predict(model, tokens, bandwidth=5e10) for tokens in (context, context + more))
    assert short.memory.value <= long.memory.value
    assert short.cache.value < long.cache.value
    assert short.file.value <= long.file.value
    assert short.decode is not None
    assert long.decode is not None
    assert short.decode.value >= long.decode.value


@given(decoders, st.integers(16, 8192))
def test_fewer_bits_take_less(model: Decoder, context: int) -> None:
    ways = [(32, None), (16, None), (8, 32), (4, 32)]
    files_ = [predict(stored(model, *way), context).file.value for way in ways]
    streamed = [predict(stored(model, *way), context).streamed.value for way in ways]
    memory = [predict(stored(model, *way), context).memory.value for way in ways[1:]]
    assert files_ == sorted(files_, reverse=True)
    assert len(set(files_)) == len(files_)
    assert streamed == sorted(streamed, reverse=True)
    assert memory == sorted(memory, reverse=True)


@given(decoders, st.integers(16, 8192), st.floats(1e9, 1e12))
def test_bounds_enclose_the_value(model: Decoder, context: int, bandwidth: float) -> None:
    prediction = predict(model, context, bandwidth=bandwidth)
    for row in prediction.rows():
        assert row.value > 0
        if row.low is not None and row.high is not None:
            assert 0 < row.low < row.value < row.high
