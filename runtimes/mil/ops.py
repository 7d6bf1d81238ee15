"""What each operation of a Core ML program computes: one small function for each, by its name in MIL.

Parameters have MIL's names; their annotations say what the evaluator hands over. `ARITHMETIC` gets float16 as
float32, and its results are rounded to what the program declares; `MOVEMENT` only moves values, in their own dtype;
`WEIGHTS` are constants that are decompressed when they are used.
Semantics: coremltools/converters/mil/mil/ops/defs (iOS 15 to iOS 18: the newest version of each operation). What is
legal in MIL and not here raises ValueError; so do, as torch has it, values that do not fit.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from runtimes.mil.package import LARGEST
from runtimes.mil.weights import TORCH, LookUp, ShiftScale, Sparse, Weight, blocks, select, whole

Ints = tuple[int, ...]
Bools = tuple[bool, ...]
Tensors = tuple[Tensor, ...]


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ + bias; products accumulate in float32, block by block of the outputs."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for start, stop in blocks(weight):
        out[..., start:stop] = functional.linear(x, weight.rows(start, stop).to(x.dtype))
    return out if bias is None else out + bias


def conv(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    strides: Ints = (),
    pad_type: str = "valid",
    pad: Ints = (),
    dilations: Ints = (),
    groups: int = 1,
) -> Tensor:
    """A convolution with a kernel of one point: a linear over the channels of x [batch, in, ...]."""
    kernel = weight.shape[2:]
    padded = pad_type == "custom" and any(pad)  # the other ways add nothing around one point
    if any(size != 1 for size in (*kernel, *strides)) or groups != 1 or padded:
        raise ValueError(
            f"kernel {list(kernel)}, strides {list(strides)}, {groups} groups, padding {list(pad)}"
        )
    return linear(x.movedim(1, -1), _Flat(weight), bias).movedim(-1, 1)


class _Flat:
    """A convolution's weight [out, in, 1, ...] as [out, in]."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self.shape, self.dtype = weight.shape[:2], weight.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self._weight.rows(start, stop).flatten(1)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(query · keyᵀ / √width + mask) · value; a mask of booleans says which keys take part."""
    scores = torch.matmul(query, key.mT) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def layer_norm(
    x: Tensor,
    axes: Ints = (),
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """The variance is of the whole, not an estimate; gamma and beta have the shape of the normalized dimensions."""
    axes = _axes(axes, x)
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + epsilon)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def reduce_mean(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.mean(_axes(axes, x), keepdim=keep_dims)


def reduce_sum(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.sum(_axes(axes, x), keepdim=keep_dims, dtype=x.dtype)


def reduce_max(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.amax(_axes(axes, x), keepdim=keep_dims)


def reduce_min(x: Tensor, axes: Ints = (), keep_dims: bool = False) -> Tensor:
    return x.amin(_axes(axes, x), keepdim=keep_dims)


def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmax(axis, keepdim=keep_dims)


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensors:
    values, indices = x.topk(k, axis, largest=not ascending)
    return (values, indices) if return_indices else (values,)


def cast(x: Tensor, dtype: str) -> Tensor:
    """To another kind of number; floats are rounded to the width that the program declares, as everywhere."""
    wanted = TORCH[dtype]
    return x if wanted.is_floating_point and x.is_floating_point() else x.to(wanted)


def reshape(x: Tensor, shape: Ints) -> Tensor:
    """-1 takes what is left, 0 keeps the size that x has there."""
    return x.reshape([x.shape[i] if size == 0 and x.numel() else size for i, size in enumerate(shape)])


def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Ints = ()) -> Tensor:
    for axis in axes:
        if x.shape[axis] != 1:
            raise ValueError(f"dimension {axis} of {list(x.shape)} is not 1")
    return x.squeeze(axes) if axes else x.squeeze()


def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Scalars become a vector."""
    if interleave:
        raise ValueError("interleaved values")
    return torch.cat([value if value.dim() else value.reshape(1) for value in values], axis)


def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


def split(x: Tensor, axis: int, num_splits: int = 0, split_sizes: Ints = ()) -> Tensors:
    size = x.shape[axis]
    if not split_sizes and (num_splits < 1 or size % num_splits):
        raise ValueError(f"{num_splits} parts of {size}")
    return x.split(list(split_sizes) or size // num_splits, axis)


def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints = (),
    begin_mask: Bools = (),
    end_mask: Bools = (),
    squeeze_mask: Bools = (),
) -> Tensor:
    """As numpy slices, negative strides too; where `squeeze_mask` is set, the element at `begin`."""
    squeezed = []
    for axis, part in enumerate(_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)):
        start, stop, step = part.indices(x.shape[axis])
        if step < 0:
            x = x.index_select(axis, torch.arange(start, stop, step))
        else:
            x = x[(slice(None),) * axis + (slice(start, max(start, stop), step),)]
        if squeeze_mask and squeeze_mask[axis]:
            squeezed.append(axis)
    return squeeze(x, tuple(squeezed)) if squeezed else x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints = (),
    begin_mask: Bools = (),
    end_mask: Bools = (),
    squeeze_mask: Bools = (),
) -> Tensor:
    """A copy of x with `update` where slice_by_index would read; ValueError if it has another shape."""
    parts = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if any(part.step < 0 for part in parts):
        raise ValueError("a negative stride")
    x = x.clone()
    place = slice_by_index(
        x, begin, end, stride, begin_mask, end_mask, squeeze_mask
    )  # a view: no stride is negative
    if place.shape != update.shape:
        raise ValueError(f"an update {list(update.shape)} for a slice {list(place.shape)}")
    place.copy_(update)
    return x


def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """`size` elements from `begin` on, along each dimension; all that are left for -1."""
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


def gather(
    x: Weight, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """[*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1:]]; a negative index is none (iOS 17)."""
    axis %= len(x.shape)
    if axis == 0 and batch_dims == 0:
        return select(x, indices)
    return _gather(whole(x), indices.long(), axis, batch_dims)


def _gather(x: Tensor, indices: Tensor, axis: int, batch_dims: int) -> Tensor:
    if batch_dims:
        parts = [_gather(a, b, axis - 1, batch_dims - 1) for a, b in zip(x, indices, strict=True)]
        return torch.stack(parts)
    rows = x.index_select(axis, indices.reshape(-1))
    return rows.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return x.gather(axis, indices.long())


def tile(x: Tensor, reps: Ints) -> Tensor:
    _bounded(x.numel() * math.prod(reps))
    return x.repeat(reps)


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside of a band around the diagonal; a negative width is all of that side."""
    rows, columns = x.shape[-2:]
    x = x.tril(columns if upper < 0 else upper)
    return x.triu(-rows if lower < 0 else -lower)


def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """`pad`: before and after, for each of the last dimensions in order; torch has them from the last on."""
    if mode != "constant":
        raise ValueError(f"padding of the mode {mode}")
    _bounded(math.prod(size + sum(pad) for size in x.shape))
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    return functional.pad(x, [size for pair in reversed(pairs) for size in pair], value=constant_val)


def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    _bounded(math.prod(shape))
    return torch.zeros(shape) if value is None else value.reshape(()).repeat(shape)


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    _bounded((end - start) / step)
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def _bounded(count: float | Tensor) -> None:
    """ValueError for more elements than a tensor of a program can have, before memory is asked for them."""
    if not count <= LARGEST:
        raise ValueError(f"{int(count)} elements")


def _axes(axes: Ints, x: Tensor) -> Ints:
    """Not negative; all of x's dimensions if none is named."""
    return tuple(axis % x.dim() for axis in axes) or tuple(range(x.dim()))


def _slices(
    x: Tensor, begin: Ints, end: Ints, stride: Ints, begin_mask: Bools, end_mask: Bools, squeeze_mask: Bools
) -> list[slice]:
    """One slice for each dimension of x; an absent mask is all False, an absent stride all 1."""
    off, steps = (False,) * x.dim(), stride or (1,) * x.dim()
    slices = []
    for first, last, step, from_start, to_end, single in zip(
        begin, end, steps, begin_mask or off, end_mask or off, squeeze_mask or off, strict=True
    ):
        if single:
            slices.append(slice(first, first + 1 or None, 1))
        else:
            slices.append(slice(None if from_start else first, None if to_end else last, step))
    if len(slices) != x.dim():
        raise ValueError(f"{len(slices)} slices of a tensor {list(x.shape)}")
    return slices


ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "clip": clip,
    "conv": conv,
    "cos": lambda x: x.cos(),
    "equal": lambda x, y: x == y,
    "exp": lambda x: x.exp(),
    "floor": lambda x: x.floor(),
    "floor_div": lambda x, y: torch.floor_divide(x, y),
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "inverse": inverse,
    "layer_norm": layer_norm,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear": linear,
    "log": log,
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "logical_or": lambda x, y: x | y,
    "matmul": matmul,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "mod": lambda x, y: x % y,
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pow": lambda x, y: x**y,
    "real_div": lambda x, y: x / y,
    "reduce_argmax": reduce_argmax,
    "reduce_max": reduce_max,
    "reduce_mean": reduce_mean,
    "reduce_min": reduce_min,
    "reduce_sum": reduce_sum,
    "relu": lambda x: x.relu(),
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: functional.silu(x),
    "sin": lambda x: x.sin(),
    "softmax": softmax,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
}
MOVEMENT: Mapping[str, Callable[..., Any]] = {
    "band_part": band_part,
    "cast": cast,
    "concat": concat,
    "expand_dims": expand_dims,
    "fill": fill,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "identity": lambda x: x,
    "pad": pad,
    "range_1d": range_1d,
    "reshape": reshape,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "topk": topk,
    "transpose": transpose,
}
WEIGHTS: Mapping[str, Callable[..., Weight]] = {
    "constexpr_blockwise_shift_scale": ShiftScale,
    "constexpr_lut_to_dense": LookUp,
    "constexpr_sparse_to_dense": Sparse,
}
