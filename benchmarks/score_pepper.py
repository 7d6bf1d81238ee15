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

CASES = {
    "onnx": ("fp32", "fp16", "int8", "int4", "int4-g128"),
    "executorch": ("fp32", "int8", "int4", "int4-g128"),
}
FLOAT_RATE, INT8_LOSS, INT4_LOSS = 98.0, 1.0, 3.0  # percent, points, points


def measure(format: str, scheme: str, folder: Path, questions: int) -> dict[str, str | float]:
    """Export pepper (gate and all), ask, count."""
    bundle = exporter.export("pepper", folder / f"{format}-{scheme}", scheme=scheme, format=format)
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
    """What a format may lose."""
    rates = {row["scheme"]: float(row["held out, %"]) for row in rows if row["format"] == format}
    return [
        Bound(f"{format}: float, exact answers in %", rates["fp32"], FLOAT_RATE, at_least=True),
        Bound(f"{format}: points lost by int8", rates["fp32"] - rates["int8"], INT8_LOSS),
        Bound(f"{format}: points lost by int4", rates["fp32"] - rates["int4"], INT4_LOSS),
    ]


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
