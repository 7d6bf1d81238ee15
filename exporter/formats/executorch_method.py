"""The method of an ExecuTorch program: values, instructions, and where in memory each tensor lies."""

import math
from collections.abc import Sequence
from typing import Any

from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType

ARENA = 1  # memory_id of what the program allocates; 0 stands for constants
_ALIGNMENT = 16  # bytes
_BYTES = {ScalarType.FLOAT: 4, ScalarType.LONG: 8, ScalarType.CHAR: 1, ScalarType.BYTE: 1}


class Method:
    """A method that is being written. Values are known by their index."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.delegates: list[str] = []  # backend of each
        self.calls: list[list[int]] = []  # arguments of each delegate, filled in by whoever makes it
        self._values: list[Any] = []
        self._instructions: list[Any] = []
        self._operators: dict[tuple[str, str], int] = {}
        self._planned: list[int] = []  # tensors that live from their first use to their last
        self._caches: list[int] = []  # tensors that live on

    def input(self, kind: ScalarType, shape: Sequence[int]) -> int:
        """A tensor that the caller owns."""
        self.inputs.append(self._tensor(kind, shape))
        return self.inputs[-1]

    def tensor(self, shape: Sequence[int]) -> int:
        """A float32 tensor that the program computes, of a shape up to this one."""
        self._planned.append(self._tensor(ScalarType.FLOAT, shape))
        return self._planned[-1]

    def cache(self, shape: Sequence[int]) -> int:
        """A float32 tensor that keeps its values from run to run."""
        self._caches.append(self._tensor(ScalarType.FLOAT, shape, dynamic=False))
        return self._caches[-1]

    def constant(self, kind: ScalarType, shape: Sequence[int], buffer: int) -> int:
        """A constant tensor; `buffer` is its data_buffer_idx."""
        return self._tensor(kind, shape, dynamic=False, buffer=buffer)

    def none(self) -> int:
        """An argument that is not given."""
        return self._add(schema.Null())

    def whole(self, value: int) -> int:
        """A whole number; an instruction may overwrite it."""
        return self._add(schema.Int(value))

    def real(self, value: float) -> int:
        """A float."""
        return self._add(schema.Double(value))

    def truth(self, value: bool) -> int:
        """A truth value."""
        return self._add(schema.Bool(value))

    def kernel(self, name: str, overload: str, arguments: Sequence[int]) -> None:
        """Append a call of an operator's kernel."""
        operator = self._operators.setdefault((name, overload), len(self._operators))
        self._instructions.append(schema.KernelCall(operator, list(arguments)))

    def delegate(self, backend: str) -> list[int]:
        """Append a call of a new delegate; returns the list that its arguments go into."""
        self.delegates.append(backend)
        self.calls.append([])
        self._instructions.append(schema.DelegateCall(len(self.delegates) - 1, self.calls[-1]))
        return self.calls[-1]

    def kernels(self) -> list[str]:
        """Names of the operators called, in order, once for each call."""
        names = {index: name for (name, _), index in self._operators.items()}
        return [names[i.op_index] for i in self._instructions if isinstance(i, schema.KernelCall)]

    def finish(self) -> Any:
        """The executorch ExecutionPlan; payloads of delegates are yet to be placed."""
        size = self._place()
        return schema.ExecutionPlan(
            name=self.name,
            container_meta_type=schema.ContainerMetadata("", ""),
            values=[schema.EValue(value) for value in self._values],
            inputs=self.inputs,
            outputs=self.outputs,
            chains=[schema.Chain([], [], [schema.Instruction(i) for i in self._instructions], None)],
            operators=[schema.Operator(*names) for names in self._operators],
            delegates=[
                schema.BackendDelegate(
                    id=backend,
                    processed=schema.BackendDelegateDataReference(schema.DataLocation.SEGMENT, 0),
                    compile_specs=[],
                )
                for backend in self.delegates
            ],
            non_const_buffer_sizes=[0, size],
        )

    def _place(self) -> int:
        """Give each tensor its place in the arena, tensors that are never alive together the same; its size.

        Largest first, each at the lowest offset that is free as long as it lives (greedy by size,
        arXiv:2001.03288). Outputs live to the end, caches for ever.
        """
        last: dict[int, int] = {value: len(self._instructions) for value in self.outputs}
        first: dict[int, int] = {}
        for time, instruction in enumerate(self._instructions):
            for value in instruction.args:
                first.setdefault(value, time)
                last[value] = max(last.get(value, 0), time)
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last
        for value in sorted(self._planned, key=self._size, reverse=True):
            born, dies, offset = first.get(value, 0), last.get(value, 0), 0
            for start, end, other_born, other_dies in sorted(placed):
                alive = born <= other_dies and other_born <= dies
                if alive and start < offset + self._size(value) and offset < end:
                    offset = end
            placed.append((offset, offset + self._size(value), born, dies))
            self._locate(value, offset)
        total = max((end for _, end, _, _ in placed), default=0)
        for value in self._caches:
            self._locate(value, total)
            total += self._size(value)
        return total

    def _locate(self, value: int, offset: int) -> None:
        low, high = offset & 0xFFFFFFFF, offset >> 32
        self._values[value].allocation_info = schema.AllocationDetails(ARENA, low, high)

    def _size(self, value: int) -> int:
        tensor = self._values[value]
        size = math.prod(tensor.sizes) * _BYTES[tensor.scalar_type]
        return size + -size % _ALIGNMENT

    def _tensor(self, kind: ScalarType, shape: Sequence[int], dynamic: bool = True, buffer: int = 0) -> int:
        dynamism = schema.TensorShapeDynamism.DYNAMIC_BOUND if dynamic else schema.TensorShapeDynamism.STATIC
        return self._add(
            schema.Tensor(
                scalar_type=kind,
                storage_offset=0,
                sizes=list(shape),
                dim_order=list(range(len(shape))),
                requires_grad=False,
                layout=0,
                data_buffer_idx=buffer,
                allocation_info=None,
                shape_dynamism=dynamism,
            )
        )

    def _add(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1


def constant_method(name: str, value: Any) -> Any:
    """An ExecutionPlan that returns a number or a list of them: what executorch calls a constant method."""
    kinds = {bool: schema.Bool, int: schema.Int, float: schema.Double}
    values = value if isinstance(value, (list, tuple)) else [value]
    return schema.ExecutionPlan(
        name=name,
        container_meta_type=schema.ContainerMetadata("", ""),
        values=[schema.EValue(kinds[type(each)](each)) for each in values],
        inputs=[],
        outputs=list(range(len(values))),
        chains=[schema.Chain([], [], [], None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )
