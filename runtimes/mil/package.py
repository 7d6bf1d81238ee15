"""Read a Core ML package (.mlpackage) as it lies on disk: Manifest.json, model.mlmodel, weights/weight.bin.

>>> package = open_package(Path("model.mlpackage"))                    # doctest: +SKIP
>>> [operation.type for operation in package.functions["decode"].operations][:3]   # doctest: +SKIP
['const', 'const', 'gather']

Formats: apple/coremltools, modelpackage/src/ModelPackage.cpp (the manifest), mlmodel/format/Model.proto and MIL.proto.
"""

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from runtimes.errors import BundleError
from runtimes.mil.library import schema
from runtimes.mil.storage import DTYPES, Constant, Dtype, WeightFile, packed_size

PACKAGE_MANIFEST = "Manifest.json"
LARGEST = 1 << 32  # elements of a tensor: more than any of a model of 10 billion parameters has
_MODEL_PATH = "@model_path"  # the folder of model.mlmodel, in a program
_NUMBERS = {"ints": np.int32, "floats": np.float32, "longInts": np.int64, "bools": np.bool_}
_BY_CODE = {dtype.code: dtype for dtype in DTYPES}


@dataclass(frozen=True)
class TensorType:
    """A tensor's type; a dimension that is known only at run time is None."""

    dtype: Dtype
    shape: tuple[int | None, ...]


Value = Constant | str


@dataclass(frozen=True)
class Name:
    """An operation's argument that another operation, or the function's input, gives."""

    name: str


@dataclass(frozen=True)
class Operation:
    """`inputs`: one or more bindings for each parameter. A `const` has its value as the parameter `val`."""

    type: str
    name: str
    inputs: Mapping[str, tuple[Name | Value, ...]]
    outputs: tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True)
class Function:
    """A function of a program. `states`: tensors that stay between calls, by name."""

    name: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """A package's program; `path` is its folder."""

    path: Path
    functions: Mapping[str, Function]


class _Malformed(Exception):
    """What is wrong with a program, in a few words."""


def open_package(path: Path) -> Package:
    """Read a package's program and find its constants, which are not read yet.

    Raises BundleError if a file is missing, cut off, damaged, or no ML program; MissingExtra without coremltools.
    """
    model = _root_model(path)
    spec = schema("Model").Model()
    try:
        spec.ParseFromString(_read(model))
    except importlib.import_module("google.protobuf.message").DecodeError:
        raise BundleError(
            f"{model} is cut off or damaged: it is no protobuf; export the bundle again"
        ) from None
    if spec.WhichOneof("Type") != "mlProgram":
        raise BundleError(f"{model} holds no ML program; export the bundle again")
    reader = _Reader(model.parent)
    try:
        found = sorted(spec.mlProgram.functions.items(), key=lambda item: item[0])  # a map has no order
        functions = {name: reader.function(name, message) for name, message in found}
    except _Malformed as error:
        why = " ".join(str(error).split())
        raise BundleError(f"{model} is damaged: {why}; export the bundle again") from None
    return Package(path, functions)


def _root_model(path: Path) -> Path:
    """The file that the package's manifest names as its root; BundleError if there is none inside the package."""
    manifest = path / PACKAGE_MANIFEST
    try:
        content = json.loads(_read(manifest))
        entry = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        model = path / "Data" / PurePosixPath(entry)
        inside = model.resolve().is_relative_to(path.resolve())
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(
            f"{manifest} does not say which file is the model; export the bundle again"
        ) from None
    if not inside:
        raise BundleError(f"{manifest} points out of the package ({entry!r}); it is not read")
    return model


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; export the bundle again") from None


