"""What onnxruntime-genai reads beside an ONNX decoder: genai_config.json.

Keys: https://onnxruntime.ai/docs/genai/reference/config.html
"""

import json
from pathlib import Path

from exporter.architecture import Architecture
from runtimes.bundle import EntryPoint, Tokens

CONFIG = "genai_config.json"


def write_genai_config(
    arch: Architecture, tokens: Tokens, entry: EntryPoint, context: int, folder: Path
) -> None:
    """Write the config so that onnxruntime-genai opens `folder` as it is, decoding greedily by default."""
    eos = list(tokens.eos)
    config = {
        "model": {
            "type": arch.family,
            "bos_token_id": tokens.bos if tokens.bos is not None else eos[0],
            "eos_token_id": eos,
            "pad_token_id": tokens.pad if tokens.pad is not None else eos[0],
            "context_length": context,
            "vocab_size": arch.vocab,
            "decoder": {
                "session_options": {"log_id": "gochu", "provider_options": []},
                "filename": entry.file,
                "head_size": arch.head_dim,
                "hidden_size": arch.hidden,
                "num_attention_heads": arch.heads,
                "num_hidden_layers": arch.layers,
                "num_key_value_heads": arch.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
