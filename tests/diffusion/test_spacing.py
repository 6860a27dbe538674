from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import DDIM, DDPM, DPMSolverPP2M, Heun, Schedule, schedules
from litdiffusion.diffusion.spacing import SPACINGS, spaced_times
from small_worlds import CONTINUOUS, SCHEDULES

KINDS = {
    **SCHEDULES,
    **{f"{name}_to_pure_noise": partial(make, zero_terminal_snr=True) for name, make in SCHEDULES.items()},
    **{name: lambda total, kind=kind: kind(num_steps=total) for name, kind in CONTINUOUS.items()},
}
"""Every schedule, by its number of steps."""

NAMES = tuple(sorted(KINDS))
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def log_snr(schedule: Schedule, times: list[float]) -> Tensor:
    return schedule.log_snr(torch.tensor(times, dtype=torch.float64))


@st.composite
def any_schedule(draw, names: tuple[str, ...] = NAMES, smallest: int = 2, largest: int = 400) -> Schedule:
    """Any of ours, of any length, with or without a last step of pure noise."""
    return KINDS[draw(st.sampled_from(names))](draw(st.integers(smallest, largest)))


discrete_schedule = any_schedule(tuple(name for name in NAMES if name not in CONTINUOUS))


@every_spacing
@settings(max_examples=30)  # each bisects, under the checks of shapes
@given(schedule=any_schedule(), data=st.data())
def test_any_spacing_falls_strictly_from_1_to_0(spacing, schedule, data):
    T = schedule.num_steps
    count = data.draw(st.integers(1, T))
    times = spaced_times(schedule, count, spacing)
    assert len(times) == count + 1
    assert (times[0], times[-1]) == (1, 0)
    assert all(type(t) is float for t in times)
    assert all(t > s for t, s in pairwise(times))
    if schedule.discrete:
        assert times == [round(t * T) / T for t in times]


@every_spacing
@pytest.mark.parametrize("name", sorted(KINDS))
def test_any_spacing_is_whole_at_the_ends_of_the_range_of_its_count(name, spacing):
    """One step, two, and as many as there are, of short schedules and of long ones."""
    for T in (2, 3, 200):
        schedule = KINDS[name](T)
        for count in {1, 2, T - 1, T}:
            times = spaced_times(schedule, count, spacing)
            assert (len(times), times[0], times[-1]) == (count + 1, 1, 0)
            assert all(t > s for t, s in pairwise(times))
    if not name.endswith("_to_pure_noise"):
        assert spaced_times(KINDS[name](1), 1, spacing) == [1, 0]


@every_spacing
@settings(max_examples=30)  # each bisects, under the checks of shapes
@given(schedule=discrete_schedule, more=st.integers(1, 1000))
def test_a_spacing_of_all_times_is_all_times_and_none_has_more(spacing, schedule, more):
    T = schedule.num_steps
    assert spaced_times(schedule, T, spacing) == [i / T for i in range(T, -1, -1)]
    with pytest.raises(ValueError, match=f"num_steps={T + more}: must be from 1 to schedule.num_steps={T}"):
        spaced_times(schedule, T + more, spacing)


@every_spacing
@settings(max_examples=30)  # each bisects, under the checks of shapes
@given(schedule=any_schedule(tuple(CONTINUOUS), smallest=4), count=st.integers(1, 1000))
def test_a_continuous_schedule_has_as_many_times_as_are_asked_for(spacing, schedule, count):
    times = spaced_times(schedule, count, spacing)
    assert len(times) == count + 1
    assert all(t > s for t, s in pairwise(times))


@given(schedule=any_schedule())
def test_the_signal_to_noise_ratio_of_any_schedule_falls(schedule):
    times = torch.linspace(0, 1, schedule.num_steps + 1, dtype=torch.float64)
    alpha, _ = schedule.at(times)
    assert bool((schedule.log_snr(times[1:]).diff() < 0).all())
    assert bool((alpha.flatten().diff() <= 0).all())
    assert bool((schedule.betas > 0).all())


