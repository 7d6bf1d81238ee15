import numpy as np
import pytest
from export_coreml import ENGINE, LARGER, OURS, PEER, SEARCH, bounds


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning:coremltools.*")
def test_the_traced_function_says_what_transformers_says_token_by_token(tiny_checkpoint, tmp_path):
    pytest.importorskip("coremltools")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from coreml_tracer import convert, load

    from runtimes.mil.evaluator import Evaluator
    from runtimes.mil.package import open_package

    step = load(tiny_checkpoint, 16)
    convert(step).save(str(tmp_path / "model.mlpackage"))
    evaluator = Evaluator(open_package(tmp_path / "model.mlpackage"))
    tokens = torch.arange(8)[None] * 17 % 500
    with torch.no_grad():
        expected = step.model(tokens).logits[0].numpy()
    for at, token in enumerate(tokens[0].tolist()):
        seen = np.where(np.arange(16) <= at, 0, -1e4).astype(np.float16)[None, None, None]
        position, ids = np.array([at], np.int32), np.array([[token]], np.int32)
        found = evaluator.run("main", {"token": ids, "position": position, "mask": seen})["logits"]
        np.testing.assert_allclose(found[0, 0], expected[at], atol=2e-3 * np.ptp(expected))


def figures(**changes):
    ours = {"wall_s": 24, "peak_anon_bytes": 1.5e9}
    found = {PEER: {"wall_s": 100, "peak_anon_bytes": 8e9}, OURS: ours, SEARCH: ours, ENGINE: ours}
    found[LARGER] = {"wall_s": 50, "peak_anon_bytes": 2.9e9}
    return {name: figure | changes.get(name, {}) for name, figure in found.items()}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({OURS: {"wall_s": 26}}, [f"{OURS}: wall time over the trace route's"]),
        ({SEARCH: {"wall_s": 26}}, [f"{SEARCH}: wall time over the trace route's"]),
        ({SEARCH: {"peak_anon_bytes": 1.7e9}}, [f"{SEARCH}: peak memory over the trace route's"]),
        ({LARGER: {"peak_anon_bytes": 3.1e9}}, [f"{LARGER}: peak GB"]),
        ({ENGINE: {"wall_s": 99, "peak_anon_bytes": 7e9}}, []),
    ],
)
def test_each_bound_is_of_what_it_says(changes, missed):
    assert [bound.name for bound in bounds(figures(**changes)) if not bound.kept] == missed
