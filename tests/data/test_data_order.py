import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litdiffusion.data.data_order import DataOrder

sizes = st.integers(1, 60)
seeds = st.integers(-(2**40), 2**40)


@given(sizes, seeds, st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_images: int, seed: int, epoch: int) -> None:
    order = DataOrder(num_images, seed)
    seen = order.at(epoch * num_images, (epoch + 1) * num_images)
    assert sorted(seen.tolist()) == list(range(num_images))


@given(sizes, seeds, st.integers(0, 40), st.integers(1, 200))
def test_batches_are_full_and_concatenate_to_the_stream(
    n: int, seed: int, step: int, batch_size: int
) -> None:
    """Also where a batch straddles epochs, or is several times the data set."""
    order = DataOrder(n, seed)
    two = torch.cat([order.batch(s, batch_size, 0, batch_size) for s in (step, step + 1)])
    assert len(two) == 2 * batch_size
    one_by_one = [order.permutation(p // n)[p % n] for p in range(step * batch_size, (step + 2) * batch_size)]
    assert two.tolist() == [int(index) for index in one_by_one]


@given(sizes, seeds, st.integers(0, 40), st.integers(1, 8), st.integers(1, 8))
def test_the_shares_of_the_ranks_make_the_global_batch(
    n: int, seed: int, step: int, world_size: int, share: int
) -> None:
    batch_size = world_size * share
    whole = DataOrder(n, seed).batch(step, batch_size, 0, batch_size)
    shares = [
        DataOrder(n, seed).batch(step, batch_size, rank * share, (rank + 1) * share)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(shares), whole)


@given(sizes, seeds, st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 50))
def test_the_past_does_not_matter(n: int, seed: int, steps: list[int], batch_size: int) -> None:
    """Visiting steps in any order, back and forth, gives what a fresh object gives: the cache is only a cache."""
    order = DataOrder(n, seed)
    for step in steps:
        fresh = DataOrder(n, seed).batch(step, batch_size, 0, batch_size)
        assert torch.equal(order.batch(step, batch_size, 0, batch_size), fresh)


def test_epochs_and_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    order = DataOrder(1000, seed=0)
    first, second = order.at(0, 1000), order.at(1000, 2000)
    assert torch.equal(torch.rand(3), expected)
    for other in (second, DataOrder(1000, seed=1).at(0, 1000)):
        assert (first == other).float().mean() < 0.02  # unrelated permutations agree in one place on average


def test_an_empty_range_is_empty_and_an_empty_set_is_refused() -> None:
    assert DataOrder(5, 0).at(7, 7).tolist() == []
    with pytest.raises(ValueError, match="at least 1"):
        DataOrder(0, 0)
