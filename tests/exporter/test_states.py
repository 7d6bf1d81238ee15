"""Hidden states cross from layer to layer through a file as they are."""

import pytest
import torch

from exporter.quantization import states


@pytest.mark.parametrize(
    ("lengths", "together", "sizes"),
    [
        ([5, 5, 5, 3, 3, 5], 10, [(2, 5), (1, 5), (2, 3), (1, 5)]),  # in order: what is apart stays apart
        ([5, 5], 4, [(1, 5), (1, 5)]),  # one at a time, however long
        ([1], 1024, [(1, 1)]),
        ([], 8, []),
    ],
)
def test_batches_are_read_as_they_were_written(lengths, together, sizes, monkeypatch, tmp_path):
    monkeypatch.setattr(states, "TOKENS", together)
    sequences = [torch.randn(length, 6) for length in lengths]
    states.write(tmp_path / "상태.f32", sequences)
    if lengths:
        found = list(states.read(tmp_path / "상태.f32", 6, lengths))
        assert [batch.shape[:2] for batch in found] == sizes
        assert torch.equal(torch.cat([x.flatten(0, 1) for x in found]), torch.cat(sequences))
        found[0].zero_()  # is a copy
        assert torch.equal(next(states.read(tmp_path / "상태.f32", 6, lengths))[0], sequences[0])
    places = [place for some in states.batches(lengths) for place in range(len(lengths))[some]]
    assert places == list(range(len(lengths)))
