"""Compile the first of the graphs that a model is split into for the NPU: predicted and real size of its binary.

The checkpoint holds the layers of that graph and one more, with random weights: the rest would only take disk.

    python benchmarks/hexagon_parts.py SHAPE CHIP CONTEXT FOLDER
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from random_checkpoint import CONFIGS, write_checkpoint

from exporter import export
from exporter.architecture import read_architecture
from exporter.formats.onnx import DATA, GRAPH
from exporter.formats.onnx_static import write_static
from exporter.formats.onnx_weights import OnnxWeights
from exporter.npu import hexagon
from exporter.npu.hexagon_plan import Wishes
from exporter.plan import make_plan


def main() -> None:
    shape, chip, context, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    arch = read_architecture(CONFIGS[shape])
    plan = make_plan(arch, delegate="hexagon", wishes=Wishes((chip,)), scheme="int4", context=context)
    assert plan.compilation
    schemes = {name: decision.scheme for name, decision in plan.decisions.items()}
    first = plan.compilation.parts[0]
    config = CONFIGS[shape] | {"num_hidden_layers": first.stop + 1}
    checkpoint, out = write_checkpoint(folder / "checkpoint", config), folder / "out"
    bundle = export(checkpoint, out, format="onnx", scheme="int4", context=context, verify=False, force=True)
    cut = read_architecture(config)
    parts = (first, range(first.stop, first.stop + 1))
    entries = write_static(cut, OnnxWeights(out / GRAPH), context, bundle.path, parts=parts)
    wanted = [entry for entry in entries if entry.name.endswith(".0")]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        (result,) = hexagon.compile_graphs(wanted, [DATA], plan.compilation.chips, bundle.path)
    size = sum((bundle.path / name).stat().st_size for name in result.files if name.endswith(".bin"))
    figures = {
        "shape": shape,
        "parts": len(plan.compilation.parts),
        "layers": len(first),
        "predicted bytes": hexagon.binary_bytes(arch, schemes, first, head=False),
        "binary bytes": size,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
