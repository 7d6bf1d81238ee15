"""Bad input through the command line: one clear sentence on standard error, the exit code, and nothing left behind."""

import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

FAMILY = "qwen2"


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoints.folder(FAMILY), tmp_path / "checkpoint"))


@pytest.fixture
def bundle(bundles, tmp_path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundles(FAMILY, "int8").path, tmp_path / "bundle"))


@pytest.fixture
def refused(gochu) -> Callable[..., str]:
    """`refused(code, says, *arguments)`: the command fails so, in one sentence, which is returned."""

    def run(code: int, says: str, *arguments: object) -> str:
        found, out, err = gochu(*arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("gochu: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert says in err
        return err

    return run


@pytest.fixture
def export_refused(refused, tmp_path) -> Callable[..., str]:
    """The export of a checkpoint fails, and leaves nothing at the output nor beside it."""

    def run(says: str, checkpoint: Path | str, *arguments: object, code: int = 3) -> str:
        out = tmp_path / "outputs" / "out"
        error = refused(
            code, says, "export", checkpoint, "--scheme", "int4", "--context", 64, "-o", out, *arguments
        )
        assert not out.exists()
        left = [path for path in out.parent.rglob("*") if path.is_file()] if out.parent.exists() else []
        assert sum(path.stat().st_size for path in left if path.name.startswith("model.onnx")) == 0
        return error

    return run


def change(folder: Path, add: dict[str, torch.Tensor] | None = None, drop: str = "") -> None:
    tensors = load_file(folder / "model.safetensors") | (add or {})
    tensors.pop(drop, None)
    save_file(tensors, folder / "model.safetensors")


def rewrite_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


# checkpoints


def test_truncated_weights(folder, export_refused):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    export_refused("cut off or damaged", folder)


def test_overlapping_weights(folder, export_refused):
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    norm, other = header["model.norm.weight"], header["model.layers.0.input_layernorm.weight"]
    norm["data_offsets"] = other["data_offsets"]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    export_refused("overlaps", folder)


def test_missing_shard(checkpoints, tmp_path, export_refused):
    checkpoints.write(tmp_path / "sharded", FAMILY, shard="100KB")
    sorted((tmp_path / "sharded").glob("model-*.safetensors"))[-1].unlink()
    export_refused("download is incomplete", tmp_path / "sharded")


def test_missing_tensor(folder, export_refused):
    change(folder, drop="model.layers.1.self_attn.k_proj.bias")
    export_refused("k_proj.bias is missing", folder)


def test_misshapen_tensor(folder, export_refused):
    change(folder, {"model.layers.1.self_attn.k_proj.bias": torch.ones(17)})
    export_refused("has shape [17] where config.json means [16]", folder)


def test_extra_tensor(folder, export_refused):
    change(folder, {"model.vision_tower.weight": torch.ones(4)})
    export_refused("vision_tower.weight has no place", folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["layers.2.mlp.down_proj.weight", "layers.2.self_attn.q_proj.bias", "norm.weight"]
)
def test_weights_that_are_not_finite(folder, export_refused, name, value):
    tensor = load_file(folder / "model.safetensors")[f"model.{name}"]
    tensor.view(-1)[-1] = value
    change(folder, {f"model.{name}": tensor})
    export_refused("NaN or infinite", folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_only(folder, export_refused, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    export_refused("never opens those", folder)


def test_unknown_family(folder, export_refused):
    rewrite_json(folder / "config.json", model_type="rwkv")
    export_refused("'rwkv' cannot be exported", folder)


def test_config_that_is_not_json(folder, export_refused):
    (folder / "config.json").write_text("{", encoding="utf-8")
    export_refused("is not JSON", folder)


def test_missing_tokenizer(folder, export_refused):
    (folder / "tokenizer.json").unlink()
    export_refused("tokenizer.json is missing", folder)


def test_broken_tokenizer(folder, export_refused):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    export_refused("is not a tokenizer", folder)


def test_tokenizer_larger_than_the_embedding(checkpoints, tmp_path, export_refused):
    checkpoints.write(tmp_path / "small", FAMILY, vocab_size=300)
    export_refused("tokenizer and weights do not belong together", tmp_path / "small")


def test_eos_that_is_no_token(folder, export_refused):
    rewrite_json(folder / "generation_config.json", eos_token_id=[1, 99999])
    export_refused("eos_token_id", folder)


def test_chat_template_that_is_malformed(folder, export_refused):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}", encoding="utf-8")
    export_refused("chat template is malformed", folder)


def test_chat_template_that_reaches_for_python(folder, export_refused):
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(attack, encoding="utf-8")
    export_refused("chat template", folder)


def test_no_such_checkpoint(export_refused):
    export_refused("there is no checkpoint", "./no/where")


# devices, schemes, recipes


def test_unknown_device(folder, export_refused):
    assert "Galaxy S24" in export_refused("Galaxy S24 Ulta", folder, "--device", "Galaxy S24 Ulta")


def test_ambiguous_device(folder, export_refused):
    error = export_refused("more than one chip", folder, "--device", "Galaxy S24")
    assert "Exynos" in error
    assert "Snapdragon" in error


def test_unknown_scheme(folder, refused, tmp_path):
    refused(3, "there is no scheme 'int5'", "export", folder, "--scheme", "int5", "-o", tmp_path / "out")


def test_unknown_algorithm(folder, export_refused):
    export_refused("there is no algorithm 'magic'", folder, "--algorithm", "magic")


def test_context_beyond_the_models(folder, refused, tmp_path):
    refused(3, "1000000", "export", folder, "--context", 1000000, "-o", tmp_path / "out")


def test_recipe_that_is_not_toml(folder, refused, tmp_path):
    (tmp_path / "r.toml").write_text("rules = ", encoding="utf-8")
    refused(3, "is not TOML", "export", folder, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out")


RULES = '[[rules]]\nmatch = "*"\nscheme = "int4"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'name = "n"\ncolour = 3\n{RULES}', "there is no key colour: use name, prepare, rules"),
        (
            f'name = "n"\n{RULES}bits = 3\n',
            "there is no key rules.0.bits: use match, scheme, algorithm, reason",
        ),
        (RULES, "name is missing"),
        ('name = "n"\n[[rules]]\nscheme = "int4"\n', "rules.0.match is missing"),
        (f"name = 3\n{RULES}", "see `gochu recipes show portable-int4`"),
        (
            f'name = "n"\n[[rules]]\nmatch = "layers.99.*"\nscheme = "int8"\n{RULES}',
            "'layers.99.*' decides nothing",
        ),
        ('name = "n"\n[[rules]]\nmatch = "embedding"\nscheme = "int8"\n', "end with a rule for '*'"),
        (
            'name = "n"\n[[rules]]\nmatch = "*"\nscheme = "int5"\n',
            "there is no scheme 'int5': use one of fp32",
        ),
        (
            'name = "n"\n[[rules]]\nmatch = "*"\nscheme = "int4"\nalgorithm = "magic"\n',
            "no algorithm 'magic': use",
        ),
        ('name = "n"\n[[rules]]\nmatch = "*"\nscheme = "pal4"\nalgorithm = "gptq"\n', "gptq finds scales"),
    ],
)
def test_recipes_that_cannot_be_followed(folder, refused, tmp_path, text, says):
    recipe, out = tmp_path / "레시피.toml", tmp_path / "out"
    recipe.write_text(text, encoding="utf-8")
    refused(3, says, "export", folder, "--format", "coreml", "--recipe", recipe, "-o", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", recipe.name]


def test_a_recipe_of_another_encoding(folder, refused, tmp_path):
    (tmp_path / "r.toml").write_bytes(f'name = "안녕"\n{RULES}'.encode("utf-16"))
    refused(
        3, "is not TOML in UTF-8", "export", folder, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out"
    )
    refused(
        3, "give a TOML file, or one of `gochu recipes`", "export", folder, "--recipe", tmp_path / "no.toml"
    )
    refused(3, "no recipe 'int3': use one of ", "export", folder, "--recipe", "int3")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--delegate", "ane", "--scheme", "int4"),
            "takes no scales for groups of inputs (int4): use pal4-g8",
        ),
        (("--format", "executorch", "--scheme", "fp16"), "fp16 is none of them: use int8 or fp32"),
        (("--format", "onnx", "--scheme", "pal4"), "ONNX Runtime has no lookup tables: use int4 or int8"),
        (("--format", "executorch", "--scheme", "w4a16"), "XNNPACK takes no such graph: use int4"),
        (("--format", "coreai", "--scheme", "pal3"), "coreai-torch packs no 3 bits): use fp16"),
        (("--format", "onnx", "--recipe", "ane-palettized4"), "ONNX Runtime has no lookup tables"),
        (("--format", "coreml", "--recipe", "hexagon-w8a16"), "Core ML takes no such graph: use int8"),
        (
            ("--delegate", "qualcomm", "--device", "Galaxy S24 Ultra", "--scheme", "int4"),
            "takes fp16 only: use --scheme fp16",
        ),
    ],
)
def test_bits_that_a_target_refuses(folder, refused, tmp_path, options, says):
    refused(3, says, "export", folder, *options, "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# calibration texts

CALIBRATED = {
    "export": ("--scheme", "int4", "--algorithm", "gptq", "--context", 64),
    "quantize": ("--target-bits", 6.5),
}


@pytest.fixture
def text_refused(refused, folder, tmp_path) -> Callable[..., None]:
    """Both commands refuse a calibration text, and write nothing that anyone could take for a result."""

    def run(text: Path, says: str, checkpoint: Path = folder) -> None:
        for command, options in CALIBRATED.items():
            out = tmp_path / "outputs" / f"{command}.toml"
            refused(3, says, command, checkpoint, *options, "--calibration", text, "-o", out)
            assert not out.exists()
            assert not list(out.parent.rglob("model.*"))

    return run


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("빈.txt", b"", "has 0 tokens, and 128 are the fewest that say anything: give a longer one"),
        ("blank.jsonl", b"\n\n", "has 0 tokens, and 128 are the fewest"),
        ("short.txt", "고추".encode(), "tokens, and 128 are the fewest"),
        (
            "cp949.txt",
            "작은 고추가 맵다. ".encode("cp949") * 99,
            "is not UTF-8 (byte 0xc0 at 0): save it as UTF-8",
        ),
        (
            "utf16.txt",
            ("작은 고추가 맵다. " * 99).encode("utf-16"),
            "convert it (iconv -f CP949 -t UTF-8, or from UTF-16",
        ),
        ("binary.jsonl", bytes(range(256)) * 9, "is not UTF-8 (byte 0x80 at 128)"),
        ("list.jsonl", b"[1, 2]\n", 'line 1: write {"text": "..."}, or {"messages": [...]}'),
        ("other.jsonl", b'{"text": "a"}\n{"body": "b"}\n', 'line 2: write {"text": "..."}'),
        ("turns.jsonl", b'{"messages": [{"role": "user"}]}\n', "with the role and content of each turn"),
        ("not.jsonl", "작은 고추가 맵다.\n".encode(), 'not.jsonl, line 1: write {"text"'),
    ],
)
def test_calibration_texts_that_say_nothing(text_refused, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    text_refused(tmp_path / name, says)
    # a recipe is not even begun
    assert not [path for path in (tmp_path / "outputs").iterdir() if path.name.startswith(".quantize")]


def test_no_calibration_text(text_refused, tmp_path):
    text_refused(
        tmp_path / "no.txt", "no.txt cannot be read (No such file or directory): give a .txt or .jsonl file"
    )


def test_a_byte_order_mark_is_no_text(folder, gochu, tmp_path):
    """Which editors on Windows put before UTF-8."""
    lines = "".join(json.dumps({"text": f"작은 고추가 맵다. {i}"}) + "\n" for i in range(40))
    (tmp_path / "t.jsonl").write_bytes(lines.encode("utf-8-sig"))
    code, _, err = gochu(
        "quantize",
        folder,
        "--target-bits",
        6.5,
        "--calibration",
        tmp_path / "t.jsonl",
        "-o",
        tmp_path / "r.toml",
    )
    assert code == 0, err


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "글.txt").write_text(
        "\n\n".join(f"작은 고추가 맵다. {i}" for i in range(40)), encoding="utf-8"
    )
    return tmp_path / "글.txt"


