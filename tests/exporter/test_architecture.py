"""config.json -> Architecture: both styles of config, published models' sizes, refusals."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import PUBLISHED

from exporter.architecture import read_architecture, sources
from exporter.errors import CheckpointError, UnsupportedArchitecture

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def llama(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_size(name):
    config, parameters = PUBLISHED[name]
    assert read_architecture(config).parameters == parameters


def test_published_details():
    gemma = read_architecture(PUBLISHED["google/gemma-2-2b"][0])
    assert gemma.windows == (4096, 0) * 13
    assert gemma.embedding_scale == math.sqrt(2304)
    assert (gemma.attention_softcap, gemma.final_softcap, gemma.attention_scale) == (50, 30, 1 / 16)
    assert gemma.tied
    phi = read_architecture(PUBLISHED["microsoft/Phi-3-mini-128k-instruct"][0])
    assert phi.rope.original_context == 4096
    assert not phi.rope.is_long(4096)
    assert phi.rope.is_long(4097)
    assert phi.rope.scale == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert read_architecture(PUBLISHED["Qwen/Qwen2.5-0.5B"][0]).windows == (0,) * 24
    assert read_architecture(PUBLISHED["microsoft/Phi-3-mini-4k-instruct"][0]).windows == (2047,) * 32


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_canonical_tensor_has_one_place(name):
    arch = read_architecture(PUBLISHED[name][0])
    places = sources(arch)
    assert set(places) == {n for n, _ in arch.matrices()} | {n for n, _ in arch.vectors()}
    assert len({(p.tensor, p.start) for p in places.values()}) == len(places)


def test_sizes_match_transformers(family, checkpoints):
    config = json.loads((checkpoints.folder(family) / "config.json").read_text(encoding="utf-8"))
    arch = read_architecture(config)
    assert arch.parameters == sum(p.numel() for p in checkpoints.model(family).parameters())


def test_both_styles_of_config_mean_the_same(family, checkpoints):
    """transformers 5 writes rope_parameters; transformers 4 wrote rope_theta and rope_scaling."""
    new = json.loads((checkpoints.folder(family) / "config.json").read_text(encoding="utf-8"))
    rope = new["rope_parameters"]
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old["rope_theta"] = rope["rope_theta"]
    rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor", "rope_type")}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {"rope_type": rope["rope_type"], **rest}
    old["layer_types"] = None
    assert read_architecture(old) == read_architecture(new)
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {"type": rope["rope_type"], **rest}  # the older name of the key
        assert read_architecture(old) == read_architecture(new)


def test_su_and_yarn_are_longrope_in_phi3():
    config, _ = PUBLISHED["microsoft/Phi-3-mini-128k-instruct"]
    expected = read_architecture(config)
    for name in ("yarn", "longrope"):
        assert (
            read_architecture({**config, "rope_scaling": {**config["rope_scaling"], "type": name}})
            == expected
        )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "phi3small"}, "block-sparse"),
        ({"model_type": "phi3_v"}, "vision"),
        ({"model_type": "mllama"}, "vision"),
        ({"model_type": "mamba"}, "llama, qwen2, gemma2, phi3"),
        ({}, "None"),
        (llama(model_type=["llama"]), "cannot be exported"),
        (llama(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
        (llama(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "spiral"),
        (llama(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized already"),
        (llama(architectures=["LlamaForSequenceClassification"]), "not a language model"),
        (llama(hidden_act="relu"), "relu"),
        (llama(model_type="gemma2", use_bidirectional_attention=True), "causal"),
    ],
)
def test_what_the_decoder_does_not_describe_is_refused(config, says):
    with pytest.raises(UnsupportedArchitecture, match=says):
        read_architecture(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "table"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"partial_rotary_factor": 1.5}, "rotary dimensions"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": ["a", "b"]}, "layer_types"),
        ({"model_type": "qwen2", "max_window_layers": "x"}, "max_window_layers"),
        ({"architectures": True}, "architectures"),
        ({"hidden_act": ["silu"]}, "silu"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "no frequencies"),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 1.0,
                }
            },
            "no frequencies",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(CheckpointError, match=says):
        read_architecture(llama(**changes))


_KEYS = [
    *LLAMA,
    "head_dim",
    "sliding_window",
    "max_window_layers",
    "use_sliding_window",
    "layer_types",
    "hidden_activation",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
]
_ROPE_KEYS = [
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "short_factor",
    "long_factor",
    "partial_rotary_factor",
    "truncate",
]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 4, 64, 2**31, -1, 10**400]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.sampled_from([1.0, 0, "x", None]), max_size=9),
    st.just([1.0] * 8),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(
    st.sampled_from(["llama", "qwen2", "gemma2", "phi3"]),
    st.dictionaries(st.sampled_from(_KEYS), _SCALARS, max_size=3),
    st.one_of(
        st.none(),
        st.fixed_dictionaries(
            {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "longrope", 3, None, []])},
            optional=dict.fromkeys(_ROPE_KEYS, _SCALARS),
        ),
    ),
)
def test_any_config_gives_an_architecture_or_a_checkpoint_error(family, changes, rope):
    config = llama(**(changes | {"model_type": family}))
    if rope is not None:
        config["rope_parameters"] = rope
    try:
        arch = read_architecture(config)
    except CheckpointError:
        return
    assert arch.layers == len(arch.windows)
    assert all(math.isfinite(f) and f > 0 for f in arch.rope.inv_freq)
    assert math.isfinite(arch.rope.scale)
