"""What targets on device farms share: waiting for a run, its limits, stopping it, and secrets that are never shown.

A farm's target uploads an app and the bundle, has the farm run them on phones, and reads measurements from the logs
(`runtimes.measurement_line`). A run costs money while it lasts, so it is cancelled when its time is up or when the user
stops; and it has an id, with which a later command goes on waiting for it.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from runtimes.errors import GochuError, TargetError, UsageError

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0  # s between two questions
TRIES = 5  # of a request that the farm failed to answer


@dataclass(frozen=True)
class Limits:
    """What a run may take: minutes until it is cancelled, and minutes of all its devices together."""

    minutes: float = 30.0
    device_minutes: float = 120.0

    def check(self, devices: Sequence[str]) -> None:
        """UsageError if devices may take more than is allowed, before anything is spent."""
        if self.minutes <= 0:
            raise UsageError(
                f"a run of {self.minutes:g} minutes measures nothing: allow some with max_minutes"
            )
        most = self.minutes * len(devices)
        if most > self.device_minutes:
            raise UsageError(
                f"{len(devices)} devices for up to {self.minutes:g} minutes each are {most:g} device minutes, and "
                f"{self.device_minutes:g} are allowed: name fewer devices, lower max_minutes, or raise "
                "max_device_minutes"
            )

    def within(self, longest: float, what: str) -> "Limits":
        """These, if a farm allows so many minutes; UsageError if not. `what`: what it ends then, in its words."""
        if self.minutes > longest:
            raise UsageError(
                f"{what} after {longest:g} minutes: lower max_minutes, or take a smaller workload"
            )
        return self


@dataclass
class Clock:
    """Time, so that a test need not wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def wait(
    ask: Callable[[], T | None],
    what: str,
    limits: Limits,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda what: None,
    fate: str = "was cancelled: allow more with max_minutes",
) -> T:
    """Ask again and again, at growing intervals, until there is an answer; TargetError when the time is up.

    `fate`: what becomes of it then, and what to do.
    """
    clock = clock or Clock()
    start, pause = clock.now(), FIRST_WAIT
    while (answer := ask()) is None:
        spent = clock.now() - start
        if spent >= 60 * limits.minutes:
            raise TargetError(f"{what} was not done after {limits.minutes:g} minutes and {fate}")
        progress(f"{what}: {spent / 60:.0f} of at most {limits.minutes:g} minutes")
        clock.sleep(min(pause, 60 * limits.minutes - spent))
        pause = min(1.5 * pause, LONGEST_WAIT)
    return answer


def retried(
    request: Callable[[], T], transient: Callable[[Exception], bool], clock: Clock | None = None
) -> T:
    """What a request gives; one that fails in a way that passes (a 5xx, a lost connection) is tried again, later each
    time. What does not pass is raised at once, and what has not passed after the last try."""
    clock = clock or Clock()
    for attempt in range(TRIES):
        try:
            return request()
        except Exception as error:
            if attempt == TRIES - 1 or not transient(error):
                raise
        clock.sleep(2**attempt * (1 + random.random()) / 2)
    raise AssertionError("the last try returns or raises")


@contextmanager
def cancelling(cancel: Callable[[], None], run: str) -> Iterator[None]:
    """Cancel a run if the block does not come to its end, by Ctrl-C or an error: it would go on costing money."""
    try:
        yield
    except BaseException:
        try:
            cancel()
        except Exception as error:  # the first error is what the user must see
            why = str(error) if isinstance(error, GochuError) else type(error).__name__
            said = f"could not be cancelled ({why}): do it on the farm's web page"
        else:
            said = "was cancelled"
        print(f"gochu: run {run} {said}", file=sys.stderr)
        raise


def without(text: str, secrets: Sequence[str | None]) -> str:
    """A text with each secret in it replaced: a farm's error may repeat what it was sent."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "[secret]")
    return text
