"""A Core ML package (.mlpackage), written directly: the ML Program's protobuf, and its weights streamed.

coremltools' own builder holds the whole program with its weights in memory and runs passes over it. Here each
weight goes to the weight file when it is first used, through coremltools' blob writer, and only its offset stays.
Layout: apple/coremltools, mlmodel/format/MIL.proto and Model.proto; coremltools/converters/mil/backend/mil.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtimes.mil.library import blob_writer, schema

MIL, MODEL, FEATURES = schema("MIL"), schema("Model"), schema("FeatureTypes")

Kind = Literal[
    "fp16", "fp32", "int32", "bool", "int8", "int4", "uint8", "uint6", "uint4", "uint3", "uint2", "string"
]
SPECIFICATION, OPSET = 9, "CoreML8"  # iOS 18, macOS 15
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")  # keys that are names of weights
_INLINE = 32  # elements up to which a constant stays in the program
_MODEL, _WEIGHTS = "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
_TYPES = {
    "fp16": MIL.FLOAT16,
    "fp32": MIL.FLOAT32,
    "int32": MIL.INT32,
    "bool": MIL.BOOL,
    "int8": MIL.INT8,
    "int4": MIL.INT4,
    "uint8": MIL.UINT8,
    "uint6": MIL.UINT6,
    "uint4": MIL.UINT4,
    "uint3": MIL.UINT3,
    "uint2": MIL.UINT2,
    "string": MIL.STRING,
}
_FEATURES = {
    "fp16": FEATURES.ArrayFeatureType.FLOAT16,
    "fp32": FEATURES.ArrayFeatureType.FLOAT32,
    "int32": FEATURES.ArrayFeatureType.INT32,
}
_KINDS: dict[Any, Kind] = {
    np.dtype(np.float16): "fp16",
    np.dtype(np.float32): "fp32",
    np.dtype(np.int32): "int32",
    np.dtype(np.bool_): "bool",
    np.dtype(np.int8): "int8",
    np.dtype(np.uint8): "uint8",
}


@dataclass(frozen=True)
class Var:
    """A value of a function."""

    name: str
    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Blob:
    """Where data lies in the weight file, and the key under which it was put there."""

    key: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int


Input = Var | Blob | NDArray[Any] | np.generic | str | bool | int | Sequence[Var]


class Package:
    """A package that is being written to `path` (a folder that does not exist yet)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = 0  # bytes of weights so far
        self.functions: list[MilFunction] = []
        self._blobs: dict[str, Blob] = {}
        weights = path / "Data" / _WEIGHTS
        weights.mkdir(parents=True)
        self._writer: Any = blob_writer(weights / "weight.bin")

    def function(self, name: str) -> "MilFunction":
        """A new function; all share states and weights."""
        self.functions.append(MilFunction(self, name))
        return self.functions[-1]

    def blob(self, key: str, kind: Kind, shape: Sequence[int], fetch: Callable[[], NDArray[Any]]) -> Blob:
        """Data in the weight file, fetched and written where the key is met first."""
        if key not in self._blobs:
            data = np.ascontiguousarray(fetch()).reshape(-1)
            names = {"fp16": "fp16", "fp32": "float"}
            write = getattr(self._writer, f"write_{names.get(kind, kind)}_data")
            offset = write(data.view(np.uint16) if kind == "fp16" else data)
            self._blobs[key] = Blob(key, kind, tuple(shape), offset)
            self.size += data.size * _bits(kind) // 8
        return self._blobs[key]

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the program and the package's manifest; `metadata` are texts for whoever opens it."""
        self._writer = None  # which completes the weight file
        program = MIL.Program(
            version=1, functions={function.name: function.proto() for function in self.functions}
        )
        description = MODEL.ModelDescription(
            functions=[function.description() for function in self.functions],
            defaultFunctionName=self.functions[-1].name,
        )
        description.metadata.userDefined.update(metadata)
        model = MODEL.Model(specificationVersion=SPECIFICATION, description=description, mlProgram=program)
        data = model.SerializeToString(deterministic=True)
        (self._path / "Data" / _MODEL).write_bytes(data)
        (self._path / "Manifest.json").write_text(_manifest(data), encoding="utf-8")


