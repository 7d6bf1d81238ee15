"""The package's face: its names, and that importing it costs nothing."""

import subprocess
import sys
from types import ModuleType

import pytest

import runtimes
from runtimes.errors import MissingExtra
from runtimes.extras import require


def test_exported_names() -> None:
    assert runtimes.__all__ == [
        "Bundle",
        "Chat",
        "Engine",
        "Generation",
        "Manifest",
        "Measurement",
        "Model",
        "Sampling",
        "Tokenizer",
        "Workload",
        "load",
        "measure",
        "open_engine",
    ]
    for name in runtimes.__all__:
        value = getattr(runtimes, name)
        assert value.__name__ == name
        assert not isinstance(value, ModuleType)
        assert value.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = runtimes.nothing


def test_importing_loads_no_library() -> None:
    heavy = {"numpy", "onnxruntime", "pydantic", "tokenizers", "jinja2", "torch", "rich", "onnx"}
    code = f"import sys, runtimes, runtimes.extras; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_engines_are_chosen_without_loading_one() -> None:
    code = "import sys, runtimes.engines; print(sorted({'numpy', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_names_its_extra() -> None:
    with pytest.raises(MissingExtra) as caught:
        require("no_such_library.part", "run")
    assert str(caught.value) == (
        "no_such_library is not installed; install it with `pip install 'gochu[run]'`"
    )
    assert caught.value.exit_code == 5
    assert require("json", "run").dumps([]) == "[]"


def test_a_library_that_is_there_but_broken_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("import no_such_library\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        require("broken_library", "run")
