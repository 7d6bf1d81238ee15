"""Run a Core ML program operation by operation in torch, on any machine's CPU.

>>> evaluator = Evaluator(open_package(Path("model.mlpackage")))       # doctest: +SKIP
>>> evaluator.run("decode", {"input_ids": ids, "position": position})["logits"]   # doctest: +SKIP

What is assumed about float16, since Apple does not say how its processors round: an operation on float16 values
computes in float32, inside it nothing is rounded (sums of products, softmax, variances), and its result is rounded
once to the dtype that the program declares; compressed weights are rounded to it before they multiply. Others report
just that of the Neural Engine: products, convolutions and normalization accumulate wider than float16, activations
are right to half a step (https://ane-guide.readthedocs.io, Numerics; measured on the M1). A GPU accumulates in
float32 unless MLModelConfiguration.allowLowPrecisionAccumulationOnGPU is set. Of softmax no report is known. A
processor that keeps parts in float16, flushes numbers below 2^-14 to zero, or fuses operations gives slightly other
numbers. What passes 65504 becomes infinite, as it would there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from runtimes.errors import BundleError, UsageError
from runtimes.mil.compiler import REFUSALS, Compiled, Refused, Shared, fits
from runtimes.mil.package import Function, Operation, Package
from runtimes.mil.weights import TORCH, Budget

CACHE_BYTES = 2 << 30  # of decompressed weights: a model of a billion parameters in float16


class Evaluator:
    """The functions of a package, and the states that they share; states are zero at first.

    `exact`: do not round to float16 (weights stay what they are), which tells rounding from a mistake. `cache`: bytes
    of decompressed weights to keep; what does not fit is decompressed for each use. Raises BundleError if the program
    has an operation, or a use of one, that is not known here.
    """

    def __init__(
        self, package: Package, *, threads: int = 1, exact: bool = False, cache: int = CACHE_BYTES
    ) -> None:
        self._path, self._threads = package.path, threads
        self._shared = Shared(TORCH | {"fp16": torch.float32} if exact else TORCH, Budget(cache))
        self._functions: dict[str, Compiled] = {}
        for name, function in package.functions.items():
            self._declare(function)
            try:
                self._functions[name] = Compiled(function, self._shared)
            except Refused as refused:
                raise self._refusal(name, refused.operation, refused.__cause__) from None
            if missing := [output for output, slot in self._functions[name].outputs.items() if slot < 0]:
                raise self._damaged(f"nothing gives the output {missing[0]} of the function {name}")

    @torch.inference_mode()
    def run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, the caller's own, in the dtypes that the function declares (float32 for float16 if exact).

        UsageError if there is no such function or the inputs are not those it declares; BundleError if an operation
        cannot be computed on its values.
        """
        compiled = self._functions.get(function)
        if compiled is None:
            raise UsageError(
                f"{self._path.name} has no function {function!r}: it has {', '.join(self._functions)}"
            )
        if set(inputs) != set(compiled.inputs):
            raise UsageError(
                f"the function {function} takes {', '.join(compiled.inputs)}; it was given {', '.join(inputs)}"
            )
        slots = compiled.start({name: self._input(compiled, name, value) for name, value in inputs.items()})
        with _threads(self._threads):
            for step in compiled.steps:
                try:
                    step.run(slots)
                except REFUSALS as error:
                    raise self._refusal(function, step.operation, error) from None
                for slot in step.frees:
                    slots[slot] = None
        return {name: slots[slot].clone().numpy() for name, slot in compiled.outputs.items()}

    def _input(self, compiled: Compiled, name: str, given: np.ndarray) -> Tensor:
        kind = compiled.inputs[name]
        value = torch.from_numpy(np.array(given)).to(self._shared.dtypes[kind.dtype.name])
        if not fits(value, kind.shape):
            raise UsageError(f"the input {name} must be {list(kind.shape)}; it is {list(value.shape)}")
        return value

    def _declare(self, function: Function) -> None:
        for name, kind in function.inputs.items():
            if kind.dtype.name not in TORCH:
                raise self._damaged(f"the input {name} of the function {function.name} is {kind.dtype.name}")
        for name, kind in function.states.items():
            sizes = [size for size in kind.shape if size is not None]
            if len(sizes) != len(kind.shape) or not kind.dtype.floating:
                raise self._damaged(f"the state {name} is {kind.dtype.name} {list(kind.shape)}")
            try:
                fresh = torch.zeros(sizes, dtype=self._shared.dtypes[kind.dtype.name])
            except RuntimeError:
                raise self._damaged(f"there is no memory for the state {name}, {sizes}") from None
            if self._shared.states.setdefault(name, fresh).shape != fresh.shape:
                raise self._damaged(f"the state {name} has another shape in the function {function.name}")

    def _refusal(self, function: str, operation: Operation, error: BaseException | None) -> BundleError:
        why = str(error.args[0] if error and error.args else error)[:200]
        return self._damaged(
            f"the operation {operation.type} {operation.name!r} of the function {function} cannot be evaluated ({why})"
        )

    def _damaged(self, why: str) -> BundleError:
        return BundleError(f"{self._path}: {' '.join(why.split())}; export the bundle again")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's threads are the process's: another user of it finds its own number again."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