@pytest.mark.parametrize(
    ("name", "total", "count"),
    [("cosine", 1000, 10), ("cosine", 1000, 31), ("cosine", 400, 20), ("flow", 10, 31), ("ve", 10, 10)],
)
def test_the_quadratic_spacing_spreads_the_root_of_t_evenly(name, total, count):
    schedule = KINDS[name](total)
    times = spaced_times(schedule, count, "quadratic")[::-1]
    tolerance = 0.5001 / total if schedule.discrete else 1e-12
    for i, t in enumerate(times):
        assert t == pytest.approx((i / count) ** 2, abs=tolerance)
    strides = [t - s for s, t in pairwise(times)]
    assert strides[0] < 1 / count < strides[-1]  # denser near the image


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_to_pure_noise"])
@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_the_log_snr_spacing_takes_the_step_nearest_to_each_even_log_snr(name, count):
    T = 20_000
    schedule = KINDS[name](T)
    times = spaced_times(schedule, count, "log_snr")[::-1]
    # From 1 / T to the last time whose log-SNR is finite; pure noise, where it is not, is one time more.
    pure_noise = int(schedule.has_zero_terminal_snr)
    inner = [round(t * T) for t in (times[1:-1] if pure_noise else times[1:])]
    table = schedule.log_snr(torch.arange(1, T + 1, dtype=torch.float64) / T)
    wanted = torch.linspace(
        float(table[0]), float(table[T - 1 - pure_noise]), len(inner), dtype=torch.float64
    )
    nearest = ((table[None, :] - wanted[:, None]).abs().argmin(1) + 1).tolist()
    assert (times[0], inner[-1] if len(inner) == 1 else inner[0], times[-1]) == (
        0,
        T - pure_noise if len(inner) == 1 else 1,
        1,
    )
    # Where the table has less than one time for each, they stand side by side. The time at which the interpolated
    # log-SNR is the wanted one rounds to another step than the nearest in log-SNR only where both are as near.
    for i in range(1, len(inner) - 1):
        if inner[i - 1] + 1 < inner[i] < inner[i + 1] - 1:
            assert inner[i] == nearest[i]
    assert len(set(inner) & set(nearest)) >= len(set(nearest)) - 1


@pytest.mark.parametrize("name", sorted(CONTINUOUS))
@pytest.mark.parametrize("count", [3, 10, 40])
def test_the_log_snr_of_a_continuous_schedule_is_spread_evenly(name, count):
    schedule = KINDS[name](1000)
    times = spaced_times(schedule, count, "log_snr")[::-1]
    inner = times[1:-1] if schedule.has_zero_terminal_snr else times[1:]
    found = log_snr(schedule, inner)
    ends = (-found[[0, -1]] / 2).exp()  # of sigma / alpha
    assert float(ends[0]) == pytest.approx(0.002, rel=1e-6)
    alpha, sigma = schedule.at(1.0)
    assert float(ends[1]) == pytest.approx(sigma / alpha if alpha > 0 else 1000.0)
    wanted = torch.linspace(float(found[0]), float(found[-1]), len(inner), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Karras et al., 2206.00364, equation 5, and k-diffusion's ``get_sigmas_karras``: n numbers, then 0."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat(((high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)))


@pytest.mark.parametrize("count", [2, 3, 18, 40, 256])
@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_spacing_is_edms_under_the_ve_schedule(rho, count):
    """Whatever the schedule's own rho: the spacing's is 7."""
    schedule = schedules.VE(rho=rho)
    sigmas = torch.tensor([schedule.at(t)[1] for t in spaced_times(schedule, count, "karras")])
    torch.testing.assert_close(sigmas.double(), karras_sigmas(count, 0.002, 80.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["flow", "vp_linear", "vp_cosine"])
def test_karras_spacing_spreads_sigma_by_alpha_of_any_continuous_schedule(name):
    """Down to 0.002, from the last time before pure noise."""
    schedule = KINDS[name](1000)
    times = spaced_times(schedule, 20, "karras")[int(schedule.has_zero_terminal_snr) : -1]
    k = (-log_snr(schedule, times) / 2).exp()
    expected = karras_sigmas(len(times), 0.002, float(k[0]))[:-1]
    torch.testing.assert_close(k, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine_to_pure_noise"])
def test_karras_spacing_of_a_table_takes_the_nearest_steps(name):
    T = 20_000
    schedule = KINDS[name](T)
    pure_noise = int(schedule.has_zero_terminal_snr)
    times = spaced_times(schedule, 12, "karras")[pure_noise:-1]
    first, last = (float((-log_snr(schedule, [t]) / 2).exp()) for t in (1 / T, (T - pure_noise) / T))
    wanted = karras_sigmas(len(times), max(first, 0.002), last)[:-1]
    ideal = schedule.time_of(-2 * wanted.log())
    torch.testing.assert_close(torch.tensor(times).double(), ideal, rtol=0, atol=0.501 / T)


@pytest.mark.parametrize("make", [DDPM, DDIM, DPMSolverPP2M, Heun])
def test_every_sampler_stops_at_the_times_of_its_spacing(make):
    schedule = schedules.linear(50)
    for spacing in SPACINGS:
        assert make(7, spacing=spacing).times(schedule) == spaced_times(schedule, 7, spacing)
    assert make(7).spacing == "uniform"


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize(
    "make",
    [
        schedules.Flow,
        schedules.VE,
        schedules.VPCosine,
        schedules.VPLinear,
        partial(schedules.VPLinear, 0.1, 5000.0),
    ],
)
def test_the_spacing_of_continuous_time_does_not_depend_on_t_steps(make, spacing, num_steps):
    """Some end in pure noise, or as good as that: their times rise all the same."""
    times = spaced_times(make(num_steps=num_steps), 7, spacing)
    assert times == spaced_times(make(num_steps=50), 7, spacing)
    assert all(s < t for t, s in pairwise(times))
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 8)
