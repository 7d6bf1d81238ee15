"""A Hugging Face checkpoint: its config, its tokenizer's files, and its tensors under canonical names.

Opening one reads only headers; everything that can be wrong is found then, before any work is done.
Nothing of a checkpoint is ever executed or unpickled.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture, read_architecture, sources
from exporter.errors import CheckpointError
from exporter.safetensors import SafetensorsReader, StoredTensor, read_header, to_float32

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # buffers that old checkpoints stored


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a checkpoint, read in row blocks."""

    name: str
    shape: tuple[int, int]
    rows: Callable[[int, int], NDArray[Any]]  # (start, stop) -> as stored, see safetensors.to_float32


def matrix_of(name: str, values: NDArray[np.float32]) -> Matrix:
    """A matrix that is in memory, [outputs, inputs]."""
    outputs, inputs = values.shape
    return Matrix(name, (outputs, inputs), lambda start, stop: values[start:stop])


class Source(Protocol):
    """Where a model's float weights come from: a checkpoint, or what reads one and changes no output of the model
    (`quantization.preparation`)."""

    architecture: Architecture

    def matrix(self, name: str) -> Matrix:
        """A weight matrix [outputs, inputs] by its canonical name."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight (its offset added) or a bias, float32, by its canonical name."""


class Checkpoint:
    """An opened checkpoint (a `Source`). `source` is what the user gave, `revision` a repository's pinned commit."""

    def __init__(self, path: Path, source: str, revision: str | None = None) -> None:
        self.path, self.source, self.revision = path, source, revision
        self.name = source.rstrip("/").rpartition("/")[2] or path.name
        self.config = read_json(path / "config.json", required=True)
        self.generation_config = read_json(path / "generation_config.json")
        self.architecture: Architecture = read_architecture(self.config)
        self._tensors = _tensors(path)
        self._sources = sources(self.architecture)
        _check_tensors(self.architecture, self._sources, self._tensors, path)
        self._reader = SafetensorsReader(self._tensors.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def matrix(self, name: str) -> Matrix:
        """A weight matrix [outputs, inputs] by its canonical name."""
        source = self._sources[name]
        stored = self._tensors[source.tensor]

        def rows(start: int, stop: int) -> NDArray[Any]:
            return self._reader.rows(stored, source.start + start, source.start + stop)

        return Matrix(name, (source.rows, stored.shape[1]), rows)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight (its offset added) or a bias, float32, by its canonical name."""
        source = self._sources[name]
        stored = self._reader.rows(self._tensors[source.tensor], source.start, source.start + source.rows)
        values = to_float32(stored)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{source.tensor} has NaN or infinite values: the checkpoint is damaged")
        return values + np.float32(self.architecture.norm_offset) if name.endswith("_norm") else values

    def fingerprint(self) -> list[Any]:
        """Changes when the checkpoint does: its config, and name, size and time of its weight files."""
        files = sorted({t.file for t in self._tensors.values()})
        return [self.config, self.revision, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


def open_checkpoint(source: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Open a folder, `pepper` (the embedded model), or a Hugging Face repository id such as "org/model".

    Raises CheckpointError or UnsupportedArchitecture with what is wrong and what to do.
    """
    text = os.fspath(source)
    if Path(text).is_dir():
        return Checkpoint(Path(text), Path(text).resolve().name)
    if text == "pepper":
        from exporter.pepper import checkpoint_path

        return Checkpoint(checkpoint_path(), "pepper")
    if Path(text).exists():
        raise CheckpointError(f"{text} is a file: give the checkpoint's folder, the one with config.json")
    if _REPOSITORY.fullmatch(text):
        from exporter.hub import download

        path, pinned = download(text, revision, _WANTED)
        return Checkpoint(path, text, pinned)
    raise CheckpointError(
        f"there is no checkpoint {text!r}: give a folder with config.json and safetensors files, "
        "a Hugging Face repository id (org/model), or pepper"
    )


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """A JSON table; empty if the file is absent and not required."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} is missing: give the folder of a Hugging Face checkpoint")
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON table: download it again")
    return data


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, by its name in the checkpoint."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise CheckpointError(f"{index} has no weight_map: download it again")
        found: dict[str, StoredTensor] = {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {shard!r}, which is not a safetensors file beside it")
            if not (path / shard).is_file():
                raise CheckpointError(f"{path / shard} is missing: the download is incomplete, get it again")
            found |= {name: t for name, t in read_header(path / shard).items() if places.get(name) == shard}
        if lost := sorted(set(places) - set(found)):
            raise CheckpointError(
                f"{path / places[lost[0]]} does not hold {lost[0]}, though the index says so"
            )
        return found
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise CheckpointError(
            f"{path} has {len(files)} safetensors files and no {index.name}: download that too"
        )
    if pickles := sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")):
        raise CheckpointError(
            f"{path} holds its weights as {pickles[0]}, a pickle that could run code: Gochu never opens those; "
            "convert it to safetensors where you trust it (transformers: save_pretrained)"
        )
    raise CheckpointError(f"{path} has no safetensors files: download the weights too")


def _check_tensors(
    arch: Architecture, places: dict[str, Any], tensors: dict[str, StoredTensor], path: Path
) -> None:
    """Every tensor that the architecture has is there with its shape and a float dtype, and no other."""
    columns = {name: shape[1] for name, shape in arch.matrices()}
    rows: dict[str, int] = {}
    for source in places.values():
        if source.tensor not in tensors:
            raise CheckpointError(f"{path}: tensor {source.tensor} is missing: the checkpoint is incomplete")
        rows[source.tensor] = rows.get(source.tensor, 0) + source.rows
    for name, source in places.items():
        stored = tensors[source.tensor]
        expected = (rows[source.tensor], columns[name]) if name in columns else (rows[source.tensor],)
        if stored.shape != expected:
            raise CheckpointError(
                f"{path}: tensor {source.tensor} has shape {list(stored.shape)} where config.json means "
                f"{list(expected)}: weights and config do not belong together"
            )
        if stored.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{path}: tensor {source.tensor} is {stored.dtype}: Gochu starts from float32, float16 or bfloat16"
            )
    known = {source.tensor for source in places.values()} | ({"lm_head.weight"} if arch.tied else set())
    if extra := sorted(name for name in set(tensors) - known if not _IGNORED.fullmatch(name)):
        raise CheckpointError(
            f"{path}: tensor {extra[0]} has no place in a {arch.family} decoder of {arch.layers} layers: "
            "the model has parts that would be lost"
        )
