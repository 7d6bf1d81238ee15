"""Errors of what makes a bundle.

GochuError (profiles/errors.py)
├── CheckpointError             exit 3: the checkpoint is damaged, incomplete or unsafe
│   └── UnsupportedArchitecture exit 3: a model that the decoder does not describe
├── RecipeError                 exit 3: a recipe or scheme that cannot be followed
├── PlanRefused                 exit 3: the model cannot fit or run on the device as asked
├── OutputError                 exit 3: the output could not be written (disk full, ...)
├── OutputExists                exit 2: there is something at the output path already
└── GateFailed                  exit 4: the export does not say what the original says
"""

from profiles.errors import GochuError, MissingExtra, UsageError

__all__ = [
    "CheckpointError",
    "GateFailed",
    "GochuError",
    "MissingExtra",
    "OutputError",
    "OutputExists",
    "PlanRefused",
    "RecipeError",
    "UnsupportedArchitecture",
    "UsageError",
]


class CheckpointError(GochuError):
    """The checkpoint is damaged, incomplete or unsafe to read."""


class UnsupportedArchitecture(CheckpointError):
    """The model is of a kind that the decoder does not describe."""


class RecipeError(GochuError):
    """A recipe or scheme that cannot be followed."""


class PlanRefused(GochuError):
    """The model cannot fit or run on the device as asked; the message names what would.

    `rule`: the id of the rule that forbids it, in exporter/rules.toml, which the message ends with; "" if none does.
    `needed`: bytes of memory that it would take, where that is what forbids it.
    """

    def __init__(self, message: str, rule: str = "", needed: float | None = None) -> None:
        super().__init__(f"{message} [{rule}]" if rule else message)
        self.rule, self.needed = rule, needed


class OutputError(GochuError):
    """The output could not be written."""


class OutputExists(UsageError):
    """There is something at the output path already."""


class GateFailed(GochuError):
    """The exported model does not say what the original says; the message says which check failed."""

    exit_code = 4
