"""Graphs of integers for Hexagon, run on the CPU, against the reference; and the integers they hold."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.checkpoint import Matrix, open_checkpoint
from exporter.errors import RecipeError
from exporter.formats.onnx import GRAPH, write_onnx
from exporter.formats.onnx_qdq import DATA, pack, transposed, unpack, write_qdq
from exporter.formats.onnx_qdq_weights import QdqWeights
from exporter.formats.onnx_weights import OnnxWeights
from exporter.npu import hexagon_ops
from exporter.npu.hexagon_ops import HexagonOps
from exporter.npu.hexagon_torch import RULES, TorchGraph, calibrate
from exporter.pepper.questions import held_out
from exporter.pepper.score import score
from exporter.quantization import ranges, rtn
from exporter.quantization.calibration import calibration_sequences
from exporter.quantization.recipe import Recipe, Rule, find_recipe
from exporter.quantization.scheme import parse_scheme
from exporter.quantization.weights import QuantizedWeights
from exporter.tokenizer import read_text_side
from exporter.torch_ops import TorchOps, look_up
from runtimes.chat import ChatTemplate
from runtimes.tokenizer import Tokenizer

CONTEXT, CHUNK = 64, 16
PROMPT, NEW = 27, 8  # tokens: a chunk and a part of one, then one by one
MINMAX = (ranges.Rule("*", ranges.MinMax),)
MIXED = Recipe(
    name="mixed",
    rules=(
        Rule(match="*.mlp.down", scheme="w8a16"),
        Rule(match="*.attention.[qk]", scheme="w4a16"),
        Rule(match="*", scheme="w4a16-g32"),
    ),
)


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory):
    """`written(family, scheme or recipe, parts)`: (architecture, weights, entries, folder), once each."""
    made = {}

    def write(family, scheme="w8a16", parts=None, rules=RULES):
        recipe = Recipe.uniform(scheme) if isinstance(scheme, str) else scheme
        key = (family, recipe.name, parts, rules)
        if key not in made:
            checkpoint = open_checkpoint(checkpoints.folder(family)).__enter__()
            arch = checkpoint.architecture
            weights = QuantizedWeights(checkpoint, recipe.resolve(arch))
            ids = [tokens(PROMPT + NEW), tokens(48, 1), tokens(48, 2)]
            found = calibrate(arch, weights, ids, CONTEXT, CHUNK, rules)
            folder = tmp_path_factory.mktemp(family)
            entries = write_qdq(arch, weights, found, CONTEXT, folder, CHUNK, parts)
            made[key] = arch, weights, entries, folder
        return made[key]

    return write


@pytest.fixture(scope="module")
def engine(written, qdq_engine):
    """`engine(...)` as `written`: the engine on the CPU."""

    def open_engine(*arguments):
        arch, weights, entries, folder = written(*arguments)
        return qdq_engine(folder, entries, weights.matrix("embedding"), arch.embedding_scale)

    return open_engine


def run(engine):
    """Logits [NEW, vocab] after a prompt, tokens given."""
    ids = tokens(PROMPT + NEW - 1)
    engine.reset()
    return np.stack([engine.prefill(ids[:PROMPT]), *map(engine.decode, ids[PROMPT:])])


def reference(arch, weights):
    ops = TorchOps(arch, weights, CONTEXT, rounded=0)
    return ops.run(torch.tensor([tokens(PROMPT + NEW - 1)]))[0, PROMPT - 1 :].numpy()


def errors(ours, theirs):
    """The largest error at each step, as a share of the logits' range."""
    return np.abs(ours - theirs).max(-1) / np.ptp(theirs, -1)


def program(arch, weights, graph, ids):
    """Logits [length, vocab] of the program on tensors, all tokens at once."""
    length = len(ids)
    shapes = ((1, arch.kv_heads, arch.head_dim, 0), (1, arch.kv_heads, 0, arch.head_dim))
    for i in range(arch.layers):
        for name, shape in zip(("key", "value"), shapes, strict=True):
            graph.inputs[f"past_key_values.{i}.{name}"] = torch.zeros(shape)
    table = weights.matrix("embedding")
    graph.inputs["hidden"] = look_up(torch.tensor([ids]), table) * arch.embedding_scale
    graph.positions = torch.arange(length)
    with torch.no_grad():
        HexagonOps(graph, arch, length=length, context=CONTEXT, past=0).run(range(arch.layers), head=True)
    return graph.outputs["logits"][0].numpy()


def test_the_program_is_the_decoder(family, written):
    arch, weights, _, _ = written(family)
    graph = TorchGraph(arch, weights, CONTEXT, lambda step, values: None)
    ours = program(arch, weights, graph, tokens(PROMPT + NEW - 1))[PROMPT - 1 :]
    assert errors(ours, reference(arch, weights)).max() < 1e-4


