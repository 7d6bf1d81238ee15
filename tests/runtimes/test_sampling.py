"""Sampling: the same candidates and probabilities as transformers, and what each setting promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runtimes.errors import EngineError, UsageError
from runtimes.sampling import Sampler, Sampling

LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def by_transformers(sampling: Sampling, logits: np.ndarray, history: list[int]) -> np.ndarray:
    """Probabilities [vocab] after transformers' processors, in the order of its `generate`."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    import torch

    chain = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(transformers.MinPLogitsWarper(sampling.min_p))
    scores = chain(torch.tensor([history], dtype=torch.long), torch.tensor(logits)[None].double())
    return scores[0].softmax(-1).numpy()


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=0.7, top_k=50),
    Sampling(temperature=1.0, top_k=100_000),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, repetition_penalty=0.8),
    Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_same_probabilities_as_transformers(sampling: Sampling) -> None:
    random = np.random.default_rng(1)
    for spread in (0.1, 1, 2, 4, 8):  # from nearly even to nearly certain
        logits = (spread * random.standard_normal(3000)).astype(np.float32)
        history = random.integers(0, 3000, 60).tolist()
        tokens, probabilities = Sampler(sampling).distribution(logits, history)
        ours = np.zeros(3000)
        ours[tokens] = probabilities
        theirs = by_transformers(sampling, logits, history)
        assert set(np.flatnonzero(theirs)) == set(tokens)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_ties_at_the_edge_of_top_k_stay_as_in_transformers() -> None:
    logits = np.array([3, 1, 1, 1, 0], np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    tokens, _ = Sampler(sampling).distribution(logits)
    assert set(tokens) == {0, 1, 2, 3} == set(np.flatnonzero(by_transformers(sampling, logits, [0])))


@given(logits=LOGITS)
def test_greedy_takes_the_largest(logits: np.ndarray) -> None:
    assert logits[Sampler(Sampling()).pick(logits)] == logits.max()


def test_greedy_heeds_the_repetition_penalty() -> None:
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    assert Sampler(Sampling()).pick(logits, [0]) == 0
    assert Sampler(Sampling(repetition_penalty=2.0)).pick(logits, [0]) == 1
    assert logits.tolist() == [2.0, 1.5, -1.0], "the caller's logits are left alone"


@given(
    logits=LOGITS,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_what_is_picked_may_be_picked(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    tokens, probabilities = Sampler(sampling).distribution(logits)
    assert probabilities.sum() == pytest.approx(1)
    assert (probabilities > 0).all()
    assert probabilities.min() >= min_p * probabilities.max() * (1 - 1e-9)
    assert logits[tokens].max() == pytest.approx(logits.max(), abs=1e-9), "the likeliest, or its equal"
    assert Sampler(sampling).pick(logits) in tokens
    assert Sampler(sampling).pick(logits) == Sampler(sampling).pick(logits), "the same seed, the same choice"


def test_picks_are_as_frequent_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    counts = np.bincount([sampler.pick(logits) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.01)


def test_a_token_that_is_ruled_out_is_never_picked() -> None:
    logits = np.full(8, -np.inf, np.float32)
    logits[[2, 5]] = 0
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    assert {sampler.pick(logits) for _ in range(50)} == {2, 5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "bad", [[0.0, float("nan"), 1.0], [float("nan")] * 3, [float("-inf")] * 3, [0, float("inf"), 0]]
)
def test_logits_that_are_no_numbers_are_an_error(temperature: float, bad: list[float]) -> None:
    with pytest.raises(EngineError, match="as a logit"):
        Sampler(Sampling(temperature=temperature)).pick(np.array(bad, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}, but it has to be"):
        Sampling(**{name: value})
