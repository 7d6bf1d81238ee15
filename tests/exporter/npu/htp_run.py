"""Compile graphs for the Hexagon NPU and run them in Qualcomm's simulator, in a process of its own: it may crash.

python htp_run.py SOC ARCH JOB.npz: `graph` (path) and the inputs of each call, `0.hidden`, ...; writes the outputs of
each call to JOB.out.npz, and prints what onnxruntime assigned where as JSON. Without calls it only compiles.
"""

import json
import sys
from collections import Counter

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn

soc, arch, job = sys.argv[1:]
with np.load(job) as file:
    arrays = dict(file)
ort.register_execution_provider_library("QNNExecutionProvider", qnn.get_library_path())
devices = [device for device in ort.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
options = ort.SessionOptions()
options.log_severity_level = 3
options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
chip = {"backend_path": qnn.get_qnn_htp_path(), "soc_model": soc, "htp_arch": arch}
options.add_provider_for_devices(devices, chip)
session = ort.InferenceSession(str(arrays.pop("graph")), options)
assigned = {
    part.ep_name: Counter(node.op_type for node in part.get_nodes())
    for part in session.get_provider_graph_assignment_info()
}
names = [output.name for output in session.get_outputs()]
results = {}
for call in sorted({int(key.partition(".")[0]) for key in arrays}):
    given = {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith(f"{call}.")}
    results |= {f"{call}.{name}": array for name, array in zip(names, session.run(names, given), strict=True)}
np.savez(f"{job}.out.npz", **results)
print("\n" + json.dumps(assigned))
