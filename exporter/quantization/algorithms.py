"""The registry of algorithms: how integers and tables are found, by name, and what each one needs to know."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from exporter.checkpoint import Matrix
from exporter.errors import RecipeError
from exporter.quantization.hqq import quantize_hqq
from exporter.quantization.palettize import quantize_kmeans
from exporter.quantization.rtn import Quantized, quantize_absmax, quantize_mse
from exporter.quantization.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Algorithm:
    """How weights become integers or tables, in one of three ways: by a function of the weights alone; by one that is
    also given the Hessian of their inputs on a calibration text, float32 [inputs, inputs] (see
    `quantization.streaming`), and gives a note on what it could not do as usual; or by training all such weights
    together on that text (see `quantization.qat`), from what the algorithm `trained_from` finds. `reason` is for the
    plan."""

    reason: str
    from_weights: Callable[[Matrix, Scheme], Quantized] | None = None
    from_hessian: Callable[[Matrix, Scheme, "Tensor"], tuple[Quantized, str]] | None = None
    trained_from: str = ""

    @property
    def needs_text(self) -> bool:
        """Whether the model has to run on a calibration text."""
        return self.from_weights is None


def _gptq(
    matrix: Matrix, scheme: Scheme, hessian: "Tensor", *, act_order: bool = False, sweeps: int = 0
) -> tuple[Quantized, str]:
    from exporter.quantization.gptq import quantize_gptq  # here: what follows a Hessian needs torch

    return quantize_gptq(matrix, scheme, hessian, act_order=act_order, sweeps=sweeps)


def _clip(matrix: Matrix, scheme: Scheme, hessian: "Tensor") -> tuple[Quantized, str]:
    from exporter.quantization.clip import quantize_clip

    return quantize_clip(matrix, scheme, hessian)


def _kmeans_hessian(matrix: Matrix, scheme: Scheme, hessian: "Tensor") -> tuple[Quantized, str]:
    from exporter.quantization.hessian import importance

    return quantize_kmeans(matrix, scheme, importance(matrix.name, hessian)), ""


DEFAULT = "rtn"
SWEEPS = 3  # of gptq-descent: more lower the error on the calibration text, and no longer that on another
ALGORITHMS = {
    DEFAULT: Algorithm("the nearest integers, at the scales of least squared error", quantize_mse),
    "rtn-absmax": Algorithm(
        "the nearest integers, at scales that the largest weight sets: the quickest", quantize_absmax
    ),
    "hqq": Algorithm(
        "the nearest integers, at scales for an error in which outliers count less (HQQ, Badri and Shaji 2023)",
        quantize_hqq,
    ),
    "clip": Algorithm(
        "the nearest integers, at the scales of least error on the calibration text's activations, group by group (as "
        "AWQ clips, Lin et al. 2023, arXiv 2306.00978)",
        from_hessian=_clip,
    ),
    "gptq": Algorithm(
        "each weight's rounding error is made up for by those rounded after it, as the calibration text's activations "
        "weigh them (Frantar et al. 2022, arXiv 2210.17323)",
        from_hessian=_gptq,
    ),
    "gptq-act-order": Algorithm(
        "GPTQ (Frantar et al. 2022, arXiv 2210.17323) that rounds the weights of the largest activations first, at "
        "scales found before",
        from_hessian=partial(_gptq, act_order=True),
    ),
    "gptq-descent": Algorithm(
        "gptq-act-order, and then each weight and scale in turn is chosen anew for what the others have left, as in "
        "QuantEase (Behdin et al. 2023, arXiv 2309.01885): the least error, and the slowest",
        from_hessian=partial(_gptq, act_order=True, sweeps=SWEEPS),
    ),
    "qat": Algorithm(
        "gptq-descent's integers and scales, trained together so that the model's predictions on the calibration text "
        "come as near to the float model's as they can: gradients go straight through the rounding (Bengio et al. "
        "2013, arXiv 1308.3432), the float model is the teacher (Hinton et al. 2015, arXiv 1503.02531)",
        trained_from="gptq-descent",
    ),
}
TABLE_DEFAULT = "kmeans"
TABLE_ALGORITHMS = {
    TABLE_DEFAULT: Algorithm(
        "tables of nearly the least squared error, which is what the default means for lookup tables",
        quantize_kmeans,
    ),
    "kmeans-hessian": Algorithm(
        "tables of nearly the least squared error, each weight counting as much as its input's activations on the "
        "calibration text (as in SqueezeLLM, Kim et al. 2023, arXiv 2306.07629)",
        from_hessian=_kmeans_hessian,
    ),
}


def resolve_algorithm(name: str, scheme: Scheme) -> str:
    """What the algorithm asked for means to a scheme: the default is another for lookup tables.

    RecipeError for a name that there is not, or that finds no such weights.
    """
    name = TABLE_DEFAULT if scheme.table and name == DEFAULT else name
    found = find_algorithm(name, scheme)
    return DEFAULT if scheme.is_float and found.needs_text else name  # floats are only converted


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
