"""GPTQ on the layers of Qwen2.5-0.5B's shape, with random weights: memory of an export, and seconds for a layer."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from common import run_or_stop
from random_checkpoint import CONFIGS, write_checkpoint

from exporter.checkpoint import open_checkpoint
from exporter.quantization.calibration import MOST, TEXTS, calibration_sequences
from exporter.quantization.recipe import Recipe, Rule
from exporter.quantization.streaming import quantize_layers
from exporter.staging import Staging

SHAPE, LAYERS, SCHEME = "Qwen2.5-0.5B", 3, "int4-g128"
CONTEXT = 512  # tokens of a sequence
MEMORY = 1.5  # GB
FEW, MORE = 1, 3  # layers, whose difference is what a layer takes
# Tokens are drawn from so many, so that the head, which no side quantizes, costs next to nothing
_SMALL_HEAD = {"vocab_size": 1024, "bos_token_id": 1000, "eos_token_id": 1001}


def whole_export(work: Path) -> dict[str, Any]:
    """Memory of a whole export with GPTQ on as many tokens as are used at most."""
    checkpoint = write_checkpoint(work / "checkpoint", CONFIGS[SHAPE] | {"num_hidden_layers": LAYERS})
    text = work / "text.jsonl"
    text.write_text(3 * TEXTS.read_text(encoding="utf-8"), encoding="utf-8")
    with open_checkpoint(checkpoint) as source:
        tokens = sum(map(len, calibration_sequences(source, CONTEXT, text)))
    assert tokens == MOST, f"{tokens} tokens are not the {MOST} that are used at most"
    command = [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), "--scheme", SCHEME]
    command += ["--algorithm", "gptq", "--calibration", str(text), "--context", str(CONTEXT), "--no-verify"]
    run = run_or_stop([*command, "-o", str(work / "exported")])
    return {
        "shape": f"{SHAPE}, {LAYERS} layers",
        "tokens": tokens,
        "peak GB": run.peak_anon_bytes / 1e9,
        "peak GB with the file": run.peak_rss_bytes / 1e9,
        "seconds": run.wall_s,
    }


def layer_times(work: Path, with_peers: bool, threads: int) -> list[dict[str, Any]]:
    """Seconds of GPTQ for a layer, ours first: the difference of more layers and fewer, on the same tokens."""
    sequences = np.random.default_rng(0).integers(0, 1000, (MOST // CONTEXT, CONTEXT)).tolist()
    checkpoints = {
        layers: write_checkpoint(
            work / f"layers-{layers}", CONFIGS[SHAPE] | _SMALL_HEAD | {"num_hidden_layers": layers}
        )
        for layers in (FEW, MORE)
    }
    torch.set_num_threads(threads)
    took = {"gochu": {layers: _ours(folder, sequences) for layers, folder in checkpoints.items()}}
    if with_peers:
        for dtype in ("auto", "float32"):  # the checkpoint's, which is bfloat16, and what ours computes in
            task = peers.Task(4, 128, dtype=dtype)
            took[f"llm-compressor, {'bfloat16' if dtype == 'auto' else dtype}"] = {
                layers: peers.seconds(
                    "llm-compressor", folder, sequences, task, work / f"peer-{layers}-{dtype}", threads
                )
                for layers, folder in checkpoints.items()
            }
    whole = CONFIGS[SHAPE]["num_hidden_layers"]
    return [
        {
            "quantizer": name,
            "shape": f"{SHAPE}, {MOST} tokens, {SCHEME}",
            "s a layer": (layer := (found[MORE] - found[FEW]) / (MORE - FEW)),
            f"minutes for {whole} layers": layer * whole / 60,
        }
        for name, found in took.items()
    ]


def _ours(checkpoint: Path, sequences: list[list[int]]) -> float:
    rules = (Rule(match="embedding", scheme="fp32"), Rule(match="*", scheme=SCHEME, algorithm="gptq"))
    with open_checkpoint(checkpoint) as source, tempfile.TemporaryDirectory() as folder:
        decisions = Recipe(name="measured", rules=rules).resolve(source.architecture)
        start = time.perf_counter()
        quantize_layers(source, decisions, sequences, CONTEXT, Staging(Path(folder), ""))
        return time.perf_counter() - start
