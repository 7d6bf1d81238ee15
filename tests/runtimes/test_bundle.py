"""A bundle is read strictly: nothing outside its folder, nothing changed, nothing unknown."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.bundle import Bundle, Manifest, parse_manifest
from runtimes.errors import BundleError, ChecksumError, GochuError, UnsafePath


def manifest_text(folder: Path) -> str:
    return (folder / "manifest.json").read_text(encoding="utf-8")


def test_opens_a_bundle(toy: Path) -> None:
    bundle = Bundle.open(str(toy))
    assert bundle.manifest.model.name == "toy"
    assert bundle.manifest.tokens.eos == (1, 2)
    bundle.verify_checksums()
    assert bundle.size() == sum(p.stat().st_size for p in toy.iterdir() if p.name != "manifest.json")


def test_manifest_survives_writing_and_reading(toy: Path) -> None:
    manifest = parse_manifest(manifest_text(toy))
    assert parse_manifest(manifest.to_json()) == manifest
    assert parse_manifest(manifest.to_json()).to_json() == manifest.to_json()


def test_korean_stands_in_the_manifest_as_it_is(copy: Path, rewrite: Callable) -> None:
    rewrite(copy, device="갤럭시")
    manifest = Bundle.open(copy).manifest
    assert "갤럭시" in manifest.to_json()
    assert parse_manifest(manifest.to_json()).device == "갤럭시"


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle.*gochu export"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path / "nothing" / "here")


def test_manifest_that_is_not_utf8(copy: Path) -> None:
    (copy / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(copy)


def test_a_changed_byte_is_found(copy: Path) -> None:
    data = copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    bundle = Bundle.open(copy)  # the size is right: only the checksum tells
    with pytest.raises(ChecksumError, match=r"model\.onnx\.data is not what was exported"):
        bundle.verify_checksums()


def test_a_cut_file_is_found_at_once(copy: Path) -> None:
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ChecksumError, match=r"has \d+ bytes where the manifest says \d+"):
        Bundle.open(copy)


def test_a_missing_file_is_found_at_once(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        Bundle.open(copy)


ESCAPES = [
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "C:/secret",
    "..\\secret",
    "a\\b",
    "\\\\host\\x",
    "",
    "a\0b",
    ".",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leaves_the_folder(toy: Path, path: str) -> None:
    """Neither in the list of files, nor in a variant, nor in an entry point."""
    for place in ("files", "variant", "entry"):
        data = json.loads(manifest_text(toy))
        if place == "files":
            data["files"][0]["path"] = path
        elif place == "variant":
            data["variants"][0]["files"][0] = path
        else:
            data["variants"][0]["entry_points"][0]["file"] = path
        with pytest.raises(UnsafePath, match="leaves the bundle's folder"):
            parse_manifest(json.dumps(data))


def test_no_link_leads_out(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((copy / "tokenizer.json").read_bytes())
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UnsafePath, match="leads out of the bundle"):
        Bundle.open(copy)


def test_no_linked_folder_leads_out(copy: Path, tmp_path: Path, rewrite: Callable) -> None:
    data = json.loads(manifest_text(copy))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"x")
    (copy / "inside").symlink_to(tmp_path / "outside")
    data["files"].append({"path": "inside/x", "size": 1, "sha256": "0" * 64})
    (copy / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UnsafePath):
        Bundle.open(copy)


def test_a_link_within_the_folder_is_followed(copy: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "real.json")
    (copy / "tokenizer.json").symlink_to("real.json")
    Bundle.open(copy).verify_checksums()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "schema version 2 where this Gochu reads 1"),
        ({"schema_version": None}, "schema version None"),
        ({"surprise": 1}, "surprise"),
        ({"variants": []}, "variants"),
        ({"tokens": {"eos": []}}, "tokens.eos"),
        ({"tokens": {"eos": [-1]}}, "tokens.eos.0"),
        ({"gate": {"status": "failed"}}, "gate.status"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(toy: Path, change: dict, says: str) -> None:
    data = json.loads(manifest_text(toy)) | change
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(data))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_listed_twice_or_not_at_all(toy: Path) -> None:
    data = json.loads(manifest_text(toy))
    with pytest.raises(BundleError, match="listed twice"):
        parse_manifest(json.dumps(data | {"files": data["files"] * 2}))
    with pytest.raises(BundleError, match=r"not listed: model\.onnx\b"):
        parse_manifest(json.dumps(data | {"files": []}))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(text=st.text() | ANY_JSON.map(json.dumps))
def test_any_text_is_a_manifest_or_a_gochu_error(text: str) -> None:
    with pytest.raises(GochuError):
        parse_manifest(text)


@settings(max_examples=200)
@given(data=st.data())
def test_any_change_gives_a_manifest_or_a_gochu_error(toy: Path, data: st.DataObject) -> None:
    """Put anything anywhere into a good manifest: it is read, or refused in Gochu's own words."""
    root = json.loads(manifest_text(toy))
    node, key = root, data.draw(st.sampled_from(sorted(root)))
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(ANY_JSON)
    with suppress(GochuError):
        assert isinstance(parse_manifest(json.dumps(root)), Manifest)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BundleError):
        parse_manifest('{"a":' * 100_000)


def test_huge_number_is_refused() -> None:
    with pytest.raises(BundleError):
        parse_manifest('{"schema_version": ' + "9" * 10_000 + "}")
