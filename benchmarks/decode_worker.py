"""Time greedy generation with one runtime in this process; print the seconds as JSON. Used by decode_onnx.py.

A process of its own, because idle threads of one runtime's pool spin and would slow the other's down.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np


def genai(folder: Path, threads: int, prompt: list[int], new: int) -> Iterator[tuple[float, float]]:
    """Seconds that onnxruntime-genai takes, again and again: to the first token, for `new` tokens after it."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + new + 1, do_sample=False)
    ids = np.array(prompt, np.int32)
    while True:
        generator = og.Generator(model, params)
        start = perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        yield first - start, perf_counter() - first


def gochu(folder: Path, threads: int, prompt: list[int], new: int) -> Iterator[tuple[float, float]]:
    """The same with Gochu's engine."""
    from runtimes.bundle import Bundle
    from runtimes.engines import open_engine
    from runtimes.sampling import Sampler, Sampling

    engine = open_engine(Bundle.open(folder), context=len(prompt) + new + 1, threads=threads)
    sampler = Sampler(Sampling())
    while True:
        engine.reset()
        start = perf_counter()
        token = sampler.pick(engine.prefill(prompt))
        first = perf_counter()
        for _ in range(new):
            token = sampler.pick(engine.decode(token))
        yield first - start, perf_counter() - first


RUNTIMES = {"genai": genai, "gochu": gochu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--new", type=int, required=True, help="tokens to generate after the first")
    parser.add_argument(
        "--repeats", type=int, required=True, help="measured ones; one more goes before to warm up"
    )
    parser.add_argument("--vocabulary", type=int, required=True, help="prompt tokens are drawn from so many")
    a = parser.parse_args()
    prompt = np.random.default_rng(0).integers(0, a.vocabulary, a.prompt).tolist()
    runs = RUNTIMES[a.runtime](a.folder, a.threads, prompt, a.new)
    next(runs)
    measured = [next(runs) for _ in range(a.repeats)]
    print(json.dumps({"prefill_s": [p for p, _ in measured], "decode_s": [d for _, d in measured]}))


if __name__ == "__main__":
    main()
