"""Quantize a checkpoint with another project's library, in that project's own environment.

    VENV/bin/python peer_worker.py JOB.json

JOB: `peer` (a key of PEERS), `checkpoint` (a folder), `sequences` (an .npy of token ids, int64 [sequences, length]),
and `tasks`, each with `bits`, `group` (null: a scale for each output), `dtype` that the model computes in, `repeats`,
and `output`: the layers' matrices, as what they stand for, float32, under Hugging Face's names, as safetensors. For
each task a line of JSON is printed: `seconds`, of quantizing alone, with all loaded and imported before, the quickest
of `repeats`; and `versions`. The embedding and the head stay as they are.

What is not said here is each library's default. Imports nothing of Gochu.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def llm_compressor(model: Any, sequences: Any, bits: int, group: int | None) -> Callable[[], Any]:
    """llm-compressor's GPTQ: activation order that keeps the groups, damping 0.01, scales of the largest weights."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
    }
    weights |= {"group_size": group} if group else {}
    config = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = GPTQModifier(config_groups=config, ignore=["lm_head"])
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in sequences], batch_size=8)
    return lambda: oneshot(model=model, dataset=loader, recipe=recipe, pipeline="sequential")


def auto_round(model: Any, sequences: Any, bits: int, group: int | None) -> Callable[[], Any]:
    """auto-round's signed gradient descent: 200 steps for each layer, 8 sequences at a time."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(model.name_or_path),  # it asks for one; the text is tokens already
        bits=bits,
        group_size=group or -1,
        sym=True,
        dataset=torch.utils.data.DataLoader(sequences, batch_size=8),
        seqlen=sequences.shape[1],
        nsamples=len(sequences),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,  # models this small never win back the minutes that compiling takes
    )
    return lambda: tuner.quantize()[0]


PEERS = {
    "llm-compressor": (llm_compressor, ("llmcompressor", "compressed-tensors", "transformers", "torch")),
    "auto-round": (auto_round, ("auto-round", "transformers", "torch")),
}


def quantize(job: dict[str, Any], task: dict[str, Any]) -> float:
    """Do one task; seconds."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    prepare, _ = PEERS[job["peer"]]
    sequences = torch.from_numpy(np.load(job["sequences"]))
    best = float("inf")
    for _ in range(task["repeats"]):
        model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=task["dtype"]).eval()
        run = prepare(model, sequences, task["bits"], task["group"])
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    state = {f"{name}.weight": model.get_submodule(name).weight for name in names if name != "lm_head"}
    save_file({name: weight.detach().float().contiguous() for name, weight in state.items()}, task["output"])
    return best


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    versions = {package: version(package) for package in PEERS[job["peer"]][1]}
    for task in job["tasks"]:
        said = {"output": task["output"], "seconds": quantize(job, task), "versions": versions}
        print("\n" + json.dumps(said), flush=True)  # a line of its own: libraries print too


if __name__ == "__main__":
    main()
