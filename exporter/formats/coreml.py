"""Core ML: the decoder as an ML Program for iOS 18 and macOS 15, functions `prefill` and `decode` in one package.

Linear layers, for the GPU (and the CPU): integers in groups along the inputs, which the Neural Engine does not
take. Products of matrices are float16; the residual stream, norms, rotary embedding, activations and softmax are
float32, which costs these processors little: they are small, and a residual stream in float16 would gather a rounding
in every layer. Both functions share the states and the weights.
"""

from pathlib import Path
from typing import Any

import numpy as np

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.formats.coreml_ops import CHUNK, MASKED, ProgramOps
from exporter.formats.coreml_program import MilFunction, Package, Var
from exporter.quantization.weights import Weights
from runtimes.bundle import EntryPoint, TensorSpec

PACKAGE = "model.mlpackage"


class MilOps(ProgramOps):
    """The verbs of `decoder.Ops` as operations of one function; values are [1, length, channels]."""

    wide = "fp32"

    def __init__(
        self, arch: Architecture, weights: Weights, function: MilFunction, length: int, context: int
    ) -> None:
        self.tokens = function.input("input_ids", "int32", (1, length))
        super().__init__(arch, weights, function, length, context, range(arch.layers))
        self.row = function.input("last", "int32", (1,)) if length > 1 else None

    def embed(self, tokens: Var, weight: str) -> Var:
        shape = (1, self.length, self.arch.hidden)
        table = self.matrix(weight)
        rows = self.f.op(
            "gather",
            "fp16",
            shape,
            x=table,
            indices=tokens,
            axis=0,
            batch_dims=0,
            validate_indices=False,
        )
        return self.widened(rows)

    def rms_norm(self, x: Var, weight: str) -> Var:
        """In float32, where squares stay in range."""
        x = self.widened(x)
        power = self.reduce("reduce_mean", self.binary("mul", x, x), -1)
        epsilon = self.number(self.arch.norm_eps, x.kind)
        root = self.f.op("rsqrt", power.kind, power.shape, x=power, epsilon=epsilon)
        return self.binary("mul", self.binary("mul", x, root), self.vector(weight, x.kind))

    def linear(self, x: Var, weight: str) -> Var:
        out = (*x.shape[:-1], self._shapes[weight][0])
        bias: dict[str, Any] = {}
        if self.arch.has_bias(weight):
            bias["bias"] = self.vector(f"{weight}.bias")
        return self.f.op("linear", "fp16", out, x=self.halved(x), weight=self.matrix(weight), **bias)

    def last(self, x: Var) -> Var:
        if self.row is None:
            return x
        shape = (1, 1, x.shape[-1])
        return self.f.op(
            "gather", x.kind, shape, x=x, indices=self.row, axis=1, batch_dims=0, validate_indices=False
        )

    def heads(self, x: Var, count: int) -> Var:
        split = self.reshape(x, (1, self.length, count, self.arch.head_dim))
        return self.transpose(split, (0, 2, 1, 3))

    def merged(self, x: Var) -> Var:
        return self.reshape(self.transpose(x, (0, 2, 1, 3)), (1, self.length, x.shape[1] * x.shape[3]))

    def mask(self, window: int) -> Var:
        shape = (self.length, self.context)
        steps = np.arange(self.length, dtype=np.int32)[:, None]
        queries = self.f.op("add", "int32", (self.length, 1), x=steps, y=self.position)
        keys = np.arange(self.context, dtype=np.int32)[None]
        seen = self.f.op("less_equal", "bool", shape, x=keys, y=queries)
        if window:
            first = self.f.op("sub", "int32", (self.length, 1), x=queries, y=np.array([window], np.int32))
            near = self.f.op("greater", "bool", shape, x=keys, y=first)
            seen = self.f.op("logical_and", "bool", shape, x=seen, y=near)
        counts = self.f.op("cast", self.wide, shape, x=seen, dtype=self.wide)
        hidden = self.binary("sub", self.number(1, self.wide), counts)
        return self.binary("mul", hidden, self.number(MASKED, self.wide))


def write_coreml(
    arch: Architecture, weights: Weights, context: int, folder: Path, name: str = PACKAGE
) -> tuple[EntryPoint, ...]:
    """Write a package into `folder`; returns its entry points. Memory is bounded by the largest weight."""
    package = Package(folder / name)
    lengths = {"prefill": min(CHUNK, context), "decode": 1}
    entries = []
    for entry, length in lengths.items():
        function = package.function(entry)
        ops = MilOps(arch, weights, function, length, context)
        function.output("logits", ops.halved(decoder(ops, arch, ops.tokens)))
        entries.append(_entry_point(entry, name, length, arch))
    package.finish({"gochu.family": arch.family, "gochu.context": str(context)})
    return tuple(entries)


def _entry_point(name: str, file: str, length: int, arch: Architecture) -> EntryPoint:
    inputs = [
        TensorSpec(name="input_ids", dtype="int32", shape=(1, length)),
        TensorSpec(name="position", dtype="int32", shape=(1,)),
    ]
    if length > 1:
        inputs.append(TensorSpec(name="last", dtype="int32", shape=(1,)))
    logits = TensorSpec(name="logits", dtype="float16", shape=(1, 1, arch.vocab))
    return EntryPoint(name=name, file=file, inputs=tuple(inputs), outputs=(logits,))
