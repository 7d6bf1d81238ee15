"""The decoder in torch, for coreai-torch: in the layout and with the cache of Apple's LLMs for iOS and macOS 27.

Values are [1, length, channels]; every linear is a convolution of one point over [1, channels, 1, length], which is
what the Neural Engine multiplies by. Weights keep the quantizer's integers and tables: coreai's operations
dequantize constants, with which a convolution goes together.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional

from exporter.architecture import Architecture
from exporter.primitive_ops import REST
from exporter.quantization.weights import Weights
from exporter.torch_primitives import TorchPrimitives

OPERATORS = "coreai_torch._compression.custom_layers"  # defines torch.ops.coreai.* when it is imported
_HIDDEN = -40000.0  # what a mask adds to a score that must not count, as Apple's runner fills its own
_FLOOR = 1e-5  # the least that a norm divides by: what lies below it all is 0 in float16


@torch.library.custom_op("gochu::write_rows", mutates_args=())
def write_rows(cache: Tensor, rows: Tensor, layer: int, step: Tensor) -> Tensor:
    """`cache` [layers, 1, channels, 1, context] with `rows` [1, channels, 1, length] at position `step` [1]."""
    first, written = int(step), cache.clone()
    written[layer, ..., first : first + rows.shape[-1]] = rows
    return written


@write_rows.register_fake
def _(cache: Tensor, rows: Tensor, layer: int, step: Tensor) -> Tensor:
    return torch.empty_like(cache)


class CoreAiOps(TorchPrimitives):
    """The verbs over the inputs of one entry point, `begin`'s; numbers are of `dtype`, float16 but in tests.

    What stays is a buffer of `held`, made in a first run on fake tensors, before tracing; entry points share the
    tensors by `shared`.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        context: int,
        held: nn.Module,
        shared: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(arch, weights)
        self.context, self.dtype = context, dtype
        self._held, self._shared = held, shared

    def begin(self, table: Tensor, **inputs: Tensor) -> None:
        """`table`: the embedding's [vocab, 1, hidden]; a decoder's other `inputs` are those of `coreai.Extend`."""
        self._masks.clear()
        self.table = table.reshape(table.shape[0], table.shape[2])
        if inputs:
            self.at, self.step = inputs["position_ids"].to(torch.int32), inputs["in_step"]
            self.seen = inputs["causal_mask"].reshape(self.context, -1).transpose(0, 1)
            self.keys, self.values = inputs["key_cache"], inputs["value_cache"]

    @property
    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.arch.rope.tables(self.context)

    # the verbs that are more than elementary operations

    def embed(self, tokens: Tensor, weight: str) -> Tensor:
        return functional.embedding(tokens, self.table)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def rms_norm(self, x: Tensor, weight: str) -> Tensor:
        """With m = max |x|: y = x / m, and y / sqrt(mean(y²) + eps / m²) * weight; y² is at most 1."""
        largest = torch.clamp(x.abs().amax(-1, keepdim=True), min=_FLOOR)
        y, eps = x / largest, self.arch.norm_eps**0.5 / largest
        normed = y * torch.rsqrt(self.mean(y * y) + eps * eps)
        return normed * self.constant(weight, self.weights.vector(weight))

    def linear(self, x: Tensor, weight: str) -> Tensor:
        if weight == "embedding":
            return functional.linear(x, self.table)
        bias = None
        if self.arch.has_bias(weight):
            bias = self.constant(f"{weight}.bias", self.weights.vector(f"{weight}.bias"))
        columns = x.transpose(1, 2)[:, :, None]
        return functional.conv2d(columns, self.matrix(weight), bias)[:, :, 0].transpose(1, 2)

    def last(self, x: Tensor) -> Tensor:
        return x  # the runner takes the row that it wants

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        arch = self.arch
        keys, values = self._remember(k, v, layer)
        shared, length = arch.heads // arch.kv_heads, q.shape[1]
        q = self.scale(q, arch.attention_scale).reshape(length, arch.kv_heads, shared, arch.head_dim)
        q = q.permute(1, 2, 0, 3).reshape(arch.kv_heads, shared * length, arch.head_dim)
        scores = torch.matmul(q, keys)
        if arch.attention_softcap:
            scores = self.softcap(scores, arch.attention_softcap)
        scores = scores.reshape(arch.kv_heads, shared, length, self.context) + self.mask(arch.windows[layer])
        scores = self.softmax(scores).reshape(arch.kv_heads, shared * length, self.context)
        mixed = torch.matmul(scores, values.transpose(1, 2))
        mixed = mixed.reshape(arch.kv_heads, shared, length, arch.head_dim).permute(2, 0, 1, 3)
        return mixed.reshape(1, length, arch.heads * arch.head_dim)

    def mask(self, window: int) -> Tensor:
        """What is added to scores, [length, context]: the runner's mask, and what the window hides besides."""
        if not 0 < window < self.context:
            return self.seen
        if window not in self._masks:
            if "positions" not in self._shared:
                self._share("positions", np.arange(self.context, dtype=np.int32)[None])
            behind = self.at.transpose(0, 1) - self._kept("positions")
            self._masks[window] = torch.minimum(self.seen, (behind >= window).to(self.dtype) * _HIDDEN)
        return self._masks[window]

    # elementary operations

    def constant(self, name: str, values: NDArray[np.float32]) -> Tensor:
        if name not in self._shared:
            self._share(name, self._float(values))
        return self._kept(name)

    def _silu(self, x: Tensor) -> Tensor:
        return functional.silu(x)

    def _gelu(self, x: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")  # written out, x³ would leave float16

    # positions

    def rope_table(self, name: str, table: NDArray[np.float32]) -> Tensor:
        return functional.embedding(self.at, self.constant(name, table))[:, :, None]

    def positions(self, of: str) -> Tensor:
        raise NotImplementedError("masks come from the runner")

    # what stays

    def matrix(self, name: str) -> Tensor:
        """A weight as a convolution's, [outputs, inputs, 1, 1]: the operation that dequantizes it, on constants.

        Names of buffers say what they are: by them coreai-torch finds the numbers of fewer bits than a byte.
        """
        scheme = self.weights.scheme(name)
        if f"{name}.weight" not in self._shared:
            matrix = self.weights.matrix(name)
            if matrix.tables is not None:
                self._share(f"{name}.weight", matrix.indices()[:, :, None, None])
                self._share(f"{name}.lut", self._float(matrix.tables[:, None, None, None, :, None]))
            elif matrix.scales is not None:
                self._share(f"{name}.weight", matrix.integers()[:, :, None, None])
                self._share(f"{name}.scales", self._float(matrix.scales[:, :, None, None]))
            else:
                self._share(f"{name}.weight", self._float(matrix.data[:, :, None, None]))
        if scheme.table:
            indices = self._kept(f"{name}.weight", "indices")
            return torch.ops.coreai.lut_to_dense(indices, self._kept(f"{name}.lut"), 0)
        stored = self._kept(f"{name}.weight")
        if scheme.is_float:
            return stored
        bits = torch.int4 if scheme.bits == 4 else torch.int8  # type: ignore[attr-defined]
        return torch.ops.coreai.constexpr_blockwise_shift_scale(
            stored, self._kept(f"{name}.scales"), None, None, bits, None
        )

    def _remember(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, [kv_heads, head_dim, context], with k and v in their place."""
        arch = self.arch
        channels = arch.kv_heads * arch.head_dim
        k, v = (x.reshape(1, REST, channels).transpose(1, 2)[:, :, None] for x in (k, v))
        self.keys = torch.ops.gochu.write_rows(self.keys, k, layer, self.step)
        self.values = torch.ops.gochu.write_rows(self.values, v, layer, self.step)
        shape = (arch.kv_heads, arch.head_dim, self.context)
        return self.keys[layer].reshape(shape), self.values[layer].reshape(shape)

    def _kept(self, name: str, kind: str = "") -> Tensor:
        """A buffer of what is shared by that name; `kind` is added to the buffer's."""
        buffer = name.replace(".", "_") + kind
        if buffer not in self._held._buffers:
            self._held.register_buffer(buffer, self._shared[name])
        return self._held.get_buffer(buffer)

    def _share(self, name: str, values: NDArray[Any]) -> None:
        with unset_fake_temporarily():
            self._shared[name] = torch.tensor(values)

    def _float(self, values: NDArray[Any]) -> NDArray[Any]:
        return values.astype(np.float16 if self.dtype == torch.float16 else np.float32)
