"""Other projects' quantizers, each in an environment of its own, on the same checkpoint and calibration sequences.

What they find comes back as a checkpoint whose matrices are what their integers stand for, so that one ruler measures
all. The environments lie in a cache and are made once, by pip from the versions pinned in peer_requirements/.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import run_or_stop

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "peer_requirements"
PEERS = ("llm-compressor", "auto-round")
CACHE = Path.home() / ".cache" / "gochu" / "peers"


@dataclass(frozen=True)
class Found:
    """What a peer made of one task: a checkpoint in float32, the seconds of quantizing alone, package versions."""

    checkpoint: Path
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """Symmetric integers of so many bits, in groups along the inputs; None is a scale for each output.

    `repeats`: of which the quickest counts; `dtype`: what the model computes in, "auto" is the checkpoint's.
    """

    bits: int
    group: int | None
    repeats: int = 1
    dtype: str = "float32"


def environment(peer: str) -> Path:
    """The Python of a peer's environment, which is made where it is missing or its requirements changed."""
    wanted, folder = REQUIREMENTS / f"{peer}.txt", CACHE / peer
    python, made_of = folder / "bin" / "python", folder / "requirements.txt"
    if not made_of.is_file() or made_of.read_bytes() != wanted.read_bytes():
        print(f"installing {peer} into {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(wanted)], check=True)
        shutil.copy(wanted, made_of)  # last: tells a finished environment from a broken-off one
    return python


def quantize(
    peer: str,
    checkpoint: Path,
    sequences: Sequence[Sequence[int]],
    tasks: Sequence[Task],
    work: Path,
    threads: int,
) -> list[Found]:
    """What `peer` makes of the layers' matrices of `checkpoint`, task by task, in one process with so many threads.

    The sequences have one length: auto-round takes no others. `work` is left with what is found.
    """
    outputs, said = _run(peer, checkpoint, sequences, tasks, work, threads)
    return [
        Found(merged(checkpoint, file, work / file.stem), answer["seconds"], answer["versions"])
        for file, answer in zip(outputs, said, strict=True)
    ]


def seconds(
    peer: str, checkpoint: Path, sequences: Sequence[Sequence[int]], task: Task, work: Path, threads: int
) -> float:
    """How long a peer's quantizing takes; what it finds is thrown away."""
    (output,), (said,) = _run(peer, checkpoint, sequences, [task], work, threads)
    output.unlink()
    return float(said["seconds"])


def _run(
    peer: str,
    checkpoint: Path,
    sequences: Sequence[Sequence[int]],
    tasks: Sequence[Task],
    work: Path,
    threads: int,
) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files that the worker wrote, and what it said of each."""
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "sequences.npy", np.array(sequences, np.int64))
    outputs = [work / f"{peer}-{place}.safetensors" for place, _ in enumerate(tasks)]
    job = {
        "peer": peer,
        "checkpoint": str(checkpoint),
        "sequences": str(work / "sequences.npy"),
        "tasks": [vars(task) | {"output": str(file)} for task, file in zip(tasks, outputs, strict=True)],
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [str(environment(peer)), str(HERE / "peer_worker.py"), str(work / "job.json")]
    run = run_or_stop(command, {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"})
    return outputs, read_answers(run.stdout, len(tasks))


def read_answers(printed: str, tasks: int) -> list[dict[str, Any]]:
    """The worker's lines of JSON among what its library printed; SystemExit if there are not as many as tasks."""
    lines = [line for line in printed.splitlines() if line.startswith('{"output"')]
    if len(lines) != tasks:
        raise SystemExit(f"the worker answered {len(lines)} of {tasks} tasks:\n{printed[-2000:]}")
    return [json.loads(line) for line in lines]


def merged(checkpoint: Path, found: Path, folder: Path) -> Path:
    """A copy of a checkpoint (of one file) in float32 with the matrices of `found` in place of its own."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    tensors, others = load_file(checkpoint / "model.safetensors"), load_file(found)
    if unknown := others.keys() - tensors.keys():
        raise SystemExit(f"{found} has {min(unknown)}, which is not in {checkpoint}")
    state = {name: others.get(name, tensor).float().contiguous() for name, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
