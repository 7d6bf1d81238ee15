"""The evaluator of Core ML programs: every operation against torch, every packed dtype against coremltools' writer, and
damaged packages.

Programs are made with coremltools' own builder and saved by it; what is evaluated is read back from the disk.
"""

import gc
import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import coremltools as ct
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.libmilstoragepython import _BlobStorageWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from runtimes.errors import BundleError, UsageError
from runtimes.mil import weights
from runtimes.mil.evaluator import Evaluator
from runtimes.mil.ops import ARITHMETIC, MOVEMENT, WEIGHTS
from runtimes.mil.package import open_package
from runtimes.mil.storage import DTYPES, WeightFile

logging.getLogger("coremltools").setLevel(logging.ERROR)
mb = Builder
MIL = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32}
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """Each conversion collects garbage, which takes 0.3 s with all that is imported; that is no garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


def save(
    path: Path,
    functions: Mapping[str, tuple[Mapping[str, np.ndarray], Callable[..., Any]]],
    states: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Save a package whose functions take arrays like those given; results are named out0, out1, ..."""
    program = Program()
    for name, (inputs, build) in functions.items():
        variables = {
            key: mb.placeholder(value.shape, dtype=MIL[value.dtype.name]) for key, value in inputs.items()
        }
        variables |= {
            key: mb.state_tensor_placeholder(shape, dtype=types.fp16) for key, shape in (states or {}).items()
        }
        with Function(variables, opset_version=ct.target.iOS18) as function:
            found = build(**function.inputs)
            outputs = found if isinstance(found, list | tuple) else [found]
            function.set_outputs([mb.identity(x=o, name=f"out{i}") for i, o in enumerate(outputs)])
        program.add_function(name, function)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = True
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )
    model.save(str(path))
    return path


def evaluate(path: Path, inputs: Mapping[str, np.ndarray], **options: Any) -> list[np.ndarray]:
    return list(Evaluator(open_package(path), **options).run("main", inputs).values())


@dataclass(frozen=True)
class Case:
    """One way to use an operation: as built in MIL, and as torch has it, on the same values.

    `build(number, **variables)`: `number` is numpy's dtype of the floats; `expect(**tensors)` gets them in float32.
    """

    build: Callable[..., Any]
    expect: Callable[..., Any]
    inputs: Mapping[str, np.ndarray]


def floats(*shape: int, low: float = -2, high: float = 2) -> np.ndarray:
    return RANDOM.uniform(low, high, shape).astype(np.float32)


