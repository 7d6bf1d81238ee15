"""What makes a bundle.

>>> import exporter                                                                # doctest: +SKIP
>>> exporter.export("pepper", "out/", device="Galaxy S24 Ultra").manifest.gate     # doctest: +SKIP

Names are imported when they are first used, so `import exporter` itself loads no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint, open_checkpoint
    from exporter.gate import verify
    from exporter.pipeline import export
    from exporter.plan import Plan, make_plan
    from exporter.quantization.recipe import Recipe, read_recipe

_HOME = {
    "Checkpoint": "checkpoint",
    "Plan": "plan",
    "Recipe": "quantization.recipe",
    "export": "pipeline",
    "make_plan": "plan",
    "open_checkpoint": "checkpoint",
    "read_recipe": "quantization.recipe",
    "verify": "gate",
}

__all__ = ["Checkpoint", "Plan", "Recipe", "export", "make_plan", "open_checkpoint", "read_recipe", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    return getattr(importlib.import_module(f"exporter.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
