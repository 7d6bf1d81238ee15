"""Import a heavy library, or say in one line which extra brings it."""

import importlib
import importlib.util
import os
from types import ModuleType

from runtimes.errors import MissingExtra
from runtimes.quiet import quiet

# ONNX Runtime's official builds collect usage events, from 1.32 on under Linux too, and send them to Microsoft unless
# told not to before they start (Privacy.md in its package).
_NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "1")


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which `pip install 'gochu[extra]'` brings; MissingExtra if it is not installed.

    An installed module that fails to import for a reason of its own raises that reason, not MissingExtra. What it
    says while it is imported is kept off the screen, and what it would tell its maker is not told.
    """
    if module.startswith("onnxruntime"):
        os.environ.setdefault(*_NO_TELEMETRY)
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise _missing(root, extra) from None


def installed(module: str) -> bool:
    """Whether `module` is installed; it is not imported yet."""
    return importlib.util.find_spec(module) is not None


def check(module: str, extra: str) -> None:
    """MissingExtra if `module` is not installed."""
    if not installed(module):
        raise _missing(module, extra)


def _missing(module: str, extra: str) -> MissingExtra:
    return MissingExtra(f"{module} is not installed; install it with `pip install 'gochu[{extra}]'`")
