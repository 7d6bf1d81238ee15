"""The Core ML engine on tiny stateful packages made with coremltools' own builder, one and in a chain of two."""

import hashlib
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import coremltools as ct
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import Function, Program, types

from runtimes.bundle import Bundle, Choice, Manifest
from runtimes.engines.coreml import CoreMLEngine, load
from runtimes.errors import BundleError, EngineError, PromptError, UsageError
from runtimes.mil.evaluator import Evaluator
from runtimes.mil.package import open_package

logging.getLogger("coremltools").setLevel(logging.ERROR)
mb = Builder
VOCAB, HIDDEN, CONTEXT, CHUNK = 40, 16, 24, 6
IDS = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 20)]
CHOICE = Choice(topic="variant", value="ane", reason="a test wants it")
_random = np.random.default_rng(1)
EMBEDDING = _random.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
HEAD = _random.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
LAYERS = [
    [(_random.standard_normal((HIDDEN, HIDDEN)) / 4).astype(np.float16) for _ in "qkv"] for _ in range(2)
]


def reference(tokens: list[int]) -> np.ndarray:
    """Float32 logits [vocab] after the tokens: the same model without a cache, in numpy."""
    x = EMBEDDING[tokens].astype(np.float32)
    hidden_from = np.triu(np.full((len(tokens), len(tokens)), -1e4, np.float32), 1)
    for q, k, v in LAYERS:
        scores = (x @ q.T.astype(np.float32)) @ (x @ k.T.astype(np.float32)).T / 4 + hidden_from
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + weights / weights.sum(-1, keepdims=True) @ (x @ v.T.astype(np.float32))
    return x[-1] @ HEAD.T.astype(np.float32)


def attention(i: int, x: Any, position: Any, states: dict[str, Any], length: int) -> Any:
    """A layer with its keys and values in rows of a state [context, hidden]."""
    q, k, v = (mb.linear(x=x, weight=weight) for weight in LAYERS[i])
    end = mb.concat(values=[mb.add(x=position, y=np.int32([length])), np.int32([HIDDEN])], axis=0)
    begin = mb.concat(values=[position, np.int32([0])], axis=0)
    cache = {}
    for name, rows in (("k", k), ("v", v)):
        state = states[f"{name}{i}"]
        update = mb.slice_update(
            x=mb.read_state(input=state), update=mb.squeeze(x=rows, axes=[0]), begin=begin, end=end
        )
        cache[name] = mb.coreml_update_state(state=state, value=update)
    rows = mb.add(x=np.arange(length, dtype=np.int32)[:, None], y=position)
    seen = mb.cast(x=mb.less_equal(x=np.arange(CONTEXT, dtype=np.int32)[None], y=rows), dtype="fp16")
    mask = mb.mul(x=mb.sub(x=seen, y=np.float16(1)), y=np.float16(1e4))
    scores = mb.mul(x=mb.matmul(x=q, y=cache["k"], transpose_y=True), y=np.float16(0.25))
    weights = mb.softmax(x=mb.add(x=scores, y=mask), axis=-1)
    return mb.add(x=x, y=mb.matmul(x=weights, y=cache["v"]))


def write_package(path: Path, layers: range, ends: str) -> None:
    """`ends`: how the last package of the chain answers (logits, split, token), "hidden" for one before."""
    program = Program()
    for name, length in (("prefill", CHUNK), ("decode", 1)):
        first = layers.start == 0
        inputs: dict[str, Any] = (
            {"input_ids": mb.placeholder((1, length), dtype=types.int32)}
            if first
            else {"hidden": mb.placeholder((1, length, HIDDEN), dtype=types.fp16)}
        )
        inputs["position"] = mb.placeholder((1,), dtype=types.int32)
        if ends != "hidden":
            inputs["last"] = mb.placeholder((1,), dtype=types.int32)
        for i in layers:
            for part in "kv":
                inputs[f"{part}{i}"] = mb.state_tensor_placeholder((CONTEXT, HIDDEN), dtype=types.fp16)
        with Function(inputs, opset_version=ct.target.iOS18) as function:
            given = function.inputs
            x = mb.gather(x=EMBEDDING, indices=given["input_ids"], axis=0) if first else given["hidden"]
            for i in layers:
                x = attention(i, x, given["position"], given, length)
            function.set_outputs(answer(x, given, ends, first))
        program.add_function(name, function)
    program.default_function_name = "prefill"
    program.export_as_multifunction = True
    ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    ).save(str(path))


