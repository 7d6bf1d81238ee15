"""The decoder, written once.

`decoder` is the only description of the Llama-like model. It is a plain function over the verbs of `Ops`;
a format is a class that implements those verbs, and the values that flow through are its own business:
tensors, names of ONNX values, Core ML variables. Weights are named, never passed: whoever implements the
verbs knows where its weights are.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from exporter.architecture import Architecture

V = TypeVar("V")


class Ops(Protocol[V]):
    """The verbs. `V` is a value; shapes are what the value stands for; `weight` is a canonical name."""

    def embed(self, tokens: V, weight: str) -> V:
        """Token ids [batch, length] -> [batch, length, hidden]."""

    def scale(self, x: V, factor: float) -> V:
        """x * factor."""

    def add(self, x: V, y: V) -> V:
        """x + y."""

    def rms_norm(self, x: V, weight: str) -> V:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension."""

    def linear(self, x: V, weight: str) -> V:
        """x @ Wᵀ, plus a bias if the architecture has one there."""

    def linears(self, x: V, weights: Sequence[str]) -> Sequence[V]:
        """Several linears of one input; a format may fuse them."""

    def attention(self, q: V, k: V, v: V, layer: int) -> V:
        """[batch, length, heads·dim] each -> [batch, length, heads·dim].

        Rotary embedding, KV cache, causal mask with the layer's window, softcap and softmax are inside:
        what a target fuses differs most here.
        """

    def gated(self, gate: V, up: V) -> V:
        """activation(gate) * up."""

    def last(self, x: V) -> V:
        """Only the last position, [batch, 1, hidden], where nothing else is asked for."""

    def softcap(self, x: V, cap: float) -> V:
        """cap * tanh(x / cap)."""


def decoder(ops: Ops[V], arch: Architecture, tokens: V) -> V:
    """Logits [batch, length or 1, vocab] of token ids [batch, length]."""
    x = embedding(ops, arch, tokens)
    for i in range(arch.layers):
        x = layer(ops, arch, i, x)
    return head(ops, arch, x)


def embedding(ops: Ops[V], arch: Architecture, tokens: V) -> V:
    """Token ids -> hidden states."""
    x = ops.embed(tokens, "embedding")
    return ops.scale(x, arch.embedding_scale) if arch.embedding_scale != 1 else x


def layer(ops: Ops[V], arch: Architecture, i: int, x: V) -> V:
    """One decoder layer: attention and MLP, each added to the residual stream."""
    name = f"layers.{i}."
    h = ops.rms_norm(x, name + "attention_norm")
    q, k, v = ops.linears(h, [name + "attention.q", name + "attention.k", name + "attention.v"])
    h = ops.linear(ops.attention(q, k, v, i), name + "attention.o")
    if arch.post_norms:
        h = ops.rms_norm(h, name + "attention_post_norm")
    x = ops.add(x, h)
    h = ops.rms_norm(x, name + "mlp_norm")
    gate, up = ops.linears(h, [name + "mlp.gate", name + "mlp.up"])
    h = ops.linear(ops.gated(gate, up), name + "mlp.down")
    if arch.post_norms:
        h = ops.rms_norm(h, name + "mlp_post_norm")
    return ops.add(x, h)


def head(ops: Ops[V], arch: Architecture, x: V) -> V:
    """Hidden states -> logits."""
    x = ops.rms_norm(ops.last(x), "final_norm")
    logits = ops.linear(x, "embedding" if arch.tied else "head")
    return ops.softcap(logits, arch.final_softcap) if arch.final_softcap else logits