class _Reader:
    """Turns protobuf messages into the classes above; `folder`: that of model.mlmodel. Raises _Malformed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, WeightFile] = {}

    def function(self, name: str, message: Any) -> Function:
        if message.opset not in message.block_specializations:
            raise _Malformed(f"function {name} has no block for its opset {message.opset!r}")
        block = message.block_specializations[message.opset]
        inputs, states = {}, {}
        for value in message.inputs:
            if value.type.WhichOneof("type") == "stateType":
                states[value.name] = _tensor_type(value.type.stateType.wrappedType)
            else:
                inputs[value.name] = _tensor_type(value.type)
        operations = tuple(self._operation(each) for each in block.operations)
        return Function(name, inputs, states, operations, tuple(block.outputs))

    def _operation(self, message: Any) -> Operation:
        outputs = tuple((value.name, _tensor_type(value.type)) for value in message.outputs)
        if message.blocks:
            raise _Malformed(
                f"a {message.type} has blocks of its own, which programs for phones here have not"
            )
        inputs = {
            parameter: tuple(self._binding(binding) for binding in argument.arguments)
            for parameter, argument in message.inputs.items()
        }
        attributes = {key: self._value(value) for key, value in message.attributes.items()}
        name = attributes.pop("name", outputs[0][0] if outputs else "")
        inputs |= {key: (value,) for key, value in attributes.items()}
        return Operation(message.type, str(name), inputs, outputs)

    def _binding(self, message: Any) -> Name | Value:
        return Name(message.name) if message.WhichOneof("binding") == "name" else self._value(message.value)

    def _value(self, message: Any) -> Value:
        """A constant's value: text, or a tensor whose bytes are in the message or in a weight file."""
        kind = _tensor_type(message.type)
        shape = tuple(size for size in kind.shape if size is not None)
        if len(shape) != len(kind.shape):
            raise _Malformed("a constant has a dimension of unknown size")
        if message.WhichOneof("value") == "blobFileValue":
            blob = message.blobFileValue
            return self._file(blob.fileName).constant(blob.offset, kind.dtype, shape)
        return _immediate(message.immediateValue.tensor, kind.dtype, shape)

    def _file(self, name: str) -> WeightFile:
        if name not in self._files:
            parts = PurePosixPath(name).parts
            if len(parts) < 2 or parts[0] != _MODEL_PATH or ".." in parts or not name.isprintable():
                raise _Malformed(f"a constant is in the file {name!r}, which is not below {_MODEL_PATH}")
            self._files[name] = WeightFile(self._folder.joinpath(*parts[1:]))
        return self._files[name]


def _immediate(tensor: Any, dtype: Dtype, shape: tuple[int, ...]) -> Value:
    """A value that stands in the message itself, in one of several fields."""
    field = tensor.WhichOneof("value")
    if field == "strings" and dtype.name == "string" and shape == ():
        if len(tensor.strings.values) != 1:
            raise _Malformed(f"a text constant has {len(tensor.strings.values)} values")
        return tensor.strings.values[0]
    if field == "bytes":
        raw = np.frombuffer(bytearray(tensor.bytes.values), np.uint8)
    elif field in _NUMBERS and dtype.name != "string":
        numbers: np.ndarray = np.array(getattr(tensor, field).values, _NUMBERS[field])
        raw = numbers.astype(dtype.numpy).view(np.uint8)
    else:
        raise _Malformed(f"a constant of {dtype.name} is held as {field}")
    if dtype.bits == 0 or len(raw) != packed_size(dtype, shape):
        raise _Malformed(f"a constant of {dtype.name} {list(shape)} has {len(raw)} bytes")
    return Constant(dtype, shape, raw, key=(raw.tobytes(), dtype.name, shape))


def _tensor_type(message: Any) -> TensorType:
    kind = message.WhichOneof("type")
    if kind != "tensorType":
        raise _Malformed(f"a value is of the type {kind}, where a tensor is wanted")
    tensor = message.tensorType
    dtype = _BY_CODE.get(tensor.dataType)
    if dtype is None:
        raise _Malformed(f"a tensor is of the unknown dtype {tensor.dataType}")
    if tensor.rank != len(tensor.dimensions):
        raise _Malformed(f"a tensor of rank {tensor.rank} has {len(tensor.dimensions)} dimensions")
    shape = tuple(
        each.constant.size if each.WhichOneof("dimension") == "constant" else None
        for each in tensor.dimensions
    )
    if math.prod(size or 1 for size in shape) > LARGEST:
        raise _Malformed(f"a tensor has the shape {list(shape)}")
    return TensorType(dtype, shape)