def answer(x: Any, given: dict[str, Any], ends: str, first: bool) -> list[Any]:
    if ends == "hidden":
        return [mb.identity(x=x, name="hidden")]
    row = mb.gather(x=x, indices=given["last"], axis=1)
    if ends == "split":
        half = VOCAB // 2
        return [
            mb.linear(x=row, weight=part, name=f"logits_{i}")
            for i, part in enumerate((HEAD[:half], HEAD[half:]))
        ]
    logits = mb.linear(x=row, weight=HEAD, name="logits")
    if ends == "logits":
        return [logits]
    return [mb.squeeze(x=mb.reduce_argmax(x=logits, axis=-1), axes=[0], name="token")]


def specs(names: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": "float16" if name[0] in "hl" else "int32", "shape": shape}
        for name, shape in names.items()
    ]


def entries(part: str, file: str, first: bool, outputs: list[str]) -> list[dict[str, Any]]:
    found = []
    for name, length in (("prefill", CHUNK), ("decode", 1)):
        inputs = {"input_ids": (1, length)} if first else {"hidden": (1, length, HIDDEN)}
        inputs |= {"position": (1,)} | ({} if outputs == ["hidden"] else {"last": (1,)})
        found.append(
            {
                "name": name + part,
                "file": file,
                "inputs": specs(inputs),
                "outputs": specs(dict.fromkeys(outputs, (1,))),
            }
        )
    return found


OUTPUTS = {"logits": ["logits"], "split": ["logits_0", "logits_1"], "token": ["token"]}


def write_bundle(folder: Path, kind: str) -> Bundle:
    """One package with `logits` or `token`, or a chain of two whose logits are `split`."""
    if kind == "split":
        write_package(folder / "a.mlpackage", range(1), "hidden")
        write_package(folder / "b.mlpackage", range(1, 2), "split")
        points = entries(".0", "a.mlpackage/Manifest.json", True, ["hidden"])
        points += entries(".1", "b.mlpackage/Manifest.json", False, OUTPUTS[kind])
    else:
        write_package(folder / "model.mlpackage", range(2), kind)
        points = entries("", "model.mlpackage/Manifest.json", True, OUTPUTS[kind])
    files = [
        {
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    variant = {
        "name": "ane",
        "format": "coreml",
        "engine": "coreml",
        "scheme": "float16",
        "context": CONTEXT,
        "last_logits_only": True,
        "entry_points": points,
        "kv_cache": {
            "layers": 2,
            "kv_heads": 1,
            "head_dim": HIDDEN,
            "dtype": "float16",
            "shared_buffer": True,
            "held_by": "program",
        },
        "files": [file["path"] for file in files],
        "toolchain": {"coremltools": ct.__version__},
    }
    model = {
        "name": "toy",
        "source": "toy",
        "family": "llama",
        "parameters": 1000,
        "layers": 2,
        "hidden": HIDDEN,
    }
    model |= {"heads": 1, "kv_heads": 1, "head_dim": HIDDEN, "vocab": VOCAB, "trained_context": CONTEXT}
    manifest = {
        "gochu": "0.0",
        "model": model,
        "plan": [],
        "recipe": {},
        "tensors": [],
        "variants": [variant],
        "tokens": {"eos": [1]},
        "files": files,
        "gate": {"status": "unverified"},
    }
    (folder / "manifest.json").write_text(Manifest.model_validate(manifest).to_json(), encoding="utf-8")
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """A bundle of each kind. One that changes something takes a copy."""
    return {kind: write_bundle(tmp_path_factory.mktemp(kind), kind) for kind in OUTPUTS}


def opened(bundle: Bundle, context: int = CONTEXT, **options: Any) -> CoreMLEngine:
    (variant,) = bundle.manifest.variants
    return load(bundle, variant, CHOICE, context=context, threads=1, **options)


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    """The same files, with another manifest's variant; nothing is validated."""
    variant = bundle.manifest.variants[0].model_copy(update=changes)
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"variants": (variant,)}))


