import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from litdiffusion.diffusion.timesteps import spread_times
from torch import Tensor

from litdiffusion.diffusion import ImportanceTimesteps, StratifiedTimesteps, UniformTimesteps

RULES = [UniformTimesteps(), StratifiedTimesteps()]


def experienced(losses: Tensor, history: int = 2) -> ImportanceTimesteps:
    """A rule that has met each time's loss ``history`` times."""
    rule = ImportanceTimesteps(len(losses), history)
    for _ in range(history):
        rule.observe(torch.arange(1, len(losses) + 1), losses)
    return rule


LARGEST_BELOW_1 = 1 - 2.0**-24
uniform_numbers = st.floats(0, LARGEST_BELOW_1, width=32)


def in_middle_of_slices(count: int) -> Tensor:
    """(k + 1/2) / count: one uniform number in each of ``count`` equal slices of [0, 1)."""
    return (torch.arange(count) + 0.5) / count


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@given(u=st.lists(uniform_numbers, min_size=1, max_size=8), num_steps=st.integers(1, 10**6), data=st.data())
def test_times_lie_within_the_schedule(rule, u, num_steps, data):
    batch_size = data.draw(st.integers(len(u), 4096))
    first = data.draw(st.integers(0, batch_size - len(u)))
    position = torch.arange(first, first + len(u))
    t = rule(torch.tensor(u), position, batch_size, num_steps)
    assert t.dtype == torch.int64
    assert int(t.min()) >= 1
    assert int(t.max()) <= num_steps


@pytest.mark.parametrize("num_steps", [1, 3, 300, 1000, 10**6])
def test_the_ends_of_the_uniform_numbers_are_the_ends_of_time(num_steps):
    u, position = torch.tensor([0.0, LARGEST_BELOW_1]), torch.arange(2)
    assert UniformTimesteps()(u, position, 2, num_steps).tolist() == [1, num_steps]


def test_uniform_times_are_equally_likely():
    u = in_middle_of_slices(5 * 30)
    t = UniformTimesteps()(u, torch.arange(len(u)), len(u), 30)
    assert torch.bincount(t).tolist() == [0] + [5] * 30


def test_uniform_times_do_not_depend_on_position():
    u = in_middle_of_slices(16)
    t = UniformTimesteps()(u, torch.arange(16), 16, 1000)
    assert torch.equal(t, UniformTimesteps()(u, torch.arange(16) + 100, 512, 1000))


@given(u=st.lists(uniform_numbers, min_size=24, max_size=24))
def test_a_stratified_batch_meets_each_of_its_slices_once(u):
    position = torch.arange(24)
    # As many images as times, twice as many, and half as many.
    assert StratifiedTimesteps()(torch.tensor(u), position, 24, 24).tolist() == list(range(1, 25))
    twice = StratifiedTimesteps()(torch.tensor(u), position, 24, 12)
    assert torch.bincount(twice).tolist() == [0] + [2] * 12
    half = StratifiedTimesteps()(torch.tensor(u), position, 24, 48)
    assert ((half - 1) // 2).tolist() == list(range(24))


def test_stratified_times_are_equally_likely():
    """7 images, 5 times, no divisor in common: over all u, each time is drawn as often as each other."""
    u = in_middle_of_slices(5 * 20).repeat_interleave(7)
    position = torch.arange(7).repeat(5 * 20)
    t = StratifiedTimesteps()(u, position, 7, 5)
    assert torch.bincount(t).tolist() == [0] + [7 * 20] * 5


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("cut", [1, 5, 16, 23])
def test_a_share_of_the_batch_draws_what_the_whole_batch_draws(rule, cut):
    u = torch.rand(24, generator=torch.Generator().manual_seed(0))
    position = torch.arange(24)
    shares = [rule(u[part], position[part], 24, 1000) for part in (slice(0, cut), slice(cut, 24))]
    assert torch.equal(torch.cat(shares), rule(u, position, 24, 1000))


@given(first=st.integers(0, 10**6), count=st.integers(1, 400), num_steps=st.sampled_from([10, 300, 1000]))
def test_spread_times_fill_every_tenth_of_time_in_every_run(first, count, num_steps):
    t = spread_times(torch.arange(first, first + count), num_steps)
    assert int(t.min()) >= 1
    assert int(t.max()) <= num_steps
    in_tenths = torch.bincount((t - 1) * 10 // num_steps, minlength=10)
    assert (
        float((in_tenths - count / 10).abs().max()) < 3
    )  # independent draws stray by sqrt(count / 10), several times over


def test_spread_times_are_a_function_of_the_position():
    whole = spread_times(torch.arange(50), 300)
    assert torch.equal(whole[20:30], spread_times(torch.arange(20, 30), 300))


def test_importance_follows_the_root_of_the_second_moment():
    losses = torch.tensor([0.5, 1.0, 4.0, 2.5])
    rule = ImportanceTimesteps(4, history=2, uniform_share=0.1)
    rule.observe(torch.arange(1, 5), 3 * losses)
    assert rule.probabilities().tolist() == [0.25] * 4  # not all times have been met twice
    rule.observe(torch.arange(1, 5), 4 * losses)
    size = losses.double() * (25 / 2) ** 0.5
    torch.testing.assert_close(rule.probabilities(), 0.9 * size / size.sum() + 0.1 / 4)
    t = rule(in_middle_of_slices(1).expand(2000), torch.arange(2000), 2000, 4)
    drawn = torch.bincount(t, minlength=5)[1:] / 2000
    torch.testing.assert_close(drawn.double(), rule.probabilities(), rtol=0, atol=1e-3)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30), st.integers(1, 64))
