"""`gochu target`: what it lists, and what it sets up."""

import json
from types import SimpleNamespace

import pytest

from runtimes import targets
from runtimes.errors import TargetError


@pytest.fixture
def kettle(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A target of another package, in its own words."""

    def measure(bundle, workload, *, threads=1, water=1, progress=None): ...

    target = SimpleNamespace(__doc__="Boil [a bundle].\n\nMore.", measure=measure)
    monkeypatch.setattr(targets, "BUILT_IN", ("host", "kettle"))
    find = targets.find
    monkeypatch.setattr(targets, "find", lambda name: target if name == "kettle" else find(name))
    return target


def test_every_target_is_listed_with_its_own_words(gochu) -> None:
    code, out, err = gochu("target", "list", "--json")
    assert (code, err) == (0, "")
    found = {each["name"]: each for each in json.loads(out)}
    assert list(found) == targets.known()
    assert (found["host"]["ready"], found["host"]["hindrance"]) == (True, "")
    assert found["host"]["options"] == ["--threads", "--variant", "--context"]
    emulator = found["arm64-emulator"]
    assert emulator["has_setup"]
    assert not emulator["ready"]  # a test's cache is empty
    assert "run `gochu target setup arm64-emulator`" in emulator["hindrance"]
    assert "--option max_minutes=..." in emulator["options"]
    assert all(each["what"].endswith(".") for each in found.values())


@pytest.mark.parametrize("words", [["target"], ["target", "list"]])
def test_the_table_says_what_is_missing(kettle: SimpleNamespace, gochu, words) -> None:
    def check() -> None:
        raise TargetError("the kettle is cold: plug it in")

    kettle.check = check
    code, out, err = gochu(*words)
    assert (code, out) == (0, "")
    host, kettle = (
        next(line for line in err.splitlines() if line.strip().startswith(name))
        for name in ("host", "kettle")
    )
    assert "yes" in host
    assert "Boil [a bundle]." in kettle
    assert "no: the kettle is cold: plug" in kettle


def test_what_cannot_be_known_is_not_claimed(kettle: SimpleNamespace) -> None:
    about = targets.about("kettle")
    assert (about.ready, about.has_setup) == (None, False)
    assert about.options == ("--threads", "--option water=...")
    kettle.check = lambda: None
    assert targets.about("kettle").ready is True


def test_a_package_that_cannot_be_imported_is_listed_as_such(kettle: SimpleNamespace, monkeypatch) -> None:
    def find(name: str) -> None:
        raise TargetError("target kettle of teahouse cannot be imported: install that package again")

    monkeypatch.setattr(targets, "find", find)
    about = targets.about("kettle")
    assert (about.ready, about.hindrance[:24]) == (False, "target kettle of teahous")


def test_a_target_is_set_up_by_its_own_function(kettle: SimpleNamespace, gochu, tmp_path) -> None:
    kettle.setup = lambda progress: progress("filling") or tmp_path / "주전자"
    code, out, err = gochu("target", "setup", "kettle", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"target": "kettle", "folder": str(tmp_path / "주전자")}
    code, out, err = gochu("target", "setup", "kettle")
    assert (code, out) == (0, "")
    assert "target kettle is ready" in err


def test_a_target_that_needs_no_set_up_says_so(kettle: SimpleNamespace, gochu) -> None:
    kettle.setup = lambda progress: None
    assert gochu("target", "setup", "host") == (
        2,
        "",
        "gochu: target host needs no set-up; those that do are kettle\n",
    )
    code, _, err = gochu("target", "setup", "kettel")
    assert (code, err) == (
        2,
        "gochu: there is no target 'kettel'; there are host, kettle; did you mean kettle?\n",
    )
