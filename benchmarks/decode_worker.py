"""Generate greedily with one runtime, on command: what the benchmarks of generation measure, a process for each.

Two runtimes in one process would disturb each other: idle threads of a pool spin. A process that waits for
its next command is quiet, so several can be loaded at once and run in turns. Each line on standard input is
answered with the seconds that it took: `prefill` (the prompt, to the first token), `decode` (more tokens).
"""

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from runtimes.quiet import quiet


class Runtime(Protocol):
    """A loaded model; both verbs return seconds."""

    def prefill(self, prompt: list[int]) -> float:
        """Begin anew: run the prompt, choose the first token."""

    def decode(self, tokens: int) -> float:
        """Go on: run the last token and choose the next one, so many times."""


class Genai:
    """onnxruntime-genai; what differs is laid over its config, the folder stays as it is.

    The generation may not end before the context does (`min_length`): after an end, genai runs the same
    position again and again, which is quicker than going on.
    """

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._params = og.GeneratorParams(self._model)
        self._params.set_search_options(max_length=context, min_length=context, do_sample=False)
        self._new: Any = og.Generator
        self._generator: Any = None

    def prefill(self, prompt: list[int]) -> float:
        ids = np.array(prompt, np.int32)
        self._generator = self._new(self._model, self._params)
        start = perf_counter()
        self._generator.append_tokens(ids)
        self._generator.generate_next_token()
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        before = self._generator.token_count()
        start = perf_counter()
        for _ in range(tokens):
            self._generator.generate_next_token()
        seconds = perf_counter() - start
        if self._generator.token_count() != before + tokens:
            raise SystemExit("onnxruntime-genai ended the generation early: what it took says nothing")
        return seconds


class Gochu:
    """Gochu's engine and sampler."""

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        from runtimes.bundle import Bundle
        from runtimes.engines import open_engine
        from runtimes.sampling import Sampler, Sampling

        self._engine = open_engine(Bundle.open(folder), context=context, threads=threads)
        self._sampler = Sampler(Sampling())
        self._token = 0

    def prefill(self, prompt: list[int]) -> float:
        ids = np.array(prompt, np.int64)  # as above: a list's conversion is not what is measured
        self._engine.reset()
        start = perf_counter()
        self._token = self._sampler.pick(self._engine.prefill(ids))
        return perf_counter() - start

    def decode(self, tokens: int) -> float:
        start = perf_counter()
        for _ in range(tokens):
            self._token = self._sampler.pick(self._engine.decode(self._token))
        return perf_counter() - start


class ExecuTorchRunner:
    """ExecuTorch's TextLLMRunner, on a folder with model.pte and tokenizer.json.

    It takes text, so its prompt is a character that is a token of its own, repeated. It goes on where it ended:
    `decode` gives it one token to begin with, which costs what a step costs. Its callback for text is not used:
    it fails on a part of a UTF-8 character.
    """

    TOKEN = "#"

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        # Attention calls torch's MKL, which would start threads of its own inside each of the pool's. Only what is
        # said before OpenMP is loaded holds for all threads: torch.set_num_threads would for this one alone.
        os.environ["OMP_NUM_THREADS"] = "1"
        from runtimes.engines.executorch import import_runtime

        runtime = import_runtime()  # registers the kernels
        with quiet():
            from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

            runtime._unsafe_reset_threadpool(threads)  # the one that all programs of a process share
            self._runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
        self._config: Any = GenerationConfig

    def prefill(self, prompt: list[int]) -> float:
        self._runner.reset()
        return self._generate(len(prompt), 1)

    def decode(self, tokens: int) -> float:
        return self._generate(1, tokens)

    def _generate(self, given: int, new: int) -> float:
        config = self._config(echo=False, max_new_tokens=new, temperature=0)
        found: list[Any] = []
        with quiet():  # it has much to say
            start = perf_counter()
            self._runner.generate(self.TOKEN * given, config, None, found.append)
            seconds = perf_counter() - start
        stats = found[-1]
        done = stats.num_prompt_tokens, stats.num_generated_tokens + 1  # it does not count the first
        if done != (given, new):
            raise SystemExit(f"ExecuTorch's runner did something else than it was told: {stats}")
        return seconds


RUNTIMES: dict[str, type[Genai] | type[Gochu] | type[ExecuTorchRunner]] = {
    "genai": Genai,
    "gochu": Gochu,
    "executorch-runner": ExecuTorchRunner,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True, help="prompt tokens are drawn from so many")
    parser.add_argument("--prompt", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, required=True, help="tokens for each `decode`")
    parser.add_argument("--context", type=int, required=True, help="tokens to make room for")
    a = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "wb") as nowhere:  # a runner prints what it generates
        os.dup2(nowhere.fileno(), 1)
    prompt = np.random.default_rng(0).integers(0, a.vocabulary, a.prompt).tolist()
    runtime: Runtime = RUNTIMES[a.runtime](a.folder, a.threads, a.context)
    for line in sys.stdin:
        seconds = runtime.prefill(prompt) if line.strip() == "prefill" else runtime.decode(a.tokens)
        print(seconds, file=answers)


if __name__ == "__main__":
    main()