@pytest.mark.parametrize("scheme", ["w8a16", MIXED], ids=["w8a16", "mixed"])
def test_the_graphs_say_what_the_decoder_says(family, scheme, written, engine, monkeypatch):
    """To within 16 bits, were the cache not in 8: these models, of random numbers, multiply what that rounds."""
    arch, weights, _, _ = written(family, scheme)
    theirs = reference(arch, weights)
    off = errors(run(engine(family, scheme)), theirs)
    monkeypatch.setattr(hexagon_ops, "CACHE_BITS", 16)
    fine = errors(run(engine(family, scheme, None, MINMAX)), theirs)
    assert fine.max() < 0.005
    assert off.mean() < 0.1


def test_parts_are_the_whole(written, engine):
    whole, split = run(engine("gemma2")), engine("gemma2", "w8a16", (range(2), range(2, 3)))
    assert [entry.name for entry in split.prefills + split.decodes] == [
        "prefill.0",
        "prefill.1",
        "decode.0",
        "decode.1",
    ]
    assert np.array_equal(run(split), whole)


def test_a_padded_prefill_is_an_unpadded_one(engine):
    """Chunks of 16 and a padded one of 5, or token by token: the same keys, values and logits, but for rounding."""
    chunked, single = engine("qwen2-window-yarn"), engine("qwen2-window-yarn")
    ids = tokens(22)
    one = chunked.prefill(ids)
    for token in ids:
        other = single.decode(token)
    assert np.abs(one - other).max() < 0.02 * np.ptp(one)
    for name, cache in chunked.cache.items():
        steps_off = np.abs(cache.astype(int) - single.cache[name])
        assert (steps_off > 2).mean() < 0.01
        slots = cache[..., 22:] if name.endswith("key") else cache[..., 22:, :]
        assert (slots == slots.flat[0]).all()  # nothing of the padding


def test_what_a_slot_that_is_not_seen_holds_is_no_matter(engine):
    clean, dirty = engine("gemma2"), engine("gemma2")
    for cache in dirty.cache.values():
        cache[:] = np.random.default_rng(3).integers(0, 256, cache.shape)
    one, other = run(clean), run_on(dirty)
    assert np.abs(one - other).max() < 0.02 * np.ptp(one)


def run_on(engine):
    """As `run`, in the cache as it is."""
    ids = tokens(PROMPT + NEW - 1)
    return np.stack([engine.prefill(ids[:PROMPT]), *map(engine.decode, ids[PROMPT:])])


def test_entry_points_are_the_graphs(written):
    arch, _, entries, folder = written("gemma2", "w8a16")
    prefill, decode = entries
    assert (prefill.name, prefill.file) == ("prefill", "hexagon-prefill.onnx")
    assert [spec.name for spec in decode.outputs][-1] == "logits"
    for entry in entries:
        graph = onnx.load(folder / entry.file, load_external_data=False).graph
        inline = [tensor for tensor in graph.initializer if not tensor.external_data]
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in inline}
        for specs, infos in ((entry.inputs, graph.input), (entry.outputs, graph.output)):
            assert [spec.name for spec in specs] == [info.name for info in infos]
            for spec, info in zip(specs, infos, strict=True):
                assert spec.shape == tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
                kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
                assert spec.dtype == kind.name
                if spec.name == "positions":
                    continue
                ends = [n for n in graph.node if n.op_type.endswith("eLinear")]
                node = next(n for n in ends if spec.name in (*n.input, *n.output))
                assert constants[node.input[1]] == np.float32(spec.scale)
                assert constants[node.input[2]] == spec.zero_point
    same = {
        spec.name: (spec.scale, spec.zero_point)
        for entry in entries
        for spec in (*entry.inputs, *entry.outputs)
    }
    for i in range(arch.layers):
        for part in ("key", "value"):
            assert same[f"present.{i}.{part}"] == same[f"past_key_values.{i}.{part}"]
    masks = {spec.name for spec in decode.inputs if spec.name.startswith("mask")}
    assert masks == {"mask.0", "mask.8"}
    assert same["mask.8"][1] == 65535
    unused = {f"past_key_values.{arch.layers - 1}.{part}" for part in ("key", "value")}
    assert not unused & {spec.name for spec in prefill.inputs}  # its last layer only makes keys and values
    assert len(onnx.load(folder / prefill.file, load_external_data=False).graph.node) < len(graph.node)


# the integers


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16-g32", MIXED], ids=str)
def test_the_files_hold_the_quantizers_integers(family, scheme, written):
    arch, weights, entries, folder = written(family, scheme)
    stored = QdqWeights([folder / entry.file for entry in entries])
    for name, _ in arch.matrices():
        if name == "embedding" and not arch.tied:
            continue  # looked up outside
        found = weights.matrix(name)
        assert stored.scheme(name) == found.scheme
        assert stored.matrix(name).digest() == found.digest(), name
    for name, _ in arch.vectors():
        exact = weights.vector(name)
        step = (max(exact.max(), 0) - min(exact.min(), 0)) / 65535
        assert np.abs(stored.vector(name) - exact).max() <= step, name


