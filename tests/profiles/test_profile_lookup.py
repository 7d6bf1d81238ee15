"""`profiles.find`: one device, or one of two errors; never a guess."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import profiles
from profiles import AmbiguousDevice, UnknownDevice


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
        ("mt6983", "no device profile has"),
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
