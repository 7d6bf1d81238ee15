"""Two parts of coremltools without the rest of it, whose import takes seconds and talks: protobuf, weight storage."""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from runtimes.errors import BundleError
from runtimes.extras import require

EXTRA = "coreml"
_PROTO = "runtimes.mil._proto"
_STORAGE = "coremltools.libmilstoragepython"


def schema(name: str) -> Any:
    """The module of protobuf classes `name` ("Model", "MIL", "FeatureTypes").

    The classes are those that coremltools itself has: protobuf keeps one for each message.
    """
    if _PROTO not in sys.modules:
        package = ModuleType(_PROTO)
        package.__path__ = [str(folder / "proto") for folder in _folders()]
        sys.modules[_PROTO] = package
    return importlib.import_module(f"{_PROTO}.{name}_pb2")


def blob_writer(path: Path) -> Any:
    """coremltools' writer of the weight file at `path`."""
    if _STORAGE not in sys.modules:
        finder = importlib.machinery.PathFinder()
        found = finder.find_spec("libmilstoragepython", [str(folder) for folder in _folders()])
        if found is None or found.origin is None:
            raise BundleError("coremltools is installed without its weight storage; install it again")
        spec = importlib.util.spec_from_file_location(_STORAGE, found.origin)
        if spec is None or spec.loader is None:
            raise BundleError(f"{found.origin} is no library of Python; install coremltools again")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[_STORAGE] = module  # where coremltools looks too: it can be loaded once
    return sys.modules[_STORAGE]._BlobStorageWriter(str(path))


def _folders() -> list[Path]:
    found = importlib.util.find_spec("coremltools")
    if found is None or not found.submodule_search_locations:
        require("coremltools", EXTRA)
        raise BundleError("coremltools is installed without its files; install it again")
    return [Path(folder) for folder in found.submodule_search_locations]
