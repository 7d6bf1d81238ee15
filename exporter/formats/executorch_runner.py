"""What ExecuTorch's LLM runner asks a program: its constant methods.

Names: pytorch/executorch, extension/llm/runner/constants.h.
"""

from typing import Any

from exporter.architecture import Architecture
from runtimes.bundle import Tokens


def runner_methods(arch: Architecture, tokens: Tokens, context: int, chunk: int) -> dict[str, Any]:
    """Constant methods for a program that takes up to `chunk` tokens at once and holds `context` of them."""
    return {
        "get_bos_id": tokens.bos if tokens.bos is not None else tokens.eos[0],
        "get_eos_ids": list(tokens.eos),
        "get_max_seq_len": chunk,
        "get_max_context_len": context,
        "get_vocab_size": arch.vocab,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
