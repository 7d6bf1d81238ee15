"""The ExecuTorch program against the reference on the integers read back from its file."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("executorch", reason="executorch is not installed")

from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType

from exporter.architecture import Architecture
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import RecipeError
from exporter.formats import FORMATS
from exporter.formats.executorch import CHUNK, PROGRAM, write_executorch
from exporter.formats.executorch_method import Method
from exporter.formats.executorch_pte import PteReader
from exporter.formats.executorch_runner import runner_methods
from exporter.formats.executorch_weights import ExecuTorchWeights
from exporter.quantization.recipe import Recipe, Rule
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import vector_digest
from exporter.quantization.weights import FloatWeights, QuantizedWeights
from exporter.torch_ops import TorchOps
from runtimes.bundle import Choice, Residency, TensorReport, Tokens
from runtimes.engines.executorch import ExecuTorchEngine
from runtimes.errors import BundleError

CONTEXT = 64
SCHEMES = ("fp32", "int8", "int4", "int4-g64")
FLOAT = 1e-5  # of the logits' range; 3e-6 is the largest seen
TOKENS = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(3))
CHOICE = Choice(topic="variant", value="test", reason="a test")


def write(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path, context: int = CONTEXT
) -> tuple[dict[str, TensorReport], Residency]:
    """Write the program; returns the quantizer's reports, and what XNNPACK computes."""
    arch = checkpoint.architecture
    weights = QuantizedWeights(checkpoint, recipe.resolve(arch, FORMATS["executorch"].fit))
    methods = runner_methods(arch, Tokens(bos=0, eos=(1, 2)), context, min(CHUNK, context))
    _, residency = write_executorch(arch, weights, context, folder, methods)
    return {report.name: report for report in weights.reports}, residency


def engine(folder: Path, arch: Architecture, context: int = CONTEXT) -> ExecuTorchEngine:
    return ExecuTorchEngine(folder / PROGRAM, CHOICE, context=context, vocab=arch.vocab, threads=1)


def reference(checkpoint: Checkpoint, weights: Any, rounded: int | None, context: int = CONTEXT) -> TorchOps:
    return TorchOps(checkpoint.architecture, weights, context, rounded=rounded, engine="executorch")


def in_pieces(run: Any, tokens: torch.Tensor = TOKENS) -> np.ndarray:
    """Logits after prefills of 11 and 9 tokens, and after single ones: [steps, vocab]."""
    pieces: Iterable[torch.Tensor] = [tokens[:, :11], tokens[:, 11:20], *tokens[:, 20:].split(1, 1)]
    return np.stack([np.asarray(run(piece)) for piece in pieces])


def ours(found: ExecuTorchEngine) -> np.ndarray:
    return in_pieces(lambda piece: found.prefill(piece[0].tolist()))


def theirs(ops: TorchOps) -> np.ndarray:
    return in_pieces(lambda piece: ops.run(piece)[0, -1])


def errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Largest error at each step, as a share of the logits' range."""
    return np.abs(ours - theirs).max(-1) / (theirs.max() - theirs.min())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_program_agrees_with_the_reference(family, scheme, checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        arch = checkpoint.architecture
        reports, residency = write(checkpoint, Recipe.uniform(scheme), tmp_path)
        stored = ExecuTorchWeights(tmp_path / PROGRAM, arch)
        assert set(reports) == {n for n, _ in arch.matrices()} | {n for n, _ in arch.vectors()}
        for name, report in reports.items():
            digest = (
                vector_digest(stored.vector(name)) if len(report.shape) == 1 else stored.matrix(name).digest()
            )
            assert digest == report.digest, name
        exact = theirs(reference(checkpoint, stored, 0))
        rounded = theirs(reference(checkpoint, stored, None))
        as_it_runs = ours(engine(tmp_path, arch))
        noise = errors(rounded, exact)
        assert noise.any() == (scheme != "fp32")
        off = errors(as_it_runs, rounded)
        if scheme == "fp32":
            assert off.max() < FLOAT
        else:
            # As for ONNX: the same rounding until a value beside a rounding boundary falls to the other side.
            # The first run holds 11 tokens, each with its own roundings, so even it need not be without one.
            assert off.max() < 2 * noise.max()
            assert off.mean() < noise.mean()
        twin = tmp_path / "twin"
        twin.mkdir()
        methods = runner_methods(arch, Tokens(eos=(1,)), CONTEXT, CONTEXT)
        write_executorch(arch, FloatWeights(stored, arch), CONTEXT, twin, methods)
        assert errors(ours(engine(twin, arch)), exact).max() < FLOAT
    assert residency.macs_on > residency.macs // 2
    assert not {"aten::linear", "aten::bmm", "aten::mm"} & set(residency.elsewhere)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_activations_are_rounded_as_xnnpack_does(scheme, checkpoints, tmp_path):
    """One token, one layer's first products: nothing has been rounded before, so all must be the same."""
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        write(checkpoint, Recipe.uniform(scheme), tmp_path)
        stored = ExecuTorchWeights(tmp_path / PROGRAM, checkpoint.architecture)
        found = engine(tmp_path, checkpoint.architecture)
        off = []
        for token in range(40):
            found.reset()
            rounded = reference(checkpoint, stored, None).run(torch.tensor([[token]]))[0, -1].numpy()
            off.append(errors(found.prefill([token])[None], rounded[None])[0])
        assert np.median(off) < 1e-6  # with another rounding, no token agrees
        exact = reference(checkpoint, stored, 0).run(torch.tensor([[0]]))[0, -1].numpy()
        found.reset()
        assert errors(found.prefill([0])[None], exact[None])[0] > 1e-4


def test_a_tied_head_is_stored_once(checkpoints, tmp_path):
    sizes = {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        checkpoints.write(folder / "checkpoint", "llama-llama3-rope", tie_word_embeddings=tied)
        with open_checkpoint(folder / "checkpoint") as checkpoint:
            write(checkpoint, Recipe.uniform("int4"), folder)
        sizes[tied] = (folder / PROGRAM).stat().st_size
    assert sizes[False] - sizes[True] > 0.95 * 512 * 128 // 2  # less the nodes that swap the head's inputs


def test_tensors_may_differ_in_scheme(checkpoints, tmp_path):
    rules = (
        Rule(match="layers.1.*", scheme="fp32"),
        Rule(match="*.mlp.down", scheme="int8"),
        Rule(match="*", scheme="int4"),
    )
    with open_checkpoint(checkpoints.folder("qwen2-window-yarn")) as checkpoint:
        write(checkpoint, Recipe(name="mixed", rules=rules), tmp_path)
        stored = ExecuTorchWeights(tmp_path / PROGRAM, checkpoint.architecture)
        found = {name: stored.scheme(name).name for name, _ in checkpoint.architecture.matrices()}
        assert found["layers.1.mlp.down"] == "fp32"
        assert found["layers.0.mlp.down"] == "int8-channel"
        assert found["embedding"] == found["head"] == "int4"
        rounded = theirs(reference(checkpoint, stored, None))
        noise = errors(rounded, theirs(reference(checkpoint, stored, 0)))
        assert errors(ours(engine(tmp_path, checkpoint.architecture)), rounded).max() < 2 * noise.max()


def test_a_long_prompt_goes_through_in_chunks(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.formats.executorch.CHUNK", 16)
    with open_checkpoint(checkpoints.folder("gemma2")) as checkpoint:
        arch = checkpoint.architecture
        weights = QuantizedWeights(checkpoint, Recipe.uniform("fp32").resolve(arch))
        methods = runner_methods(arch, Tokens(eos=(1,)), CONTEXT, 16)
        write_executorch(arch, weights, CONTEXT, tmp_path, methods)
        found = engine(tmp_path, arch).prefill(TOKENS[0].tolist())
        expected = reference(checkpoint, weights, 0).run(TOKENS)[0, -1].numpy()
        assert errors(found[None], expected[None])[0] < FLOAT


def test_the_same_plan_writes_the_same_bytes(checkpoints, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open_checkpoint(checkpoints.folder("gemma2")) as checkpoint:
            write(checkpoint, Recipe.uniform("int4"), tmp_path / name)
        written.append((tmp_path / name / PROGRAM).read_bytes())
    assert written[0] == written[1]


def test_other_weights_have_other_keys(checkpoints, tmp_path):
    """XNNPACK's cache of packed weights goes by the keys, for all programs of a process."""
    keys = []
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        model = checkpoints.write(folder / "checkpoint", "qwen2")
        model.model.layers[0].mlp.up_proj.weight.data += seed
        model.save_pretrained(folder / "checkpoint")
        with open_checkpoint(folder / "checkpoint") as checkpoint:
            write(checkpoint, Recipe.uniform("int8"), folder)
        keys.append(set(PteReader(folder / PROGRAM).names()))
    changed = {key.partition(":")[0] for key in keys[0] - keys[1]}
    assert changed == {"layers.0.mlp.up"}


def test_the_runner_is_told_all_it_asks(checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        write(checkpoint, Recipe.uniform("int4"), tmp_path)
    plans = {plan.name: plan for plan in PteReader(tmp_path / PROGRAM).program.execution_plan}

    def returned(name: str) -> list[Any]:
        return [next(iter(vars(plans[name].values[index].val).values())) for index in plans[name].outputs]

    assert returned("get_eos_ids") == [1, 2]
    assert (returned("get_bos_id"), returned("get_max_context_len")) == ([0], [CONTEXT])
    assert returned("use_kv_cache") == [True]


def test_fp16_is_refused():
    with pytest.raises(RecipeError, match="fp16 is none of them: use int8 or fp32"):
        FORMATS["executorch"].fit(Scheme(16))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=25),
    uses=st.lists(st.lists(st.integers(0, 24), min_size=1, max_size=4), min_size=1, max_size=30),
)
def test_tensors_that_live_together_lie_apart(sizes, uses):
    method = Method("forward")
    tensors = [method.tensor((size,)) for size in sizes]
    cache = method.cache((7,))
    for use in uses:
        method.kernel("aten::add", "out", [tensors[index % len(tensors)] for index in use] + [cache])
    method.outputs.append(tensors[0])
    plan = method.finish()
    instructions = [i.instr_args.args for i in plan.chains[0].instructions]
    lives = {t: [time for time, args in enumerate(instructions) if t in args] for t in (*tensors, cache)}
    lives[tensors[0]] = [*(lives[tensors[0]] or [0]), len(instructions)]
    lives[cache] = [0, len(instructions)]
    used = [t for t in lives if lives[t]]

    def place(t: int) -> tuple[int, int]:
        tensor = plan.values[t].val
        start = tensor.allocation_info.memory_offset
        return start, start + 4 * tensor.sizes[0]

    for i, a in enumerate(used):
        assert place(a)[1] <= plan.non_const_buffer_sizes[1]
        for b in used[i + 1 :]:
            together = lives[a][0] <= lives[b][-1] and lives[b][0] <= lives[a][-1]
            apart = place(a)[1] <= place(b)[0] or place(b)[1] <= place(a)[0]
            assert apart or not together


def test_offsets_beyond_4_gb_are_split():
    method = Method("forward")
    caches = [method.cache((1 << 30,)) for _ in range(2)]  # 4 GiB each
    method.kernel("aten::add", "out", caches)
    place = method.finish().values[caches[1]].val.allocation_info
    assert (place.memory_offset_low, place.memory_offset_high, place.memory_offset) == (0, 1, 1 << 32)
    assert isinstance(place, schema.AllocationDetails)
    assert ScalarType.FLOAT == 6


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A folder with a whole program, and room for damaged ones."""
    folder = tmp_path_factory.mktemp("program")
    with open_checkpoint("pepper") as checkpoint:
        write(checkpoint, Recipe.uniform("int4"), folder)
    return folder


@settings(max_examples=150)
@given(
    changes=st.lists(st.tuples(st.integers(0, 20000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.sampled_from([1.0, 1.0, 1.0, 0.5, 1e-4, 0.0]),
)
def test_a_damaged_program_is_a_clear_error(program, changes, cut):
    """Any bytes in the flatbuffer: the reader says what is wrong, or reads something; it never does worse."""
    damaged = bytearray((program / PROGRAM).read_bytes())
    for place, byte in changes:
        damaged[place] = byte
    path = program / "damaged.pte"
    path.write_bytes(damaged[: int(cut * len(damaged))])
    with contextlib.suppress(BundleError):
        list(PteReader(path).names())
