"""The registry of algorithms: how integers are found, by name.

An algorithm is a function (Matrix, Scheme) -> (QuantizedTensor, relative squared error, largest error).
"""

from collections.abc import Callable

from exporter.checkpoint import Matrix
from exporter.errors import RecipeError
from exporter.quantization.rtn import quantize_absmax, quantize_mse
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor

Algorithm = Callable[[Matrix, Scheme], tuple[QuantizedTensor, float, float]]

ALGORITHMS: dict[str, Algorithm] = {"rtn": quantize_mse, "rtn-absmax": quantize_absmax}


def find_algorithm(name: str) -> Algorithm:
    """An algorithm by its name; RecipeError names those there are."""
    if name not in ALGORITHMS:
        raise RecipeError(f"there is no algorithm {name!r}: use one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