def whole(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def one(build: Callable[..., Any], expect: Callable[..., Any], x: np.ndarray | None = None) -> Case:
    return Case(lambda number, x: build(x), expect, {"x": floats(2, 3, 4) if x is None else x})


def two(
    build: Callable[..., Any],
    expect: Callable[..., Any],
    x: np.ndarray | None = None,
    y: np.ndarray | None = None,
) -> Case:
    x, y = floats(2, 3, 4) if x is None else x, floats(3, 1) if y is None else y
    return Case(lambda number, x, y: build(x, y), expect, {"x": x, "y": y})


def like(x: Any, value: float) -> Any:
    """A constant in the float of a variable."""
    return types.nptype_from_builtin(x.dtype)(value)


def truth(condition: Any) -> Any:
    """Booleans as numbers: a program cannot return them."""
    return mb.cast(x=condition, dtype="int32")


def compared(name: str, expect: Callable[..., Any]) -> list[Case]:
    """A comparison of floats, some of them equal, and of integers."""
    build = getattr(mb, name)
    ints = whole([1, 2, 3], [3, 2, 1])
    half = np.round(floats(4, 5) * 2) / 2
    return [
        two(lambda x, y: truth(build(x=x, y=y)), lambda x, y: expect(x, y).int(), half, half[:1]),
        two(lambda x, y: truth(build(x=x, y=y)), lambda x, y: expect(x, y).int(), ints, whole(2, 2, 3)),
    ]


def joined(name: str, expect: Callable[..., Any]) -> list[Case]:
    bits = whole([0, 0, 1, 1], [1, 0, 1, 0])

    def build(x: Any, y: Any) -> Any:
        return truth(getattr(mb, name)(x=mb.cast(x=x, dtype="bool"), y=mb.cast(x=y, dtype="bool")))

    return [two(build, lambda x, y: expect(x.bool(), y.bool()).int(), bits, bits[::-1].copy())]


def reduced(name: str, expect: Callable[..., Any]) -> list[Case]:
    build = getattr(mb, name)
    return [
        one(lambda x: build(x=x, axes=[-1], keep_dims=True), lambda x: expect(x, (-1,), True)),
        one(lambda x: build(x=x, axes=[0, 2], keep_dims=False), lambda x: expect(x, (0, 2), False)),
        one(lambda x: build(x=x, keep_dims=True), lambda x: expect(x, (0, 1, 2), True)),
    ]


def simple(name: str, expect: Callable[..., Any], low: float = -2, high: float = 2) -> list[Case]:
    return [one(lambda x: getattr(mb, name)(x=x), expect, floats(2, 3, 4, low=low, high=high))]


def binary(name: str, expect: Callable[..., Any], low: float = -2) -> list[Case]:
    build = getattr(mb, name)
    return [
        two(lambda x, y: build(x=x, y=y), expect, floats(2, 3, 4, low=low), floats(3, 1, low=max(low, 0.2))),
        two(lambda x, y: build(x=x, y=y), expect, floats(2, 3, low=low), floats(2, 3, low=max(low, 0.2))),
    ]


def integers(name: str, expect: Callable[..., Any]) -> Case:
    build = getattr(mb, name)
    return two(lambda x, y: build(x=x, y=y), expect, whole([5, -7, 9]), whole([2], [3]))


def slices(**arguments: Any) -> Case:
    """A slice of [5, 6, 7] with constant ends, against the same in numpy."""
    masks = {key: arguments.get(key, [False] * 3) for key in ("begin_mask", "end_mask", "squeeze_mask")}
    place = tuple(
        b if squeeze else slice(None if from_start else b, None if to_end else e, s)
        for b, e, s, from_start, to_end, squeeze in zip(
            arguments["begin"],
            arguments["end"],
            arguments.get("stride", [1] * 3),
            *masks.values(),
            strict=True,
        )
    )
    return one(
        lambda x: mb.slice_by_index(x=x, **arguments),
        lambda x: torch.from_numpy(x.numpy()[place].copy()),
        floats(5, 6, 7),
    )


def updates(**arguments: Any) -> Case:
    def expect(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[1:3, :, 1:6:2] = y
        return x

    return two(
        lambda x, y: mb.slice_update(x=x, update=y, **arguments), expect, floats(4, 3, 6), floats(2, 3, 3)
    )


def attention(mask: np.ndarray | None) -> Case:
    inputs = {"q": floats(1, 2, 3, 8), "k": floats(1, 2, 5, 8), "v": floats(1, 2, 5, 4)}
    if mask is not None:
        inputs["m"] = mask

    def build(number: Any, q: Any, k: Any, v: Any, m: Any = None) -> Any:
        if m is not None and mask is not None and mask.dtype == np.int32:
            m = mb.cast(x=m, dtype="bool")
        return mb.scaled_dot_product_attention(
            query=q, key=k, value=v, **({} if m is None else {"attn_mask": m})
        )

    def expect(q: Any, k: Any, v: Any, m: Any = None) -> Any:
        return functional.scaled_dot_product_attention(
            q, k, v, m.bool() if m is not None and m.dtype == torch.int32 else m
        )

    return Case(build, expect, inputs)


def blockwise(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> Case:
    """A weight of [6, 8], added so that every element is seen; block sizes by the shape of the scales."""

    def build(number: Any, x: Any) -> Any:
        extra = {} if offset is None else {"offset": offset}
        return mb.add(
            x=x, y=mb.constexpr_blockwise_shift_scale(data=data, scale=scale.astype(number), **extra)
        )

    def expect(x: torch.Tensor) -> torch.Tensor:
        spread = [
            np.asarray(part).astype(np.float32) for part in (scale, 0 * scale if offset is None else offset)
        ]
        for axis, size in enumerate(data.shape):
            spread = [np.repeat(part, size // part.shape[axis], axis) for part in spread]
        return x + torch.from_numpy((data.astype(np.float32) - spread[1]) * spread[0])

    return Case(build, expect, {"x": np.zeros(data.shape, np.float32)})


def looked_up(bits: int, groups: tuple[int, int], vector: int = 1, axis: int = 0) -> Case:
    """Indices [6, 8] into tables for groups along both dimensions."""
    indices = RANDOM.integers(0, 2**bits, (6, 8)).astype(np.uint8)
    table = floats(*groups, 2**bits, vector).astype(np.float16).astype(np.float32)

    def build(number: Any, x: Any) -> Any:
        stored = indices.astype(types.string_to_nptype(f"uint{bits}")) if bits < 8 else indices
        extra = {"vector_axis": np.int32(axis)} if vector > 1 else {}
        return mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=stored, lut=table.astype(number), **extra))

    dense = np.empty(
        [size * (vector if axis == i else 1) for i, size in enumerate(indices.shape)], np.float32
    )
    for i, j in np.ndindex(*indices.shape):
        entry = table[i * groups[0] // 6, j * groups[1] // 8, indices[i, j]]
        for v in range(vector):
            dense[(i * vector + v, j) if axis == 0 else (i, j * vector + v)] = entry[v]
    return Case(build, lambda x: x + torch.from_numpy(dense), {"x": np.zeros(dense.shape, np.float32)})


def chained() -> Case:
    """int8 entries looked up, then scaled for each row."""
    indices = RANDOM.integers(0, 16, (6, 8)).astype(np.uint8)
    table = RANDOM.integers(-128, 128, (1, 1, 16, 1)).astype(np.int8)
    scale = np.exp2(RANDOM.integers(-5, 0, (6, 1))).astype(np.float32)

    def build(number: Any, x: Any) -> Any:
        looked = mb.constexpr_lut_to_dense(indices=indices.astype(types.string_to_nptype("uint4")), lut=table)
        return mb.add(x=x, y=mb.constexpr_blockwise_shift_scale(data=looked, scale=scale.astype(number)))

    dense = table[0, 0, :, 0][indices].astype(np.float32) * scale
    return Case(build, lambda x: x + torch.from_numpy(dense), {"x": np.zeros((6, 8), np.float32)})


def sparse() -> Case:
    mask = (RANDOM.random((6, 8)) < 0.4).astype(np.uint8)
    values = floats(int(mask.sum())).astype(np.float16).astype(np.float32)
    dense = np.zeros((6, 8), np.float32)
    dense[mask == 1] = values

    def build(number: Any, x: Any) -> Any:
        kept = mask.astype(types.string_to_nptype("uint1"))
        return mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=values.astype(number), mask=kept))

    return Case(build, lambda x: x + torch.from_numpy(dense), {"x": np.zeros((6, 8), np.float32)})


def with_constants(
    build: Callable[..., Any], expect: Callable[..., Any], x: np.ndarray, *constants: np.ndarray
) -> Case:
    """Constants in the float of the program."""
    exact = [c.astype(np.float16).astype(np.float32) for c in constants]
    return Case(
        lambda number, x: build(x, *(c.astype(number) for c in exact)),
        lambda x: expect(x, *map(torch.from_numpy, exact)),
        {"x": x},
    )


INT4, UINT4 = types.np_int4_dtype, types.np_uint4_dtype
IDS = whole([0, 4, 2], [4, 1, 3])
CASES: dict[str, list[Case]] = {
    "abs": simple("abs", torch.abs),
    "add": [*binary("add", torch.add), integers("add", torch.add)],
    "clip": [one(lambda x: mb.clip(x=x, alpha=like(x, -0.5), beta=like(x, 1)), lambda x: x.clamp(-0.5, 1.0))],
    "cos": simple("cos", torch.cos),
    "exp": simple("exp", torch.exp),
    "floor": simple("floor", torch.floor),
    "floor_div": [integers("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"))],
    "gelu": [
        one(lambda x: mb.gelu(x=x), functional.gelu),
        one(
            lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
            lambda x: functional.gelu(x, approximate="tanh"),
        ),
        one(lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x / (1 + torch.exp(-1.702 * x))),
    ],
    "inverse": [
        one(lambda x: mb.inverse(x=x, epsilon=0.5), lambda x: 1 / (x + 0.5), floats(9, low=0, high=1))
    ],
    "log": [one(lambda x: mb.log(x=x, epsilon=0.25), lambda x: (x + 0.25).log(), floats(9, low=0, high=3))],
    "maximum": binary("maximum", torch.maximum),
    "minimum": binary("minimum", torch.minimum),
    "mod": [integers("mod", torch.remainder)],
    "mul": [*binary("mul", torch.mul), integers("mul", torch.mul)],
    "pow": binary("pow", torch.pow, low=0.1),
    "real_div": binary("real_div", torch.div),
    "relu": simple("relu", functional.relu),
    "rsqrt": [
        one(lambda x: mb.rsqrt(x=x), lambda x: 1 / x.sqrt(), floats(9, low=0.1, high=3)),
        one(lambda x: mb.rsqrt(x=x, epsilon=0.5), lambda x: 1 / (x + 0.5).sqrt(), floats(9, low=0, high=1)),
    ],
    "sigmoid": simple("sigmoid", torch.sigmoid),
    "silu": simple("silu", functional.silu),
    "sin": simple("sin", torch.sin),
    "sqrt": simple("sqrt", torch.sqrt, low=0),
    "square": simple("square", torch.square),
    "sub": [*binary("sub", torch.sub), integers("sub", torch.sub)],
    "tanh": simple("tanh", torch.tanh),
    "equal": compared("equal", torch.eq),
    "greater": compared("greater", torch.gt),
    "greater_equal": compared("greater_equal", torch.ge),
    "less": compared("less", torch.lt),
    "less_equal": compared("less_equal", torch.le),
    "not_equal": compared("not_equal", torch.ne),
    "logical_and": joined("logical_and", torch.logical_and),
    "logical_or": joined("logical_or", torch.logical_or),
    "logical_not": [
        one(
            lambda x: truth(mb.logical_not(x=mb.cast(x=x, dtype="bool"))),
            lambda x: torch.logical_not(x).int(),
            whole(0, 1, 5),
        )
    ],
    "reduce_argmax": [
        one(lambda x: mb.reduce_argmax(x=x, axis=1, keep_dims=True), lambda x: x.argmax(1, True).int()),
        one(lambda x: mb.reduce_argmax(x=x, axis=-1), lambda x: x.argmax(-1).int()),
    ],
    "reduce_max": reduced("reduce_max", torch.amax),
    "reduce_mean": reduced("reduce_mean", torch.mean),
    "reduce_min": reduced("reduce_min", torch.amin),
    "reduce_sum": reduced("reduce_sum", torch.sum),
    "softmax": [
        one(lambda x: mb.softmax(x=x), lambda x: x.softmax(-1)),
        one(lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), floats(2, 3, 4, low=-20, high=20)),
    ],
    "layer_norm": [
        with_constants(
            lambda x, g, b: mb.layer_norm(x=x, axes=[-1], gamma=g, beta=b, epsilon=like(x, 1e-3)),
            lambda x, g, b: functional.layer_norm(x, (8,), g, b, float(np.float16(1e-3))),
            floats(2, 3, 8),
            floats(8),
            floats(8),
        ),
        one(
            lambda x: mb.layer_norm(x=x, axes=[1, 2], epsilon=like(x, 0.125)),
            lambda x: functional.layer_norm(x, (3, 8), eps=0.125),
            floats(2, 3, 8),
        ),
    ],
    "linear": [
        with_constants(
            lambda x, w, b: mb.linear(x=x, weight=w, bias=b),
            functional.linear,
            floats(2, 3, 8),
            floats(5, 8),
            floats(5),
        ),
        with_constants(lambda x, w: mb.linear(x=x, weight=w), functional.linear, floats(3, 8), floats(5, 8)),
    ],
    "matmul": [
        two(lambda x, y: mb.matmul(x=x, y=y), torch.matmul, floats(2, 1, 3, 4), floats(5, 4, 6)),
        two(
            lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
            lambda x, y: x.mT @ y.mT,
            floats(2, 4, 3),
            floats(2, 6, 4),
        ),
        with_constants(
            lambda x, w: mb.matmul(x=x, y=w, transpose_y=True),
            lambda x, w: x @ w.mT,
            floats(2, 3, 4),
            floats(6, 4),
        ),
    ],
    "conv": [
        with_constants(
            lambda x, w, b: mb.conv(x=x, weight=w, bias=b),
            functional.conv2d,
            floats(2, 8, 1, 3),
            floats(5, 8, 1, 1),
            floats(5),
        ),
        with_constants(
            lambda x, w: mb.conv(x=x, weight=w), functional.conv1d, floats(1, 8, 7), floats(5, 8, 1)
        ),
        Case(
            lambda number, x, y: mb.conv(x=x, weight=y),
            functional.conv2d,
            {"x": floats(1, 4, 2, 3), "y": floats(6, 4, 1, 1)},
        ),
    ],
    "scaled_dot_product_attention": [
        attention(None),
        attention(floats(3, 5)),
        attention((RANDOM.random((1, 1, 3, 5)) < 0.7).astype(np.int32) | np.eye(3, 5, dtype=np.int32)),
    ],
    "band_part": [
        one(lambda x: mb.band_part(x=x, lower=-1, upper=0), torch.tril, floats(2, 5, 4)),
        one(lambda x: mb.band_part(x=x, lower=0, upper=-1), torch.triu, floats(4, 5)),
        one(lambda x: mb.band_part(x=x, lower=1, upper=2), lambda x: x.tril(2).triu(-1), floats(5, 6)),
    ],
    "cast": [
        one(lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.int(), floats(9, low=-9, high=9)),
        one(lambda x: mb.cast(x=x, dtype="fp16"), lambda x: x.half()),
        one(lambda x: mb.cast(x=x, dtype="fp32"), lambda x: x, whole(3, -70000)),
        one(
            lambda x: mb.cast(x=mb.cast(x=x, dtype="uint16"), dtype="int32"),
            lambda x: x,
            whole(3, 40000, 65535),
        ),
    ],
    "concat": [
        two(
            lambda x, y: mb.concat(values=[x, y, x], axis=1),
            lambda x, y: torch.cat([x, y, x], 1),
            y=floats(2, 1, 4),
        ),
        two(
            lambda x, y: mb.concat(values=[mb.squeeze(x=x), mb.squeeze(x=y)], axis=0),
            lambda x, y: torch.cat([x, y]),
            whole(3),
            whole(4),
        ),
        one(
            lambda x: mb.concat(values=[x, np.array([7, 8], np.int32)], axis=0),
            lambda x: torch.tensor([*x.tolist(), 7, 8]),
            whole(5),
        ),
    ],
    "expand_dims": [
        one(lambda x: mb.expand_dims(x=x, axes=[0, 2]), lambda x: x[None, :, None]),
        one(lambda x: mb.expand_dims(x=x, axes=[-1]), lambda x: x[..., None]),
    ],
    "fill": [
        one(lambda x: mb.add(x=x, y=mb.fill(shape=x.shape, value=like(x, 2.5))), lambda x: x + 2.5),
        one(
            lambda x: mb.fill(shape=mb.add(x=x, y=np.int32(1)), value=3),
            lambda x: torch.full([3, 4], 3),
            whole(2, 3),
        ),
    ],
    "gather": [
        two(lambda x, y: mb.gather(x=x, indices=y, axis=0), lambda x, y: x[y], floats(5, 6), IDS),
        two(lambda x, y: mb.gather(x=x, indices=y, axis=-1), lambda x, y: x[:, y], floats(3, 5), IDS),
        two(
            lambda x, y: mb.gather(x=x, indices=y, axis=1, batch_dims=1),
            lambda x, y: torch.stack([x[0][y[0]], x[1][y[1]]]),
            floats(2, 5, 4),
            IDS,
        ),
        Case(
            lambda number, y: mb.gather(x=np.arange(50).reshape(5, 10).astype(number), indices=y, axis=0),
            lambda y: torch.arange(50.0).reshape(5, 10)[y],
            {"y": IDS},
        ),
        one(
            lambda x: mb.gather(x=mb.cast(x=x, dtype="int32"), indices=np.int32(1), axis=0),
            lambda x: x[1],
            whole(7, 8),
        ),
    ],
    "gather_along_axis": [
        two(
            lambda x, y: mb.gather_along_axis(x=x, indices=y, axis=1),
            lambda x, y: torch.take_along_dim(x, y.long(), 1),
            floats(2, 5),
            IDS,
        )
    ],
    "identity": [one(lambda x: mb.identity(x=x), lambda x: x)],
    "pad": [
        one(
            lambda x: mb.pad(x=x, pad=[1, 0, 2, 3], constant_val=like(x, 1.5)),
            lambda x: functional.pad(x, (2, 3, 1, 0), value=1.5),
        )
    ],
    "range_1d": [
        one(
            lambda x: mb.range_1d(start=np.int32(1), end=mb.squeeze(x=x), step=np.int32(3)),
            lambda x: torch.arange(1, 11, 3),
            whole(11),
        )
    ],
    "reshape": [
        one(lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, -1)),
        one(lambda x: mb.reshape(x=x, shape=[0, 4, 3]), lambda x: x.reshape(2, 4, 3)),
    ],
    "select": [
        Case(
            lambda number, c, a, b: mb.select(cond=mb.cast(x=c, dtype="bool"), a=a, b=b),
            lambda c, a, b: torch.where(c.bool(), a, b),
            {"c": whole([0, 1, 1], [1, 0, 1]), "a": floats(2, 3), "b": floats(2, 3)},
        )
    ],
    "slice_by_index": [
        slices(begin=[1, 0, 2], end=[4, 6, 7]),
        slices(begin=[0, 4, -3], end=[5, 0, -1], stride=[2, -2, 1]),
        slices(
            begin=[9, 1, 3], end=[0, 3, 9], begin_mask=[True, False, False], end_mask=[True, False, False]
        ),
        slices(begin=[2, 0, -1], end=[0, 6, 0], squeeze_mask=[True, False, True]),
        Case(
            lambda number, x, y: mb.slice_by_index(x=x, begin=y, end=mb.add(x=y, y=whole(1, 2))),
            lambda x, y: x[1:2, 3:5],
            {"x": floats(4, 6), "y": whole(1, 3)},
        ),
    ],
    "slice_by_size": [
        two(
            lambda x, y: mb.slice_by_size(x=x, begin=y, size=whole(2, -1)),
            lambda x, y: x[1:3, 2:],
            floats(4, 6),
            whole(1, 2),
        )
    ],
    "slice_update": [
        updates(begin=[1, 0, 1], end=[3, 3, 6], stride=[1, 1, 2]),
        updates(
            begin=[1, 9, 1],
            end=[3, 0, 0],
            stride=[1, 1, 2],
            begin_mask=[False, True, False],
            end_mask=[False, True, True],
        ),
        two(
            lambda x, y: mb.slice_update(x=x, update=y, begin=[1, 2], end=[0, 5], squeeze_mask=[True, False]),
            lambda x, y: torch.cat([x[:1], torch.cat([x[1:2, :2], y[None], x[1:2, 5:]], 1), x[2:]]),
            floats(3, 6),
            floats(3),
        ),
    ],
    "split": [
        one(lambda x: mb.split(x=x, num_splits=2, axis=-1), lambda x: x.chunk(2, -1)),
        one(lambda x: mb.split(x=x, split_sizes=[1, 2], axis=1), lambda x: x.split([1, 2], 1)),
    ],
    "squeeze": [
        one(lambda x: mb.squeeze(x=x, axes=[0, -2]), lambda x: x[0, :, 0], floats(1, 3, 1, 4)),
        one(lambda x: mb.squeeze(x=x), lambda x: x.squeeze(), floats(1, 3, 1)),
    ],
    "stack": [
        two(
            lambda x, y: mb.stack(values=[x, y], axis=1),
            lambda x, y: torch.stack([x, y], 1),
            y=floats(2, 3, 4),
        )
    ],
    "tile": [one(lambda x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.repeat(1, 2, 3))],
    "topk": [
        one(
            lambda x: mb.topk(x=x, k=2, axis=1),
            lambda x: (x.sort(1, True)[0][:, :2], x.argsort(1, True)[:, :2]),
        ),
        one(lambda x: mb.topk(x=x, k=3, axis=-1, ascending=True)[0], lambda x: x.sort(-1)[0][..., :3]),
    ],
    "transpose": [one(lambda x: mb.transpose(x=x, perm=[2, 0, -2]), lambda x: x.permute(2, 0, 1))],
    "constexpr_blockwise_shift_scale": [
        blockwise(RANDOM.integers(-8, 8, (6, 8)).astype(INT4), floats(6, 2).astype(np.float16)),
        blockwise(RANDOM.integers(-8, 8, (6, 8)).astype(INT4), floats(2, 1).astype(np.float16)),
        blockwise(
            RANDOM.integers(0, 16, (6, 8)).astype(UINT4),
            floats(3, 4).astype(np.float16),
            RANDOM.integers(0, 16, (3, 4)).astype(UINT4),
        ),
        blockwise(RANDOM.integers(-128, 128, (6, 8)).astype(np.int8), floats(6, 1).astype(np.float16)),
        blockwise(
            RANDOM.integers(0, 256, (6, 8)).astype(np.uint8),
            floats(1, 1).astype(np.float16),
            whole([128]).astype(np.uint8),
        ),
        blockwise(
            RANDOM.integers(-128, 128, (6, 4, 1, 1)).astype(np.int8), floats(6, 2, 1, 1).astype(np.float16)
        ),
    ],
    "constexpr_lut_to_dense": [
        *(looked_up(bits, (1, 1)) for bits in (1, 2, 3, 4, 6, 8)),
        looked_up(4, (3, 1)),
        looked_up(2, (1, 4)),
        looked_up(6, (2, 2)),
        looked_up(2, (2, 1), vector=2, axis=0),
        looked_up(4, (1, 2), vector=4, axis=1),
        chained(),
    ],
    "constexpr_sparse_to_dense": [sparse()],
}


