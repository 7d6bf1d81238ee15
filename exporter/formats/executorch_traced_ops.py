"""The decoder in torch, for torch.export: what each of executorch's partitioners takes whole.

Weights keep the quantizer's integers: a matrix is `torchao::dequantize_affine` of constants, which a partitioner
takes together with the product that follows. Tensors that stay (weights, tables, caches) are buffers of one module.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional

from exporter.architecture import Architecture
from exporter.primitive_ops import REST
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights
from exporter.torch_primitives import TorchPrimitives

_HIDDEN = -3e4  # what a mask adds to a score that must not count: float16 holds it


class TracedOps(TorchPrimitives):
    """The verbs as XNNPACK and ExecuTorch's kernels for CPUs take them: those that `formats.executorch` writes.

    Tokens are [1, length]; a cache is float32 [1, context, kv_heads, head_dim]. Buffers are made in a first run,
    before tracing, on fake tensors: it computes nothing.
    """

    any_length = True  # of tokens, else one at a time

    def __init__(self, arch: Architecture, weights: Weights, context: int, held: nn.Module) -> None:
        super().__init__(arch, weights)
        self.context = context
        self.stored: dict[str, int] = {}  # buffer -> bytes of it in the file, where that is not its size
        self._held = held
        self._embedding: QuantizedTensor | None = None
        self._taken: dict[str, Tensor] = {}  # rows of tables at this run's positions

    def begin(self, tokens: Tensor, start: Tensor) -> None:
        """What comes now is a run of tokens [1, length] at position `start` [1], int64 both."""
        self._taken.clear()
        self._masks.clear()
        self.length = tokens.shape[1]
        self._place(start)

    @property
    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.arch.rope.tables(self.context)

    # the verbs that are more than elementary operations

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        scheme, key = self.weights.scheme(weight), f"{weight}.table"
        if not scheme.is_integer:
            return functional.embedding(tokens, self.float_matrix(weight))
        if key not in self:
            table = self._matrix(weight)
            swapped = (table.data << 4) | (
                table.data >> 4
            )  # of two in a byte, the kernel takes the upper first
            self._keep(key, swapped if scheme.bits == 4 else table.integers())
            self._keep(f"{key}.scales", table.scales)
        look_up = {
            4: torch.ops.quantized_decomposed.embedding_4bit.dtype,
            8: torch.ops.quantized_decomposed.embedding_byte.dtype,
        }[scheme.bits]
        half = 2 ** (scheme.bits - 1)
        scales = self[f"{key}.scales"]
        return look_up(self[key], scales, None, -half, half - 1, tokens, dtype=torch.float32)

    def linear(self, x: Tensor, weight: str) -> Tensor:
        if self.weights.scheme(weight).is_integer:
            x = round_per_token(x)
        return functional.linear(x, self.float_matrix(weight), self.bias(weight))

    def last(self, x: Tensor) -> Tensor:
        return x[:, -1:]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.any_length and x.ndim == y.ndim == 3 and y.shape[1] == 1:
            x = self.last(x)  # the residual stream in the last layer, of which only the last token goes on
        return x + y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        arch, (keys, values) = self.arch, self._remember(k, v, layer)
        masked = self.is_masked(layer)
        if masked or arch.attention_softcap:
            seen = self.position + self.length
            keys, values = keys.narrow(1, 0, seen), values.narrow(1, 0, seen)
        if arch.attention_softcap:
            mixed = self.capped_attention(q, keys, values, layer)
        else:
            mask, scale = self.mask(arch.windows[layer]) if masked else None, arch.attention_scale
            mixed = torch.ops.llama.custom_sdpa(q, keys, values, self.position, mask, 0.0, not masked, scale)
        if layer == arch.layers - 1:
            mixed = self.last(mixed)
        return self.reshape(mixed, [1, REST, arch.heads * arch.head_dim])

    def is_masked(self, layer: int) -> bool:
        """Whether the layer's window hides anything within the context."""
        return 0 < self.arch.windows[layer] < self.context

    # elementary operations

    def constant(self, name: str, values: NDArray[np.float32]) -> Tensor:
        if name not in self:
            self._keep(name, values)
        return self[name]

    def mean(self, x: Tensor) -> Tensor:
        size = x.shape[-1]  # as a product, since XNNPACK's partitioner takes no mean of the last dimension
        return functional.linear(x, self.constant(f"mean.{size}", np.full((1, size), 1 / size, np.float32)))

    # positions

    def rope_table(self, name: str, table: NDArray[np.float32]) -> Tensor:
        return self.rows(
            name, table.reshape(len(table), 1, -1)
        )  # [length, 1, n]: one more dimension comes by broadcasting

    def positions(self, of: str) -> Tensor:
        table = np.arange(self.context, dtype=np.float32)
        if of == "queries":
            return self.rows("positions", table)[:, None]
        return self.constant("positions", table).narrow(0, 0, self.position + self.length)[None, :]

    def rows(self, name: str, table: NDArray[np.float32]) -> Tensor:
        """Rows of a table at this run's positions."""
        if name not in self._taken:
            self._taken[name] = self._rows(self.constant(name, table))
        return self._taken[name]

    def _place(self, start: Tensor) -> None:
        """Note where this run starts; what is checked here is checked at run time too."""
        self.position: Any = start[0].item()  # an int, or in tracing its symbol
        torch._check(self.position >= 0)
        torch._check(self.position + self.length <= self.context)

    def _rows(self, table: Tensor) -> Tensor:
        return table.narrow(0, self.position, self.length)

    # for attention

    def _scaled(self, q: Tensor) -> Tensor:
        """q for a kernel that divides scores by √head_dim, as if it multiplied by the architecture's scale."""
        factor = self.arch.attention_scale * math.sqrt(self.arch.head_dim)
        return q if math.isclose(factor, 1.0) else self.scale(q, factor)

    def _written_out(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of q [..., queries, dim] over keys and values [..., context, dim]; `mask` is added to scores."""
        scores = self.matmul(q, keys.transpose(-1, -2))
        scores = self.scale(scores, 1 / math.sqrt(self.arch.head_dim))
        if self.arch.attention_softcap:
            scores = self.softcap(scores, self.arch.attention_softcap)
        return self.matmul(self.softmax(scores + mask), values)

    # what stays

    def float_matrix(self, name: str, use: str = "") -> Tensor:
        """A weight as float32 [outputs, inputs]; `use` keeps apart what two uses of one weight must not share.

        For integers this is the operation that dequantizes them, whose bounds tell partitioners of 4 bits.
        What is held twice is once in the file, where constants go by their hash.
        """
        from torchao.quantization.quant_primitives import dequantize_affine

        scheme, key = self.weights.scheme(name), name + use
        if key not in self:
            matrix = self._matrix(name)
            stored = 0 if use and self.arch.tied else matrix.data.nbytes
            self._keep(key, matrix.integers() if scheme.is_integer else matrix.dequantize(), stored)
            if matrix.scales is not None:
                self._keep(f"{key}.scales", matrix.scales)
                self._keep(f"{key}.zeros", np.zeros(matrix.scales.shape, np.int8), stored=0)
        if not scheme.is_integer:
            return self[key]
        scales, half = self[f"{key}.scales"], 2 ** (scheme.bits - 1)
        block = (1, scheme.group or self[key].shape[1])
        return dequantize_affine(self[key], block, scales, self[f"{key}.zeros"], torch.int8, -half, half - 1)

    def bias(self, weight: str) -> Tensor | None:
        """What the linear by that name adds."""
        if not self.arch.has_bias(weight):
            return None
        return self.constant(f"{weight}.bias", self.weights.vector(f"{weight}.bias"))

    def _remember(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's caches with k and v in their place."""
        shape = (1, self.context, self.arch.kv_heads, self.arch.head_dim)
        keys, values = (self._cache(layer, kind, shape) for kind in ("keys", "values"))
        torch.ops.llama.update_cache(k, keys, self.position)
        torch.ops.llama.update_cache(v, values, self.position)
        return keys, values

    def _cache(self, layer: int, kind: str, shape: tuple[int, ...]) -> Tensor:
        name = f"cache.{layer}.{kind}"
        if name not in self:
            self._keep(name, np.zeros(shape, np.float32), stored=0)
        return self[name]

    def _matrix(self, name: str) -> QuantizedTensor:
        """A weight; a tied embedding, which is asked for twice, is quantized once."""
        if name != "embedding":
            return self.weights.matrix(name)
        if self._embedding is None:
            self._embedding = self.weights.matrix(name)
        return self._embedding

    def _keep(self, name: str, values: NDArray[Any] | None, stored: int | None = None) -> None:
        """Make a buffer; `stored`: bytes of it in the file."""
        with unset_fake_temporarily():
            self._held.register_buffer(_buffer(name), torch.tensor(values))
        if stored is not None:
            self.stored[_buffer(name)] = stored

    def __contains__(self, name: str) -> bool:
        return _buffer(name) in self._held._buffers

    def __getitem__(self, name: str) -> Tensor:
        return self._held.get_buffer(_buffer(name))


class VulkanOps(TracedOps):
    """The verbs as the Vulkan delegate takes them: its own norm and rotary embedding, attention over KV caches.

    Its attention has neither window nor softcap nor a scale of its own; where a layer needs one of the first two,
    scores are written out over the whole context, in four dimensions, which is as many as it takes.
    """

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        # apart from the head's: the delegate transposes the scales of a product in place
        return functional.embedding(tokens, self.float_matrix(weight, ".table"))

    def linear(self, x: Tensor, weight: str) -> Tensor:
        return functional.linear(x, self.float_matrix(weight), self.bias(weight))

    def rms_norm(self, x: Tensor, weight: str) -> Tensor:
        gamma = self.constant(weight, self.weights.vector(weight))
        return torch.ops.et_vk.rms_norm(x, gamma, self.arch.norm_eps)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        arch = self.arch
        if arch.rope.dim % 8:  # its rotary kernel takes no other (backends/vulkan, RotaryEmbedding.cpp)
            return super().attention(q, k, v, layer)
        cos, sin = (np.concatenate((table, table), -1) for table in self.tables)
        q, k = torch.ops.et_vk.apply_rotary_emb_hf(
            self.reshape(q, [1, self.length, arch.heads, arch.head_dim]),
            self.reshape(k, [1, self.length, arch.kv_heads, arch.head_dim]),
            self._own_rows("rope.cos", cos),
            self._own_rows("rope.sin", sin),
            0,
        )
        return self.attend(q, k, self.reshape(v, [1, self.length, arch.kv_heads, arch.head_dim]), layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        arch, (keys, values) = self.arch, self._remember(k, v, layer)
        q = self._scaled(q)
        if not self.is_masked(layer) and not arch.attention_softcap:
            mixed = torch.ops.llama.custom_sdpa(q, keys, values, self.position, None, 0.0, True, None)
        else:
            shape = (self.length, arch.kv_heads, arch.heads // arch.kv_heads, arch.head_dim)
            mixed = self._written_out(
                q.reshape(shape).permute(1, 2, 0, 3),
                keys[0].permute(1, 0, 2)[:, None],
                values[0].permute(1, 0, 2)[:, None],
                self.rows(*self._mask_table(arch.windows[layer])),
            ).permute(2, 0, 1, 3)
        mixed = self.reshape(mixed, [1, self.length, arch.heads * arch.head_dim])
        return self.last(mixed) if layer == arch.layers - 1 else mixed

    def _own_rows(self, name: str, table: NDArray[np.float32]) -> Tensor:
        """`rows`, as a tensor of their own: the rotary operator cannot be traced on a part of another."""
        own = f"{name}.own"
        if own not in self._taken:
            self._taken[own] = self.rows(name, table).clone()
        return self._taken[own]

    def _mask_table(self, window: int) -> tuple[str, NDArray[np.float32]]:
        """What each position [context] adds to its scores [context]: in float16, positions themselves would be
        exact to 2048 only."""
        behind = np.subtract.outer(np.arange(self.context), np.arange(self.context))
        hidden = (behind < 0) | (behind >= (window or self.context))
        return f"mask.{window}", np.where(hidden, np.float32(_HIDDEN), np.float32(0))


class StaticOps(TracedOps):
    """The verbs for delegates of fixed shapes (Core ML, Qualcomm's, MediaTek's): one token, the whole context.

    The position stays a tensor. A cache is [1, kv_heads, context, head_dim], which Core ML holds in float16.
    """

    any_length = False

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        return functional.embedding(tokens, self.float_matrix(weight))

    def linear(self, x: Tensor, weight: str) -> Tensor:
        return functional.linear(x, self.float_matrix(weight), self.bias(weight))

    def rms_norm(self, x: Tensor, weight: str) -> Tensor:
        gamma = self.constant(weight, self.weights.vector(weight))
        return functional.rms_norm(x, x.shape[-1:], gamma, self.arch.norm_eps)  # x² may exceed float16

    def last(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        arch, (keys, values) = self.arch, self._remember(k, v, layer)
        q = self.reshape(self._scaled(q), [1, arch.kv_heads, arch.heads // arch.kv_heads, arch.head_dim])
        mask = self.mask(arch.windows[layer])
        if arch.attention_softcap:
            mixed = self._written_out(q, keys, values, mask)
        else:
            mixed = functional.scaled_dot_product_attention(q, keys, values, mask)
        return self.reshape(mixed, [1, 1, arch.heads * arch.head_dim])

    def mask(self, window: int) -> Tensor:
        if window not in self._masks:
            behind = self.start - self["positions"]
            seen = behind >= 0
            if 0 < window < self.context:
                seen = seen & (behind < window)
            self._masks[window] = (seen.float() - 1)[None, :] * -_HIDDEN
        return self._masks[window]

    def _place(self, start: Tensor) -> None:
        if "positions" not in self:
            self._keep("positions", np.arange(self.context, dtype=np.int32))
        self.start = start.to(torch.int32)

    def _rows(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.start)

    def _remember(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        shape = (1, self.arch.kv_heads, self.context, self.arch.head_dim)
        keys, values = (self._cache(layer, kind, shape) for kind in ("keys", "values"))
        for cache, new in ((keys, k), (values, v)):
            cache[:, :, self.start] = new.transpose(1, 2)
        return keys, values


def round_per_token(x: Tensor) -> Tensor:
    """x rounded to 8 bits and back, with a scale and a zero point for each token (the last dimension).

    As the partitioner knows the pattern from torchao (Int8DynamicActivationIntxWeightConfig).
    """
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block, low, high = [1] * (x.ndim - 1) + [x.shape[-1]], -128, 127
    scales, zeros = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.int8, low, high, zero_point_dtype=torch.int8
    )
    q = quantize_affine(x, block, scales, zeros, torch.int8, low, high)
    return dequantize_affine(q, block, scales, zeros, torch.int8, low, high)


def _buffer(name: str) -> str:
    """Names of buffers have no dots."""
    return name.replace(".", "_")
