"""The registry of what may be done to float weights before they are quantized: no output changes, but what rounding
does to them.

A preparation turns weights as they are read (`quantization.rotation`), or finds scales on a calibration text, layer by
layer (`quantization.streaming`), which are folded in (`quantization.folding`). What quantizes weights sees a
`checkpoint.Source`, what writes formats sees quantized weights, and neither knows of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.architecture import Architecture
from exporter.checkpoint import Source
from exporter.errors import RecipeError
from exporter.quantization.folding import Linears, Scaled, Scales
from exporter.quantization.recipe import Decision, Recipe, calibrated
from exporter.quantization.rotation import Rotated, rotated_architecture, turns_stream
from exporter.quantization.scheme import Scheme
from exporter.quantization.smoothquant import smoothquant_scales

Find = Callable[[Linears], NDArray[np.float32] | None]


@dataclass(frozen=True)
class Preparation:
    """`reason` is for the plan, and `note` what it adds for an architecture (as it was) and what its weights become.

    Either `source` changes the weights as they are, and `architecture` says what the model is then; or `find` finds
    scales, of linears some of whose schemes are `of` that kind ("which have none" is what others are told), by their
    inputs' Hessian or by their peaks.
    """

    reason: str
    note: Callable[[Architecture, Mapping[str, Decision]], str] = lambda arch, decisions: ""
    source: Callable[[Source], Source] | None = None
    architecture: Callable[[Architecture], Architecture] = lambda arch: arch
    find: Find | None = None
    by_hessian: bool = False
    of: Callable[[Scheme], bool] = lambda scheme: True
    whom: str = ""


def _awq(linears: Linears) -> NDArray[np.float32] | None:
    from exporter.quantization.awq import awq_scales  # here: it needs torch

    return awq_scales(linears)


def _rotation_note(arch: Architecture, decisions: Mapping[str, Decision]) -> str:
    if not turns_stream(arch):
        return (
            f"only the heads' values are turned: {arch.family} normalises what attention and MLP give, and its "
            "residual stream cannot be"
        )
    if not arch.tied:
        return ""
    nbytes = decisions["head"].scheme.nbytes((arch.vocab, arch.hidden))
    return (
        "the final norm goes into the head, which then no longer is the embedding and is stored apart: "
        f"{nbytes / 1e6:.1f} MB more"
    )


PREPARATIONS = {
    "hadamard": Preparation(
        "weights and activations turned by random Hadamard matrices have no outliers that a scale must reach "
        "(QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; R1 and R2 of SpinQuant, arXiv 2405.16406)",
        note=_rotation_note,
        source=Rotated,
        architecture=rotated_architecture,
    ),
    "awq": Preparation(
        "weights of channels that the calibration text's activations use most are made larger, so that rounding costs "
        "them less (Lin et al. 2023, arXiv 2306.00978)",
        find=_awq,
        by_hessian=True,
        of=lambda scheme: scheme.is_integer,
        whom="weights that become integers",
    ),
    "smoothquant": Preparation(
        "outliers of the activations on the calibration text are shared with the weights, so that both can be rounded "
        "(Xiao et al. 2022, arXiv 2211.10438)",
        find=smoothquant_scales,
        of=lambda scheme: scheme.activations != "float32",
        whom="schemes that round activations (int8, int4, w8a16, w4a16)",
    ),
}


def prepared_architecture(arch: Architecture, names: Sequence[str]) -> Architecture:
    """Of the model after the preparations by these names; RecipeError for names that cannot be, or be together."""
    for name in names:
        if name not in PREPARATIONS:
            raise RecipeError(f"there is no preparation {name!r}: use one of {', '.join(PREPARATIONS)}")
    if len(set(names)) < len(names):
        raise RecipeError(f"prepare names {max(names, key=list(names).count)} twice: name it once")
    finding = [name for name in names if PREPARATIONS[name].find]
    if len(finding) > 1:
        raise RecipeError(f"{' and '.join(finding)} set the scales of the same channels: use one of them")
    for name in names:
        arch = PREPARATIONS[name].architecture(arch)
    return arch


def refuse_idle(names: Sequence[str], decisions: Mapping[str, Decision]) -> None:
    """RecipeError for a preparation that has nothing to work on."""
    for name in names:
        made = PREPARATIONS[name]
        layers = (each.scheme for weight, each in decisions.items() if weight.startswith("layers."))
        if not any(map(made.of, layers)):
            raise RecipeError(f"{name} is for {made.whom}, and no layer has any here: drop it")


def finder(names: Sequence[str]) -> Preparation | None:
    """That of the preparations which finds scales on a calibration text."""
    return next((PREPARATIONS[name] for name in names if PREPARATIONS[name].find), None)


def needs_text(recipe: Recipe, decisions: Mapping[str, Decision]) -> bool:
    """Whether weights, or scales that are folded into them, are found on a calibration text."""
    return bool(calibrated(decisions)) or finder(recipe.prepare) is not None


def prepared(source: Source, names: Sequence[str], scales: Scales | None = None) -> Source:
    """The source after those preparations that need no calibration text, which come before the others; then with
    `scales`, if others found some, folded in."""
    for name in names:
        if turn := PREPARATIONS[name].source:
            source = turn(source)
    return source if scales is None else Scaled(source, scales)
