from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, norm
from torch import Tensor

from litdiffusion.diffusion import (
    Draws,
    Importance,
    LogitNormal,
    Lognormal,
    NoiseLevels,
    Schedule,
    UniformLevels,
    schedules,
)
from small_worlds import ALL_SCHEDULES, times

PLAIN_OR_SPREAD = [UniformLevels(), UniformLevels(stratified=True)]
LARGEST_BELOW_1 = 1 - 2.0**-24
ONCE = schedules.linear(4)


def in_steps(count: int) -> Tensor:
    return torch.arange(1, count + 1).double() / count


def experienced(losses: Tensor, history: int = 2) -> Importance:
    """A distribution that has met the loss of each part ``history`` times."""
    levels = Importance(len(losses), history)
    for _ in range(history):
        levels.observe(ONCE, in_steps(len(losses)), losses)
    return levels


uniform_numbers = st.floats(0, LARGEST_BELOW_1, width=32)


def in_middle_of_slices(count: int) -> Tensor:
    """(k + 1/2) / count: one uniform number in each of ``count`` equal slices of [0, 1)."""
    return (torch.arange(count) + 0.5) / count


@dataclass(frozen=True)
class Given(Draws):
    """Draws whose uniform numbers are given."""

    u: Tensor | None = None

    def uniform(self, name: str) -> Tensor:
        assert self.u is not None
        return self.u


def given_draws(u: Tensor, batch_size: int | None = None, positions: Tensor | None = None) -> Given:
    positions = torch.arange(len(u)) if positions is None else positions
    return Given((), positions, batch_size or len(u), u)


def steps_of(levels: NoiseLevels, T: int, draws: Draws) -> Tensor:
    """Which of the steps 1..T of a discrete schedule are drawn."""
    t = levels(schedules.linear(T), draws)
    assert t.dtype == torch.float64
    steps = (t * T).round().long()
    assert torch.equal(steps / T, t) or torch.allclose(steps.double() / T, t, rtol=1e-15, atol=0)
    return steps


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", [UniformLevels, Lognormal, LogitNormal, Importance])
@given(
    u=st.lists(uniform_numbers, min_size=1, max_size=8),
    name=st.sampled_from(sorted(ALL_SCHEDULES)),
    data=st.data(),
)
def test_times_lie_within_the_schedule(kind, stratified, u, name, data):
    batch_size = data.draw(st.integers(len(u), 4096))
    first = data.draw(st.integers(0, batch_size - len(u)))
    draws = given_draws(torch.tensor(u), batch_size, torch.arange(first, first + len(u)))
    t = kind(stratified=stratified)(ALL_SCHEDULES[name](num_steps=300), draws)
    assert t.dtype == torch.float64
    assert 0 < float(t.min()) <= float(t.max()) <= 1


@pytest.mark.parametrize("num_steps", [1, 3, 300, 1000])
def test_the_ends_of_the_uniform_numbers_are_the_ends_of_time(num_steps):
    ends = given_draws(torch.tensor([0.0, LARGEST_BELOW_1]))
    assert steps_of(UniformLevels(), num_steps, ends).tolist() == [1, num_steps]
    t = UniformLevels()(schedules.Flow(num_steps=num_steps), ends)
    assert 0 < float(t[0]) < 1e-8
    assert float(t[1]) == LARGEST_BELOW_1


def test_uniform_times_are_equally_likely():
    u = in_middle_of_slices(5 * 30)
    assert torch.bincount(steps_of(UniformLevels(), 30, given_draws(u))).tolist() == [0] + [5] * 30
    assert torch.equal(UniformLevels()(schedules.VPLinear(), given_draws(u)), u.double())


def test_uniform_times_do_not_depend_on_the_batch():
    one, other = (Draws.at(0, "train", start=0, stop=16, batch_size=size) for size in (16, 512))
    assert torch.equal(steps_of(UniformLevels(), 1000, one), steps_of(UniformLevels(), 1000, other))


