"""How much of each family an Exynos NPU would compute, with and without Gochu's rewrites: a prediction.

Arithmetic over shapes against the operator table of ExecuTorch's Samsung backend, for one token at a context of
1024 (or the model's own length); nothing is exported, and no chip has run it.

    python benchmarks/exynos_precheck.py --check
"""

import argparse

from common import Bound, finish, table
from random_checkpoint import CONFIGS

from exporter.architecture import Architecture, read_architecture
from exporter.checkpoint import open_checkpoint
from exporter.npu.exynos import CONTEXT, precheck

CHIP = "E9965"  # Exynos 2600
# config.json of https://huggingface.co/google/gemma-2-2b
GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "head_dim": 256,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 26,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
MODELS = ("Llama-3.2-1B", "Qwen2.5-0.5B", "Phi-3-mini-4k")


def architectures() -> dict[str, Architecture]:
    """pepper, and one model of each family."""
    with open_checkpoint("pepper") as checkpoint:
        found = {"pepper": checkpoint.architecture}
    found |= {name: read_architecture(CONFIGS[name]) for name in MODELS}
    return found | {"gemma-2-2b": read_architecture(GEMMA)}


def row(name: str, arch: Architecture, rewrites: bool) -> dict[str, str | int | float]:
    """What the NPU would compute."""
    report = precheck(arch, CHIP, context=min(CONTEXT, arch.context), rewrites=rewrites)
    left = ", ".join(sorted(each.target.removesuffix(".default") for each in report.left))
    return {
        "model": name,
        "rewrites": "yes" if rewrites else "no",
        "ops, %": 100 * report.ops_on / report.ops,
        "MACs, %": 100 * report.macs_share,
        "weights, %": 100 * report.bytes_share,
        "graphs": report.pieces,
        "in and out, MB": report.passed_bytes / 1e6,
        "left on the CPU": left or "-",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    arguments = parser.parse_args()
    rows = [row(name, arch, rewrites) for name, arch in architectures().items() for rewrites in (False, True)]
    table(f"What the NPU of {CHIP} would compute (a prediction)", rows)
    bounds = [
        Bound(f"{each['model']}: MACs in % with rewrites", float(each["MACs, %"]), 99, at_least=True)
        for each in rows
        if each["rewrites"] == "yes"
    ]
    finish({"benchmark": "exynos_precheck", "chip": CHIP, "models": rows}, bounds, arguments.check)


if __name__ == "__main__":
    main()
