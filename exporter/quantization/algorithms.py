"""The registry of algorithms: how integers and tables are found, by name.

An algorithm is a function (Matrix, Scheme) -> (QuantizedTensor, relative squared error, largest error).
"""

from collections.abc import Callable

from exporter.checkpoint import Matrix
from exporter.errors import RecipeError
from exporter.quantization.palettize import quantize_kmeans
from exporter.quantization.rtn import quantize_absmax, quantize_mse
from exporter.quantization.scheme import Scheme
from exporter.quantization.tensor import QuantizedTensor

Algorithm = Callable[[Matrix, Scheme], tuple[QuantizedTensor, float, float]]

DEFAULT = "rtn"
ALGORITHMS: dict[str, Algorithm] = {DEFAULT: quantize_mse, "rtn-absmax": quantize_absmax}
TABLE_DEFAULT = "kmeans"
TABLE_ALGORITHMS: dict[str, Algorithm] = {TABLE_DEFAULT: quantize_kmeans}


def resolve_algorithm(name: str, scheme: Scheme) -> str:
    """What the algorithm asked for means to a scheme: the default is another for lookup tables.

    RecipeError for a name that there is not, or that finds no such weights.
    """
    name = TABLE_DEFAULT if scheme.table and name == DEFAULT else name
    find_algorithm(name, scheme)
    return name


def find_algorithm(name: str, scheme: Scheme) -> Algorithm:
    """An algorithm by its name; RecipeError names those that find what `scheme` asks for."""
    fitting, others = ALGORITHMS, TABLE_ALGORITHMS
    if scheme.table:
        fitting, others = others, fitting
    if name in fitting:
        return fitting[name]
    usable = ", ".join(fitting)
    if name in others:
        kind = "scales" if scheme.table else "lookup tables"
        raise RecipeError(f"{name} finds {kind}, and {scheme.name} has none: use one of {usable}")
    raise RecipeError(f"there is no algorithm {name!r}: use one of {usable}")