class MilFunction:
    """A function that is being written, operation by operation."""

    def __init__(self, package: Package, name: str) -> None:
        self.name = name
        self.package = package
        self.operations: list[Any] = []
        self._inputs: list[Var] = []
        self._states: list[Var] = []
        self._outputs: list[Var] = []
        self._constants: dict[str, Var] = {}
        self._count = 0

    def input(self, name: str, kind: Kind, shape: Sequence[int]) -> Var:
        """What the caller gives."""
        self._inputs.append(Var(name, kind, tuple(shape)))
        return self._inputs[-1]

    def state(self, name: str, shape: Sequence[int]) -> Var:
        """Float16 memory that stays from call to call."""
        self._states.append(Var(name, "fp16", tuple(shape)))
        return self._states[-1]

    def output(self, name: str, value: Var) -> None:
        """What the caller gets."""
        self._outputs.append(self.op("identity", value.kind, value.shape, name=name, x=value))

    def op(
        self, type: str, kind: Kind, shape: Sequence[int], /, *, name: str | None = None, **inputs: Input
    ) -> Var:
        """Append an operation; constants among its inputs become operations of their own."""
        out = Var(name or self._fresh(type), kind, tuple(int(size) for size in shape))
        arguments = {key: self._argument(value) for key, value in inputs.items()}
        self._append(type, arguments, out)
        return out

    def constexpr(
        self, type: str, kind: Kind, shape: Sequence[int], /, *, name: str, **inputs: Blob | Var
    ) -> Var:
        """Append an operation on constants, which a runtime may leave undone until it needs them."""
        if name in self._constants:
            return self._constants[name]
        out = Var(identifier(name), kind, tuple(shape))
        arguments = {}
        for key, value in inputs.items():
            binding = (
                MIL.Argument.Binding(value=_file_value(value))
                if isinstance(value, Blob)
                else MIL.Argument.Binding(name=value.name)
            )
            arguments[key] = MIL.Argument(arguments=[binding])
        self._append(type, arguments, out)
        self._constants[name] = out
        return out

    def const(self, value: Blob | NDArray[Any] | np.generic | str | bool | int) -> Var:
        """A constant; one that is large goes to the weight file."""
        if isinstance(value, Blob):
            return self._constant(value.key, _file_value(value), value.kind, value.shape)
        if isinstance(value, str):
            return self._constant(f"string {value}", _string(value), "string", ())
        array = np.asarray(np.int32(value) if type(value) is int else value)
        kind = _KINDS[array.dtype]
        key = f"{kind} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        if array.size > _INLINE and kind != "bool":
            return self.const(self.package.blob(key, kind, array.shape, lambda: array))
        return self._constant(key, _immediate(array, kind), kind, array.shape)

    def read(self, state: Var) -> Var:
        """What a state holds."""
        return self.op("read_state", "fp16", state.shape, input=state)

    def write(self, state: Var, value: Var) -> Var:
        """Put a value into a state; what it holds then is the result."""
        arguments = {"input": self._argument(state), "data": self._argument(value)}
        self._append("write_state", arguments, None)
        return self.read(state)

    def proto(self) -> Any:
        """As the program holds it."""
        inputs = [MIL.NamedValueType(name=v.name, type=_type(v.kind, v.shape)) for v in self._inputs]
        for state in self._states:
            type = MIL.ValueType()
            type.stateType.wrappedType.CopyFrom(_type("fp16", state.shape))
            inputs.append(MIL.NamedValueType(name=state.name, type=type))
        block = MIL.Block(outputs=[v.name for v in self._outputs], operations=self.operations)
        return MIL.Function(inputs=inputs, opset=OPSET, block_specializations={OPSET: block})

    def description(self) -> Any:
        """As the model's description holds it."""
        states = []
        for state in self._states:
            feature = MODEL.FeatureDescription(name=state.name)
            feature.type.stateType.arrayType.CopyFrom(_feature(state).type.multiArrayType)
            states.append(feature)
        return MODEL.FunctionDescription(
            name=self.name,
            input=[_feature(v) for v in self._inputs],
            output=[_feature(v) for v in self._outputs],
            state=states,
        )

    def _append(self, type: str, arguments: dict[str, Any], out: Var | None) -> None:
        name = out.name if out else self._fresh(type)
        outputs = [MIL.NamedValueType(name=out.name, type=_type(out.kind, out.shape))] if out else []
        self.operations.append(
            MIL.Operation(type=type, inputs=arguments, outputs=outputs, attributes={"name": _string(name)})
        )

    def _argument(self, value: Input) -> Any:
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        names = [v.name if isinstance(v, Var) else self.const(v).name for v in values]
        return MIL.Argument(arguments=[MIL.Argument.Binding(name=name) for name in names])

    def _constant(self, key: str, value: Any, kind: Kind, shape: tuple[int, ...]) -> Var:
        if key not in self._constants:
            name = identifier(key) if _NAME.fullmatch(key) else self._fresh("const")
            out = Var(name, kind, tuple(shape))
            self.operations.append(
                MIL.Operation(
                    type="const",
                    outputs=[MIL.NamedValueType(name=out.name, type=_type(kind, shape))],
                    attributes={"name": _string(out.name), "val": value},
                )
            )
            self._constants[key] = out
        return self._constants[key]

    def _fresh(self, type: str) -> str:
        self._count += 1
        return f"{type}_{self._count}"