@pytest.mark.parametrize("kind", ["logits", "split"])
@pytest.mark.parametrize("exact", [False, True])
def test_logits_are_the_models(made, kind, exact):
    """Rounded to float16, within what rounding makes; exact, to float32."""
    engine = opened(made[kind], exact=exact)
    expected = reference(IDS)
    logits = engine.prefill(IDS)
    assert logits.shape == (VOCAB,)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=(1e-5 if exact else 1e-2) * np.ptp(expected))
    if not exact:
        assert np.abs(logits - expected).max() > 1e-5 * np.ptp(expected)  # it was rounded


@pytest.mark.parametrize("kind", ["logits", "split"])
def test_any_way_to_give_the_tokens_is_the_same(made, kind):
    """Whole chunks, parts of chunks, single tokens; what filled up a chunk is never seen."""
    engine, found = opened(made[kind]), []
    for sizes in ([20], [6, 6, 6, 2], [1, 8, 11], [5, 1, 1, 7, 6], [1] * 20):
        engine.reset()
        rest = list(IDS)
        for size in sizes:
            logits = engine.prefill(rest[:size])
            rest = rest[size:]
        found.append(logits)
        assert engine.position == len(IDS)
    engine.reset()
    engine.prefill(IDS[:10])
    for token in IDS[10:]:
        logits = engine.decode(token)
    for other in (*found[1:], logits):
        np.testing.assert_allclose(other, found[0], atol=5e-3 * np.ptp(found[0]))


def test_a_chunk_that_would_pass_the_context_goes_token_by_token(made):
    engine = opened(made["logits"])
    ids = [*IDS, 3, 5, 7, 9]
    engine.prefill(ids[:20])
    before = engine.runs
    logits = engine.prefill(ids[20:])  # rows 20 to 25, and there are 24
    assert (engine.position, engine.runs - before) == (CONTEXT, 4)
    np.testing.assert_allclose(logits, reference(ids), atol=1e-2 * np.ptp(logits))


def test_going_back_forgets_what_came_after(made):
    engine = opened(made["split"])
    first = engine.prefill(IDS[:13])
    engine.prefill(IDS[13:])
    engine.reset(9)
    assert engine.position == 9
    np.testing.assert_allclose(engine.prefill(IDS[9:13]), first, atol=5e-3 * np.ptp(first))
    with pytest.raises(UsageError, match="position 14"):
        engine.reset(14)


def test_a_token_found_in_the_graph_is_the_likeliest(made):
    engine = opened(made["token"])
    for found, prompt in ((engine.prefill(IDS), IDS), (engine.decode(7), [*IDS, 7])):
        assert found.tolist() == np.eye(VOCAB)[reference(prompt).argmax()].tolist()


def test_logits_are_the_callers_own(made):
    engine = opened(made["logits"])
    first = engine.prefill(IDS[:5])
    kept = first.copy()
    engine.decode(7)
    np.testing.assert_array_equal(first, kept)


def test_two_engines_do_not_share_a_cache(made):
    one, two = opened(made["logits"]), opened(made["logits"])
    alone = one.prefill(IDS[:9])
    two.prefill(IDS[9:20])
    one.reset(4)
    np.testing.assert_allclose(one.prefill(IDS[4:9]), alone, atol=5e-3 * np.ptp(alone))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: e.prefill([]), PromptError, "no tokens"),
        (lambda e: e.prefill([1] * 25), PromptError, "25 tokens do not fit in the context of 24"),
        (lambda e: e.prefill([VOCAB]), PromptError, f"{VOCAB} is not in the vocabulary"),
        (lambda e: e.prefill([-1]), PromptError, "-1 is not in the vocabulary"),
        (lambda e: e.decode(VOCAB), PromptError, "not in the vocabulary"),
        (lambda e: (e.prefill([1] * 24), e.decode(1)), PromptError, "25 tokens do not fit"),
        (lambda e: (e.close(), e.decode(1)), UsageError, "closed"),
    ],
)
def test_wrong_use_is_one_sentence(made, call: Callable[..., Any], error, words):
    engine = opened(made["logits"])
    with pytest.raises(error, match=words):
        call(engine)


