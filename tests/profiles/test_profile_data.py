"""The shipped profiles: each is valid, each figure has a source, and they hang together."""

import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import profiles
from profiles import lookup
from profiles.model import GIB, Hexagon, MemoryRule

HOME = Path(str(files("profiles")))
FILES = sorted(HOME.glob("**/*.toml"))


def tables(node: object, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        yield key, node
        for name, value in node.items():
            yield from tables(value, f"{key}.{name}")
    elif isinstance(node, list):
        for item in node:
            yield from tables(item, key)


def has_figure(table: dict[str, Any]) -> bool:
    return any(type(value) in (int, float) for value in table.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_figure_has_a_source(file: Path) -> None:
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    sourced = [key for key, table in tables(content) if "source" in table]
    for key, table in tables(content):
        if has_figure(table):
            # A list of clusters or of shares is sourced by the table that holds the list, a config by its model.
            above = {key, key.rpartition(".")[0], *([".models"] if key.startswith(".models.config") else [])}
            assert above & set(sourced), f"{file}: [{key}] names no source"
    assert "source" not in content, "a source of the whole file would be a source of nothing"
    for _, table in tables(content):
        source = table.get("source", "https://")
        assert any(mark in source for mark in ("http", ": ", "/", "definition of this")), source


def test_the_shipped_files_are_all_read() -> None:
    assert {chip.id for chip in profiles.chips()} == {file.stem for file in (HOME / "socs").glob("*.toml")}
    assert {device.id for device in profiles.devices()} == {
        file.stem for file in (HOME / "devices").glob("*.toml")
    }
    assert len(profiles.devices()) >= 100
    assert len(profiles.chips()) >= 50


def test_each_device_has_a_chip_memory_and_a_reason() -> None:
    for device in profiles.devices():
        assert device.soc.id == device.chip
        assert 0 < device.app_memory_bytes < device.ram_bytes
        entitled = device.entitled_app_memory_bytes
        assert (entitled is not None) == (device.os == "ios")
        assert entitled is None or device.app_memory_bytes < entitled < device.ram_bytes
        assert "GiB" in device.app_memory_reason


def test_no_two_devices_share_a_model_code() -> None:
    codes = Counter(lookup.normalized(code) for device in profiles.devices() for code in device.model_codes)
    assert [code for code, count in codes.items() if count > 1] == []
    plain = [code for code in codes if not code.endswith("*")]
    patterns = [code[:-1] for code in codes if code.endswith("*")]
    assert [code for code in plain if code.startswith(tuple(patterns))] == []


def test_devices_of_one_name_differ_in_chip_and_say_where_they_are_sold() -> None:
    for name, count in Counter(device.name for device in profiles.devices()).items():
        if count > 1:
            same = [device for device in profiles.devices() if device.name == name]
            assert len({device.chip for device in same}) == count
            assert all(device.market and device.model_codes for device in same)


def test_each_phone_has_a_korean_name() -> None:
    for device in profiles.devices():
        if device.os in ("android", "ios"):
            assert any("가" <= letter <= "힣" for alias in device.aliases for letter in alias), device.id


@pytest.mark.parametrize(
    ("chip", "arch", "soc_model", "sdk"),
    [
        ("sm8450", "v69", 36, "2.14"),
        ("sm8550", "v73", 43, "2.23"),
        ("sm8650", "v75", 57, "2.23"),
        ("sm8750", "v79", 69, "2.37"),
        ("sm8850", "v81", 87, "2.42"),
    ],
)
def test_hexagon_figures(chip: str, arch: str, soc_model: int, sdk: str) -> None:
    npu = next(known for known in profiles.chips() if known.id == chip).npu
    assert isinstance(npu, Hexagon)
    assert (npu.arch, npu.soc_model, npu.vtcm_mb, npu.min_qnn_sdk) == (arch, soc_model, 8, sdk)


def test_what_npus_compute_with() -> None:
    """All NPUs of a family say the same, and each entry is of some chip."""
    known = {chip.npu.family: chip.number_types for chip in profiles.chips() if chip.npu}
    assert {family for family, types in known.items() if types is None} == {"apu", "tpu", "exynos"}
    stated = {npu for types in known.values() if types for npu in types.npus}
    assert stated == {family for family, types in known.items() if types}
    for family, blocks in (
        ("hexagon-v69", False),
        ("hexagon-v73", True),
        ("ane", False),
        ("exynos-e9955", False),
    ):
        types = known[family]
        assert types
        assert ("int4-block" in types.weights) is blocks


def test_each_hexagon_is_known_to_the_compiler() -> None:
    ids = [chip.npu.soc_model for chip in profiles.chips() if isinstance(chip.npu, Hexagon)]
    assert None not in ids
    assert len(set(ids)) == len(ids) >= 14


def test_versions_of_a_system_go_not_backward() -> None:
    for device in profiles.devices():
        if device.versions and device.versions.first and device.versions.last:
            assert float(device.versions.first) <= float(device.versions.last), device.id
    assert all(device.versions for device in profiles.devices() if device.os == "ios")


def test_a_farms_name_is_of_one_device_and_says_its_system() -> None:
    names = Counter(name for device in profiles.devices() if device.farms for name in device.farms.names)
    assert set(names.values()) == {1}
    for device in profiles.devices():
        if device.farms:
            assert device.farms.names
            assert all("-" in name for name in device.farms.browserstack)
    assert len(names) >= 60


def test_nothing_is_left_unverified() -> None:
    assert [file.name for file in FILES if "unverified" in file.read_text(encoding="utf-8")] == []


def test_chip_properties() -> None:
    chip = profiles.find("galaxy-s24-ultra").soc
    assert chip.bandwidth_bytes_per_s == pytest.approx(76.8e9)
    assert chip.performance_cores == 6
    bare = next(known for known in profiles.chips() if known.id == "agx-orin")
    assert bare.bandwidth_bytes_per_s is None
    assert bare.performance_cores is None


@pytest.mark.parametrize(
    ("device", "app", "entitled"),
    [
        ("galaxy-s24-ultra", int(0.6 * 12 * GIB), None),
        ("iphone-16-pro", 4 * GIB, int(0.65 * 8 * GIB)),
        ("iphone-17-pro", 6 * GIB, 9 * GIB),
        ("iphone-13-pro", 3_120_000_000, 4_200_000_000),  # measured
        ("iphone-15-pro-max", 3_370_000_000, int(0.65 * 8 * GIB)),  # measured, and by rule
        ("raspberry-pi-5-4gb", 4 * GIB - 1_500_000_000, None),
        ("laptop", 12 * GIB, None),
    ],
)
def test_memory_an_app_may_use(device: str, app: int, entitled: int | None) -> None:
    found = profiles.find(device)
    assert (found.app_memory_bytes, found.entitled_app_memory_bytes) == (app, entitled)


def test_the_memory_rule_is_the_smaller_of_share_and_reserve_and_never_negative() -> None:
    rule = MemoryRule(share=0.6, reserve_bytes=1_200_000_000, source="PocketPal's rule")
    assert rule.app_bytes(8_000_000_000) == 4_800_000_000
    assert rule.app_bytes(2_000_000_000) == 800_000_000
    assert rule.app_bytes(1_000_000_000) == 0


def test_the_reason_tells_which_bound_held() -> None:
    assert "60% of 12 GiB" in profiles.find("galaxy-s24-ultra").app_memory_reason
    assert "less 1.5 GB" in profiles.find("raspberry-pi-5-4gb").app_memory_reason
    assert "measured on this device" in profiles.find("iphone-15-pro").app_memory_reason
    assert "increased-memory-limit" in profiles.find("iphone-16").app_memory_reason


def test_profiles_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        profiles.find("laptop").name = "my laptop"


def test_the_exported_names() -> None:
    assert sorted(profiles.__all__) == [
        "AmbiguousDevice",
        "Chip",
        "Device",
        "KnownModel",
        "Observation",
        "ProfileError",
        "UnknownDevice",
        "UnknownModel",
        "chips",
        "devices",
        "find",
        "find_model",
        "models",
        "observations",
        "search",
    ]
    assert all(hasattr(profiles, name) for name in profiles.__all__)
    with pytest.raises(AttributeError, match="phones"):
        _ = profiles.phones


def test_importing_the_package_loads_neither_pydantic_nor_a_profile() -> None:
    code = "import sys, profiles; print(sorted({'pydantic', 'tomllib', 'difflib'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOME.parent
    )
    assert done.stdout.strip() == "[]"
