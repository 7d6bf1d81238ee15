"""Keep off the user's screen what libraries say about themselves."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Take what is written to standard error, by native code too, and drop warnings.

    The list holds the lines when the block has ended, for an error's reason.
    """
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file,
        warnings.catch_warnings(),
        redirect_stderr(file),  # Python's own is another one in a notebook
    ):
        warnings.simplefilter("ignore")
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            file.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()
