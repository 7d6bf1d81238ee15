"""The commands in the order in which one uses them, and the interface that scripts rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pepper(bundles) -> Path:
    return bundles("pepper", "int8").path


@pytest.fixture
def said(gochu):
    """`said("plan", ...)`: the JSON that a command prints on standard output, which holds nothing else."""

    def run(*arguments: object) -> Any:
        code, out, err = gochu(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def test_export(said, tmp_path):
    out = tmp_path / "out"
    found = said("export", "pepper", "--device", "Galaxy S24 Ultra", "--scheme", "int4", "-o", out)
    assert found["bundle"] == str(out)
    assert found["device"] == "Galaxy S24 Ultra"
    assert found["gate"]["status"] == "passed"
    assert {choice["topic"] for choice in found["plan"]} >= {"format", "scheme", "context"}
    assert all(choice["reason"] for choice in found["plan"])
    files = [path for path in out.iterdir() if path.name != "manifest.json"]
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert sorted(tmp_path.iterdir()) == [out]


def test_export_to_executorch(said, gochu, tmp_path):
    out = tmp_path / "out"
    found = said("export", "pepper", "--format", "executorch", "--device", "SM-S921N", "-o", out)
    assert [variant["name"] for variant in found["variants"]] == ["executorch-xnnpack-int8"]
    assert {check["name"] for check in found["gate"]["checks"]} >= {
        "residency",
        "integers",
        "graph",
        "tokens",
    }
    answer = said("run", out, "--prompt", "삼백이십을 숫자로 쓰면?")
    assert (answer["text"], answer["finish_reason"]) == ("320", "stop")
    assert said("score", out, "--questions", 20)["right"] >= 18
    (measured,) = said("bench", out, "--workload", "smoke")
    assert measured["where"]["engine"].startswith("executorch ")
    code, _, err = gochu("inspect", out)
    assert (code, "executorch-xnnpack-int8" in err) == (0, True)
    code, _, err = gochu("export", "pepper", "--format", "executorch", "--no-verify", "--force", "-o", out)
    assert (code, err.strip().splitlines()[0][:5]) == (0, "Plan:")  # nothing of what libraries say


def test_a_missing_library_is_said_before_work(gochu, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "executorch" else find(name, *rest)
    )
    code, out, err = gochu("export", "pepper", "--format", "executorch", "-o", tmp_path / "out")
    assert (code, out) == (5, "")
    assert err == "gochu: executorch is not installed; install it with `pip install 'gochu[executorch]'`\n"
    assert list(tmp_path.iterdir()) == []


def test_export_for_people(gochu, tmp_path):
    """Tables go to standard error: standard output stays free."""
    code, out, err = gochu(
        "export", "pepper", "--device", "SM-S928N", "--context", 128, "-o", tmp_path / "out"
    )
    assert (code, out) == (0, "")
    for word in ("Plan", "Gate", "scheme", "passed", f"gochu run {tmp_path / 'out'}"):
        assert word in " ".join(err.split())


def test_run(said, pepper):
    found = said("run", pepper, "--prompt", "23 더하기 45는?", "--max-tokens", 24, "--temperature", 0)
    assert found.keys() == {"text", "tokens", "prompt_tokens", "finish_reason", "timings"}
    assert "68" in found["text"]
    assert found["finish_reason"] == "stop"
    assert all(isinstance(token, int) for token in found["tokens"])
    assert found["prompt_tokens"] > 5
    assert found["timings"]["ttft_s"] > 0


def test_run_for_people(gochu, pepper):
    code, out, err = gochu("run", pepper, "--prompt", "화요일 다음 날은?")
    assert code == 0, err
    assert "수요일" in out
    assert out.count("\n") == 1
    assert "tokens/s" in err


def test_sampling_repeats_with_its_seed(said, pepper):
    arguments = ("run", pepper, "--prompt", "안녕", "--raw", "--temperature", 1.5, "--max-tokens", 20)
    first, again, other = (said(*arguments, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other


def test_inspect(said, gochu, pepper):
    assert said("inspect", pepper) == json.loads((pepper / "manifest.json").read_text(encoding="utf-8"))
    code, out, err = gochu("inspect", pepper, "--tensors")
    assert (code, out) == (0, "")
    assert "layers.0.attention.q" in err


def test_bench(said, pepper):
    found = said("bench", pepper, "--threads", 1)
    assert found
    assert isinstance(found, list)


def test_score(said, pepper):
    found = said("score", pepper, "--questions", 40)
    assert found["asked"] == 40
    assert found["rate"] > 0.9


def test_plan(said, tmp_path):
    found = said("plan", "pepper", "--device", "galaxy-s24-exynos", "--scheme", "int4")
    assert found["scheme"] == "int4"
    assert found["device"] == "galaxy-s24-exynos"
    assert all(choice["reason"] for choice in found["choices"])


def test_devices(said, gochu):
    assert any(device["name"] == "Galaxy S24 Ultra" for device in said("devices"))
    assert {"galaxy" in device["name"].lower() for device in said("devices", "galaxy")} == {True}
    code, out, err = gochu("devices", "nokia 3310")
    assert (code, out) == (3, "")
    assert err.count("\n") == 1


def test_devices_by_chip_npu_and_memory(said, gochu):
    def found(*arguments):
        return {device["id"] for device in said("devices", *arguments)}

    assert found("galaxy", "--chip", "sm8650", "--ram-at-least", "12GB") == {
        "galaxy-s24-plus-snapdragon",
        "galaxy-s24-ultra",
        "galaxy-z-flip6",
        "galaxy-z-fold6",
    }
    assert found("--chip", "Snapdragon 8 Elite") == {
        *("galaxy-s25", "galaxy-s25-plus", "galaxy-s25-ultra", "galaxy-z-fold7", "oneplus-13", "xiaomi-15")
    }
    assert found("--npu", "v75") == found("--npu", "hexagon-v75") < found("--npu", "hexagon")
    assert {device["npu"] for device in said("devices", "--npu", "ane")} == {"ane"}
    assert found("vivo", "--ram-at-least", "16 GiB") == {"vivo-x300"}
    assert found("SM-S928N1") == {"galaxy-s24-ultra"}  # a code that a pattern stands for
    for arguments, code, words in [
        (("--chip", "tenso g4"), 3, "'Tensor G4'"),
        (("--npu", "warp"), 3, "NPU 'warp'"),
        (("pixel", "--ram-at-least", "64GB"), 3, "at least 64 GB"),
        (("pixel", "--npu", "ane"), 3, "leave out one of the conditions"),
        (("--ram-at-least", "much"), 2, "8GB"),
        (("--ram-at-least", "-1"), 2, "8GB"),
    ]:
        got, out, err = gochu("devices", *arguments)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert words in err


def test_show_a_device(said, gochu):
    shown = said("devices", "show", "아이폰 16 프로")
    assert shown == said("devices", "show", "iphone17,1")
    assert shown["soc"]["npu"]["source"].startswith("http")
    assert shown["soc"]["number_types"]["npus"] == ["ane"]
    assert shown["versions"]["first"] == "18"
    assert shown["farms"]["browserstack"] == ["iPhone 16 Pro-18"]
    assert shown["ram_bytes"] == 8 << 30
    code, out, err = gochu("devices", "show", "Galaxy", "S24", "Ultra")
    assert (code, out) == (0, "")
    text = "".join(err.split())
    for words in ("SM-S928*", "76.8GB/s", "archv75", "CPU", "QualcommAIHub", "src/hooks"):
        assert words in text
    for arguments, words in [
        (("Galaxy S24",), "more than one chip"),
        (("Galxy S24 Ultra",), "Did you mean"),
        ((), "takes the name of one device"),
        (("pepper", "--chip", "sm8650"), "no filter"),
    ]:
        code, out, err = gochu("devices", "show", *arguments)
        assert (code != 0, out, err.count("\n")) == (True, "", 1)
        assert words in err


def test_a_conversation(pepper):
    done = subprocess.run(
        [sys.executable, "-m", "exporter.cli", "run", pepper],
        input="23 더하기 45는?\n\n화요일 다음 날은?\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert "68" in done.stdout.splitlines()[0]
    assert "수요일" in done.stdout.splitlines()[1]


def test_korean_in_a_plain_locale(pepper):
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "exporter.cli", "run", pepper, "--prompt", "화요일 다음 날은?", "--json"],
        capture_output=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "수요일" in json.loads(done.stdout.decode("utf-8"))["text"]


def test_a_prompt_that_is_not_unicode(gochu, pepper):
    code, out, err = gochu("run", pepper, "--prompt", b"\xb0\xed".decode("utf-8", "surrogateescape"))
    assert (code, out) == (3, "")
    assert "UTF-8" in err


def test_ctrl_c_says_that_nothing_is_lost(gochu, monkeypatch, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.pipeline.export", stop)
    code, out, err = gochu("export", "pepper", "-o", tmp_path / "out")
    assert (code, out) == (130, "")
    assert err == "gochu: stopped; the same command goes on where it was\n"


def test_a_reader_that_goes_away(pepper):
    """`gochu inspect --json | head -1`: no traceback."""
    done = subprocess.run(
        f'"{sys.executable}" -m exporter.cli inspect "{pepper}" --tensors --json | head -1',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