def as_floats(inputs: Mapping[str, np.ndarray], number: Any) -> dict[str, np.ndarray]:
    return {
        name: value.astype(number) if value.dtype == np.float32 else value for name, value in inputs.items()
    }


def as_tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What torch computes on: float16 values in float32."""
    found = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in found.items()}


def test_every_operation_has_a_case():
    assert set(CASES) == set(ARITHMETIC) | set(MOVEMENT) | set(WEIGHTS)


@pytest.mark.parametrize("number", [np.float16, np.float32])
@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_torchs(name, number, tmp_path):
    """float16: what torch computes in float32, rounded once; a unit in the last place is left to the order of sums."""
    cases = CASES[name]
    inputs = [as_floats(case.inputs, number) for case in cases]
    path = save(
        tmp_path / "model.mlpackage",
        {
            f"f{i}": (given, partial(case.build, number))
            for i, (case, given) in enumerate(zip(cases, inputs, strict=True))
        },
    )
    evaluator = Evaluator(open_package(path))
    assert name in {
        operation.type for f in open_package(path).functions.values() for operation in f.operations
    }
    for i, (case, values) in enumerate(zip(cases, inputs, strict=True)):
        found = list(evaluator.run(f"f{i}", values).values())
        expected = case.expect(*as_tensors(values).values())
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        assert len(found) == len(expected)
        for got, want in zip(found, expected, strict=True):
            assert got.shape == tuple(want.shape)
            if not want.is_floating_point():
                np.testing.assert_array_equal(got, want.numpy())
                continue
            rounded = want.numpy().astype(got.dtype)
            assert got.dtype in (number, np.float32, np.float16)
            np.testing.assert_allclose(
                got, rounded, rtol=1e-3 if got.dtype == np.float16 else 1e-5, atol=1e-6
            )


WRITER = {"fp32": "write_float_data", "fp16": "write_fp16_data"}


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype.blob_code], ids=lambda dtype: dtype.name
)
def test_packed_constants_are_what_coremltools_wrote(dtype, tmp_path):
    """All values, rows from any to any, sizes that fill no byte."""
    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    written = []
    for shape in ((1,), (3, 5), (7, 3, 3), (40, 16)):
        if dtype.floating:
            values = RANDOM.standard_normal(shape).astype(dtype.numpy)
        else:
            low = -(2 ** (dtype.bits - 1)) if dtype.signed else 0
            values = RANDOM.integers(low, low + 2**dtype.bits, shape).astype(dtype.numpy)
        given = values if dtype.bits >= 8 else values.astype(types.string_to_nptype(dtype.name))
        flat = given.reshape(-1)
        write = getattr(writer, WRITER.get(dtype.name, f"write_{dtype.name}_data"))
        written.append((write(flat.view(np.uint16) if dtype.name == "fp16" else flat), values))
    del writer
    file = WeightFile(path)
    for offset, values in written:
        constant = file.constant(offset, dtype, values.shape)
        np.testing.assert_array_equal(constant.read(), values)
        for start in range(len(values)):
            for stop in range(start, len(values) + 1, 3):
                np.testing.assert_array_equal(constant.rows(start, stop), values[start:stop])
    for nowhere in (1, written[-1][0] + 1, path.stat().st_size, 1 << 62):
        with pytest.raises(BundleError, match=f"no record at byte {nowhere} of"):
            file.constant(nowhere, dtype, (1,))


def test_sums_of_products_are_not_rounded(tmp_path):
    """In float16, 2048 + 1 is 2048: a sum of 4096 ones that is rounded on the way stays there."""
    ones = np.ones((1, 4096), np.float16)
    path = save(tmp_path / "m.mlpackage", {"main": ({"x": ones}, lambda x: mb.linear(x=x, weight=ones))})
    assert evaluate(path, {"x": ones})[0].item() == 4096


def test_results_are_rounded_to_what_the_program_declares(tmp_path):
    """1 + 2^-11 is 1 in float16, and 300 squared is infinite; exact, both are what they are."""
    x = np.array([1, 300], np.float16)

    def build(x: Any) -> Any:
        y = mb.add(x=x, y=np.float16(2**-11))
        return [mb.sub(x=y, y=x), mb.square(x=x)]

    path = save(tmp_path / "m.mlpackage", {"main": ({"x": x}, build)})
    difference, square = evaluate(path, {"x": x})
    assert (difference[0], square[1]) == (0, math.inf)
    difference, square = evaluate(path, {"x": x}, exact=True)
    assert (difference[0], square[1]) == (2**-11, 90000)


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> Path:
    """`add` adds x to a state and gives it, twice as much from `double`, in one package."""
    x = np.ones((2, 3), np.float16)

    def add(x: Any, total: Any) -> Any:
        return mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=x))

    def double(x: Any, total: Any) -> Any:
        return mb.mul(x=add(x, total), y=np.float16(2))

    path = tmp_path_factory.mktemp("counting") / "m.mlpackage"
    return save(path, {"add": ({"x": x}, add), "double": ({"x": x}, double)}, {"total": (2, 3)})


def test_functions_share_states_between_calls(counting):
    evaluator, x = Evaluator(open_package(counting)), np.ones((2, 3), np.float16)
    assert [int(evaluator.run(name, {"x": x})["out0"][0, 0]) for name in ("add", "add", "double")] == [
        1,
        2,
        6,
    ]
    other = Evaluator(open_package(counting))
    assert other.run("add", {"x": x})["out0"][0, 0] == 1


def test_what_was_given_out_does_not_change(counting):
    evaluator, x = Evaluator(open_package(counting)), np.ones((2, 3), np.float16)
    first = evaluator.run("add", {"x": x})["out0"]
    first[:] = 9
    assert evaluator.run("add", {"x": x})["out0"].tolist() == [[2] * 3] * 2


@pytest.mark.parametrize(
    ("function", "inputs", "words"),
    [
        ("sub", {}, "no function 'sub': it has add, double"),
        ("add", {}, "takes x; it was given"),
        ("add", {"x": np.ones((2, 3)), "y": np.ones(1)}, "takes x; it was given x, y"),
        ("add", {"x": np.ones((3, 2))}, r"x must be \[2, 3\]; it is \[3, 2\]"),
    ],
)
def test_wrong_use_is_one_sentence(counting, function, inputs, words):
    with pytest.raises(UsageError, match=words):
        Evaluator(open_package(counting)).run(function, inputs)


def compressed(path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two functions over the same int4 weight [48, 32], of which each block of rows is small."""
    x = floats(2, 32).astype(np.float16)
    data = RANDOM.integers(-8, 8, (48, 32)).astype(INT4)
    scale = floats(48, 1).astype(np.float16)

    def build(x: Any) -> Any:
        kept = mb.const(val=data, name="data")
        kept.op.weight_id = "data"
        scales = mb.const(val=scale, name="scale")
        scales.op.weight_id = "scale"
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=kept, scale=scales))

    return save(path, {"one": ({"x": x}, build), "two": ({"x": x}, build)}), {"x": x}


