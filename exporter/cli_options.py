"""Options that several commands have, and how what is given with them is read."""

from typing import Annotated

import typer

PrepareOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME]",
        help="What is done to the float weights before: hadamard; awq or smoothquant (on a calibration text).",
    ),
]


def names(listed: str) -> tuple[str, ...]:
    """Names between commas.

    >>> names("hadamard, awq,")
    ('hadamard', 'awq')
    """
    return tuple(name.strip() for name in listed.split(",") if name.strip())