def test_each_weight_is_stored_once(written):
    arch, weights, entries, folder = written("llama-llama3-rope", "w4a16")
    held = sum(weights.matrix(name).nbytes for name, _ in arch.matrices())
    tensors = sum(
        len(onnx.load(folder / e.file, load_external_data=False).graph.initializer) for e in entries
    )
    assert held <= (folder / DATA).stat().st_size < held + 4096 * tensors
    places = {}
    for entry in entries:
        for tensor in onnx.load(folder / entry.file, load_external_data=False).graph.initializer:
            where = tuple((e.key, e.value) for e in tensor.external_data)
            assert places.setdefault(tensor.name, where) == where


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packed_integers_are_onnxs(rows, columns, seed):
    import ml_dtypes

    integers = np.random.default_rng(seed).integers(-8, 8, (rows, columns)).astype(np.int8)
    packed = np.concatenate(list(pack(integers)))
    theirs = onnx.numpy_helper.from_array(integers.astype(ml_dtypes.int4), "w").raw_data
    assert packed.tobytes() == theirs
    assert np.array_equal(unpack(packed, integers.size), integers.ravel())


@given(st.integers(1, 9), st.sampled_from([32, 64, 96]), st.sampled_from(["w8a16", "w4a16", "w4a16-g32"]))
def test_transposed(outputs, inputs, scheme):
    w = np.random.default_rng(outputs).standard_normal((outputs, inputs)).astype(np.float32)
    tensor = rtn.quantize_mse(Matrix("w", w.shape, lambda i, j: w[i:j]), parse_scheme(scheme))[0]
    assert np.array_equal(transposed(tensor), tensor.integers().T)


def test_floats_are_refused(checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        arch = checkpoint.architecture
        weights = QuantizedWeights(checkpoint, Recipe.uniform("fp16").resolve(arch))
        found = calibrate(arch, weights, [tokens(8)], CONTEXT)
        with pytest.raises(RecipeError, match=r"layers.0.attention.q is fp16: .* use w8a16 or w4a16"):
            write_qdq(arch, weights, found, CONTEXT, tmp_path)


def test_a_step_without_a_range_is_refused(checkpoints, tmp_path):
    with open_checkpoint(checkpoints.folder("qwen2")) as checkpoint:
        arch = checkpoint.architecture
        weights = QuantizedWeights(checkpoint, Recipe.uniform("w8a16").resolve(arch))
        found = dict(calibrate(arch, weights, [tokens(8)], CONTEXT).ranges)
        del found["layers.1.mlp.gated"]
        with pytest.raises(RecipeError, match=r"layers.1.mlp.gated has no range"):
            write_qdq(arch, weights, ranges.Ranges(found), CONTEXT, tmp_path)


# the same integers on the CPU


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16-g64"])
def test_the_cpu_holds_the_same_integers(family, scheme, checkpoints, tmp_path):
    import onnxruntime as ort

    with open_checkpoint(checkpoints.folder(family)) as checkpoint:
        arch = checkpoint.architecture
        weights = QuantizedWeights(checkpoint, Recipe.uniform(scheme).resolve(arch))
        write_onnx(arch, weights, CONTEXT, tmp_path)
        stored = OnnxWeights(tmp_path / GRAPH)
        for name, _ in arch.matrices():
            assert stored.scheme(name) == weights.scheme(name)
            assert stored.matrix(name).digest() == weights.matrix(name).digest(), name
        theirs = TorchOps(arch, weights, CONTEXT, rounded=0).run(torch.tensor([tokens(20)]))[:, -1].numpy()
    session = ort.InferenceSession(str(tmp_path / GRAPH))
    given = {"input_ids": np.array([tokens(20)]), "attention_mask": np.ones((1, 20), np.int64)}
    empty = np.zeros((1, arch.kv_heads, 0, arch.head_dim), np.float32)
    given |= {spec.name: empty for spec in session.get_inputs() if spec.name.startswith("past")}
    assert errors(session.run(["logits"], given)[0][:, -1], theirs).max() < 1e-3


@pytest.mark.parametrize("name", ["hexagon-w8a16", "hexagon-w4a16"])
def test_pepper_still_answers(name, tmp_path, qdq_engine):
    """With ranges found on its training questions, held-out ones are answered as by the float model."""
    with open_checkpoint("pepper") as checkpoint:
        arch, side = checkpoint.architecture, read_text_side(checkpoint)
        weights = QuantizedWeights(checkpoint, find_recipe(name).resolve(arch))
        found = calibrate(arch, weights, calibration_sequences(checkpoint, 128), 128)
        entries = write_qdq(arch, weights, found, 128, tmp_path, 32)
        engine = qdq_engine(tmp_path, entries, weights.matrix("embedding"))
        tokenizer = Tokenizer(checkpoint.path / "tokenizer.json")
    template = ChatTemplate(side.chat_template, bos_token=tokenizer.token(side.tokens.bos))

    def answer(prompt):
        engine.reset()
        text = template.render([{"role": "user", "content": prompt}])
        said = [int(engine.prefill(tokenizer.encode(text, add_special=False)).argmax())]
        while said[-1] not in side.tokens.eos and len(said) < 32:
            said.append(int(engine.decode(said[-1]).argmax()))
        return tokenizer.decode(said)

    assert score(answer, held_out(28)).overall.right >= 27  # as many as in float
