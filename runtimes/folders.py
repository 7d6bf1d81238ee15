"""Where Gochu keeps what it can make again."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for Gochu; RuntimeError if the user has no home.

    XDG_CACHE_HOME goes before the system's own place (https://specifications.freedesktop.org/basedir-spec).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the specification says to ignore it then
        cache = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return cache / "gochu"