def test_the_context_asked_for_is_kept(made):
    engine = opened(made["logits"], context=10)
    assert engine.context == 10
    with pytest.raises(PromptError, match="11 tokens do not fit in the context of 10"):
        engine.prefill(IDS[:11])


def test_the_version_says_what_computes(made):
    assert opened(made["logits"]).version == f"coremltools {ct.__version__}, evaluated in torch"


def test_a_manifest_may_name_the_packages_folder(made):
    points = [
        p.model_copy(update={"file": "model.mlpackage"})
        for p in made["logits"].manifest.variants[0].entry_points
    ]
    engine = opened(changed(made["logits"], entry_points=tuple(points)))
    np.testing.assert_array_equal(engine.prefill(IDS), opened(made["logits"]).prefill(IDS))


def edit(bundle: Bundle, place: int, **changes: Any) -> Bundle:
    """Change one entry point."""
    points = list(bundle.manifest.variants[0].entry_points)
    points[place] = points[place].model_copy(update=changes)
    return changed(bundle, entry_points=tuple(points))


def inputs(bundle: Bundle, place: int, **shapes: Any) -> Bundle:
    """Change the inputs of one entry point: a shape, or None to leave one out."""
    old = bundle.manifest.variants[0].entry_points[place].inputs
    kept = {spec.name: spec for spec in old} | {
        name: old[0].model_copy(update={"name": name, "shape": shape}) for name, shape in shapes.items()
    }
    return edit(
        bundle, place, inputs=tuple(spec for name, spec in kept.items() if shapes.get(name, 0) is not None)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: edit(b["logits"], 1, name="decode.0"), "entry points prefill, decode.0, where"),
        (lambda b: edit(b["split"], 0, name="prefill.2"), "where Core ML's are prefill and decode"),
        (lambda b: edit(b["logits"], 1, file="b.mlpackage"), "two packages, which cannot share a KV cache"),
        (lambda b: edit(b["split"], 0, outputs=()), "not the one in the manifest .hidden"),
        (
            lambda b: inputs(b["logits"], 0, mask=(1, 24)),
            "prefill of variant ane takes mask, which nothing before",
        ),
        (lambda b: inputs(b["logits"], 0, input_ids=(1, "n")), "does not say how many input_ids"),
        (lambda b: inputs(b["logits"], 1, last=None), "function decode of .* is not the one .* .last"),
        (lambda b: edit(b["token"], 1, outputs=()), "where logits or token is wanted"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_sentence(made, change, words):
    with pytest.raises(BundleError, match=words) as caught:
        opened(change(made))
    assert "\n" not in str(caught.value)


def test_a_damaged_package_is_one_sentence(made, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(made["logits"].path, folder)
    program = folder / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    program.write_bytes(program.read_bytes()[:-100])
    bundle = Bundle(folder, made["logits"].manifest)
    with pytest.raises(BundleError, match=r"model\.mlmodel is (cut off or )?damaged") as caught:
        opened(bundle)
    assert "\n" not in str(caught.value)


def test_the_evaluator_does_not_wait_for_coremltools(made):
    """Its import takes seconds and talks."""
    code = (
        "import sys; from runtimes.bundle import Bundle, Choice; from runtimes.engines.coreml import load\n"
        f"bundle = Bundle.open({str(made['logits'].path)!r}); variant = bundle.manifest.variants[0]\n"
        "choice = Choice(topic='variant', value='ane', reason='')\n"
        "load(bundle, variant, choice, context=24, threads=1).prefill([1, 2, 3])\n"
        "print('coremltools' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


class StandIn:
    """coremltools' MLModel as macOS has it, as far as the engine uses it: the computing is the evaluator's."""

    loaded: list[tuple[str, str]] = []  # noqa: RUF012
    allowed: set[str] = set()  # noqa: RUF012
    failure: BaseException | None = None

    def __init__(self, model: str, compute_units: Any, function_name: str | None = None) -> None:
        StandIn.allowed.add(compute_units.name)
        StandIn.loaded.append((Path(model).name, str(function_name)))
        if isinstance(StandIn.failure, RuntimeWarning):
            warnings.warn(str(StandIn.failure), RuntimeWarning, stacklevel=2)
        self.__proxy__ = None if StandIn.failure is not None else object()
        self._path, self._function = Path(model), str(function_name)

    def make_state(self) -> Evaluator:
        return Evaluator(open_package(self._path))

    def predict(self, data: dict[str, np.ndarray], state: Evaluator) -> dict[str, np.ndarray]:
        assert all(value.dtype in (np.int32, np.float16) for value in data.values())
        if data["position"][0] == 13:
            raise RuntimeError("the Neural\nEngine is tired")
        return state.run(self._function, data)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(ct.models, "MLModel", StandIn)
    monkeypatch.setattr(StandIn, "failure", None)
    monkeypatch.setattr(StandIn, "loaded", [])
    monkeypatch.setattr(StandIn, "allowed", set())
    return StandIn


@pytest.mark.parametrize("kind", ["logits", "split"])
def test_on_macos_core_ml_computes(made, mac, kind):
    """Each function is a model of its own; they share one state for each package."""
    engine = opened(made[kind])
    assert engine.version == f"coremltools {ct.__version__}"
    files = ["model.mlpackage"] if kind == "logits" else ["a.mlpackage", "b.mlpackage"]
    assert mac.loaded == [(file, function) for file in files for function in ("prefill", "decode")]
    logits = engine.prefill(IDS[:12])
    np.testing.assert_allclose(logits, reference(IDS[:12]), atol=1e-2 * np.ptp(logits))
    engine.decode(IDS[12])
    with pytest.raises(EngineError, match=r"Core ML failed in decode of .*the Neural Engine is tired"):
        engine.decode(0)


@pytest.mark.parametrize(
    ("delegate", "asked", "allowed"),
    [
        ("ane", None, "CPU_AND_NE"),
        ("gpu", None, "CPU_AND_GPU"),
        ("", None, "ALL"),
        ("gpu", "cpu", "CPU_ONLY"),
        ("ane", "all", "ALL"),
    ],
)
def test_on_macos_a_variant_stays_on_the_processors_that_it_was_made_for(made, mac, delegate, asked, allowed):
    """Blockwise integers, which the GPU's layout has, are wrong on the Neural Engine, without an error."""
    opened(changed(made["logits"], delegate=delegate), compute_units=asked)
    assert mac.allowed == {allowed}


def test_unknown_compute_units_are_refused(made):
    with pytest.raises(UsageError, match="no compute units 'tpu'; there are cpu, gpu, ane, all"):
        opened(made["logits"], compute_units="tpu")


def test_on_macos_exact_is_the_evaluators(made, mac):
    assert opened(made["logits"], exact=True).version.endswith("evaluated in torch")
    assert mac.loaded == []


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeWarning("message was: no such op"), "cannot load prefill of .*no such op"),
        (ValueError("silent"), "needs a newer macOS"),
    ],
)
def test_on_macos_a_package_that_does_not_load_is_one_sentence(made, mac, monkeypatch, failure, words):
    monkeypatch.setattr(mac, "failure", failure)
    with pytest.raises(EngineError, match=words):
        opened(made["logits"])


def test_an_old_macos_is_named(made, mac, monkeypatch):
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.6.1", ("", "", ""), "arm64"))
    with pytest.raises(EngineError, match=r"from macOS 15 on; this is 14\.6\.1"):
        opened(made["logits"])
