"""Threads for work on weights: numpy and hashlib release the interpreter's lock."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def threads() -> ThreadPoolExecutor:
    """The pool that all share, a thread for each processor."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="weights")
