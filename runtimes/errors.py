"""Errors of what runs and measures a bundle.

GochuError (profiles/errors.py)
├── BundleError             exit 3: not a bundle, or one that is damaged
│   ├── ChecksumError       exit 3: a file's bytes are not those that were exported
│   └── UnsafePath          exit 3: a manifest's path leaves its folder
├── PromptError             exit 3: the prompt cannot be used (empty, longer than the context)
├── TemplateError           exit 3: the chat template fails or asks for what the sandbox forbids
├── ResultsError            exit 3: a file of measurements that cannot be read or written
├── Regressed               exit 4: a figure became worse than a comparison allows
├── EngineError             exit 6: the engine failed while it loaded or ran the model
└── TargetError             exit 6: the target could not measure (no such machine, no phone, a tool of its failed)
    └── SomeFailed          exit 6: some devices measured, and others did not
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from profiles.errors import GochuError, MissingExtra, UsageError

if TYPE_CHECKING:
    from runtimes.measurement import Measurement

__all__ = [
    "BundleError",
    "ChecksumError",
    "EngineError",
    "GochuError",
    "MissingExtra",
    "PromptError",
    "Regressed",
    "ResultsError",
    "SomeFailed",
    "TargetError",
    "TemplateError",
    "UnsafePath",
    "UsageError",
]


class BundleError(GochuError):
    """The folder is not a bundle, or its manifest does not hold together."""


class ChecksumError(BundleError):
    """A file of the bundle has changed since it was exported."""


class UnsafePath(BundleError):
    """A path in the manifest points outside the bundle's folder."""


class PromptError(GochuError):
    """The prompt cannot be run: empty, or longer than the context."""


class TemplateError(GochuError):
    """The chat template is malformed, refuses the messages, or was stopped by the sandbox."""


class ResultsError(GochuError):
    """A file of measurements cannot be read, written, or does not hold what it should."""


class Regressed(GochuError):
    """A figure became worse by more than the threshold of a comparison."""

    exit_code = 4


class EngineError(GochuError):
    """The engine could not load or run the model."""

    exit_code = 6


class TargetError(GochuError):
    """A target could not measure: it is not this machine, no phone answers, or a tool of its failed."""

    exit_code = 6


class SomeFailed(TargetError):
    """Of several devices that were asked, some did not measure. What the others did is in `measured`."""

    def __init__(self, message: str, measured: "Sequence[Measurement]") -> None:
        super().__init__(message)
        self.measured = tuple(measured)
