"""The safetensors reader: the same as the safetensors library on good files, and nothing but a CheckpointError on
bad ones."""

import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporter.errors import CheckpointError
from exporter.safetensors import SafetensorsReader, read_header, to_float32

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(list(DTYPES)), SHAPES),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32 - 1),
)
def test_reads_what_the_library_wrote(entries, seed):
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=random) * 100).to(DTYPES[dtype])
        for name, (dtype, shape) in entries.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt", "작은": "고추"})
        found = read_header(path)
        library = load_file(path)
        assert set(found) == set(library)
        reader = SafetensorsReader(found.values())
        try:
            for name, tensor in found.items():
                expected = library[name].float().numpy()
                assert tensor.shape == expected.shape
                np.testing.assert_array_equal(to_float32(reader.rows(tensor, 0, tensor.shape[0])), expected)
                middle = tensor.shape[0] // 2
                np.testing.assert_array_equal(
                    to_float32(reader.rows(tensor, middle, tensor.shape[0])), expected[middle:]
                )
        finally:
            reader.close()


def test_bfloat16_bits_are_exact():
    """All 65536 bit patterns, NaNs and infinities too."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(to_float32(bits).view(np.uint32), expected.view(np.uint32))


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "no header": b"\0" * 8,
    "header longer than the file": file_of({}, length=1000),
    "huge header length": file_of({}, length=2**63),
    "not UTF-8": file_of(b"\xff\xfe{}"),
    "not JSON": file_of(b"{"),
    "a list": file_of([]),
    "a number": file_of(3),
    "deep JSON": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "huge number": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "NaN as a shape": file_of(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"1234"),
    "entry is a list": file_of({"a": []}),
    "entry is null": file_of({"a": None}),
    "entry is a text": file_of({"a": "F32"}),
    "no dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "one offset": file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
    "offsets are texts": file_of({"a": entry([1], "0", "4")}, b"1234"),
    "shape is a number": file_of({"a": entry(1, 0, 4)}, b"1234"),
    "shape is a text": file_of({"a": entry("11", 0, 4)}, b"1234"),
    "shape is a table": file_of({"a": entry({"1": 1}, 0, 4)}, b"1234"),
    "shape has true": file_of({"a": entry([True], 0, 4)}, b"1234"),
    "negative shape": file_of({"a": entry([-1, -1], 0, 4)}, b"1234"),
    "negative offset": file_of({"a": entry([1], -4, 0)}, b"1234"),
    "backwards": file_of({"a": entry([1], 4, 0)}, b"1234"),
    "shape overflows": file_of({"a": entry([2**62, 2**62, 0], 0, 4)}, b"1234"),
    "dtype is a list": file_of({"a": entry([1], 0, 4, dtype=["F32"])}, b"1234"),
    "unknown dtype": file_of({"a": entry([1], 0, 4, dtype="F33")}, b"1234"),
    "shape does not fit": file_of({"a": entry([2], 0, 4)}, b"1234"),
    "beyond the end": file_of({"a": entry([2], 0, 8)}, b"1234"),
    "left over": file_of({"a": entry([1], 0, 4)}, b"12345"),
    "overlap": file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"1" * 12),
    "the same bytes twice": file_of({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
    "hole": file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12),
    "hole at the start": file_of({"a": entry([1], 4, 8)}, b"1" * 8),
    "a name twice": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "a key twice in an entry": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', b"1234"
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_broken_files_are_refused(what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[what])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_huge_header_length_allocates_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((99_999_999).to_bytes(8, "little"))
        file.truncate(50_000_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_zero_sized_tensors_are_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": entry([0, 4], 0, 0), "b": entry([1], 0, 4)}, b"1234"))
    assert read_header(path)["a"].shape == (0, 4)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64, 64)}, path)
    tensor = read_header(path)["a"]
    reader = SafetensorsReader([tensor])
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="changed meanwhile"):
        reader.rows(tensor, 0, 64)
    reader.close()


@pytest.fixture(scope="module")
def good() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({"a.weight": torch.ones(3, 5), "b.weight": torch.ones(4).bfloat16()}, path)
        return path.read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_damage_gives_only_checkpoint_errors(good, data):
    """Truncations, flipped bits and spliced bytes: read whole, or refused."""
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        kind = data.draw(st.sampled_from(["cut", "flip", "insert", "remove"]))
        if kind == "cut":
            del damaged[at:]
        elif kind == "flip" and damaged:
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif damaged:
            del damaged[at : at + data.draw(st.integers(1, 9))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(damaged)
        try:
            found = read_header(path)
        except CheckpointError:
            return
        reader = SafetensorsReader(found.values())
        for tensor in found.values():
            if tensor.dtype in DTYPES:
                reader.rows(tensor, 0, tensor.shape[0] if tensor.shape else 1)
        reader.close()
