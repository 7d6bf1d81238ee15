"""One token through a bundle's graph for the NPU: in the simulator, and the same graph by the CPU's kernels.

python benchmarks/hexagon_step.py BUNDLE
"""

import json
import sys

import numpy as np

from runtimes.bundle import Bundle
from runtimes.engines import open_engine


def main() -> None:
    bundle = Bundle.open(sys.argv[1])
    token = bundle.manifest.model.vocab // 3
    ours = open_engine(bundle, on="htp-simulator").decode(token)
    theirs = open_engine(bundle, on="htp-simulator", exact=True).decode(token)
    exact = open_engine(bundle, exact=True).decode(token)  # the CPU's variant, activations not rounded
    figures = {
        "correlation": float(np.corrcoef(ours, theirs)[0, 1]),
        "same": float(ours.argmax() == theirs.argmax()),
        "with float": float(np.corrcoef(ours, exact)[0, 1]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