def test_weights_are_kept_within_the_budget(tmp_path, monkeypatch):
    """Block by block or at once, kept or not, the product is the same; functions share what is kept."""
    path, inputs = compressed(tmp_path / "m.mlpackage")
    whole_at_once = Evaluator(open_package(path)).run("one", inputs)["out0"]
    monkeypatch.setattr(weights, "BLOCK", 32 * 7)
    read: list[int] = []
    rows = weights.ShiftScale.rows
    monkeypatch.setattr(
        weights.ShiftScale, "rows", lambda self, a, b: (read.append(b - a), rows(self, a, b))[1]
    )
    for cache, expected in ((48 * 32 * 2, 48), (48 * 32 * 2 - 1, 3 * 48)):
        evaluator = Evaluator(open_package(path), cache=cache)
        read.clear()
        for name in ("one", "two", "one"):
            np.testing.assert_array_equal(evaluator.run(name, inputs)["out0"], whole_at_once)
        assert sum(read) == expected
        assert max(read) == 7


def test_of_a_chain_only_the_result_is_kept(tmp_path):
    """Entries looked up and then scaled: what was looked up takes nothing of the budget."""
    table, x = RANDOM.integers(-128, 128, (1, 1, 4, 1)).astype(np.int8), np.ones((1, 32), np.float16)
    indices = RANDOM.integers(0, 4, (16, 32)).astype(types.string_to_nptype("uint2"))

    def build(x: Any) -> Any:
        looked = mb.constexpr_lut_to_dense(indices=indices, lut=table)
        scale = np.full((16, 1), 0.5, np.float16)
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=looked, scale=scale))

    path = save(tmp_path / "m.mlpackage", {"main": ({"x": x}, build)})
    evaluator = Evaluator(open_package(path), cache=16 * 32 * 3)
    found = evaluator.run("main", {"x": x})["out0"]
    np.testing.assert_array_equal(found[0], (table[0, 0, :, 0][indices.astype(int)] * 0.5).sum(-1))
    assert evaluator._shared.budget.left == 16 * 32


