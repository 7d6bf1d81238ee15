"""What runs and measures a bundle.

>>> import runtimes                                                    # doctest: +SKIP
>>> model = runtimes.load("out/")                                      # doctest: +SKIP
>>> model.generate("3 + 4 = ?").text                                   # doctest: +SKIP
'7'

Names are imported when they are first used, so `import runtimes` itself loads no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.bundle import Bundle, Manifest
    from runtimes.engines import Engine, open_engine
    from runtimes.generate import Chat, Generation, Model, load
    from runtimes.measurement import Measurement
    from runtimes.sampling import Sampling
    from runtimes.targets.host import measure
    from runtimes.tokenizer import Tokenizer
    from runtimes.workload import Workload

_HOME = {
    "Bundle": "bundle",
    "Chat": "generate",
    "Engine": "engines",
    "Generation": "generate",
    "Manifest": "bundle",
    "Measurement": "measurement",
    "Model": "generate",
    "Sampling": "sampling",
    "Tokenizer": "tokenizer",
    "Workload": "workload",
    "load": "generate",
    "measure": "targets.host",
    "open_engine": "engines",
}

__all__ = [
    "Bundle",
    "Chat",
    "Engine",
    "Generation",
    "Manifest",
    "Measurement",
    "Model",
    "Sampling",
    "Tokenizer",
    "Workload",
    "load",
    "measure",
    "open_engine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtimes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"runtimes.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
