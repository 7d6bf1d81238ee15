"""Turn a function of a Core ML program into a list of closures: names, constants and parameters are settled once.

What a parameter is handed is said by its annotation in ops.py: a tensor, some integers, a weight of which only rows
are read, ...
"""

import inspect
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from runtimes.mil.ops import ARITHMETIC, MOVEMENT, WEIGHTS, Bools, Ints, Tensors
from runtimes.mil.package import Function, Name, Operation, TensorType, Value
from runtimes.mil.storage import Constant
from runtimes.mil.weights import TORCH, Budget, Computed, Kept, Stored, Weight, tensor, whole

# What torch and Python raise for values that an operation cannot take.
REFUSALS = (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError)

Slots = list[Any]  # the values of a call, by number; None when no step needs one any more
_Get = Callable[[Slots], Any]


class Refused(Exception):
    """An operation that cannot be compiled; `__cause__` says why."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation.name)
        self.operation = operation


@dataclass
class Shared:
    """What the functions of a package have in common. `dtypes`: torch's for what an operation declares."""

    dtypes: Mapping[str, torch.dtype]
    budget: Budget
    states: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[Hashable, Weight] = field(default_factory=dict)


@dataclass
class Step:
    """One operation: `run` reads and sets slots, those in `frees` are not needed after it."""

    operation: Operation
    run: Callable[[Slots], None]
    frees: tuple[int, ...] = ()


class Compiled:
    """A function, ready to run; Refused if one of its operations is unknown or misused."""

    def __init__(self, function: Function, shared: Shared) -> None:
        self.inputs, self._states, self._shared = function.inputs, function.states, shared
        self.steps: list[Step] = []
        self._fixed: dict[str, Value | Weight] = {}
        self._numbers = {name: number for number, name in enumerate(function.inputs)}
        self._reads: list[int] = []  # slots that the operation being compiled reads
        readers: dict[int, Step] = {}  # the last one of each slot
        for operation in function.operations:
            self._reads.clear()
            try:
                step = self._add(operation)
            except REFUSALS as error:
                raise Refused(operation) from error
            if step is not None:
                self.steps.append(step)
                readers |= dict.fromkeys(self._reads, step)
        self.outputs = {name: self._numbers.get(name, -1) for name in function.outputs}
        for slot, step in readers.items():
            if slot not in self.outputs.values():
                step.frees += (slot,)

    def start(self, inputs: Mapping[str, Tensor]) -> Slots:
        """The slots that a call begins with."""
        return [inputs.get(name) for name in self._numbers]

    def _add(self, operation: Operation) -> Step | None:
        """A step, or None for a constant."""
        if operation.type == "const":
            ((name, _),), (value,) = operation.outputs, operation.inputs["val"]
            self._fixed[name] = self._settled(value)
            return None
        if operation.type in WEIGHTS:
            ((name, kind),) = operation.outputs
            self._fixed[name] = self._weight(operation, kind)
            return None
        if operation.type == "read_state":
            return Step(operation, self._read_state(operation))
        if operation.type == "write_state":
            return Step(operation, self._write_state(operation))
        function = ARITHMETIC.get(operation.type) or MOVEMENT.get(operation.type)
        if function is None:
            raise KeyError("Gochu does not know it")
        call = self._call(function, operation)
        return Step(operation, partial(_run, call, self._results(operation)))

    def _call(self, function: Callable[..., Any], operation: Operation) -> _Get:
        """What computes the operation's results from the slots."""
        kinds = _kinds(function, operation.inputs)
        fixed: dict[str, Any] = {}
        moving: dict[str, _Get] = {}
        for parameter, bindings in operation.inputs.items():
            kind = kinds[parameter]
            if kind is Tensor and operation.type in ARITHMETIC:
                kind = _WIDENED
            if kind is Tensors:
                moving[parameter] = partial(_each, [self._argument(binding, Tensor) for binding in bindings])
                continue
            (binding,) = bindings
            argument = self._argument(binding, kind)
            if isinstance(argument, _Given):
                fixed[parameter] = argument.value
            else:
                moving[parameter] = argument
        return partial(_apply, partial(function, **fixed), tuple(moving.items()))

    def _argument(self, binding: Name | Value, kind: Any) -> _Get:
        """How an argument of that kind is got; `_Given` if it is the same in each call."""
        convert = _CONVERSIONS[kind]
        if isinstance(binding, Name) and binding.name in self._numbers:
            slot = self._numbers[binding.name]
            self._reads.append(slot)
            return lambda slots: convert(slots[slot])
        value = self._settled(binding)
        if isinstance(value, str) or kind is str:
            if not isinstance(value, str) or kind is not str:
                raise TypeError(f"{value} is no value for this parameter")
            return _Given(value)
        if kind is Weight:
            return _Given(_as_weight(value))
        if isinstance(value, Constant):
            return _Given(convert(tensor(value)))
        weight = value
        return lambda slots: convert(whole(weight))  # not kept here: the budget decides

    def _settled(self, binding: Name | Value) -> Value | Weight:
        """A value that is the same in each call."""
        if not isinstance(binding, Name):
            return binding
        if binding.name not in self._fixed:
            raise KeyError(f"nothing before it gives {binding.name}")
        return self._fixed[binding.name]

    def _weight(self, operation: Operation, kind: TensorType) -> Weight:
        """A weight to be decompressed; the same one for all functions that hold the same constants."""
        kinds = _kinds(WEIGHTS[operation.type], operation.inputs)
        arguments: dict[str, Any] = {}
        keys: list[Hashable] = [operation.type]
        for parameter, (binding,) in sorted(operation.inputs.items()):
            value = self._settled(binding)
            if isinstance(value, str):
                raise TypeError(f"{value!r} is no weight")
            keys += [parameter, value.key if isinstance(value, Constant) else id(value)]
            given = value.source if isinstance(value, Kept) else value  # of a chain, the last result is kept
            arguments[parameter] = (
                _as_weight(given)
                if kinds[parameter] is Weight
                else _CONVERSIONS[kinds[parameter]](_tensor(given))
            )
        key = tuple(keys)
        if key not in self._shared.weights:
            self._shared.weights[key] = Kept(WEIGHTS[operation.type](**arguments), self._shared.budget)
        weight = self._shared.weights[key]
        if weight.shape != kind.shape or weight.dtype != TORCH.get(kind.dtype.name):
            raise ValueError(f"it gives {weight.dtype} {list(weight.shape)}, not what it declares")
        return weight

    def _results(self, operation: Operation) -> tuple["_Result", ...]:
        """Where the results go, and what they must be."""
        return tuple(
            _Result(
                self._numbers.setdefault(name, len(self._numbers)),
                self._shared.dtypes[kind.dtype.name],
                kind.shape,
            )
            for name, kind in operation.outputs
        )

    def _state(self, operation: Operation) -> str:
        (binding,) = operation.inputs["input"]
        if not isinstance(binding, Name) or binding.name not in self._states:
            raise KeyError("its state is none of the function's")
        return binding.name

    def _read_state(self, operation: Operation) -> Callable[[Slots], None]:
        """A state's tensor itself: no operation changes a tensor in place, so it is as good as a copy."""
        name, states, results = self._state(operation), self._shared.states, self._results(operation)
        return partial(_run, lambda _: states[name], results)

    def _write_state(self, operation: Operation) -> Callable[[Slots], None]:
        name, states = self._state(operation), self._shared.states
        shape, dtype = tuple(states[name].shape), states[name].dtype
        (binding,) = operation.inputs["data"]
        get = self._argument(binding, Tensor)

        def run(slots: Slots) -> None:
            value = get(slots)
            if value.shape != shape:
                raise ValueError(f"a value {list(value.shape)} for a state {list(shape)}")
            states[name] = _rounded(value, dtype)

        return run


