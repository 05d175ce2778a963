"""Which samples form which step, whose they are, and how they are cut: properties for any sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.order import SampleOrder, _permutation, deal, split
from teacher_cache.errors import ConfigError


@settings(max_examples=100, deadline=None)
@given(num_samples=st.integers(1, 60), size=st.integers(1, 60), epochs=st.integers(1, 3))
def test_every_epoch_is_a_permutation_whatever_the_batch_size(num_samples: int, size: int, epochs: int) -> None:
    size = min(size, num_samples)
    order = SampleOrder(num_samples=num_samples, global_batch_size=size, seed=7, stage="align")
    steps = -(-epochs * num_samples // size)
    batches = [order.step(step) for step in range(steps)]
    assert {len(batch) for batch in batches} == {size}
    stream = np.concatenate(batches)[: epochs * num_samples].reshape(epochs, num_samples)
    assert np.array_equal(np.sort(stream, axis=1), np.tile(np.arange(num_samples), (epochs, 1)))
    assert order.steps_per_epoch == -(-num_samples // size)


@settings(max_examples=50, deadline=None)
@given(num_samples=st.integers(2, 60), sizes=st.lists(st.integers(1, 60), min_size=2, max_size=2))
def test_the_batch_size_cuts_the_same_stream(num_samples: int, sizes: list[int]) -> None:
    def stream(size: int) -> list[int]:
        order = SampleOrder(num_samples=num_samples, global_batch_size=size, seed=1, stage="distill")
        steps = range(-(-2 * num_samples // size))
        return np.concatenate([order.step(step) for step in steps])[: 2 * num_samples].tolist()

    first, second = (stream(min(size, num_samples)) for size in sizes)
    assert first == second


def test_seed_stage_and_epoch_change_the_order() -> None:
    def batch(seed: int, stage: str, step: int = 0) -> list[int]:
        return SampleOrder(num_samples=50, global_batch_size=50, seed=seed, stage=stage).step(step).tolist()

    assert batch(0, "align") == batch(0, "align")
    orders = [batch(0, "align"), batch(1, "align"), batch(0, "distill"), batch(0, "align", step=1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_permutation_is_made_once_per_epoch() -> None:
    order = SampleOrder(num_samples=100, global_batch_size=7, seed=123, stage="align")
    _permutation.cache_clear()
    for step in range(43):  # three epochs and a sample
        order.step(step)
    assert _permutation.cache_info().misses == 4


def test_fewer_samples_than_a_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        SampleOrder(num_samples=3, global_batch_size=4, seed=0, stage="align")


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 5000), max_size=70), num_ranks=st.integers(1, 9), even_samples=st.booleans())
def test_shares_are_a_partition_of_near_even_tokens(lengths: list[int], num_ranks: int, even_samples: bool) -> None:
    given_lengths = np.array(lengths, dtype=np.int64)
    shares = deal(given_lengths, num_ranks=num_ranks, even_samples=even_samples)
    assert len(shares) == num_ranks
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))
    sizes = [len(share) for share in shares]
    assert not even_samples or max(sizes) - min(sizes) <= 1
    tokens = [int(given_lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert all(np.array_equal(share, np.sort(share)) for share in shares)


def test_dealing_by_length_is_much_more_even_than_dealing_in_order() -> None:
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, size=64 * 32).astype(np.int64)

    def spread(shares: list[np.ndarray]) -> float:
        tokens = np.array([lengths[share].sum() for share in shares])
        return float((tokens.max() - tokens.mean()) / tokens.mean())

    in_order = spread(np.split(np.arange(len(lengths)), 64))
    assert in_order > 0.3
    assert spread(deal(lengths, num_ranks=64, even_samples=True)) < 0.2
    assert spread(deal(lengths, num_ranks=64, even_samples=False)) < 0.01


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=30),
    most_samples=st.integers(1, 6),
    most_tokens=st.integers(1, 200),
)
def test_micro_batches_keep_to_both_limits_or_hold_one_sample(
    lengths: list[int], most_samples: int, most_tokens: int
) -> None:
    lengths = sorted(lengths, reverse=True)

    def tokens(start: int, stop: int) -> int:
        return (stop - start) * max(lengths[start:stop])

    parts = split(len(lengths), most_samples=most_samples, fits=lambda start, stop: tokens(start, stop) <= most_tokens)
    assert [index for part in parts for index in part] == list(range(len(lengths)))
    for part in parts:
        assert 1 <= len(part) <= most_samples
        assert len(part) == 1 or tokens(part.start, part.stop) <= most_tokens
    for part, after in itertools.pairwise(parts):
        # no sample was left to the next one that would have fitted
        assert len(part) == most_samples or tokens(part.start, after.start + 1) > most_tokens
