"""Keep off the user's screen what libraries say about themselves."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def quiet(stdout: bool = False) -> Iterator[list[str]]:
    """Take what is written to standard error, by native code too, and drop warnings.

    The list holds the lines when the block has ended, for an error's reason. `stdout`: what is written to standard
    output below Python goes the same way.
    """
    lines: list[str] = []
    taken = (1, 2) if stdout else (2,)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in taken}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file,
        warnings.catch_warnings(),
        redirect_stderr(file),  # Python's own is another one in a notebook
    ):
        warnings.simplefilter("ignore")
        for number in taken:
            os.dup2(file.fileno(), number)
        try:
            yield lines
        finally:
            file.flush()
            for number, original in kept.items():
                os.dup2(original, number)
                os.close(original)
            file.seek(0)
            lines += file.read().splitlines()