@pytest.mark.parametrize(
    "weight",
    [
        weights.ShiftScale(
            weights.Computed(torch.arange(96).reshape(12, 8)),
            weights.Computed(torch.arange(1.0, 9).reshape(4, 2)),
            weights.Computed(torch.arange(8.0).reshape(4, 2)),
        ),
        weights.LookUp(
            weights.Computed(torch.arange(48).reshape(12, 4) % 4),
            weights.Computed(torch.arange(96.0).reshape(4, 2, 4, 3)),
            vector_axis=0,
        ),
        weights.LookUp(
            weights.Computed(torch.arange(48).reshape(12, 4) % 4),
            weights.Computed(torch.arange(48.0).reshape(6, 1, 4, 2)),
            vector_axis=1,
        ),
        weights.Sparse(
            weights.Computed(torch.arange(48.0)), weights.Computed(torch.arange(96).reshape(12, 8) % 2)
        ),
    ],
    ids=["scales of 3 rows", "vectors along the rows", "vectors in the rows", "sparse"],
)
def test_any_rows_of_a_weight_are_those_of_the_whole(weight):
    """Blocks and groups begin and end within the rows asked for, and around them."""
    complete = weights.whole(weight)
    assert tuple(complete.shape) == weight.shape
    for start in range(weight.shape[0]):
        for stop in range(start + 1, weight.shape[0] + 1):
            assert torch.equal(weight.rows(start, stop), complete[start:stop])


