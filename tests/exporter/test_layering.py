"""Imports go down only, and nothing heavy is imported before it is needed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("profiles", "runtimes", "exporter")  # each may import those before it
HEAVY = {
    "torch",
    "onnxruntime",
    "onnx",
    "transformers",
    "numpy",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
}


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Full names imported anywhere in a file, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_packages_import_downwards_only():
    seen = set()
    for name, path in modules().items():
        here = name.partition(".")[0]
        used = {module.partition(".")[0] for module in imports(path)} & set(PACKAGES)
        above = used - set(PACKAGES[: PACKAGES.index(here) + 1])
        assert not above, f"{name} imports {above}"
        seen |= {(here, other) for other in used}
    assert {("exporter", "runtimes"), ("exporter", "profiles"), ("runtimes", "profiles")} <= seen


@pytest.mark.parametrize("siblings", ["runtimes.engines", "runtimes.targets", "exporter.formats"])
def test_siblings_do_not_know_each_other(siblings):
    """onnx_weights belongs to onnx: what comes before the underscore is one family."""
    family = {
        name: name.removeprefix(f"{siblings}.").split("_")[0]
        for name in modules()
        if name.startswith(f"{siblings}.")
    }
    for name, own in family.items():
        others = {other for other in imports(modules()[name]) if family.get(other, own) != own}
        assert not others, f"{name} imports {others}"


def test_the_quantizers_know_no_format():
    for name, path in modules().items():
        if name.startswith("exporter.quantization"):
            assert not {
                other for other in imports(path) if other.startswith(("exporter.formats", "runtimes.engines"))
            }


def test_no_module_uses_the_private_names_of_another():
    for name, path in modules().items():
        tree, known = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{name} imports {private} of {node.module}"
                known |= {alias.asname or alias.name for alias in node.names}
        own = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = node.value.id in known - own and node.value.id.islower()
                assert not (module and re.match("_[a-z]", node.attr)), f"{name} uses {ast.unparse(node)}"


def loaded_after(code: str) -> set[str]:
    """The heavy libraries in memory after `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nimport json; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    ["import exporter", "import runtimes", "import profiles; profiles.devices()", "import exporter.cli"],
)
def test_importing_a_package_loads_nothing_heavy(code):
    assert loaded_after(code) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["run", "-h"], ["devices"], []])
def test_the_command_line_answers_without_heavy_libraries(arguments):
    code = (
        f"import contextlib, io\nsys.argv = ['gochu', *{arguments!r}]\nfrom exporter.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()"
    )
    assert loaded_after(code) == set()


@pytest.mark.parametrize(
    "command",
    [
        "export",
        "plan",
        "quantize",
        "recipes",
        "devices",
        "run",
        "bench",
        "verify",
        "inspect",
        "score",
        "target",
        "quality",
        "fit",
    ],
)
def test_every_command_has_examples_in_its_help(command, gochu):
    code, out, err = gochu(command, "--help")
    assert (code, err) == (0, "")
    assert f"gochu {command}" in out.partition("Examples")[2]