@given(u=st.lists(uniform_numbers, min_size=24, max_size=24))
def test_a_stratified_batch_meets_each_of_its_slices_once(u):
    spread, draws = UniformLevels(stratified=True), given_draws(torch.tensor(u))
    # As many images as times, twice as many, and half as many.
    assert steps_of(spread, 24, draws).tolist() == list(range(1, 25))
    assert torch.bincount(steps_of(spread, 12, draws)).tolist() == [0] + [2] * 12
    assert ((steps_of(spread, 48, draws) - 1) // 2).tolist() == list(range(24))
    assert (spread(schedules.Flow(), draws) * 24 + 1e-9).long().tolist() == list(range(24))


def test_stratified_times_are_equally_likely():
    """7 images, 5 times, no divisor in common: over all u, each time is drawn as often as each other."""
    u = in_middle_of_slices(5 * 20).repeat_interleave(7)
    draws = given_draws(u, 7, torch.arange(7).repeat(5 * 20))
    assert torch.bincount(steps_of(UniformLevels(stratified=True), 5, draws)).tolist() == [0] + [7 * 20] * 5


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", [UniformLevels, Lognormal, LogitNormal, Importance])
@pytest.mark.parametrize("training", [True, False])
def test_a_share_of_the_batch_draws_what_the_whole_batch_draws(kind, stratified, training):
    levels, schedule = kind(stratified=stratified).train(training), schedules.Flow()

    def drawn(start: int, stop: int, seed: int = 0) -> Tensor:
        size = 24 if training else None
        return levels(schedule, Draws.at(seed, "train", start=start, stop=stop, batch_size=size))

    for cut in (1, 5, 16, 23):
        # Torch's sigmoid of a number in float64 depends by an ulp on how many stand beside it.
        shares = torch.cat((drawn(0, cut), drawn(cut, 24)))
        torch.testing.assert_close(shares, drawn(0, 24), rtol=1e-14, atol=0)
    # In evaluation the same images always meet the same times.
    assert torch.equal(drawn(0, 24), drawn(0, 24, seed=1)) is not training


# ---------------------------------------------------------------------------------------- normal distributions


@pytest.mark.parametrize("name", ["linear", "vp_linear", "flow", "ve"])
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.8)])
def test_the_quantiles_of_lognormal_are_scipys(name, mean, std):
    """log(sigma / alpha) ~ N(mean, std^2), as far as the schedule goes."""
    schedule, u = ALL_SCHEDULES[name](num_steps=1000), torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t = Lognormal(mean, std).quantile(u, schedule)
    found = (schedule.sigma(t) / schedule.alpha(t)).log()
    torch.testing.assert_close(found, torch.from_numpy(norm.ppf(u, mean, std)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.3)])
def test_the_quantiles_of_logit_normal_are_scipys(mean, std):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = LogitNormal(mean, std).quantile(u, schedules.Flow())
    torch.testing.assert_close(t.logit(), torch.from_numpy(norm.ppf(u, mean, std)), rtol=1e-9, atol=1e-9)


def normal_number(levels: NoiseLevels, schedule: Schedule, t: Tensor) -> Tensor:
    """Where a drawn time lies on the standard normal distribution behind it."""
    of_time = t.logit() if isinstance(levels, LogitNormal) else -schedule.log_snr(t) / 2
    return (of_time - levels.mean) / levels.std


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", [Lognormal, LogitNormal])
@pytest.mark.parametrize("schedule", [schedules.VE(1e-4, 1e4), schedules.Flow()], ids=["ve", "flow"])
def test_batches_follow_the_normal_distribution(kind, stratified, schedule):
    levels = kind(stratified=stratified)
    z = normal_number(levels, schedule, levels(schedule, Draws.at(3, start=0, stop=2000, batch_size=2000)))
    found = kstest(z.numpy(), "norm")
    if stratified:  # each image within its own 2000th of the distribution
        assert (torch.special.ndtr(z) * 2000 + 1e-6).long().tolist() == pytest.approx(range(2000), abs=1)
        assert found.statistic < 1 / 2000 + 1e-6
    else:
        assert found.pvalue > 0.01
        assert found.statistic > 2 / 2000


