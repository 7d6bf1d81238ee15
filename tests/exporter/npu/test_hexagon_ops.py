"""The program for Hexagon: its steps, and what Qualcomm's compiler and simulator make of the graphs.

The simulator's part takes about a minute, in processes of its own, and is skipped where onnxruntime-qnn is absent.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.checkpoint import open_checkpoint
from exporter.formats.onnx_qdq import write_qdq
from exporter.npu.hexagon_ops import CACHE_BITS, EMBEDDING, HexagonOps, steps
from exporter.npu.hexagon_torch import calibrate
from exporter.quantization.recipe import find_recipe
from exporter.quantization.weights import QuantizedWeights

CONTEXT, CHUNK = 64, 16
CHIPS = {
    "v69": ("36", "69"),
    "v73": ("43", "73"),
    "v75": ("57", "75"),
    "v79": ("69", "79"),
    "v81": ("87", "81"),
}
htp = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None,
    reason="onnxruntime-qnn, which holds Qualcomm's compiler and simulator, is not installed",
)


class Names:
    """A `hexagon_ops.Graph` on names of steps."""

    def __init__(self):
        self.computed, self.inputs, self.outputs = [], {}, {}

    def input(self, name, shape, step, bits=16):
        self.inputs[name] = (tuple(shape), step, bits)
        return step

    def output(self, name, value, shape):
        self.outputs[name] = (value, tuple(shape))

    def op(self, kind, *inputs, step, within=None, **attributes):
        self.computed.append((kind, step))
        return step

    def product(self, x, weight, step):
        return self.op("MatMul", x, step=step)

    def narrow(self, x, step, bits):
        assert bits == CACHE_BITS
        return step

    def vector(self, name):
        return name

    def number(self, value):
        assert value > 0
        return "number"

    def rope_rows(self, table, factor, shape):
        return table

    def reshape(self, x, shape):
        return x

    def transpose(self, x, order):
        return x

    def slice(self, x, start, stop, axis=3):
        return x

    def concat(self, values, axis):
        assert len(set(values)) == 1  # of one range
        return values[0]


def named(arch, length, layers=None, head=True):
    graph = Names()
    HexagonOps(graph, arch, length=length, context=CONTEXT).run(layers or range(arch.layers), head)
    return graph


def test_steps_are_named_alike_whatever_the_length(family, checkpoints):
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        arch = checkpoint.architecture
    one, many = named(arch, 1), named(arch, CHUNK)
    assert one.computed == many.computed
    assert {name: spec[1:] for name, spec in one.inputs.items()} == {
        n: spec[1:] for n, spec in many.inputs.items()
    }
    assert [name for name in one.outputs if name != "logits"] == [
        f"present.{i}.{part}" for i in range(arch.layers) for part in ("key", "value")
    ]
    assert one.outputs["logits"] == ("logits.capped" if arch.final_softcap else "logits", (1, 1, arch.vocab))


def test_a_part_goes_on_where_the_one_before_ended(checkpoints):
    with open_checkpoint(checkpoints.folder("gemma2")) as checkpoint:
        arch = checkpoint.architecture
    first, last = named(arch, 1, range(2), False), named(arch, 1, range(2, 3))
    assert first.inputs["hidden"][1] == EMBEDDING
    assert first.outputs["hidden_out"] == (steps(1).hidden, (1, 1, arch.hidden))
    assert last.inputs["hidden"] == ((1, 1, arch.hidden), steps(1).hidden, 16)
    assert set(last.inputs) == {"hidden", "mask.8", "past_key_values.2.key", "past_key_values.2.value"}
    assert first.computed + last.computed == named(arch, 1).computed


def test_the_embedding_is_not_in_the_program(checkpoints):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        ops = HexagonOps(Names(), checkpoint.architecture, length=1, context=CONTEXT)
    with pytest.raises(NotImplementedError, match="looked up outside"):
        ops.embed("tokens", "embedding")


# on the chip


def simulate(chip, graph, calls, folder):
    """Outputs of each call, and which provider has which operators; AssertionError with the compiler's words."""
    job = folder / f"{graph.stem}-{chip}.npz"
    np.savez(
        job, graph=str(graph), **{f"{i}.{k}": v for i, call in enumerate(calls) for k, v in call.items()}
    )
    script = Path(__file__).with_name("htp_run.py")
    done = subprocess.run(
        [sys.executable, script, *CHIPS[chip], job], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(f"{job}.out.npz") as file:
        results = [
            {k.partition(".")[2]: v for k, v in file.items() if k.startswith(f"{i}.")}
            for i in range(len(calls))
        ]
    return results, json.loads(done.stdout.splitlines()[-1])


def model(source, recipe, folder, qdq_engine):
    """The engine on the CPU, after a prompt of a chunk and a half and two tokens more."""
    with open_checkpoint(source) as checkpoint:
        arch = checkpoint.architecture
        weights = QuantizedWeights(checkpoint, recipe.resolve(arch))
        ids = np.random.default_rng(0).integers(3, 512, 28).tolist()
        found = calibrate(arch, weights, [ids, ids[::-1]], CONTEXT, CHUNK)
        entries = write_qdq(arch, weights, found, CONTEXT, folder, CHUNK)
        engine = qdq_engine(folder, entries, weights.matrix("embedding"), arch.embedding_scale)
    engine.prefill(ids[:25])
    for token in ids[25:27]:
        engine.decode(token)
    return entries, engine


@htp
@pytest.mark.parametrize("chip", ["v69", "v75"])
def test_the_chip_says_what_the_cpu_says(family, chip, checkpoints, tmp_path, qdq_engine):
    recipe = find_recipe("hexagon-w4a16" if family in ("qwen2", "phi3-partial-rotary") else "hexagon-w8a16")
    entries, engine = model(checkpoints.folder(family), recipe, tmp_path, qdq_engine)
    for entry in entries:
        calls = [inputs for name, inputs in engine.calls if name == entry.name]
        results, assigned = simulate(chip, tmp_path / entry.file, calls, tmp_path)
        assert list(assigned) == ["QNNExecutionProvider"]
        for call, result in zip(calls, results, strict=True):
            for spec, theirs in zip(entry.outputs, engine._run(entry, call), strict=True):
                off = np.abs(result[spec.name].astype(int) - theirs)
                if spec.name != "logits":
                    assert off.max() <= 8  # of 255
                    assert off.mean() < 1
                if spec.name == "logits":
                    assert np.corrcoef(result["logits"].ravel(), theirs.ravel())[0, 1] >= 0.999
                    first, second = np.sort(theirs.ravel())[[-1, -2]].astype(int)
                    if first - second > 2 * off.max():
                        assert result["logits"].argmax() == theirs.argmax()