def test_importance_weights_undo_the_choice(losses, size):
    """E_p[weight . L] is the mean of L over uniform times, whatever L."""
    rule = experienced(torch.tensor(losses))
    t = torch.arange(1, len(losses) + 1)
    p = rule.probabilities()
    torch.testing.assert_close((p * rule.weights(t)).sum(), p.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        p * rule.weights(t) * len(losses), torch.ones(len(losses)).double(), rtol=1e-5, atol=0
    )
    drawn = rule(
        torch.rand(size, generator=torch.Generator().manual_seed(0)), torch.arange(size), size, len(losses)
    )
    assert 1 <= int(drawn.min()) <= int(drawn.max()) <= len(losses)


def test_importance_remembers_the_latest_losses_only():
    rule = ImportanceTimesteps(2, history=3)
    rule.observe(torch.tensor([1, 1, 2, 1, 1, 1]), torch.tensor([1.0, 2, 9, 3, 4, 5]))
    assert sorted(rule.losses[0].tolist()) == [3, 4, 5]
    rule.observe(torch.tensor([1]), torch.tensor([6.0]))
    assert sorted(rule.losses[0].tolist()) == [4, 5, 6]
    assert rule.counts.tolist() == [6, 1]


def test_importance_survives_a_time_without_loss():
    assert experienced(torch.zeros(3)).probabilities().tolist() == pytest.approx([1 / 3] * 3)
    p = experienced(torch.tensor([0.0, 1.0])).probabilities()
    assert p.tolist() == pytest.approx([0.0005, 0.9995])
    assert bool(torch.isfinite(experienced(torch.tensor([0.0, 1.0])).weights(torch.tensor([1]))).all())


@pytest.mark.parametrize("arguments", [{"history": 0}, {"uniform_share": 0.0}, {"uniform_share": 1.1}])
def test_importance_names_a_wrong_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ImportanceTimesteps(4, **arguments)


@pytest.mark.parametrize("num_steps", [3, 9])
def test_importance_knows_one_schedule_only(num_steps):
    """With another it would never draw some times, or pile up on the last."""
    with pytest.raises(ValueError, match=f"num_steps=5: the schedule has {num_steps} steps"):
        ImportanceTimesteps(5)(torch.tensor([0.5]), torch.tensor([0]), 1, num_steps)


def test_importance_is_the_root_of_the_mean_square_not_the_mean():
    """Equal means, but a time whose losses vary is drawn more often (2102.09672, equation 18)."""
    rule = ImportanceTimesteps(2, history=2, uniform_share=1e-9)
    for losses in ([1.0, 2.0], [3.0, 2.0]):
        rule.observe(torch.tensor([1, 2]), torch.tensor(losses))
    expected = torch.tensor([5**0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(rule.probabilities(), expected / expected.sum(), rtol=1e-6, atol=0)
