"""A matrix on a Ray cluster: each cell is a Ray task, which starts the cell's process where the task is.

A machine says what it can measure by custom resources: `gochu-machine` is a place for targets without a limit of their
own (and for exports), `gochu-adb` a place on a phone that is connected to it:

    ray start --address=HEAD:6379 --resources='{"gochu-machine": 1, "gochu-adb": 2}'

Those numbers are the limits there, machine by machine; `local` starts a cluster on this machine alone with the limits
of the matrix. Every machine needs the same Gochu, and the bundles under the same path (a shared folder): a cell looks
at the manifest's checksum before it measures. Rows come back to the one process that writes them, so a task that Ray
runs again, because its worker died, neither loses a row nor doubles one.
"""

import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.errors import TargetError, UsageError
from runtimes.extras import require
from runtimes.matrix_cell import STOPPED, Outcome, Stop, Task, perform
from runtimes.quiet import quiet

WORKER_RETRIES = 3  # of a task whose worker died
_TICK, _ANSWER = 0.2, 5.0  # s
_MEMORY = 100 * 2**20  # bytes for objects of a local cluster: rows are small
_ADDRESS = re.compile(r"(?P<host>[^\s/]+):(?P<port>\d{1,5})")
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # RFC 9113, 3.4
_SETTINGS = 4  # the frame type that a server of HTTP/2, and so of gRPC, answers with


def resource(pool: str) -> str:
    """The custom resource of which a task of a pool takes one."""
    return f"gochu-{pool}"


class Cluster:
    """Tasks on a Ray cluster, until the block ends; TargetError if it cannot be reached or lacks a pool's resource."""

    def __init__(self, address: str, limits: Mapping[str, int], pools: set[str]) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if address != "local" and _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
        self._ray: Any = require("ray", "ray")
        self._address = address
        self._connect(limits)
        try:
            for pool in sorted(pools):
                self._check(pool)
        except BaseException:
            self._ray.shutdown()
            raise
        self._perform = self._ray.remote(_perform)

    def _connect(self, limits: Mapping[str, int]) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._address == "local":
            resources = {resource(pool): limit for pool, limit in limits.items()}
            options |= {"include_dashboard": False, "object_store_memory": _MEMORY, "resources": resources}
        elif self._address != "auto":
            _greet(self._address)
        said: list[str] = []
        try:
            with quiet(stdout=True) as said:
                self._ray.init(address=self._address, **options)
        except Exception as error:  # Ray raises what it likes: ConnectionError, RuntimeError, ValueError, ...
            if any("InvalidAuthToken" in line for line in said):
                raise TargetError(
                    f"the Ray cluster {self._address} does not take this token: set RAY_AUTH_TOKEN to the "
                    "cluster's, or put it into ~/.ray/auth_token"
                ) from None
            raise TargetError(
                f"the Ray cluster {self._address} cannot be used ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); start one with `ray start --head`, or take --ray local"
            ) from None

    def _check(self, pool: str) -> None:
        if self.room(pool) < 1:
            raise TargetError(
                f"no machine of the Ray cluster {self._address} has the resource {resource(pool)}: start the one that "
                f"should measure with ray start --resources='{{\"{resource(pool)}\": 1}}'"
            )

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        with quiet():
            self._ray.shutdown()

    def room(self, pool: str) -> int:
        """Places of a pool on all machines that are there now."""
        return int(self._ray.cluster_resources().get(resource(pool), 0))

    def submit(self, task: Task) -> Any:
        """Start a task; Ray places it."""
        options = {"num_cpus": 0, "max_retries": WORKER_RETRIES, "resources": {resource(task.pool): 1}}
        return self._perform.options(name=task.label, **options).remote(task.model_dump_json())

    def wait(self, running: Sequence[Any]) -> list[Any]:
        """Those that have ended, after a moment at most."""
        if not running:
            time.sleep(_TICK)
            return []
        ended: list[Any] = self._ray.wait(running, timeout=_TICK)[0]
        return ended

    def outcome(self, ended: Any, task: Task) -> Outcome:
        """What came of a task, or how Ray lost it."""
        errors = self._ray.exceptions
        try:
            return Outcome.model_validate_json(self._ray.get(ended))
        except errors.TaskCancelledError:
            return Outcome(id=task.id, error="it was stopped", exit_code=STOPPED)
        except errors.RayTaskError as error:
            said = str(error.cause).partition(". ")[0]
            sentence = f"a Ray worker cannot run Gochu ({said}): install the same Gochu on every machine"
        except errors.RayError as error:
            said = " ".join(str(error).split())[:200]
            sentence = f"Ray lost it, after {WORKER_RETRIES} retries ({type(error).__name__}: {said})"
        return Outcome(id=task.id, error=sentence, exit_code=TargetError.exit_code)

    def stop(self, running: Sequence[Any], at_once: bool) -> None:
        """Cancel tasks: their workers interrupt the cells and give them time to end, or are killed with them."""
        for task in running:
            self._ray.cancel(task, force=at_once)


def _has_token() -> bool:
    """Whether there is a token for Ray's clusters (https://docs.ray.io/en/latest/ray-security/token-auth.html)."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def _perform(task: str) -> str:
    """The Ray task."""
    return perform(Task.model_validate_json(task), Stop()).model_dump_json()


def _greet(address: str) -> None:
    """Raise unless something that speaks Ray's protocol listens: Ray itself would try for a quarter of an hour."""
    match = _ADDRESS.fullmatch(address)
    if not match or not 0 < int(match["port"]) < 2**16:
        raise UsageError(f"{address!r} is no address of a Ray cluster; say local, auto, or HOST:6379")
    try:
        with socket.create_connection((match["host"], int(match["port"])), timeout=_ANSWER) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_HELLO)
            frame = connection.recv(9)
    except OSError as error:
        raise TargetError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): start one with `ray start --head`, or "
            "take --ray local"
        ) from None
    if len(frame) < 4 or frame[3] != _SETTINGS:
        raise TargetError(
            f"what answers at {address} is no Ray cluster: give the address that `ray start` printed"
        )
