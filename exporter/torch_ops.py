"""The decoder on tensors: the reference that every format is held against."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights

_WEIGHTS_AT_ONCE = 1 << 24  # dequantized weights of one matrix in memory, 64 MB in float32


class TorchOps:
    """The verbs of `decoder.Ops` on float32 tensors, with a KV cache.

    Weights are dequantized when they are used and forgotten again, so memory holds one layer's at most.
    `rounded`: where a weight's scheme has int8 activations, round the inputs of linears as `engine` does in the
    batch's first `rounded` rows; None rounds all, 0 leaves all float32.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        context: int,
        rounded: int | None = None,
        engine: str = "onnxruntime",
    ) -> None:
        self.arch, self.weights, self.rounded = arch, weights, rounded
        self._round = ROUNDINGS[engine]
        self.past = 0  # tokens in the KV cache
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        cos, sin = arch.rope.tables(context)
        self._cos, self._sin = torch.from_numpy(cos), torch.from_numpy(sin)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length or 1, vocab] of token ids [batch, length] after those already run."""
        logits = decoder(self, self.arch, tokens)
        self.past += tokens.shape[1]
        return logits

    def forget(self, layer: int) -> None:
        """Drop a layer's keys and values, when no more tokens will come."""
        self._cache.pop(layer, None)

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        return look_up(tokens, self.weights.matrix(weight))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def rms_norm(self, x: Tensor, weight: str) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.arch.norm_eps)
        return normed * torch.tensor(self.weights.vector(weight))

    def linear(self, x: Tensor, weight: str) -> Tensor:
        scheme = self.weights.scheme(weight)
        if self.rounded != 0 and scheme.activations == "int8":
            part = self._round(x[: self.rounded], scheme.group)
            x = torch.cat((part, x[self.rounded :])) if self.rounded is not None else part
        y = self.product(x, weight)
        if self.arch.has_bias(weight):
            y = y + torch.tensor(self.weights.vector(weight + ".bias"))
        return y

    def product(self, x: Tensor, weight: str) -> Tensor:
        """x @ Wᵀ."""
        return product(x, self.weights.matrix(weight))

    def linears(self, x: Tensor, weights: Sequence[str]) -> list[Tensor]:
        return [self.linear(x, weight) for weight in weights]

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.arch.activation == "silu":
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh") * up

    def last(self, x: Tensor) -> Tensor:
        return x

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        arch, batch, length = self.arch, q.shape[0], q.shape[1]
        q = self._rotate(q.view(batch, length, arch.heads, arch.head_dim).transpose(1, 2))
        k = self._rotate(k.view(batch, length, arch.kv_heads, arch.head_dim).transpose(1, 2))
        v = v.view(batch, length, arch.kv_heads, arch.head_dim).transpose(1, 2)
        if layer in self._cache:
            k, v = (torch.cat(pair, 2) for pair in zip(self._cache[layer], (k, v), strict=True))
        self._cache[layer] = (k, v)
        shared = arch.heads // arch.kv_heads
        scores = q @ k.repeat_interleave(shared, 1).transpose(2, 3) * arch.attention_scale
        if arch.attention_softcap:
            scores = self.softcap(scores, arch.attention_softcap)
        queries = torch.arange(self.past, self.past + length)[:, None]
        keys = torch.arange(k.shape[2])
        seen = keys <= queries
        if window := arch.windows[layer]:
            seen &= keys > queries - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v.repeat_interleave(shared, 1)).transpose(1, 2).reshape(batch, length, -1)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [batch, heads, length, head_dim] at the current positions."""
        here = slice(self.past, self.past + x.shape[2])
        cos, sin, dim = self._cos[here], self._sin[here], self.arch.rope.dim
        first, second = x[..., : dim // 2], x[..., dim // 2 : dim]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return torch.cat((rotated, x[..., dim:]), -1) if dim < x.shape[-1] else rotated


class Table(Protocol):
    """What rows are looked up in: a `QuantizedTensor`, or a matrix that is not quantized yet."""

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [rows, inputs]."""


def look_up(tokens: Tensor, table: Table) -> Tensor:
    """Rows of a table; only those asked for are dequantized."""
    ids, places = np.unique(tokens.numpy(), return_inverse=True)
    rows = np.stack([table.dequantize(i, i + 1)[0] for i in ids])
    return torch.from_numpy(rows)[torch.from_numpy(places).reshape(tokens.shape)]


def embedded(
    arch: Architecture, table: Table, sequences: Iterable[Sequence[int]], context: int
) -> Iterator[Tensor]:
    """What the first layer gets of each token sequence, cut to `context` tokens: [1, length, hidden]."""
    for sequence in sequences:
        if sequence:
            yield look_up(torch.tensor([list(sequence)[:context]]), table) * arch.embedding_scale


def product(x: Tensor, matrix: QuantizedTensor) -> Tensor:
    """x @ Wᵀ, W dequantized some rows at a time."""
    parts = [functional.linear(x, rows) for rows in pieces(matrix)]
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def pieces(matrix: QuantizedTensor) -> Iterator[Tensor]:
    """A matrix in row blocks, dequantized."""
    step = max(1, _WEIGHTS_AT_ONCE // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield torch.from_numpy(matrix.dequantize(start, start + step))


def round_by_group(x: Tensor, group: int | None) -> Tensor:
    """Round to int8 and back, one scale per group of the last dimension: absmax / 127, ties to even.

    What onnxruntime's MatMulNBits does at accuracy level 4 (microsoft/onnxruntime, mlas, sqnbitgemm).
    """
    size = x.shape[-1]
    groups = functional.pad(x, (0, -size % (group or size))).unflatten(-1, (-1, group or size))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return ((groups * inverse).round() * scales).flatten(-2)[..., :size]


def round_by_token(x: Tensor, group: int | None) -> Tensor:
    """Round to int8 and back, one scale and zero point per token, whatever the weights' group; ties to even.

    What XNNPACK's dynamically quantized products do (google/XNNPACK, src/xnnpack/quantization.h,
    xnn_f32_qd8_asymmetric_quantization_params): the range holds 0, and the zero point is rounded from the end
    where that costs less.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(low == high, 1, 255 / (high - low))
    bottom, top = low * scale, high * scale
    zero = torch.where((-128 + bottom) + (127 + top) > 0, -128 - bottom, 127 - top).clamp(-128, 127).round()
    return (((x * scale).round() + zero).clamp(-128, 127) - zero) / scale


def unrounded(x: Tensor, group: int | None) -> Tensor:
    """As it is."""
    return x


# How each engine rounds activations to int8, if it does.
ROUNDINGS = {
    "onnxruntime": round_by_group,
    "executorch": round_by_token,
    "coreml": unrounded,
    "qnn": unrounded,
}
