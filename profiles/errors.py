"""What can go wrong, for all of Gochu, from the root down.

GochuError                  exit 3: bad input
├── UsageError              exit 2: the call itself is wrong
├── MissingExtra            exit 5: a library or tool is not installed
├── ProfileError            exit 3: a profile file breaks the rules
├── UnknownDevice           exit 3: no profile by that name
├── UnknownModel            exit 3: no model of the catalogue by that name
├── AmbiguousDevice         exit 3: several phones answer to that name
├── (runtimes/errors.py)    bundles, engines
└── (exporter/errors.py)    checkpoints, plans, the gate

Each message is one sentence: what was found, why it is refused, what to do. The command line prints it
alone, without a traceback, and exits with `exit_code`.
"""


class GochuError(Exception):
    """Root of all errors that Gochu raises on purpose."""

    exit_code = 3


class UsageError(GochuError):
    """The command or function was called in a way that cannot work."""

    exit_code = 2


class MissingExtra(GochuError):
    """A library or tool that this step needs is not installed."""

    exit_code = 5


class ProfileError(GochuError):
    """A device or chip profile is malformed."""


class UnknownDevice(GochuError):
    """No profile answers to the name; the message lists near misses."""


class UnknownModel(GochuError):
    """No model of the catalogue answers to the name; the message lists near misses."""


class AmbiguousDevice(GochuError):
    """More than one profile answers to the name; the message asks which."""
