"""ExecuTorch's own LLM exporter on a Hugging Face checkpoint of Qwen 2.5, as export_executorch.py measures it.

It takes a checkpoint with Meta's names, and its shape in a file of its own. Its converter for Qwen 2.5 needs a
library that the exporter does not (torchtune), so what that does is done here, before the clock starts.

The options are those of its README and its config for Qwen 2.5 (pytorch/executorch: examples/models/qwen2_5:
8da4w, KV cache, custom attention, float32, extended ops), and of its guide to exporting LLMs (the embedding in
4 bits), all in groups of 32. Its search for scales (HQQ, on unless told otherwise) is left out: without it, it
rounds as plainly as `rtn-absmax`, and is quicker.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common import Run, run_or_stop

PROGRAM = "model.pte"  # what ours is called too
GROUP = 32
CONTEXT, CHUNK = 2048, 512  # tokens that the program holds, and takes at once; as in our programs

# Hugging Face's name of each module -> Meta's
_NAMES = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def convert(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write a checkpoint as the exporter wants it into `folder`; the `base` part of the exporter's config."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    weights, params = folder / "checkpoint.pth", folder / "params.json"
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= {meta_name(name): tensor for name, tensor in load_file(file).items()}
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    torch.save(tensors, weights)
    params.write_text(json.dumps(meta_params(config)), encoding="utf-8")
    tokens = {"get_bos_id": config["bos_token_id"], "get_eos_ids": [config["eos_token_id"]]}
    return {
        "model_class": "qwen2_5_0_5b",
        "checkpoint": str(weights),
        "params": str(params),
        "metadata": json.dumps(tokens),
    }


def meta_name(name: str) -> str:
    """Meta's name of a tensor."""
    return ".".join(_NAMES.get(part, part) for part in name.removeprefix("model.").split("."))


def meta_params(config: dict[str, Any]) -> dict[str, Any]:
    """The shape of a Qwen 2.5 `config` (as in config.json) in Meta's words."""
    return {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "vocab_size": config["vocab_size"],
        "ffn_dim_multiplier": 1,
        "use_scaled_rope": False,
        "use_hf_rope": True,
        "attention_qkv_bias": True,
    }


def export(base: dict[str, Any], tokenizer: Path, output: Path) -> Run:
    """Export with ExecuTorch's exporter, anew, into `output`, with the tokenizer beside it."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    config = {
        "base": base,
        "model": {"use_kv_cache": True, "use_sdpa_with_kv_cache": True, "dtype_override": "fp32"},
        "quantization": {
            "qmode": "8da4w",
            "group_size": GROUP,
            "embedding_quantize": f"4,{GROUP}",
            "use_hqq": False,
        },
        "export": {
            "max_seq_length": CHUNK,
            "max_context_length": CONTEXT,
            "output_dir": str(output),
            "output_name": str(output / PROGRAM),
        },
        "backend": {"xnnpack": {"enabled": True, "extended_ops": True}},
    }
    path = output / "export.yaml"  # JSON is YAML
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    command = [sys.executable, "-m", "executorch.extension.llm.export.export_llm", "--config", str(path)]
    run = run_or_stop([*command, f"hydra.run.dir={output / 'log'}"])
    shutil.copy(tokenizer, output / "tokenizer.json")
    return run
