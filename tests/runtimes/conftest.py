"""A toy bundle (two random layers with GroupQueryAttention, weights in an external file), its tokenizer, and an
engine that says what a test tells it to."""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from runtimes.bundle import Bundle, Choice, Manifest
from runtimes.errors import PromptError

sys.path.insert(0, str(Path(__file__).parent))  # tests share invented_results.py

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 300, 32, 2, 4, 2, 16, 96
BOS, EOS, END_OF_TURN = 0, 1, 2
SPECIAL = ("<s>", "</s>", "<end>", "<user>", "<assistant>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = ["안녕하세요, 작은 고추가 맵다.", "the small pepper is the hot one", "삼백이십 더하기 하나"]


def byte_level_tokenizer():
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it: Korean syllables fall apart into bytes. 300 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def byte_fallback_tokenizer():
    """BPE over whole words with ▁ for spaces and single bytes for all else, as Llama 2 and Gemma have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!안녕하세요고추"]
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *letters,
        "▁a",
        "▁안",
        "녕하",
        "th",
    ]
    merges = [("▁", "a"), ("▁", "안"), ("녕", "하"), ("t", "h")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_graph(folder: Path, *, all_logits: bool = False) -> None:
    """model.onnx and model.onnx.data, with the input and output names that onnxruntime-genai wants."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(7)
    nodes, initializers = [], []

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(name: str, *shape: int) -> str:
        return constant(name, (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def node(
        op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: object
    ) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    angles = np.arange(CONTEXT)[:, None] / 1e4 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)[None]
    constant("cos", np.cos(angles).astype(np.float32))
    constant("sin", np.sin(angles).astype(np.float32))
    constant("one", np.array([1], np.int64))
    constant("last", np.array([-1], np.int64))
    node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0)
    node("Sub", ["sum", "one"], ["past"])
    node("Cast", ["past"], ["seqlens"], to=TensorProto.INT32)
    node("Shape", ["attention_mask"], ["shape"], start=1, end=2)
    node("Squeeze", ["shape"], ["length"])
    node("Cast", ["length"], ["total"], to=TensorProto.INT32)
    x = node("Gather", [weight("embedding", VOCAB, HIDDEN), "input_ids"], ["x"])
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n" if all_logits else 1, VOCAB])
    ]
    for i in range(LAYERS):
        qkv = node(
            "MatMul", [x, weight(f"qkv{i}", HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM)], [f"qkv{i}_out"]
        )
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        present = [f"present.{i}.{part}" for part in ("key", "value")]
        a = node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens", "total", "cos", "sin"],
            [f"a{i}", *present],
            "com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        o = node("MatMul", [a, weight(f"o{i}", HEADS * HEAD_DIM, HIDDEN)], [f"o{i}_out"])
        x = node("Add", [x, o], [f"x{i}"])
        for names, values, size in ((past, inputs, "past"), (present, outputs, "present")):
            shape = [1, KV_HEADS, size, HEAD_DIM]
            values.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names)
    if not all_logits:
        x = node("Gather", [x, "last"], ["x_last"], axis=1)
    node("MatMul", [x, weight("head", HIDDEN, VOCAB)], ["logits"])
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=512,
    )


def variant(**changes: object) -> dict:
    """A variant as it stands in a manifest."""
    entry = {"name": "model", "file": "model.onnx", "inputs": [], "outputs": []}
    kv = {
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "shared_buffer": True,
    }
    return {
        "name": "cpu",
        "format": "onnx",
        "engine": "onnxruntime",
        "scheme": "float32",
        "context": CONTEXT,
        "last_logits_only": True,
        "entry_points": [entry],
        "kv_cache": kv,
        "files": ["model.onnx", "model.onnx.data"],
        "toolchain": {"onnx": "1"},
    } | changes


