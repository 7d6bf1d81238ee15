"""Counting what an accelerator computes, and refusing what it must not leave."""

import pytest

from exporter.errors import GateFailed
from exporter.residency import Tally, heavy_elsewhere, require_resident


def tally(*elsewhere: str) -> Tally:
    """Three products on the accelerator, and some operations elsewhere."""
    counted = Tally()
    for _ in range(3):
        counted.add("aten::linear", on=True, macs=100, weight_bytes=50)
    for op in elsewhere:
        counted.add(op, on=False, macs=7, weight_bytes=2)
    return counted


def test_a_tally_adds_up():
    found = tally("aten::slice_copy", "llama::custom_sdpa", "aten::slice_copy").residency("gpu")
    assert found.accelerator == "gpu"
    assert (found.ops, found.ops_on) == (6, 3)
    assert (found.macs, found.macs_on) == (321, 300)
    assert (found.weight_bytes, found.weight_bytes_on) == (156, 150)
    assert found.elsewhere == ("aten::slice_copy", "llama::custom_sdpa")
    assert found.elsewhere_ops == (2, 1)


def test_light_operations_elsewhere_pass():
    found = tally("aten::slice_copy", "llama::custom_sdpa", "quantized_decomposed::embedding_4bit")
    require_resident(found.residency("gpu"))


@pytest.mark.parametrize("op", ["aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::convolution"])
def test_a_product_elsewhere_fails_the_gate(op):
    found = tally("aten::slice_copy", op, op).residency("gpu")
    assert heavy_elsewhere(found) == {op: 2}
    with pytest.raises(GateFailed, match=f"gpu leaves 2 {op} to portable kernels") as failed:
        require_resident(found)
    assert failed.value.exit_code == 4