def test_an_update_changes_neither_state_nor_constant(tmp_path):
    """A slice that is updated and not written back is the caller's alone."""
    x, table = np.ones((1, 3), np.float16), np.zeros((2, 3), np.float16)

    def build(x: Any, total: Any) -> Any:
        place = {"update": x, "begin": [1, 0], "end": [2, 3]}
        read = mb.read_state(input=total)
        kept = mb.add(x=read, y=np.float16(0))
        return [
            mb.slice_update(x=read, **place),
            mb.slice_update(x=table, **place),
            read,
            kept,
            mb.add(x=read, y=table),
        ]

    path = save(tmp_path / "m.mlpackage", {"main": ({"x": x}, build)}, {"total": (2, 3)})
    evaluator = Evaluator(open_package(path))
    for _ in range(2):
        assert [out.sum() for out in evaluator.run("main", {"x": x}).values()] == [3, 3, 0, 0, 0]


def test_an_embeddings_rows_are_all_that_is_read_of_it(tmp_path, monkeypatch):
    """It is not decompressed for a few tokens."""
    table = RANDOM.integers(-128, 128, (50, 8)).astype(np.int8)

    def build(ids: Any) -> Any:
        stored = mb.constexpr_blockwise_shift_scale(data=table, scale=np.ones((50, 1), np.float16))
        return mb.gather(x=stored, indices=ids, axis=0)

    ids = whole([7, 3, 7])
    path = save(tmp_path / "m.mlpackage", {"main": ({"ids": ids}, build)})
    read: list[int] = []
    rows = weights.ShiftScale.rows
    monkeypatch.setattr(
        weights.ShiftScale, "rows", lambda self, a, b: (read.append(b - a), rows(self, a, b))[1]
    )
    np.testing.assert_array_equal(evaluate(path, {"ids": ids})[0], table[ids].astype(np.float16))
    assert read == [1, 1]


