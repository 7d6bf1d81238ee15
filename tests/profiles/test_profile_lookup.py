"""`profiles.find`: one device, or one of two errors; never a guess."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import profiles
from profiles import AmbiguousDevice, Device, UnknownDevice, lookup


@pytest.mark.parametrize(
    ("name", "device"),
    [
        # names, however they are written
        ("Galaxy S24 Ultra", "galaxy-s24-ultra"),
        ("galaxy s24 ultra", "galaxy-s24-ultra"),
        ("GALAXY_S24-ULTRA", "galaxy-s24-ultra"),
        ("  GalaxyS24Ultra\t", "galaxy-s24-ultra"),
        ("Samsung Galaxy S24 Ultra", "galaxy-s24-ultra"),
        ("\uff27alaxy \uff33\uff12\uff14 Ultra", "galaxy-s24-ultra"),
        ("Galaxy\u00a0S24\u200b Ultra", "galaxy-s24-ultra"),
        ("S25 Ultra", "galaxy-s25-ultra"),
        ("Galaxy S25", "galaxy-s25"),
        ("Galaxy S25+", "galaxy-s25-plus"),
        ("Galaxy S23 Plus", "galaxy-s23-plus"),
        ("Galaxy Z Flip 7", "galaxy-z-flip7"),
        ("Google Pixel 9 Pro", "pixel-9-pro"),
        ("pixel 8", "pixel-8"),
        ("iPhone 16", "iphone-16"),
        ("iphone16pro", "iphone-16-pro"),
        ("Apple iPhone 17 Pro", "iphone-17-pro"),
        ("OnePlus 12", "oneplus-12"),
        ("Raspberry Pi 5", "raspberry-pi-5-8gb"),
        ("Raspberry Pi 5 4GB", "raspberry-pi-5-4gb"),
        ("MacBook Air M2", "macbook-air-m2"),
        ("laptop", "laptop"),
        # ids, which settle what a name leaves open
        ("galaxy-s24-exynos", "galaxy-s24-exynos"),
        ("Galaxy S24 Snapdragon", "galaxy-s24-snapdragon"),
        # Korean
        ("갤럭시 S24 울트라", "galaxy-s24-ultra"),
        ("갤럭시S24울트라", "galaxy-s24-ultra"),
        ("삼성 갤럭시 S25 플러스", "galaxy-s25-plus"),
        ("갤럭시 S24 엑시노스", "galaxy-s24-exynos"),
        ("갤럭시 Z 플립 7", "galaxy-z-flip7"),
        ("아이폰 16 프로", "iphone-16-pro"),
        ("애플 아이폰 16 프로 맥스", "iphone-16-pro-max"),
        ("구글 픽셀 9 프로", "pixel-9-pro"),
        ("라즈베리파이 5", "raspberry-pi-5-8gb"),
        ("노트북", "laptop"),
        (unicodedata.normalize("NFD", "갤럭시 S24 울트라"), "galaxy-s24-ultra"),
        # model codes
        ("SM-S921B", "galaxy-s24-exynos"),
        ("SM-S921N", "galaxy-s24-exynos"),
        ("sm-s921b/ds", "galaxy-s24-exynos"),
        ("SM-S921U", "galaxy-s24-snapdragon"),
        ("SM-S921U1", "galaxy-s24-snapdragon"),
        ("SM-S9210", "galaxy-s24-snapdragon"),
        ("SM-S926N", "galaxy-s24-plus-exynos"),
        ("SM-S928N", "galaxy-s24-ultra"),
        ("SM-S928", "galaxy-s24-ultra"),
        ("SM-S901B", "galaxy-s22-exynos"),
        ("SM-S901N", "galaxy-s22-snapdragon"),
        ("SM-S908U1", "galaxy-s22-ultra-snapdragon"),
        ("SM-S942B", "galaxy-s26-exynos"),
        ("SM-S942U", "galaxy-s26-snapdragon"),
        ("SM-S948B", "galaxy-s26-ultra"),
        ("SM-F766N", "galaxy-z-flip7"),
        ("iPhone17,1", "iphone-16-pro"),
        ("iPhone17,3", "iphone-16"),
        ("iPhone14,5", "iphone-13"),
        ("tokay", "pixel-9"),
        ("CPH2581", "oneplus-12"),
        # a chip that one device has
        ("Exynos 2500", "galaxy-z-flip7"),
        ("s5e9955", "galaxy-z-flip7"),
        ("mt6991", "vivo-x200"),
        ("Dimensity 9300", "vivo-x100"),
        ("SA8295", "sa8295p-car"),
        # what a farm calls it
        ("Snapdragon X Elite CRD", "snapdragon-x-elite-laptop"),
        ("Samsung Galaxy S22 5G", "galaxy-s22-snapdragon"),
        ("Google Pixel 10 Pro XL-16.0", "pixel-10-pro-xl"),
    ],
)
def test_found(name: str, device: str) -> None:
    assert profiles.find(name).id == device


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "Galaxy S24",
            ["SM-S921B, SM-S921N -> Exynos 2400", "SM-S921U", "-> Snapdragon 8 Gen 3", "'galaxy-s24-exynos'"],
        ),
        ("갤럭시 S24", ["Exynos 2400", "Snapdragon 8 Gen 3", "ro.product.model"]),
        ("SM-S921", ["SM-S921B", "SM-S921U1"]),
        ("Galaxy S24+", ["SM-S926B", "SM-S926U"]),
        ("Galaxy S22", ["SM-S901B -> Exynos 2200", "Snapdragon 8 Gen 1"]),
        ("S22 Ultra", ["SM-S908B -> Exynos 2200", "SM-S908N"]),
        ("Samsung Galaxy S26", ["SM-S942B", "Exynos 2600", "Snapdragon 8 Elite Gen 5"]),
        ("sm8650", ["Galaxy S24 Ultra (galaxy-s24-ultra)", "OnePlus 12 (oneplus-12)"]),
        ("Snapdragon 8 Elite", ["galaxy-s25", "galaxy-s25-ultra"]),
        ("Tensor G4", ["Pixel 9 (pixel-9)", "Pixel 9 Pro (pixel-9-pro)"]),
        ("iPad Pro M4", ["several profiles", "iPad16,3, iPad16,4", "'ipad-pro-11-m4' or 'ipad-pro-13-m4'"]),
        ("Galaxy S26+", ["SM-S947B, SM-S947N -> Exynos 2600", "SM-S947U"]),
    ],
)
def test_ambiguous(name: str, said: list[str]) -> None:
    with pytest.raises(AmbiguousDevice) as caught:
        profiles.find(name)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("Galxy S24 Ultra", "'Galaxy S24 Ultra'"),
        ("갤럭씨 S24 울트라", "'갤럭시 S24 울트라'"),
        ("갤록시 S25 울트라", "'갤럭시 S25 울트라'"),
        ("iPhone 16 Prp", "'iPhone 16 Pro'"),
        ("아이폰16플로", "'아이폰 16 프로'"),
        ("Pixel 9 Porch", "'Pixel 9 Pro'"),
        ("SM-S921X", "'SM-S921N'"),
        ("iPhone17,9", "'iPhone17,5'"),
        ("iPhone 20", "'iPhone 17'"),
        ("One Plus 21", "'OnePlus 12'"),
    ],
)
def test_near_miss(name: str, offered: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        profiles.find(name)
    message = str(caught.value)
    assert "Did you mean" in message
    assert offered in message
    assert message.count("', ") + message.count("' or ") <= 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "empty"),
        ("  -_\u200b ", "empty"),
        ("qqqqqqqq", "GOCHU_PROFILES"),
        ("SM-S928N and a case", "No device profile answers"),
        ("SM-S921B/or another", "No device profile answers"),
        ("sm8475", "no device profile has"),
        ("Snapdragon 888", "no device profile has"),
        ("x" * 10_000, "xxx..."),
    ],
)
def test_unknown(name: str, said: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        profiles.find(name)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_every_device_answers_to_its_id_and_codes() -> None:
    for device in profiles.devices():
        assert profiles.find(device.id) is device
        for code in device.model_codes:
            assert profiles.find(code.replace("*", "B")) is device


def every_name() -> dict[str, set[str]]:
    """Whatever a person may type, and whom it means: all names but those of chips."""
    meant: dict[str, set[str]] = {}
    for device in profiles.devices():
        codes = [code.replace("*", "B") for code in device.model_codes]
        for name in (
            device.id,
            device.name,
            *device.aliases,
            *codes,
            *(device.farms.names if device.farms else ()),
        ):
            meant.setdefault(lookup.normalized(name), set()).add(device.id)
            if name in (device.name, *device.aliases):
                for brand in device.brand:
                    meant.setdefault(lookup.normalized(f"{brand} {name}"), set()).add(device.id)
    return meant


MEANT = every_name()
# Names that stand for several profiles on purpose: the two sizes of one generation of iPad.
FAMILIES = {
    f"{name} {chip}" for name in ("iPad Pro", "아이패드 프로") for chip in ("M1", "M2", "M4", "M5")
} | {f"{name} {chip}" for name in ("iPad Air", "아이패드 에어") for chip in ("M2", "M3", "M4")}


def test_a_name_is_one_devices_or_that_of_a_declared_family() -> None:
    """Devices share a name if they are one product with two chips, or a family."""
    shared = {frozenset(ids) for ids in MEANT.values() if len(ids) > 1}
    names = {device.id: device.name for device in profiles.devices()}
    families = {frozenset(MEANT[lookup.normalized(name)]) for name in FAMILIES}
    assert {ids for ids in shared if len({names[i] for i in ids}) > 1} == families
    two_chips = {names[i] for ids in shared - families for i in ids}
    assert two_chips == {f"Galaxy {s}" for s in ("S22", "S22+", "S22 Ultra", "S24", "S24+", "S26", "S26+")}


@st.composite
def typed(draw: st.DrawFn) -> tuple[str, set[str]]:
    """A name as a hurried person writes it: case, blanks and hyphens are as they come."""
    device = draw(st.sampled_from(profiles.devices()))
    names = [device.id, device.name, *device.aliases, *(code.rstrip("*") for code in device.model_codes)]
    names += device.farms.names if device.farms else ()
    name = draw(st.sampled_from(names))
    if name in (device.name, *device.aliases) and device.brand and draw(st.booleans()):
        name = f"{draw(st.sampled_from(device.brand))} {name}"
    meant = MEANT.get(lookup.normalized(name), {device.id})
    gap = st.sampled_from(["", " ", "-", "_", "  ", "\u2013", "\u00a0"])
    letters = [draw(gap) if letter in " -" else letter for letter in name]
    written = draw(gap).join(letters) if draw(st.integers(0, 9)) == 0 else "".join(letters)
    return draw(st.sampled_from([str.upper, str.lower, str.title, str]))(written), meant


@given(typed())
@settings(max_examples=500)
def test_any_name_in_any_spelling_finds_its_device_or_asks_back(asked: tuple[str, set[str]]) -> None:
    name, meant = asked
    if len(meant) == 1:
        assert {profiles.find(name).id} == meant
        return
    with pytest.raises(AmbiguousDevice) as caught:
        profiles.find(name)
    assert all(repr(identity) in str(caught.value) for identity in meant)


@pytest.mark.parametrize("device", profiles.devices(), ids=lambda device: device.id)
def test_one_wrong_letter_is_not_beyond_help(device: Device) -> None:
    """A slip in a name offers something near, if it does not happen to be the name of another."""
    slip = device.name[:-2] + "#" + device.name[-1:]
    with pytest.raises((UnknownDevice, AmbiguousDevice)) as caught:
        profiles.find(slip)
    assert "Did you mean" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        ({"query": "s24 ultra"}, ["galaxy-s24-ultra"]),
        ({"query": "삼성갤럭시A55"}, ["galaxy-a55"]),
        ({"query": "SM-F741N"}, ["galaxy-z-flip6"]),
        ({"query": "vivo", "ram_at_least_gib": 16}, ["vivo-x300"]),
        ({"chip": "s5e9955"}, ["galaxy-z-flip7"]),
        ({"chip": "Exynos 2400"}, ["galaxy-s24-exynos", "galaxy-s24-plus-exynos", "galaxy-s25-fe"]),
        ({"npu": "exynos-e9965"}, ["galaxy-s26-exynos", "galaxy-s26-plus-exynos"]),
        ({"npu": "v68"}, ["sa8295p-car"]),
        ({"npu": "NPU 990"}, ["vivo-x300"]),
        (
            {"query": "pixel", "npu": "tpu", "ram_at_least_gib": 16, "chip": "tensor-g5"},
            ["pixel-10-pro", "pixel-10-pro-xl"],
        ),
    ],
)
def test_search(asked: dict[str, Any], ids: list[str]) -> None:
    assert [device.id for device in profiles.search(**asked)] == ids


def test_a_search_for_nothing_finds_all() -> None:
    assert profiles.search() == profiles.devices()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"query": "nokia 3310"}, "No device profile answers"),
        ({"query": "pixel", "npu": "ane"}, "name 'pixel' and NPU 'ane'"),
        ({"chip": "sm8475"}, "chip 'sm8475'"),
        ({"chip": "snapdragn"}, "No chip profile answers to 'snapdragn'"),
        ({"ram_at_least_gib": 64}, "at least 64 GB of RAM"),
    ],
)
def test_a_search_that_finds_nothing_says_why(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownDevice) as caught:
        profiles.search(**asked)
    assert said in str(caught.value)


def is_answered(name: str) -> None:
    try:
        found = profiles.find(name)
    except (UnknownDevice, AmbiguousDevice):
        return
    assert found in profiles.devices()


@given(st.text(st.characters(), max_size=60))
def test_any_text_is_found_or_refused(name: str) -> None:
    is_answered(name)


FRAGMENTS = [
    "Galaxy",
    "갤럭시",
    "S24",
    "+",
    "Ultra",
    "SM-",
    "S921",
    "*",
    "/DS",
    "iPhone",
    "17,1",
    " ",
    "-",
    "ﷺ",
    "\x00",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
def test_any_mixture_of_name_fragments_is_found_or_refused(name: str) -> None:
    is_answered(name)


@given(
    st.sampled_from([d.name for d in profiles.devices()]),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
    st.booleans(),
)
def test_a_name_is_answered_alike_in_all_spellings(name: str, form: str, upper: bool) -> None:
    def answer(asked: str) -> str:
        try:
            return profiles.find(asked).id
        except AmbiguousDevice:
            return "ambiguous"

    written = unicodedata.normalize(form, name)  # type: ignore[arg-type]
    assert answer(written.upper() if upper else written) == answer(name)
