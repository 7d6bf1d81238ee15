"""The folder that GOCHU_PROFILES names: profiles of one's own, and what is said when they are wrong."""

from pathlib import Path

import pytest

import profiles
from profiles import AmbiguousDevice, ProfileError

CHIP = """
name = "Kirin 9020"
vendor = "HiSilicon"

[dram]
gb_per_s = 68.2
source = "a teardown that I read"
"""
DEVICE = """
name = "Mate 70"
brand = ["Huawei", "화웨이"]
aliases = ["메이트 70"]
os = "android"
chip = "kirin-9020"

[models]
codes = ["CLS-AL00"]
source = "the phone on my desk"

[memory]
ram_gib = 12
source = "the phone on my desk"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOCHU_PROFILES", str(tmp_path))
    write(tmp_path / "socs" / "kirin-9020.toml", CHIP)
    write(tmp_path / "devices" / "mate-70.toml", DEVICE)
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def refusal() -> str:
    with pytest.raises(ProfileError) as caught:
        profiles.find("laptop")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_own_profiles_stand_beside_the_shipped_ones(folder: Path) -> None:
    found = profiles.find("화웨이 메이트 70")
    assert found.soc.name == "Kirin 9020"
    assert found.soc.bandwidth_bytes_per_s == pytest.approx(68.2e9)
    assert profiles.find("CLS-AL00") == found
    assert profiles.find("iPhone 16").id == "iphone-16"
    assert found in profiles.devices()
    assert found.soc in profiles.chips()


def test_an_own_device_may_have_a_shipped_chip_and_makes_its_chip_ambiguous(folder: Path) -> None:
    write(folder / "devices" / "mate-70.toml", DEVICE.replace("kirin-9020", "exynos-2500"))
    assert profiles.find("Mate 70").soc.id == "exynos-2500"
    with pytest.raises(AmbiguousDevice, match="Mate 70"):
        profiles.find("Exynos 2500")


def test_a_file_under_edit_is_read_anew(folder: Path) -> None:
    assert profiles.find("Mate 70").memory.ram_gib == 12
    write(folder / "devices" / "mate-70.toml", DEVICE.replace("12", "16"))
    assert profiles.find("Mate 70").memory.ram_gib == 16


def test_two_profiles_of_one_name_are_a_question(folder: Path) -> None:
    write(
        folder / "devices" / "mate-70-16gb.toml",
        DEVICE.replace("= 12", "= 16").replace("CLS-AL00", "CLS-AL10"),
    )
    with pytest.raises(AmbiguousDevice, match=r"several profiles.*'mate-70' or 'mate-70-16gb'"):
        profiles.find("메이트 70")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('os = "android"', 'os = "harmony"', ["'os'", "harmony"]),
        ('os = "android"', "", ["'os' is missing", "add it"]),
        ("ram_gib = 12", "ram = 12", ["'memory.ram_gib' is missing"]),
        ("ram_gib = 12", "ram_gib = 12\nspeed = 1", ["'memory.speed' is unknown", "remove it"]),
        ("ram_gib = 12", 'ram_gib = "12"', ["'memory.ram_gib'", "number"]),
        ("ram_gib = 12", "ram_gib = true", ["'memory.ram_gib'", "number"]),
        ("ram_gib = 12", "ram_gib = nan", ["'memory.ram_gib'", "nan"]),
        ("ram_gib = 12", "ram_gib = -1", ["'memory.ram_gib'", "greater than 0"]),
        ('ram_gib = 12\nsource = "the phone on my desk"', "ram_gib = 12", ["'memory.source' is missing"]),
        ('name = "Mate 70"', 'nmae = "Mate 70"', ["'name' is missing", "further fault"]),
        ('name = "Mate 70"', 'name = "Mate 70"\nid = "mate"', ["'id' is unknown", "aliases"]),
        ('name = "Mate 70"', 'name = "Mate 70"\nsoc = "kirin"', ["'soc' is unknown"]),
        ('name = "Mate 70"', 'name = " "', ["'name'", "at least 1 character"]),
        (
            'chip = "kirin-9020"',
            'chip = "kirin-9999"',
            ["'kirin-9999' has no profile", "socs/kirin-9999.toml"],
        ),
        ('codes = ["CLS-AL00"]', 'codes = ["*"]', ["'models.codes.0'"]),
        ('codes = ["CLS-AL00"]', 'codes = ["C*S"]', ["'models.codes.0'"]),
        ('name = "Mate 70"', "name = ", ["not TOML", "line 2"]),
    ],
)
def test_a_wrong_device_file_is_one_sentence(folder: Path, old: str, new: str, said: list[str]) -> None:
    assert old in DEVICE
    file = folder / "devices" / "mate-70.toml"
    write(file, DEVICE.replace(old, new))
    message = refusal()
    for words in [str(file), *said]:
        assert words in message


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            '[npu]\nkind = "hexagon"\nname = "Hexagon"\narch = "75"\nsource = "of my own"',
            ["npu", "arch", "75"],
        ),
        ('[npu]\nkind = "warp"\nsource = "of my own"', ["npu", "warp"]),
        ('[npu]\nkind = "ane"\nvtcm_mb = 8\nsource = "of my own"', ["vtcm_mb", "unknown"]),
        ('[cpu]\nclusters = []\nsource = "of my own"', ["cpu.clusters"]),
        ('[cpu]\nclusters = [{ count = 2, core = "big" }]\nsource = "of my own"', ["performance", "missing"]),
        (
            '[cpu]\nclusters = [{ count = 2.5, core = "big", performance = true }]\nsource = "of mine"',
            ["count"],
        ),
    ],
)
def test_a_wrong_chip_file_is_one_sentence(folder: Path, table: str, said: list[str]) -> None:
    file = folder / "socs" / "kirin-9020.toml"
    write(file, f"{CHIP}\n{table}\n")
    message = refusal()
    for words in [str(file), *said]:
        assert words in message


def test_a_file_that_is_not_utf8(folder: Path) -> None:
    file = folder / "devices" / "mate-70.toml"
    file.write_bytes(DEVICE.encode("cp949"))
    assert "is not UTF-8; save the file as UTF-8" in refusal()


def test_a_name_that_is_no_id(folder: Path) -> None:
    write(folder / "devices" / "Mate 70.toml", DEVICE)
    assert "rename the file" in refusal()


def test_a_shipped_id_is_taken(folder: Path) -> None:
    write(folder / "socs" / "sm8650.toml", CHIP)
    assert "Gochu ships a profile with the id 'sm8650'" in refusal()


@pytest.mark.parametrize("stray", ["mate-70.toml", "device/mate-70.toml"])
def test_a_profile_that_would_not_be_read(folder: Path, stray: str) -> None:
    write(folder / stray, DEVICE)
    message = refusal()
    assert str(folder / stray) in message
    assert str(folder / "devices") in message


def test_a_directory_in_the_place_of_a_file(folder: Path) -> None:
    (folder / "devices" / "mate-80.toml").mkdir()
    assert "cannot be read" in refusal()


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOCHU_PROFILES", str(tmp_path / "nowhere"))
    assert "not a folder" in refusal()


def test_an_empty_variable_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOCHU_PROFILES", "")
    assert profiles.find("laptop").id == "laptop"
