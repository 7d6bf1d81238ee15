"""The benchmarks are scripts, not a package: their folder is put where they find each other."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random checkpoint of two tiny layers, in float32."""
    from random_checkpoint import CONFIGS, write_checkpoint

    config = CONFIGS["Qwen2.5-0.5B"] | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "bos_token_id": 500,
        "eos_token_id": 501,
    }
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", config, dtype="float32")
