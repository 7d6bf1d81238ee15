"""What each scheme costs, in answers: pepper exported in every format and scheme, asked what it was never trained on.

python benchmarks/score_pepper.py --check
"""

import argparse
import tempfile
from pathlib import Path

from common import Bound, finish, table

import exporter
import runtimes
from exporter.pepper.questions import held_out, memorized
from exporter.pepper.score import score

CASES = {  # format or delegate -> schemes
    "onnx": ("fp32", "fp16", "int8", "int4", "int4-g128"),
    "executorch": ("fp32", "int8", "int4", "int4-g128"),
    "coreml gpu": ("fp16", "int8", "int4"),
    "coreml ane": ("fp16", "int8", "pal4-g8", "pal6-g16"),
}
FLOAT_RATE, INT8_LOSS, INT4_LOSS = 98.0, 1.0, 3.0  # percent, points, points


def measure(format: str, scheme: str, folder: Path, questions: int) -> dict[str, str | float]:
    """Export pepper (gate and all), ask, count."""
    name, _, delegate = format.partition(" ")
    bundle = exporter.export(
        "pepper", folder / f"{format}-{scheme}", scheme=scheme, format=name, delegate=delegate or None
    )
    asked = {"held out": held_out(questions), "by heart": memorized()}
    with runtimes.load(bundle.path) as model:
        results = {
            name: score(lambda prompt: model.generate(prompt, max_tokens=32).text, some)
            for name, some in asked.items()
        }
    rates = {f"{name}, %": 100 * result.overall.rate for name, result in results.items()}
    languages = {f"{name}, %": 100 * tally.rate for name, tally in results["held out"].by_language.items()}
    return {"format": format, "scheme": scheme, "MB": bundle.size() / 1e6, **rates, **languages}


def promises(format: str, rows: list[dict[str, str | float]]) -> list[Bound]:
    """What a format may lose of what pepper knows in float."""
    rates = {row["scheme"]: float(row["held out, %"]) for row in rows if row["format"] == format}
    best = rates.get("fp32", rates.get("fp16", 0.0))
    found = [Bound(f"{format}: float, exact answers in %", best, FLOAT_RATE, at_least=True)]
    for scheme, rate in rates.items():
        if not scheme.startswith("fp"):
            most = INT8_LOSS if scheme in ("int8", "pal6-g16") else INT4_LOSS
            found.append(Bound(f"{format}: points lost by {scheme}", best - rate, most))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--questions", type=int, default=1400, help="how many held-out questions")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = [
            measure(format, scheme, Path(work), arguments.questions)
            for format, schemes in CASES.items()
            for scheme in schemes
        ]
    table(f"pepper's exact answers to {arguments.questions} held-out questions", rows)
    bounds = [bound for format in CASES for bound in promises(format, rows)]
    finish(
        {"benchmark": "score_pepper", "questions": arguments.questions, "schemes": rows},
        bounds,
        arguments.check,
    )


if __name__ == "__main__":
    main()
