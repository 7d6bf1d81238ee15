"""What delegates compute of a program that executorch lowered, counted on its graphs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from exporter.residency import HEAVY, Tally
from runtimes.bundle import Residency

_ATTENTION = {  # name -> dimension of its keys [..., tokens, ...]
    "custom_sdpa": 1,
    "scaled_dot_product_attention": -2,
    "sdpa_with_kv_cache": 1,
}


def program_residency(
    program: Any, accelerator: str, backend: str, context: int, stored: Mapping[str, int]
) -> Residency:
    """What a lowered torch.export.ExportedProgram runs on `accelerator`, whose delegates are called `backend`.

    Counted for one token at the end of the context. `stored`: buffer -> bytes of it in the file, where that is
    not its size.
    """
    tally = Tally()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.higher_order.executorch_call_delegate:
            lowered = getattr(program.graph_module, node.args[0].target)
            _count(tally, lowered.original_module, lowered.backend_id == backend, context, stored)
    _count(tally, program, False, context, stored)
    return tally.residency(accelerator)


def _count(tally: Tally, program: Any, on: bool, context: int, stored: Mapping[str, int]) -> None:
    """Add the operations of one program that compute tensors, each with the constants that it is first to use."""
    signature = program.graph_signature
    constants = {
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
    }
    sizes = {
        node: stored.get(constants[node.name], _nbytes(node.meta["val"]))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in constants
    }
    for node in program.graph.nodes:
        if name := _operator(node):
            weight_bytes = sum(sizes.pop(used, 0) for used in node.all_input_nodes)
            tally.add(name, on, _macs(name, node, context), weight_bytes)


def _operator(node: Any) -> str:
    """namespace::name of an operator that computes a tensor, else ""."""
    values = node.meta.get("val")
    tensors = values if isinstance(values, tuple | list) else [values]
    if node.op != "call_function" or not any(isinstance(value, Tensor) for value in tensors):
        return ""
    target = node.target
    if getattr(target, "__name__", "").startswith(
        "auto_functionalized"
    ):  # what it stands for writes in place
        target = node.args[0]
    schema = getattr(target, "_schema", None)
    return schema.name if schema else ""


def _macs(name: str, node: Any, context: int) -> int:
    """Multiplications of two numbers, in products of matrices and attention."""
    kind = name.rpartition("::")[2]
    if kind in _ATTENTION:
        q, keys = (argument.meta["val"] for argument in node.args[:2])
        return 2 * _elements(q.shape, context) * _size(keys.shape[_ATTENTION[kind]], context)
    if kind not in HEAVY:
        return 0
    first = node.args[1 if kind in ("addmm", "baddbmm") else 0].meta["val"]
    return _elements(node.meta["val"].shape, context) * _size(first.shape[-1], context)


def _elements(shape: Sequence[Any], context: int) -> int:
    return math.prod(_size(size, context) for size in shape)


def _size(size: Any, context: int) -> int:
    """A size when one token is run at the last position: lengths are backed symbols, positions are not."""
    if isinstance(size, int):
        return size
    positions = free_unbacked_symbols(size)
    expression = size.node.expr
    values = {symbol: context - 1 if symbol in positions else 1 for symbol in expression.free_symbols}
    return int(expression.subs(values))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