@dataclass(frozen=True)
class _Result:
    """A result's slot and declared type."""

    slot: int
    dtype: torch.dtype
    shape: tuple[int | None, ...]


class _Given:
    """An argument that is the same in each call."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, slots: Slots) -> Any:
        return self.value


def fits(value: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether a tensor has a shape, whose unknown dimensions are None."""
    return value.shape == shape or (
        len(value.shape) == len(shape)
        and all(wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True))
    )


def _run(call: _Get, results: Sequence[_Result], slots: Slots) -> None:
    """Compute an operation's results, round them to what it declares, and put them into their slots."""
    values = call(slots)
    if isinstance(values, Tensor):
        values = (values,)
    for value, result in zip(values, results, strict=True):
        if not fits(value, result.shape):
            raise ValueError(f"its result is {list(value.shape)} where it declares {list(result.shape)}")
        slots[result.slot] = _rounded(value, result.dtype)


def _apply(function: Callable[..., Any], arguments: Sequence[tuple[str, _Get]], slots: Slots) -> Any:
    return function(**{name: get(slots) for name, get in arguments})


def _each(gets: Sequence[_Get], slots: Slots) -> Tensors:
    return tuple(get(slots) for get in gets)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """To another width of the same kind of number; no integer becomes a float by the way."""
    if value.dtype == dtype:
        return value
    if (value.is_floating_point(), value.dtype == torch.bool) != (
        dtype.is_floating_point,
        dtype == torch.bool,
    ):
        raise ValueError(f"it gives {value.dtype} where it declares {dtype}")
    return value.to(dtype)


def _kinds(function: Callable[..., Any], inputs: Mapping[str, object]) -> dict[str, Any]:
    """What each parameter wants; TypeError if one is missing or unknown."""
    signature = inspect.signature(function)
    signature.bind(**dict.fromkeys(inputs))
    kinds = {}
    for name, parameter in signature.parameters.items():
        wanted = parameter.annotation
        if isinstance(wanted, types.UnionType):  # X | None
            wanted = get_args(wanted)[0]
        kinds[name] = Tensor if wanted is inspect.Parameter.empty else wanted
    return kinds


def _as_weight(value: Constant | Weight) -> Weight:
    return Stored(value) if isinstance(value, Constant) else value


def _tensor(value: Constant | Weight) -> Tensor:
    return tensor(value) if isinstance(value, Constant) else whole(value)


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float16 else value


_WIDENED = object()  # a tensor for arithmetic
_CONVERSIONS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor: lambda value: value,
    _WIDENED: _widen,
    Weight: Computed,
    Ints: lambda value: tuple(int(number) for number in value.reshape(-1).tolist()),
    Bools: lambda value: tuple(bool(number) for number in value.reshape(-1).tolist()),
    int: lambda value: int(value.item()),
    bool: lambda value: bool(value.item()),
    float: lambda value: float(value.item()),
    str: str,
}
