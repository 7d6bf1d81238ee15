"""A target that costs nothing, as a package of somebody else's, for the tests of matrices.

It notes each call beside itself (`calls`), and what it says depends on what it was asked alone.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

from runtimes.errors import TargetError
from runtimes.measurement import Answer, Measurement, Method, Place, Subject, sampled

HERE = Path(__file__).parent


class Row:
    """A row of another schema."""

    def model_dump(self, mode: str) -> dict[str, int]:
        return {"schema_version": 1}


def measure(bundle, workload, *, water: int = 1, trouble: str = "", variant: str | None = None):
    with (HERE / "calls").open("a") as file:
        file.write(f"{os.getpid()} {os.getppid()} {trouble} {time.monotonic()}\n")
    if trouble == "cold":
        raise TargetError("주전자가 차갑다: plug it in")
    if trouble == "crash":
        os.kill(os.getpid(), 9)
    if trouble == "once" and not (HERE / "warm").exists():
        (HERE / "warm").touch()
        raise TargetError("the kettle is cold: plug it in")
    if trouble == "talk":
        os.write(1, b"steam, and no JSON")
        print("steam", file=sys.stderr)
    while trouble == "hold" and not (HERE / "go").exists():
        time.sleep(0.02)
    if trouble == "old":
        return [Row()]
    if trouble == "nap":
        time.sleep(0.2)
    said = hashlib.sha256(f"{water} {workload.name} {variant}".encode()).digest()
    return [
        Measurement(
            what=Subject(model="tea", bundle="0" * 64, variant="v", format="leaf", scheme="int4", bytes=1),
            where=Place(target="kettle", device=f"주전자 {water}", os="none", engine="steam 1"),
            how=Method(
                workload=workload.name,
                prompt_tokens=case.prompt_tokens,
                new_tokens=case.new_tokens,
                context=1,
                warmup=1,
                repeats=1,
            ),
            figures=(sampled("ttft", "s", [time.monotonic()]),),
            marks=("interrupted",) if trouble == "interrupted" else (),
            answers=tuple(Answer(prompt=p, text="", tokens=tuple(said)) for p in workload.prompts),
            command="gochu bench tea --on kettle",
            time="2026-01-01T00:00:00+00:00",
        )
        for case in workload.cases[: 0 if trouble == "nothing" else None]
    ]
