"""ExecuTorch's own LLM runner opens a bundle's program and says the same; executorch's own lowering of the decoder,
through torch.export and its XNNPACK partitioner, computes the same to the bit."""

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("executorch", reason="executorch is not installed")

from exporter.checkpoint import open_checkpoint
from exporter.formats import find_delegate
from exporter.pepper.questions import held_out
from exporter.quantization.recipe import Recipe
from exporter.quantization.weights import QuantizedWeights
from runtimes.bundle import Choice
from runtimes.engines.executorch import ExecuTorchEngine
from runtimes.generate import load

# The runner writes the answer to standard output as bytes; its callback would fail on half a Korean character.
RUNNER = """
import json, sys
import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

program, tokenizer = sys.argv[1:3]
runner = TextLLMRunner(program, tokenizer)
for prompt in json.load(sys.stdin):
    stats = []
    config = GenerationConfig(echo=False, temperature=0.0, max_new_tokens=40)
    print("\\x01", end="", flush=True)
    runner.generate(prompt, config, None, stats.append)
    print(f"\\x02{stats[0].num_prompt_tokens}", end="", flush=True)
    runner.reset()
"""


def theirs(bundle: Any, prompts: list[str]) -> list[tuple[str, int]]:
    """Greedy answers of the official runner, with the number of tokens that it made of each prompt."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, bundle.file("model.pte"), bundle.file("tokenizer.json")],
        input=json.dumps(prompts).encode(),
        capture_output=True,
        check=True,
    )
    answers = []
    for said in done.stdout.decode().split("\x01")[1:]:
        answer, _, count = said.partition("\x02")
        answers.append((re.sub(r"\n?PyTorchObserver \{.*\}\n", "", answer), int(count)))
    return answers


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_the_official_runner_gives_the_same_answers(scheme, bundles):
    bundle = bundles("pepper", scheme, 512, "executorch")
    questions = [question.prompt for question in held_out(60)]
    assert any("가" <= letter <= "힣" for question in questions for letter in question)
    with load(bundle.path, threads=1) as model:
        assert model.template is not None
        rendered = [model.template.render([{"role": "user", "content": text}]) for text in questions]
        ours = [model.generate(text, max_tokens=40) for text in questions]
        end = model.tokenizer.token(bundle.manifest.tokens.eos[0])
    found = theirs(bundle, rendered)
    assert [answer.rstrip("\n").removesuffix(end) for answer, _ in found] == [answer.text for answer in ours]
    assert [count for _, count in found] == [answer.prompt_tokens for answer in ours]
    assert all(answer.finish_reason == "stop" for answer in ours)


def test_the_official_runner_feeds_long_prompts_in_chunks(bundles, monkeypatch):
    monkeypatch.setattr("exporter.formats.executorch.CHUNK", 16)
    bundle = bundles("pepper", "int4", 256, "executorch")
    with load(bundle.path, threads=1) as model:
        assert model.template is not None
        messages = [
            {"role": "user", "content": "23 더하기 45는?"},
            {"role": "assistant", "content": "68이에요."},
            {"role": "user", "content": "삼백이십을 숫자로 쓰면?"},
        ]
        prompt = model.template.render(messages)
        assert len(model.tokenizer.encode(prompt, add_special=False)) > 2 * 16
        ours = model.generate(messages, max_tokens=40)
        end = model.tokenizer.token(bundle.manifest.tokens.eos[0])
    ((answer, count),) = theirs(bundle, [prompt])
    assert (answer.rstrip("\n").removesuffix(end), count) == (ours.text, ours.prompt_tokens)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("qwen2-window-yarn", "int4"), ("llama-biases", "int8"), ("phi3-partial-rotary", "fp32")],
)
def test_executorchs_own_lowering_computes_the_same_bits(name, scheme, checkpoints, tmp_path):
    """The slow way: minutes for a real model, so this is what it is kept for."""
    from exporter.formats.executorch import PROGRAM, write_executorch
    from exporter.formats.executorch_traced import write_traced

    methods = {"get_max_seq_len": 64}
    choice = Choice(topic="variant", value="test", reason="a test")
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, 512, 40)]
    logits = []
    with open_checkpoint(checkpoints.folder(name)) as checkpoint:
        arch = checkpoint.architecture
        decisions = Recipe.uniform(scheme).resolve(arch, find_delegate("xnnpack").fit)
        weights = QuantizedWeights(checkpoint, decisions)
        write_executorch(arch, weights, 64, tmp_path, methods)
        entry, _ = write_traced(arch, weights, 64, tmp_path, "xnnpack", methods)
        assert entry.file != PROGRAM
        for file in (PROGRAM, entry.file):
            engine = ExecuTorchEngine(tmp_path / file, choice, context=64, vocab=arch.vocab, threads=1)
            rows = [engine.prefill(tokens[:11]), engine.prefill(tokens[11:20])]
            logits.append(np.stack([*rows, *(engine.decode(token) for token in tokens[20:])]))
    assert np.ptp(logits[0]) > 1
    np.testing.assert_array_equal(logits[0], logits[1])