def test_reading_a_package_does_not_import_coremltools(counting):
    code = (
        "import sys; from pathlib import Path; from runtimes.mil.package import open_package\n"
        f"package = open_package(Path({str(counting)!r}))\n"
        "print(len(package.functions), {'coremltools', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "set()"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda x: mb.erf(x=x), "erf 'erf_0' of the function main .*does not know it"),
        (
            lambda x: mb.conv(x=x, weight=np.ones((2, 4, 3, 3), np.float16)),
            r"conv 'conv_0' .*kernel \[3, 3\]",
        ),
        (lambda x: mb.concat(values=[x, x], axis=1, interleave=True), "concat .*interleaved"),
    ],
)
def test_what_is_not_known_here_is_named(build, words, tmp_path):
    """When it is loaded, if the program alone tells."""
    x = np.ones((1, 4, 5, 5), np.float16)
    path = save(tmp_path / "m.mlpackage", {"main": ({"x": x}, build)})
    with pytest.raises(BundleError, match=words) as caught:
        evaluate(path, {"x": x})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """A package with a bit of everything, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("model")
    inputs = {"ids": whole([3, 1]), "position": whole(2)}

    def build(ids: Any, position: Any, cache: Any) -> Any:
        x = mb.gather(x=floats(9, 32).astype(np.float16), indices=ids, axis=0)
        data, scale = RANDOM.integers(-8, 8, (16, 32)).astype(INT4), np.ones((16, 2), np.float16)
        x = mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=data, scale=scale))
        indices = RANDOM.integers(0, 4, (16, 16)).astype(types.string_to_nptype("uint2"))
        x = mb.linear(
            x=x, weight=mb.constexpr_lut_to_dense(indices=indices, lut=np.ones((2, 1, 4, 1), np.float16))
        )
        begin = mb.concat(values=[position, whole(0)], axis=0)
        end = mb.concat(values=[mb.add(x=position, y=whole(2)), whole(16)], axis=0)
        new = mb.slice_update(
            x=mb.read_state(input=cache), update=mb.reshape(x=x, shape=[2, 16]), begin=begin, end=end
        )
        x = mb.softmax(x=mb.tile(x=mb.coreml_update_state(state=cache, value=new), reps=[1, 2]), axis=-1)
        first, second = mb.split(x=x, num_splits=2, axis=1)
        return mb.add(x=first, y=mb.fill(shape=[8, 1], value=np.float16(2))), mb.gelu(x=second, mode="EXACT")

    return save(folder / "m.mlpackage", {"main": (inputs, build)}, {"cache": (8, 16)}), inputs


MANIFEST, PROGRAM = "Manifest.json", "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_FILE = "Data/com.apple.CoreML/weights/weight.bin"


def damaged(package: Path, file: str, change: Callable[[bytearray], Any]) -> None:
    data = bytearray((package / file).read_bytes())
    found = change(data)
    (package / file).write_bytes(data if found is None else found)


def put(at: int, *values: int) -> Callable[[bytearray], None]:
    return lambda data: data.__setitem__(slice(at, at + len(values)), bytes(values))


def root(path: Any) -> Callable[[bytearray], bytes]:
    """A manifest whose model is at another path."""

    def change(data: bytearray) -> bytes:
        content = json.loads(data)
        content["itemInfoEntries"][content["rootModelIdentifier"]]["path"] = path
        return json.dumps(content).encode()

    return change


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (MANIFEST, lambda data: b"", "does not say which file is the model"),
        (MANIFEST, lambda data: b"[" * 100_000, "does not say which file is the model"),
        (MANIFEST, root(7), "does not say which file is the model"),
        (MANIFEST, root("../../../etc/passwd"), "points out of the package"),
        (MANIFEST, root("nothing.mlmodel"), r"nothing\.mlmodel cannot be read: No such file"),
        (PROGRAM, lambda data: data[:-9], r"model\.mlmodel is cut off or damaged"),
        (PROGRAM, lambda data: b"", "holds no ML program"),
        (
            PROGRAM,
            lambda data: data.replace(b"softmax", b"hardmax"),
            "hardmax 'hardmax_0' .*does not know it",
        ),
        (PROGRAM, lambda data: data.replace(b"num_splits", b"num_spl1ts"), "split 'split_0' .*num_spl1ts"),
        (
            PROGRAM,
            lambda data: data.replace(b"@model_path/", b"/model_path/"),
            "which is not below @model_path",
        ),
        (PROGRAM, lambda data: data.replace(b"weight.bin", b"w/../../ab"), "which is not below @model_path"),
        (PROGRAM, lambda data: data.replace(b"weight.bin", b"height.bin"), r"height\.bin cannot be read"),
        (PROGRAM, lambda data: data.replace(b"EXACT", b"EXAKT"), "gelu 'gelu_0' .*EXAKT"),
        (PROGRAM, lambda data: data.replace(b"read_state", b"look_state"), "look_state .*does not know it"),
        (WEIGHTS_FILE, lambda data: b"", r"weight\.bin is cut off or damaged: it has no header of version 2"),
        (WEIGHTS_FILE, put(4, 1), "it has no header of version 2"),
        (WEIGHTS_FILE, put(64, 0xEE), "begins with 0xdeadbeee, not with 0xdeadbeef"),
        (WEIGHTS_FILE, put(68, 14), "holds int32 where the program wants fp16"),
        (WEIGHTS_FILE, put(68, 99), "holds the unknown dtype 99 where"),
        (WEIGHTS_FILE, put(72, 0), r"holds 512 bytes where fp16 \[9, 32\] takes 576"),
        (WEIGHTS_FILE, put(86, 1), "the data at byte 281474976710784 of 576 bytes is not in its"),
        (WEIGHTS_FILE, put(80, 129), "the data at byte 129 of 576 bytes is not in its"),
        (WEIGHTS_FILE, lambda data: data[:200], "the data at byte 128 of 576 bytes is not in its 200 bytes"),
        (WEIGHTS_FILE, lambda data: data[:100], "there is no record at byte 64 of 100"),
    ],
)
def test_a_damaged_package_is_one_sentence(model, tmp_path, file, change, words):
    source, inputs = model
    package = Path(shutil.copytree(source, tmp_path / "m.mlpackage"))
    damaged(package, file, change)
    with pytest.raises(BundleError, match=words) as caught:
        evaluate(package, inputs)
    assert "\n" not in str(caught.value)
    assert str(package) in str(caught.value)


@pytest.fixture(scope="module")
def scratch(model, tmp_path_factory) -> Path:
    """A copy that is damaged over and over."""
    return Path(shutil.copytree(model[0], tmp_path_factory.mktemp("scratch") / "m.mlpackage"))


# Where, what is put in, and how many bytes it replaces: as many as it has, if None, which leaves the rest in its place.
EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.binary(max_size=3),
    st.one_of(st.none(), st.none(), st.integers(0, 3)),
)


@settings(max_examples=400)
@given(
    file=st.sampled_from([PROGRAM] * 6 + [WEIGHTS_FILE, MANIFEST]),
    edits=st.lists(EDIT, min_size=1, max_size=4),
)
def test_any_damage_is_refused_or_harmless(model, scratch, file, edits):
    """Bytes replaced, put in or taken out anywhere: an answer, or one sentence that names the package."""
    source, inputs = model
    shutil.copyfile(source / file, scratch / file)

    def change(data: bytearray) -> None:
        for place, put_in, replaced in edits:
            at = int(place * len(data))
            data[at : at + (len(put_in) if replaced is None else replaced)] = put_in

    damaged(scratch, file, change)
    message = str(scratch)
    try:
        evaluate(scratch, inputs)
    except BundleError as error:
        message = str(error)
    except UsageError:  # its inputs have other names or shapes now
        pass
    finally:
        shutil.copyfile(source / file, scratch / file)
    assert str(scratch) in message
    assert "\n" not in message
