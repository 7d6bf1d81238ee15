"""pepper on Qualcomm's NPU, in answers: every route and chip generation, asked in Qualcomm's simulator.

Each chip in a process of its own, beside the CPU's variant of the same integers and the float model. The simulator's
time says nothing of a phone's.

    python benchmarks/score_hexagon.py --check
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Bound, finish, run_or_stop, table

CHIPS = {"sm8450": "v69", "sm8550": "v73", "sm8650": "v75", "sm8750": "v79", "sm8850": "v81"}
# How it is asked for: on which chips, what it is held against, and points that it may lose.
CASES: dict[str, tuple[tuple[str, ...], str, float]] = {
    "int4": (("sm8550", "sm8650", "sm8750", "sm8850"), "CPU, same integers", 1.0),
    "hexagon-w8a16": (tuple(CHIPS), "float", 1.0),
    "hexagon-w4a16": (tuple(CHIPS), "float", 2.0),
}
CONTEXT = 128  # tokens: pepper's questions are short


def gochu(*arguments: object) -> str:
    """Run a command; what it printed."""
    command = [str(Path(sys.executable).with_name("gochu")), *map(str, arguments)]
    return run_or_stop(command).stdout


def rate(bundle: Path, questions: int, *options: str) -> float:
    """Exact answers in percent."""
    found = json.loads(gochu("score", bundle, "--questions", questions, "--json", *options))
    return 100 * float(found["right"]) / float(found["asked"])


def measure(work: Path, asked: str, questions: int, processes: int) -> list[dict[str, Any]]:
    """Export for all chips, then ask each; a row for each."""
    chips, against, _ = CASES[asked]
    bundle = work / asked
    option = "--recipe" if asked.startswith("hexagon") else "--scheme"
    gochu(
        *("export", "pepper", "--delegate", "hexagon", "--chips", ",".join(chips), option, asked),
        *("--context", CONTEXT, "-o", bundle),
    )
    variants = {
        v["chips"][0]: v
        for v in json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["variants"]
        if v["chips"]
    }
    if against == "float":
        gochu("export", "pepper", "--scheme", "fp32", "--format", "onnx", "-o", work / "float", "--force")
        base = rate(work / "float", questions)
    else:
        base = rate(bundle, questions)

    def ask(chip: str) -> float:
        return rate(bundle, questions, "--on", "htp-simulator", "--variant", variants[chip]["name"])

    with ThreadPoolExecutor(processes) as pool:
        rates = list(pool.map(ask, chips))
    return [
        {
            "asked": asked,
            "chip": f"{chip} ({CHIPS[chip]})",
            "on the NPU, % of operations": 100
            * variants[chip]["residency"]["ops_on"]
            / variants[chip]["residency"]["ops"],
            "exact, %": found,
            against: base,
            "points lost": base - found,
        }
        for chip, found in zip(chips, rates, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--questions", type=int, default=200, help="how many held-out questions")
    parser.add_argument("--processes", type=int, default=1, help="chips that are simulated at once")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    rows, bounds = [], []
    with tempfile.TemporaryDirectory() as work:
        for asked in arguments.cases:
            found = measure(Path(work), asked, arguments.questions, arguments.processes)
            table(f"pepper on Hexagon, {asked}: {arguments.questions} questions", found)
            rows += found
    for row in rows:
        name = f"{row['asked']} on {row['chip']}"
        bounds.append(Bound(f"{name}: points lost", row["points lost"], CASES[row["asked"]][2]))
        bounds.append(
            Bound(f"{name}: % of operations", row["on the NPU, % of operations"], 100.0, at_least=True)
        )
    finish(
        {"benchmark": "score_hexagon", "questions": arguments.questions, "rows": rows},
        bounds,
        arguments.check,
    )


if __name__ == "__main__":
    main()
