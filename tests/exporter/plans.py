"""Public models that tests plan for, and what a plan says of a topic."""

from typing import Any

from published import PUBLISHED

from exporter.architecture import Architecture, read_architecture
from exporter.plan import Plan
from runtimes.bundle import Choice

_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}  # stand-ins
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": PUBLISHED["meta-llama/Llama-3.2-1B"][0],
    "Qwen2.5-7B": PUBLISHED["Qwen/Qwen2.5-7B"][0]
    | {"max_position_embeddings": 32768, "rope_theta": 1000000.0},
    "Phi-3-mini-4k": PUBLISHED["microsoft/Phi-3-mini-4k-instruct"][0],
    "Phi-3-mini-128k": PUBLISHED["microsoft/Phi-3-mini-128k-instruct"][0] | {"rope_scaling": _LONGROPE},
    "gemma-2-2b": PUBLISHED["google/gemma-2-2b"][0],
    "small": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "vocab_size": 4096,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}


def architecture(name: str, **changes: Any) -> Architecture:
    return read_architecture(CONFIGS[name] | changes)


def choice(plan: Plan, topic: str) -> Choice:
    (found,) = [made for made in plan.choices if made.topic == topic]
    return found