def test_a_discrete_schedule_is_drawn_at_its_own_times():
    """Each with the share that the distribution has in (t - 1 / T, t]."""
    schedule, levels = schedules.linear(10), LogitNormal(stratified=True)
    t = levels(schedule, Draws.at(0, start=0, stop=20_000, batch_size=20_000))
    shares = torch.bincount((t * 10).round().long(), minlength=11)[1:] / 20_000
    below = norm.cdf(in_steps(10).logit().numpy())
    expected = torch.from_numpy(below).diff(prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("std", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [Lognormal, LogitNormal])
def test_a_normal_distribution_needs_a_positive_width(kind, std):
    with pytest.raises(ValueError, match="std="):
        kind(std=std)


# ---------------------------------------------------------------------------------------------- importance


def test_importance_follows_the_root_of_the_second_moment():
    losses = torch.tensor([0.5, 1.0, 4.0, 2.5])
    levels = Importance(4, history=2, uniform_share=0.1)
    levels.observe(ONCE, in_steps(4), 3 * losses)
    assert levels.probabilities().tolist() == [0.25] * 4  # not all parts have been met twice
    levels.observe(ONCE, in_steps(4), 4 * losses)
    size = losses.double() * (25 / 2) ** 0.5
    torch.testing.assert_close(levels.probabilities(), 0.9 * size / size.sum() + 0.1 / 4)
    drawn = torch.bincount(steps_of(levels, 4, given_draws(torch.full((2000,), 0.5))), minlength=5)[1:] / 2000
    torch.testing.assert_close(drawn.double(), levels.probabilities(), rtol=0, atol=1e-3)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30), st.integers(1, 64))
def test_importance_weights_undo_the_choice(losses, size):
    """E_p[weight . L] is the mean of L over uniform times, whatever L."""
    levels, count = experienced(torch.tensor(losses)), len(losses)
    p, weights = levels.probabilities(), levels.weights(ONCE, in_steps(count))
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(p * weights * count, torch.ones(count).double(), rtol=1e-5, atol=0)
    t = levels(schedules.Flow(), Draws.at(0, start=0, stop=size, batch_size=size))
    assert 0 < float(t.min()) <= float(t.max()) <= 1


def test_importance_weights_undo_the_choice_at_any_time():
    """Parts, times and schedule need not fit: of T steps, of none, with as many parts as one likes."""
    levels, draws = experienced(torch.tensor([0.5, 3.0, 1.0])), given_draws(torch.full((30_000,), 0.5))
    for schedule in (schedules.Flow(), schedules.linear(12)):
        t = levels(schedule, draws)
        weights = levels.weights(schedule, t)
        offset = 1 / 24 if schedule.discrete else 0
        for power in (0, 1, 2):
            uniform = in_middle_of_slices(12_000).double()
            if schedule.discrete:
                uniform = (uniform * 12).ceil() / 12
            expected = (uniform - offset).pow(power).mean()
            torch.testing.assert_close(
                (weights * (t - offset).pow(power)).mean(), expected, rtol=0, atol=2e-4
            )


def test_importance_remembers_the_latest_losses_only():
    levels = Importance(2, history=3)
    levels.observe(ONCE, times(0.5, 0.5, 1, 0.25, 0.4, 0.5), torch.tensor([1.0, 2, 9, 3, 4, 5]))
    assert sorted(levels.losses[0].tolist()) == [3, 4, 5]
    levels.observe(ONCE, times(0.5), torch.tensor([6.0]))
    assert sorted(levels.losses[0].tolist()) == [4, 5, 6]
    assert levels.counts.tolist() == [6, 1]


def test_importance_survives_a_part_without_loss():
    assert experienced(torch.zeros(3)).probabilities().tolist() == pytest.approx([1 / 3] * 3)
    levels = experienced(torch.tensor([0.0, 1.0]))
    assert levels.probabilities().tolist() == pytest.approx([0.0005, 0.9995])
    assert bool(torch.isfinite(levels.weights(ONCE, times(0.5))).all())


def test_importance_measures_at_uniform_times():
    levels, schedule = experienced(torch.tensor([0.5, 1.0, 4.0, 2.5])).eval(), schedules.Flow()
    draws = Draws.at("held out", start=0, stop=50)
    t = levels(schedule, draws)
    assert torch.equal(t, UniformLevels().eval()(schedule, draws))
    assert levels.weights(schedule, t).tolist() == [1] * 50


@pytest.mark.parametrize(
    "arguments", [{"bins": 0}, {"history": 0}, {"uniform_share": 0.0}, {"uniform_share": 1.1}]
)
def test_importance_names_a_wrong_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Importance(**arguments)


def test_importance_is_the_root_of_the_mean_square_not_the_mean():
    """Equal means, but a part whose losses vary is drawn more often (2102.09672, equation 18)."""
    levels = Importance(2, history=2, uniform_share=1e-9)
    for losses in ([1.0, 2.0], [3.0, 2.0]):
        levels.observe(ONCE, in_steps(2), torch.tensor(losses))
    expected = torch.tensor([5**0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(levels.probabilities(), expected / expected.sum(), rtol=1e-6, atol=0)