def identifier(key: str) -> str:
    """A weight's key as MIL lets values be named: layers.0.mlp.up -> layers_0_mlp_up."""
    return key.replace(".", "_")


def _type(kind: Kind, shape: Sequence[int]) -> Any:
    type = MIL.ValueType()
    tensor = type.tensorType
    tensor.dataType, tensor.rank = _TYPES[kind], len(shape)
    for size in shape:
        tensor.dimensions.add().constant.size = size
    return type


def _file_value(blob: Blob) -> Any:
    place = MIL.Value.BlobFileValue(fileName="@model_path/weights/weight.bin", offset=blob.offset)
    return MIL.Value(type=_type(blob.kind, blob.shape), blobFileValue=place)


def _string(text: str) -> Any:
    value = MIL.Value(type=_type("string", ()))
    value.immediateValue.tensor.strings.values.append(text)
    return value


def _immediate(array: NDArray[Any], kind: Kind) -> Any:
    value = MIL.Value(type=_type(kind, array.shape))
    tensor = value.immediateValue.tensor
    if kind == "bool":
        tensor.bools.values.extend(array.reshape(-1).tolist())
    elif kind == "int32":
        tensor.ints.values.extend(array.reshape(-1).tolist())
    elif kind == "fp32":
        tensor.floats.values.extend(array.reshape(-1).tolist())
    else:
        tensor.bytes.values = array.tobytes()
    return value


def _feature(var: Var) -> Any:
    feature = MODEL.FeatureDescription(name=var.name)
    feature.type.multiArrayType.shape.extend(var.shape)
    feature.type.multiArrayType.dataType = _FEATURES[var.kind]
    return feature


def _bits(kind: Kind) -> int:
    return {"fp16": 16, "fp32": 32, "int32": 32, "int8": 8, "bool": 8}.get(kind) or int(kind.lstrip("uint"))


def _manifest(model: bytes) -> str:
    """The package's table of contents; identifiers come from the model, so that the same one gives the same bytes.

    In the order that Core ML's own library keeps: it writes the file anew whenever it opens the package.
    """
    digest = hashlib.sha256(model).digest()
    parts = {"model": (_MODEL, "CoreML Model Specification"), "weights": (_WEIGHTS, "CoreML Model Weights")}
    ids = {part: str(uuid.UUID(bytes=hashlib.sha256(digest + part.encode()).digest()[:16])) for part in parts}
    entries = {
        ids[part]: {
            "author": "com.apple.CoreML",
            "description": text,
            "name": path.rpartition("/")[2],
            "path": path,
        }
        for part, (path, text) in parts.items()
    }
    contents = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": dict(sorted(entries.items())),
        "rootModelIdentifier": ids["model"],
    }
    return json.dumps(contents, indent=4) + "\n"
