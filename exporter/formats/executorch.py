"""ExecuTorch for phone CPUs: the decoder as a .pte program that XNNPACK computes, written outright.

Lowering a model through torch.export takes seconds for each layer, and holds all of it in memory. The program
is plain, though: for each layer a few kernels (they update the KV cache and compute attention) and one XNNPACK
delegate with all that lies between. So it is written here with executorch's own schema and serializers, and its
weights are streamed. `formats/executorch_traced.py` goes the long way with the same elementary operations; the
results are the same to the bit (tests/golden/test_executorch.py).

Kernels and their arguments: llama::update_cache and llama::custom_sdpa (extension/llm/custom_ops),
quantized_decomposed::embedding_* (kernels/quantized), aten::slice_copy (kernels/portable) in pytorch/executorch.
Inputs, outputs and constant methods are what its LLM runner asks for (extension/llm/runner).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType
from executorch.exir.version import EXECUTORCH_SCHEMA_VERSION
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.decoder import decoder
from exporter.formats.executorch_method import Method, constant_method
from exporter.formats.executorch_pte import Blob, Layout, PteWriter, rename_data
from exporter.formats.executorch_xnnpack import BACKEND, XnnGraph
from exporter.primitive_ops import REST, PrimitiveOps, shape_after
from exporter.quantization.tensor import QuantizedTensor
from exporter.quantization.weights import Weights
from exporter.residency import Tally
from runtimes.bundle import EntryPoint, Residency, TensorSpec

PROGRAM = "model.pte"
METHOD = "forward"
CHUNK = 512  # tokens that can be given at once: bounds the activations of a long prompt
_ALL = 2**63 - 1  # the end of a slice that goes to the end
_DIGITS = 16  # of a key's hash


@dataclass(eq=False)
class Value:
    """A float32 tensor, of `shape` for the longest input: computed in a delegate, held by the program, or both."""

    shape: tuple[int, ...]
    graph: XnnGraph | None = None
    number: int = 0  # in the graph
    tensor: int | None = None  # in the program
    constant: str | None = None  # the key of its data, where it is a constant


class XnnpackOps(PrimitiveOps[Value]):
    """The verbs of `decoder.Ops` as instructions of a program and nodes of XNNPACK delegates.

    Of the weights only norms and biases are read: `layout` says which part of each matrix belongs where.
    """

    def __init__(self, arch: Architecture, weights: Weights, context: int) -> None:
        super().__init__(arch, weights)
        self.context, self.chunk = context, min(CHUNK, context)
        self.method, self.layout = Method(METHOD), Layout()
        self.graphs: list[XnnGraph] = []
        self.matrices: set[str] = set()  # names of those that are stored
        self._tally, self._means = Tally(), set[int]()  # and the sizes that a mean was taken of
        self._open: XnnGraph | None = None  # the delegate that is being built
        self._shapes = dict(arch.matrices())
        self._table = 0  # data_buffer_idx of the embedding's integers
        self._taken: dict[str, Value] = {}  # rows of constant tables at this run's positions

        method, chunk = self.method, self.chunk
        self.tokens = Value((1, chunk), tensor=method.input(ScalarType.LONG, (1, chunk)))
        start = method.input(ScalarType.LONG, (1,))
        self._position, self._end, length = method.whole(0), method.whole(0), method.whole(0)
        method.kernel("aten::_local_scalar_dense", "", [start, self._position])
        method.kernel("aten::sym_size", "int", [self._tensor(self.tokens), method.whole(1), length])
        method.kernel("executorch_prim::add", "Scalar", [self._position, length, self._end])
        self._room = method.tensor((1,))  # what update_cache returns, which means nothing
        self._rope_tables()  # all that is taken from tables comes first: a kernel ends the delegate before it
        if arch.attention_softcap or any(0 < window < context for window in arch.windows):
            for of in ("queries", "keys"):
                self._positions(of)

    @property
    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.arch.rope.tables(self.context)

    # the verbs that are more than elementary operations

    def embed(self, tokens: Value, weight: str) -> Value:
        method, scheme, (rows, columns) = self.method, self.weights.scheme(weight), self._shapes[weight]
        self.matrices.add(weight)
        out = Value((1, self.chunk, columns))
        if not scheme.is_integer:
            self._table = self.layout.constant(Blob(4 * rows * columns, weight=weight, part="data"))
            table = method.constant(ScalarType.FLOAT, (rows, columns), self._table)
            no = method.truth(False)
            self._kernel(
                "aten::embedding",
                "out",
                [table, self._held(tokens), method.whole(-1), no, no],
                out,
                weight_bytes=4 * rows * columns,
            )
            return out
        width, groups = columns * scheme.bits // 8, columns // scheme.group if scheme.group else 1
        part, kind, name = {
            4: ("swapped", ScalarType.BYTE, "embedding_4bit"),
            8: ("data", ScalarType.CHAR, "embedding_byte"),
        }[scheme.bits]
        self._table = self.layout.constant(Blob(rows * width, weight=weight, part=part))
        scales = self.layout.constant(Blob(4 * rows * groups, weight=weight, part="float scales"))
        half = 2 ** (scheme.bits - 1)
        arguments = [
            method.constant(kind, (rows, width), self._table),
            method.constant(ScalarType.FLOAT, (rows, groups), scales),
            method.none(),  # zero points
            method.whole(-half),
            method.whole(half - 1),
            self._held(tokens),
            method.whole(int(ScalarType.FLOAT)),
        ]
        size = rows * (width + 4 * groups)
        self._kernel(f"quantized_decomposed::{name}", "dtype_out", arguments, out, weight_bytes=size)
        return out

    def linear(self, x: Value, weight: str) -> Value:
        scheme, shape = self.weights.scheme(weight), self._shapes[weight]
        self.matrices.add(weight)
        tied = weight == "embedding"
        if tied and scheme.bits == 4:
            x = self._swap_pairs(x)
        graph, number = self._graph(), self._number(x)
        key = _unread(weight)
        size = shape[0] * shape[1] * scheme.bits // 8
        self.layout.named(key, self._table if tied else Blob(size, weight=weight, part="data"))
        stored = 0 if tied else size
        if scheme.is_integer:
            number = graph.rounded(number)
            count = shape[0] * (shape[1] // scheme.group if scheme.group else 1)
            part, width = ("scales", 2) if scheme.group else ("float scales", 4)
            self.layout.named(key + ".scales", Blob(count * width, weight=weight, part=part))
            stored += count * width
        self._tally.add("aten::linear", True, shape[0] * shape[1], stored)
        bias = None
        if self.arch.has_bias(weight):
            bias = self._number(self.constant(f"{weight}.bias", self.weights.vector(f"{weight}.bias")))
        out = (*x.shape[:-1], shape[0])
        return Value(out, graph, graph.linear(number, graph.weight(key, shape, scheme), bias, out))

    def last(self, x: Value) -> Value:
        if x.shape[1] == 1:
            return x
        out, method = Value((x.shape[0], 1, *x.shape[2:])), self.method
        arguments = [self._held(x), method.whole(1), method.whole(-1), method.whole(_ALL), method.whole(1)]
        self._kernel("aten::slice_copy", "Tensor_out", arguments, out)
        return out

    def add(self, x: Value, y: Value) -> Value:
        if len(x.shape) == len(y.shape) == 3 and y.shape[1] == 1:
            x = self.last(x)  # the residual stream in the last layer, of which only the last token goes on
        return self._binary(xnn.XNNAdd, x, y)

    def attend(self, q: Value, k: Value, v: Value, layer: int) -> Value:
        arch, method = self.arch, self.method
        shape = (1, self.context, arch.kv_heads, arch.head_dim)
        caches = [Value(shape, tensor=method.cache(shape)) for _ in (k, v)]
        for new, cache in zip((k, v), caches, strict=True):
            arguments = [self._held(new), self._tensor(cache), self._position, self._room, self._room]
            method.kernel("llama::update_cache", "out", arguments)
            self._tally.add("llama::update_cache", False)
        masked = 0 < arch.windows[layer] < self.context
        if masked or arch.attention_softcap:
            caches = [self._seen(cache) for cache in caches]
        if arch.attention_softcap:
            keys, values = caches
            out = self.capped_attention(q, keys, values, layer)
        else:
            out = Value(q.shape)
            arguments = [
                *(self._held(value) for value in (q, *caches)),
                self._position,
                self._held(self.mask(arch.windows[layer])) if masked else method.none(),
                method.real(0.0),  # dropout
                method.truth(not masked),  # causal
                method.real(arch.attention_scale),
            ]
            macs = 2 * arch.heads * arch.head_dim * self.context  # of a token at the context's end
            self._kernel("llama::custom_sdpa", "out", arguments, out, macs)
        if layer == arch.layers - 1:
            out = self.last(out)
        return self.reshape(out, [1, REST, arch.heads * arch.head_dim])

    # elementary operations, each a node

    def constant(self, name: str, values: NDArray[np.float32]) -> Value:
        key = f"{name}:{hashlib.sha256(values.tobytes()).hexdigest()[:_DIGITS]}"
        self.layout.named(key, Blob(values.nbytes, values=values))
        return Value(values.shape, constant=key)

    def subtract(self, x: Value, y: Value) -> Value:
        return self._binary(xnn.XNNSubtract, x, y)

    def multiply(self, x: Value, y: Value) -> Value:
        return self._binary(xnn.XNNMultiply, x, y)

    def minimum(self, x: Value, y: Value) -> Value:
        return self._binary(xnn.XNNMinimum, x, y)

    def rsqrt(self, x: Value) -> Value:
        return self._node(xnn.XNNReciprocalSquareRoot, x, x.shape)

    def sigmoid(self, x: Value) -> Value:
        return self._node(xnn.XNNSigmoid, x, x.shape)

    def tanh(self, x: Value) -> Value:
        return self._node(xnn.XNNTanh, x, x.shape)

    def softmax(self, x: Value) -> Value:
        return self._node(xnn.XNNSoftmax, x, x.shape)

    def mean(self, x: Value) -> Value:
        size = x.shape[-1]
        share = self.constant(f"mean.{size}", np.full((1, size), 1 / size, np.float32))
        number, graph, out = self._number(x), self._graph(), (*x.shape[:-1], 1)
        self._tally.add("aten::linear", True, size, 4 * size if size not in self._means else 0)
        self._means.add(size)
        return Value(out, graph, graph.linear(number, self._number(share), None, out))

    def matmul(self, x: Value, y: Value) -> Value:
        shape = (*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        return self._binary(
            xnn.XNNBatchMatrixMultiply, x, y, shape, math.prod(shape) * x.shape[-1] // self.chunk
        )

    def concat(self, values: Sequence[Value]) -> Value:
        shape = (*values[0].shape[:-1], sum(value.shape[-1] for value in values))
        numbers, graph = [self._number(value) for value in values], self._graph()
        self._tally.add("aten::cat", True)
        return Value(shape, graph, graph.concat(numbers, shape))

    def slice(self, x: Value, start: int, stop: int) -> Value:
        whole = [0] * (len(x.shape) - 1)  # as a size: all there is
        attributes = {"num_dims": len(x.shape), "offsets": [*whole, start], "sizes": [*whole, stop - start]}
        return self._node(xnn.XNNStaticSlice, x, (*x.shape[:-1], stop - start), **attributes)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        new = [0 if size == REST else size for size in shape]  # 0: what the others leave
        after = tuple(shape_after(shape, x.shape))
        return self._node(xnn.XNNStaticReshape, x, after, num_dims=len(new), new_shape=new)

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        shape = tuple(x.shape[i] for i in order)
        return self._node(xnn.XNNStaticTranspose, x, shape, num_dims=len(order), perm=list(order))

    # positions

    def rope_table(self, name: str, table: NDArray[np.float32]) -> Value:
        rows, columns = table.shape
        return self._rows(name, table.reshape(rows, 1, columns), self._position, self.chunk)

    def positions(self, of: str) -> Value:
        return self.reshape(self._positions(of), [REST, 1] if of == "queries" else [1, REST])

    def _positions(self, of: str) -> Value:
        """`positions`, in one dimension."""
        start, most = (
            (self._position, self.chunk) if of == "queries" else (self.method.whole(0), self.context)
        )
        return self._rows(of, np.arange(self.context, dtype=np.float32), start, most)

    def _rows(self, name: str, table: NDArray[np.float32], start: int, most: int) -> Value:
        """Rows of a constant table from `start` to this run's last position, at most `most` of them."""
        if name not in self._taken:
            self._taken[name] = out = Value((most, *table.shape[1:]))
            buffer = self.layout.constant(Blob(table.nbytes, values=table))
            method = self.method
            constant = method.constant(ScalarType.FLOAT, table.shape, buffer)
            arguments = [constant, method.whole(0), start, self._end, method.whole(1)]
            self._kernel("aten::slice_copy", "Tensor_out", arguments, out)
        return self._taken[name]

    def _seen(self, cache: Value) -> Value:
        """The rows of a cache that are written."""
        out, method = Value(cache.shape), self.method
        arguments = [self._tensor(cache), method.whole(1), method.whole(0), self._end, method.whole(1)]
        self._kernel("aten::slice_copy", "Tensor_out", arguments, out)
        return out

    def _swap_pairs(self, x: Value) -> Value:
        """(a, b, c, d, ...) -> (b, a, d, c, ...) in the last dimension.

        The embedding's kernel takes the upper half of a byte first, XNNPACK the lower: with its inputs swapped,
        the head reads the embedding's own bytes.
        """
        size = x.shape[-1]
        pairs = self.reshape(x, [1, REST, size // 2, 2])
        return self.reshape(self.concat([self.slice(pairs, 1, 2), self.slice(pairs, 0, 1)]), [1, REST, size])

    # where values are

    def _graph(self) -> XnnGraph:
        """The delegate that is being built: a new one after a kernel."""
        if self._open is None:
            self._open = XnnGraph(self.method.delegate(BACKEND))
            self.graphs.append(self._open)
        return self._open

    def _number(self, x: Value) -> int:
        """A value's number in the open delegate, which takes it as an input if it comes from elsewhere."""
        graph = self._graph()
        if x.constant:
            return graph.constant(x.constant, x.shape)
        if x.graph is graph:
            return x.number
        return graph.input(self._tensor(x), x.shape)

    def _tensor(self, x: Value) -> int:
        """The program's tensor that holds a value; the delegate that computes it gives it away."""
        if x.tensor is None:
            x.tensor = self.method.tensor(x.shape)
        if x.graph is not None:
            x.graph.output(x.number, x.tensor)
        return x.tensor

    def _held(self, x: Value) -> int:
        """The tensor of a value that a kernel reads next: the delegate that computes it ends here."""
        self._open = None
        return self._tensor(x)

    def _kernel(
        self,
        name: str,
        overload: str,
        arguments: list[int],
        out: Value,
        macs: int = 0,
        weight_bytes: int = 0,
    ) -> None:
        self._open = None
        result = self._tensor(out)
        self.method.kernel(name, overload, [*arguments, result, result])
        self._tally.add(name, False, macs, weight_bytes)

    def _node(self, kind: Any, x: Value, shape: tuple[int, ...], **attributes: Any) -> Value:
        number, graph = self._number(x), self._graph()
        self._tally.add(f"xnnpack::{kind.__name__}", True)
        return Value(shape, graph, graph.unary(kind, number, shape, **attributes))

    def _binary(
        self, kind: Any, x: Value, y: Value, shape: tuple[int, ...] | None = None, macs: int = 0
    ) -> Value:
        shape = shape or np.broadcast_shapes(x.shape, y.shape)
        a, b, graph = self._number(x), self._number(y), self._graph()
        self._tally.add(f"xnnpack::{kind.__name__}", True, macs)
        return Value(shape, graph, graph.binary(kind, a, b, shape))

    def residency(self) -> Residency:
        """What XNNPACK computes of one token at the context's end; kernels of ExecuTorch compute the rest."""
        return self._tally.residency("xnnpack")


def write_executorch(
    arch: Architecture,
    weights: Weights,
    context: int,
    folder: Path,
    methods: Mapping[str, int | bool | Sequence[int]],
    name: str = PROGRAM,
) -> tuple[EntryPoint, Residency]:
    """Write the program into `folder`; returns its one entry point, and what XNNPACK computes of it.

    `methods`: what constant methods return. Memory is bounded by the largest weight (quantized) and the
    program without weights, time by reading the checkpoint once.
    """
    ops = XnnpackOps(arch, weights, context)
    ops.method.outputs.append(ops._held(decoder(ops, arch, ops.tokens)))
    for graph in ops.graphs:
        graph.connect()
    constants = [constant_method(method, value) for method, value in methods.items()]
    program = schema.Program(
        version=EXECUTORCH_SCHEMA_VERSION,
        execution_plan=[ops.method.finish(), *constants],
        constant_buffer=[],
        backend_delegate_data=[],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(0, []),
        named_data=[],
    )
    payloads = ops.layout.place(program, [len(graph.serialize()) for graph in ops.graphs])
    names: dict[str, str] = {}
    with PteWriter(folder / name, program, ops.layout.size) as writer:
        for offset, blob in ops.layout.given():
            writer.write(offset, blob)
        for weight in (weight for weight, _ in arch.matrices()):
            tensor = weights.matrix(weight)
            for offset, part in ops.layout.parts(weight):
                writer.write(offset, _part(tensor, part))
            key = f"{weight}:{tensor.digest()[:_DIGITS]}"
            names |= {_unread(weight) + suffix: key + suffix for suffix in ("", ".scales")}
        rename_data(program, names)
        for offset, graph in zip(payloads, ops.graphs, strict=True):
            graph.rename(names)
            writer.write(offset, np.frombuffer(graph.serialize(), np.uint8))
        writer.finish(program)
    return _entry_point(arch, ops.chunk, name), ops.residency()


def _entry_point(arch: Architecture, chunk: int, name: str) -> EntryPoint:
    return EntryPoint(
        name=METHOD,
        file=name,
        inputs=(
            TensorSpec(name="tokens", dtype="int64", shape=(1, f"length <= {chunk}")),
            TensorSpec(name="start_pos", dtype="int64", shape=(1,)),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 1, arch.vocab)),),
    )


def _unread(weight: str) -> str:
    """A matrix's key before its hash is known; as long as the final one.

    Keys hold a hash of the weights since XNNPACK's cache of packed weights, which all programs of a process
    share, goes by them.
    """
    return f"{weight}:{'.' * _DIGITS}"


def _part(tensor: QuantizedTensor, part: str) -> NDArray[Any]:
    """What is stored of a weight: see `exporter.quantization.tensor` for what it is made from."""
    if part == "data":  # XNNPACK: 4 bits as they are, 8 bits signed
        return tensor.data ^ 0x80 if tensor.scheme.bits == 8 else tensor.data
    if part == "swapped":
        return (tensor.data << 4) | (tensor.data >> 4)
    assert tensor.scales is not None
    if part == "float scales":
        return tensor.scales
    return (tensor.scales.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, exactly
