"""Where a bundle is measured: the registry of targets, those of other packages, several in one run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtimes import targets
from runtimes.errors import TargetError, UsageError
from runtimes.measurement import Backend, Measurement, Method, Place, Subject, sampled

KETTLE = """
from runtimes.measurement import Measurement, Method, Place, Subject, sampled
from runtimes.errors import TargetError

def measure(bundle, workload, *, water: int = 1, variant=None):
    if variant == "cold":
        raise TargetError("the kettle is cold: plug it in")
    return [Measurement(
        what=Subject(model="tea", bundle="0" * 64, variant=variant or "green", format="leaf", scheme="int4", bytes=1),
        where=Place(target="kettle", device="Kettle [9]", os="none", engine="steam 1"),
        how=Method(
            workload=getattr(workload, "name", workload),
            prompt_tokens=1, new_tokens=1, context=1, warmup=1, repeats=1,
        ),
        figures=(sampled("ttft", "s", [1.5]),),
        command="gochu bench tea --on kettle",
        time="2026-01-01T00:00:00+00:00",
    )]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install(distribution, code, name)`: a package with a target, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, code: str = KETTLE, name: str = "kettle") -> None:
        module = f"{distribution}_of_a_test"
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{targets.GROUP}]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


@pytest.mark.parametrize("name", targets.BUILT_IN)
def test_a_built_in_target_is_a_module_with_the_verb(name: str) -> None:
    target = targets.find(name)
    assert target.__name__ == f"runtimes.targets.{name.replace('-', '_')}"
    assert callable(target.measure)


def test_another_packages_target_is_found_by_its_entry_point(install) -> None:
    install("teahouse")
    (found,) = targets.find("kettle").measure("out", "smoke")
    assert found.where.target == "kettle"


def test_an_unknown_target_is_told_what_there_is(install, gochu) -> None:
    install("teahouse")
    with pytest.raises(UsageError, match=r"^there is no target 'hots'; .*host.*kettle; did you mean host\?$"):
        targets.find("hots")
    code, out, err = gochu("bench", "nowhere", "--on", "kettel")
    assert (code, out) == (2, "")
    assert err == (
        f"gochu: there is no target 'kettel'; there are {', '.join(targets.BUILT_IN)}, kettle; did you mean kettle?\n"
    )
    with pytest.raises(UsageError, match=r"kettle$"):
        targets.find("zzz")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import no_such_library",
            "target kettle of teahouse cannot be imported .ModuleNotFoundError: .*no_such",
        ),
        ("measure = 3", "target kettle of teahouse has no function measure"),
    ],
)
def test_another_packages_target_that_cannot_be_used_is_one_sentence(install, gochu, code, words) -> None:
    install("teahouse", code)
    with pytest.raises(TargetError, match=words):
        targets.find("kettle")
    code, out, err = gochu("bench", "nowhere", "--on", "kettle")
    assert (code, out, err.count("\n")) == (6, "", 1)


def test_two_packages_cannot_have_the_same_target(install) -> None:
    install("teahouse")
    install("coffeehouse")
    with pytest.raises(TargetError, match=r"kettle is in several packages \(coffeehouse, teahouse\)"):
        targets.find("kettle")


def test_no_package_replaces_a_built_in_target(install) -> None:
    install("teahouse", name="host")
    assert targets.find("host").__name__ == "runtimes.targets.host"


def test_a_target_gets_the_options_that_it_knows(install) -> None:
    install("teahouse")
    (host, for_host), (kettle, for_kettle) = targets.choose(
        "host, kettle,host", {"threads": 2, "variant": "green", "context": None}
    )
    assert (host, kettle) == (targets.find("host"), targets.find("kettle"))
    assert for_host == {"threads": 2, "variant": "green"}
    assert for_kettle == {"variant": "green"}


@pytest.mark.parametrize(
    ("on", "option", "words"),
    [
        (
            "iphone",
            "--threads",
            "--threads means nothing to target iphone; .* --variant, --device, --option compute_units=",
        ),
        ("mac,iphone", "--threads", "--threads means nothing to target mac or iphone"),
        (
            "host",
            "--device",
            "--device means nothing to target host; .* --threads, --variant, --context",
        ),
        ("host", "--option", r"--option compute_units=\.\.\. means nothing to target host"),
        ("iphone", "--context", "--context means nothing to target iphone"),
        ("host,", "--threads", "'host,' names no target where it should"),
    ],
)
def test_an_option_that_no_target_knows_is_refused_before_anything_runs(gochu, on, option, words) -> None:
    import re

    code, out, err = gochu(
        "bench", "nowhere", "--on", on, option, "compute_units=1" if option == "--option" else 1
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(words, err), err


def test_a_trace_is_made_here(gochu) -> None:
    code, out, err = gochu("bench", "nowhere", "--trace", "--on", "mac")
    assert (code, out) == (2, "")
    assert "leave out --on" in " ".join(err.replace("│", " ").split())


def test_several_targets_in_one_run(install, gochu, toy: Path) -> None:
    pytest.importorskip("onnxruntime", reason="runs the toy bundle")
    install("teahouse")
    code, out, err = gochu("bench", toy, "--on", "host,kettle", "--threads", 1, "--json")
    assert code == 0, err
    found = [Measurement.model_validate(each) for each in json.loads(out)]
    assert [each.where.target for each in found] == ["host", "kettle"]
    code, out, err = gochu("bench", toy, "--on", "kettle,host", "--threads", 1)
    assert (code, out) == (0, "")
    title = " ".join(err.partition("┏")[0].split())
    assert title.index("kettle: Kettle [9], none, steam 1 host: ") == 0
    rows = [line for line in err.splitlines() if "→" in line and "│" in line]
    assert ["kettle" in row for row in rows] == [True, False]


def test_what_one_target_measured_is_not_lost_when_the_next_one_fails(install, gochu, toy: Path) -> None:
    install("teahouse")
    install("coldhouse", KETTLE.replace('variant == "cold"', "True"), name="cold")
    code, out, err = gochu("bench", toy, "--on", "kettle,cold", "--json")
    assert (code, err) == (6, "gochu: the kettle is cold: plug it in\n")
    assert [each["where"]["target"] for each in json.loads(out)] == ["kettle"]
    code, out, err = gochu("bench", toy, "--on", "cold,kettle", "--json")
    assert (code, out, err) == (6, "", "gochu: the kettle is cold: plug it in\n")


def test_looking_at_the_help_looks_for_no_entry_points() -> None:
    code = (
        "import contextlib, importlib.metadata, io, sys\n"
        "looked = []\n"
        "find = importlib.metadata.entry_points\n"
        "importlib.metadata.entry_points = lambda **k: looked.append(k) or find(**k)\n"
        "sys.argv = ['gochu', 'bench', '--help']\n"
        "from exporter.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\n"
        "from runtimes import targets; targets.find('host')\n"
        "print(sorted({'coremltools', 'numpy', 'asyncio', 'onnxruntime'} & set(sys.modules)))\n"
        "print({'group': targets.GROUP} in looked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def place(**changes: Any) -> Place:
    backend = Backend(
        requested="CPU and GPU", effective={"decode": {"GPU": 7, "CPU": 2}, "prefill": {"GPU": 9}}
    )
    return Place(**{"target": "mac", "device": "M", "os": "O", "engine": "E", "backend": backend} | changes)


def test_a_place_says_what_was_asked_of_its_processors_and_what_they_got() -> None:
    from runtimes.report import where

    assert where(place()) == (
        "M, O, E\n  asked for CPU and GPU; operations: decode's on CPU (2), GPU (7); prefill's on GPU (9)"
    )
    assert where(place(backend=Backend(requested="CPU"))) == "M, O, E\n  asked for CPU; operations: unknown"
    assert where(place(backend=None, threads=2)) == "M, O, E, 2 threads"


def test_a_backend_survives_json() -> None:
    found = Measurement(
        what=Subject(model="m", bundle="0" * 64, variant="v", format="coreml", scheme="int4", bytes=1),
        where=place(),
        how=Method(workload="smoke", prompt_tokens=1, new_tokens=1, context=1, warmup=1, repeats=1),
        figures=(sampled("load_time", "s", [1.0]),),
        command="",
        time="",
    )
    assert Measurement.model_validate_json(found.model_dump_json()) == found