def test_activations_that_become_nan(checkpoints, text_refused, text, tmp_path):
    model = checkpoints.write(tmp_path / "overflowing", FAMILY)
    model.model.layers[1].post_attention_layernorm.weight.data *= 1e30
    model.save_pretrained(tmp_path / "overflowing")
    text_refused(text, "became NaN or infinite on the calibration text", tmp_path / "overflowing")


def test_a_hessian_that_is_not_positive_definite(folder, refused, text, tmp_path, monkeypatch):
    """None that is summed up of real inputs is indefinite, so the sum is taken with the wrong sign here."""
    from exporter.quantization import streaming

    original = streaming._hessians
    monkeypatch.setattr(
        streaming,
        "_hessians",
        lambda *given: {names: -1e6 * hessian for names, hessian in original(*given).items()},
    )
    options = (*CALIBRATED["export"], "--calibration", text, "-o", tmp_path / "out")
    says = "inputs is not positive definite even with 1 times its mean diagonal added: give a longer calibration text"
    assert "layers.0.attention.q" in refused(3, says, "export", folder, *options)
    assert not (tmp_path / "out").exists()


# outputs


def test_an_existing_output_needs_force(folder, bundle, refused, gochu):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    refused(2, "--force", "export", folder, "--scheme", "int4", "-o", bundle)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    code, _, err = gochu("export", folder, "--scheme", "fp16", "--context", 64, "-o", bundle, "--force")
    assert code == 0, err
    assert (
        json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["variants"][0]["scheme"] == "fp16"
    )


