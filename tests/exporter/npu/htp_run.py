"""Compile graphs for the Hexagon NPU and run them in Qualcomm's simulator, in a process of its own: it may crash.

python htp_run.py SOC ARCH JOB.npz: `graph` (path) and the inputs of each call, `0.hidden`, ...; writes the outputs of
each call to JOB.out.npz, and prints what onnxruntime assigned where as JSON. Without calls it only compiles.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from runtimes import qnn

soc, arch, job = sys.argv[1:]
with np.load(job) as file:
    arrays = dict(file)
session = qnn.open_session(Path(str(arrays.pop("graph"))), qnn.Chip(int(soc), f"v{arch}"), cpu_ops=False)
assigned: dict[str, Counter[str]] = {}
for node in qnn.nodes(session):
    assigned.setdefault(node.provider, Counter())[node.op] += 1
names = [output.name for output in session.get_outputs()]
results = {}
for call in sorted({int(key.partition(".")[0]) for key in arrays}):
    given = {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith(f"{call}.")}
    results |= {f"{call}.{name}": array for name, array in zip(names, session.run(names, given), strict=True)}
np.savez(f"{job}.out.npz", **results)
print("\n" + json.dumps(assigned))
