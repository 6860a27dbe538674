from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litdiffusion.diffusion import DDIM, DDPM, DPMSolverPP2M, Heun, Schedule, schedules
from litdiffusion.diffusion.grids import grid_times
from small_worlds import ALL_SCHEDULES, SCHEDULES

GRIDS = ["uniform", "quadratic", "log_snr"]


@st.composite
def any_schedule(draw, smallest: int = 1, largest: int = 400) -> Schedule:
    """Any of ours, of any length, with or without a last step of pure noise."""
    name = draw(st.sampled_from(sorted(ALL_SCHEDULES)))
    if name in SCHEDULES and draw(st.booleans()):
        return SCHEDULES[name](draw(st.integers(max(smallest, 2), largest)), zero_terminal_snr=True)
    return ALL_SCHEDULES[name](draw(st.integers(smallest, largest)))


@pytest.mark.parametrize("grid", GRIDS)
@given(schedule=any_schedule(), data=st.data())
def test_any_grid_falls_strictly_from_the_last_time_to_0(grid, schedule, data):
    count = data.draw(st.integers(1, schedule.num_steps))
    times = grid_times(schedule, count, grid)
    assert len(times) == count + 1
    assert times[0] == schedule.num_steps
    assert times[-1] == 0
    assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize("grid", GRIDS)
@given(schedule=any_schedule(), more=st.integers(1, 1000))
def test_a_grid_of_all_times_is_all_times_and_none_has_more(grid, schedule, more):
    total = schedule.num_steps
    assert grid_times(schedule, total, grid) == list(range(total, -1, -1))
    with pytest.raises(ValueError, match=f"num_steps={total + more}: the schedule has only {total} steps"):
        grid_times(schedule, total + more, grid)


@given(schedule=any_schedule())
def test_the_signal_to_noise_ratio_of_any_schedule_falls(schedule):
    assert bool((schedule.log_snr.diff() < 0).all())
    assert bool((schedule.alpha.diff() < 0).all())
    assert bool((schedule.betas > 0).all())


@pytest.mark.parametrize(("total", "count"), [(1000, 10), (1000, 31), (400, 20)])
def test_the_quadratic_grid_spreads_the_root_of_t_evenly(total, count):
    times = grid_times(schedules.cosine(total), count, "quadratic")[::-1]
    for i, t in enumerate(times):
        assert abs(t - total * (i / count) ** 2) <= 0.5
    strides = [t - s for s, t in pairwise(times)]
    assert strides[0] < total / count < strides[-1]  # denser near the image


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "cosine_to_pure_noise"])
@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_the_log_snr_grid_takes_the_time_nearest_to_each_even_log_snr(name, count):
    total = 20_000
    pure_noise = name == "cosine_to_pure_noise"
    schedule = (
        schedules.cosine(total, zero_terminal_snr=True) if pure_noise else getattr(schedules, name)(total)
    )
    times = grid_times(schedule, count, "log_snr")[::-1]
    # From t = 1 to the last time whose log-SNR is finite; pure noise, where it is not, is one time more.
    inner = times[1:-1] if schedule.has_zero_terminal_snr else times[1:]
    ends = schedule.log_snr[[0, total - 1 - int(schedule.has_zero_terminal_snr)]].tolist()
    wanted = torch.linspace(*ends, len(inner), dtype=torch.float64)
    nearest = ((schedule.log_snr[None, :] - wanted[:, None]).abs().argmin(1) + 1).tolist()
    assert (times[0], inner[0], times[-1]) == (0, 1, total)
    # Where the table has less than one time for each, they stand side by side.
    for i in range(1, len(inner) - 1):
        if inner[i - 1] + 1 < inner[i] < inner[i + 1] - 1:
            assert inner[i] == nearest[i]
    assert len(set(inner) & set(nearest)) >= len(set(nearest)) - 1


@pytest.mark.parametrize("make", [DDPM, DDIM, DPMSolverPP2M, Heun])
def test_every_sampler_walks_the_grid_it_was_given(make):
    schedule = schedules.linear(50)
    for grid in GRIDS:
        assert make(7, grid=grid).times(schedule) == grid_times(schedule, 7, grid)
    assert make(7).grid == "uniform"