def test_force_replaces_bundles_only(folder, refused, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x", encoding="utf-8")
    refused(2, "is not a bundle", "export", folder, "-o", precious, "--force")
    assert (precious / "thesis.tex").read_text(encoding="utf-8") == "x"


def test_an_output_that_is_a_file(folder, refused, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    refused(2, "exists already", "export", folder, "-o", tmp_path / "file")


def test_an_output_below_a_file(folder, refused, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    refused(3, "could not be written", "export", folder, "-o", tmp_path / "file" / "out")


def full_disk(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line where no file can grow beyond `limit` bytes, as on a disk that is full."""

    def restrict() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "exporter.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        preexec_fn=restrict,
        check=False,
    )


@pytest.mark.parametrize("limit", [3_000, 100_000])
def test_a_full_disk_leaves_the_old_bundle_as_it_was(folder, bundle, limit):
    """The text side does not fit, or the weights do not."""
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    done = full_disk(limit, "export", folder, "--scheme", "fp32", "--context", 64, "-o", bundle, "--force")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("gochu: ")
    assert done.stderr.count("\n") == 1
    assert "could not be written" in done.stderr
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    # what was half written is gone: a full disk needs the room
    left = [path for path in bundle.parent.rglob("model.onnx*") if bundle not in path.parents]
    assert left == []


def test_a_full_disk_leaves_no_output(folder, tmp_path):
    done = full_disk(100_000, "export", folder, "--scheme", "fp32", "--context", 64, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert not (tmp_path / "out").exists()


# bundles


READERS = (["run", "--prompt", "안녕"], ["verify"], ["inspect"], ["bench"])


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_no_bundle(tmp_path, refused, command):
    refused(3, "is not a bundle", command[0], tmp_path, *command[1:])


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_leads_out_of_the_folder(bundle, refused, command, path):
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][0]["path"] = path
    rewrite_json(bundle / "manifest.json", **manifest)
    refused(3, "leaves the bundle's folder", command[0], bundle, *command[1:])


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_a_link_that_leads_out_of_the_folder(bundle, tmp_path, refused, command):
    shutil.move(bundle / "tokenizer.json", tmp_path / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    refused(3, "leads out of the bundle", command[0], bundle, *command[1:])


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"])
def test_a_changed_byte(bundle, refused, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    refused(3, f"{name} is not what was exported", "verify", bundle)


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
@pytest.mark.parametrize("change", [b"", b"x"])
def test_a_file_of_another_size(bundle, refused, command, change):
    path = bundle / "model.onnx.data"
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
    refused(3, "it was changed or cut off", command[0], bundle, *command[1:])


def test_a_missing_file(bundle, refused):
    (bundle / "tokenizer.json").unlink()
    refused(3, "tokenizer.json is missing", "run", bundle, "--prompt", "x")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 2}'])
def test_a_manifest_that_is_none(bundle, refused, text):
    (bundle / "manifest.json").write_text(text, encoding="utf-8")
    refused(3, "manifest.json", "inspect", bundle)


def test_an_empty_prompt(bundle, refused):
    refused(3, "the prompt is empty", "run", bundle, "--prompt", "")


def test_a_prompt_longer_than_the_context(bundle, refused):
    refused(3, "context holds", "run", bundle, "--prompt", "안녕 " * 500)


def test_a_variant_that_is_not_there(bundle, refused):
    refused(2, "no variant 'gpu'", "run", bundle, "--prompt", "x", "--variant", "gpu")


# misuse


@pytest.mark.parametrize(
    "arguments",
    [
        ["explode"],
        ["export", "--nope"],
        ["run", "x", "--max-tokens", "0"],
        ["run", "x", "--json"],
        ["export", "a", "b"],
    ],
)
def test_wrong_use(gochu, arguments):
    code, out, err = gochu(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


def test_a_missing_extra(folder, refused, tmp_path, monkeypatch):
    for name in [
        m for m in sys.modules if m.partition(".")[0] == "onnx" or m.startswith("exporter.formats.onnx")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(5, "gochu[onnx]", "export", folder, "--scheme", "int4", "-o", tmp_path / "out")