def write_manifest(folder: Path, **changes: object) -> dict:
    """A manifest over the files that are in the folder, with top-level keys changed as told."""
    files = [
        {"path": p.name, "size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(folder.iterdir())
        if p.name != "manifest.json"
    ]
    model = {
        "name": "toy",
        "source": "toy",
        "family": "llama",
        "parameters": 1000,
        "layers": LAYERS,
        "hidden": HIDDEN,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab": VOCAB,
        "trained_context": CONTEXT,
    }
    data = {
        "schema_version": 1,
        "gochu": "0.0",
        "model": model,
        "plan": [],
        "recipe": {},
        "tensors": [],
        "variants": [variant()],
        "tokens": {"bos": BOS, "eos": [EOS, END_OF_TURN]},
        "chat_template": TEMPLATE,
        "files": files,
        "gate": {"status": "unverified"},
    } | changes
    (folder / "manifest.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return data


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle. Many tests read it: one that changes something takes a `copy`."""
    folder = tmp_path_factory.mktemp("bundles") / "toy"
    folder.mkdir()
    write_graph(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def all_logits(toy: Path) -> Path:
    """The same model, with a graph that returns the logits of every token."""
    folder = toy.with_name("all-logits")
    shutil.copytree(toy, folder)
    write_graph(folder, all_logits=True)
    write_manifest(folder, variants=[variant(last_logits_only=False)])
    return folder


class Kettle:
    """A target of another package, installed for a test: `calls` says who called it, `go` lets it end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def calls(self) -> list[list[str]]:
        """Of each call: the process, its parent, the trouble that was asked for, when."""
        file = self.folder / "calls"
        return [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []

    def called(self, times: int) -> list[str]:
        """Wait for so many calls; the last of them."""
        while len(self.calls) < times:
            time.sleep(0.02)
        return self.calls[times - 1]

    def go(self) -> None:
        (self.folder / "go").touch()

    def forget(self) -> None:
        for name in ("calls", "go", "warm"):
            (self.folder / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def installed_kettle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kettle]:
    """matrix_kettle.py as pip would leave it, for processes that are started too."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).with_name("matrix_kettle.py"), folder / "matrix_kettle_of_a_test.py")
    info = folder / "teahouse-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: teahouse\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gochu.targets]\nkettle = matrix_kettle_of_a_test\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield Kettle(folder)
        sys.modules.pop("matrix_kettle_of_a_test", None)


@pytest.fixture
def kettle(installed_kettle: Kettle) -> Kettle:
    installed_kettle.forget()
    return installed_kettle


@pytest.fixture
def matrix_file(tmp_path: Path, toy: Path) -> Callable[[str], Path]:
    """`matrix_file(text)`: a matrix over the toy bundle, in a folder with a Korean name."""

    def write(text: str, bundles: str | None = None) -> Path:
        file = tmp_path / "행렬" / "matrix.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"bundles = {bundles or [str(toy)]}\n{text}", encoding="utf-8")
        return file

    return write


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle to damage."""
    return Path(shutil.copytree(toy, tmp_path / "copy"))


@pytest.fixture
def rewrite() -> Callable[..., dict]:
    """`rewrite(folder, key=value)`: write its manifest anew over the files that are there now."""
    return write_manifest


@pytest.fixture
def make_variant() -> Callable[..., dict]:
    """`make_variant(key=value)`: a variant of the toy bundle with keys changed."""
    return variant


@pytest.fixture(scope="session")
def byte_level(toy: Path) -> Path:
    return toy / "tokenizer.json"


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    byte_fallback_tokenizer().save(str(path))
    return path


class Scripted:
    """An engine that answers any prompt with the tokens of a script, and records what it was fed."""

    choice = Choice(topic="variant", value="scripted", reason="a test wants it")
    vocab = VOCAB
    threads = 1
    version = "scripted 1"

    def __init__(self, script: Sequence[int], context: int = CONTEXT) -> None:
        self.script = list(script)
        self.context = context
        self.position = 0
        self.prefilled: list[list[int]] = []
        self.decoded: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        self.prefilled.append(list(tokens))
        self._take(len(tokens))
        self.decoded.clear()
        return self._logits()

    def decode(self, token: int) -> np.ndarray:
        self._take(1)
        self.decoded.append(token)
        return self._logits()

    def reset(self, position: int = 0) -> None:
        assert 0 <= position <= self.position
        self.position = position

    def close(self) -> None:
        self.position = -1

    def _take(self, count: int) -> None:
        if self.position + count > self.context:
            raise PromptError("the script's context is full")
        self.position += count

    def _logits(self) -> np.ndarray:
        logits = np.zeros(VOCAB, np.float32)
        logits[self.script[len(self.decoded) % len(self.script)]] = 1
        return logits


@pytest.fixture
def scripted_model(toy: Path):
    """`scripted_model(script, context=..., template=...)`: a Model over the toy's tokenizer that says the script.

    The script is a text or token ids; it begins again when it is through.
    """
    from runtimes.generate import Model
    from runtimes.tokenizer import Tokenizer

    bundle, tokenizer = Bundle.open(toy), Tokenizer(toy / "tokenizer.json")

    def make(script: str | Sequence[int], context: int = CONTEXT, template: str | None = TEMPLATE) -> Model:
        ids = tokenizer.encode(script, add_special=False) if isinstance(script, str) else script
        manifest = Manifest.model_validate(bundle.manifest.model_dump() | {"chat_template": template})
        return Model(Bundle(bundle.path, manifest), Scripted(ids, context), tokenizer)

    return make


@pytest.fixture(scope="session")
def hexagon(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """pepper with a variant for the NPU of sm8650 (a Galaxy S24 Ultra's), and the CPU's."""
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    from exporter import export
    from exporter.npu.hexagon_plan import Wishes

    folder = tmp_path_factory.mktemp("hexagon") / "out"
    wishes = Wishes(("sm8650",))
    return export(
        "pepper", folder, delegate="hexagon", scheme="int4", context=64, wishes=wishes, verify=False
    )
