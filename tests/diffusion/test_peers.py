"""Whole runs beside other libraries, in float64. (``test_samplers.py`` has DDPM's and DDIM's single steps.)

Diffusers keeps its tables of sigma in float32; here they are replaced by ours, so that only formulas are compared.
"""

import math
from itertools import islice, pairwise

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from peer_schedulers import on_our_tables
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    X0,
    Denoiser,
    DPMSolverPP2M,
    Estimate,
    Heun,
    Schedule,
    V,
    Velocity,
    schedules,
)
from litdiffusion.diffusion.grids import grid_times
from small_worlds import MixtureData, exact_denoiser, normal

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
]

X_T = normal(3, 1, 1, 1, dtype=torch.float64)
GRIDS = ["uniform", "quadratic", "log_snr"]


def noise_to_signal(schedule: Schedule) -> Tensor:
    """k = sigma / alpha, from t = 0 on: what diffusers and EDM call sigma."""
    return schedule.sigma / schedule.alpha


def estimates_of(denoiser: Denoiser, x: Tensor, t: int) -> Estimate:
    return denoiser(x, torch.full((len(x),), t))


# ------------------------------------------------------------------------------------------- DPM-Solver++(2M)


def diffusers_2m(denoiser: Denoiser, times: list[int], flow: bool, **config) -> Tensor:
    """Diffusers' two update formulas along our grid, each given what our network estimates."""
    schedule = denoiser.schedule
    scheduler = on_our_tables(
        DPMSolverMultistepScheduler,
        schedule,
        X0(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        use_flow_sigmas=flow,
        **config,
    )
    scheduler.sigmas = (schedule.sigma if flow else noise_to_signal(schedule))[times]
    x, earlier = X_T, None
    for index, (t, s) in enumerate(pairwise(times)):
        scheduler._step_index = index
        x0 = estimates_of(denoiser, x, t).x0
        if earlier is None or s == 0:
            x = scheduler.dpm_solver_first_order_update(x0, sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update([earlier, x0], sample=x)
        earlier = x0
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 11, 40])
@pytest.mark.parametrize("name", ["cosine", "linear", "flow"])
def test_dpm_solver_pp_2m_is_diffusers(name, num_steps, grid):
    schedule = getattr(schedules, name)(40)
    denoiser = exact_denoiser(MixtureData(schedule))
    sampler = DPMSolverPP2M(num_steps, grid)
    theirs = diffusers_2m(denoiser, sampler.times(schedule), flow=name == "flow")
    torch.testing.assert_close(sampler.sample(denoiser, X_T), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_dpm_solver_pp_2m_is_diffusers_from_end_to_end(num_steps):
    """Their own loop: grid, history and orders are theirs too, with tables and images in float32."""
    schedule = schedules.linear(40, rescale=False)
    denoiser = exact_denoiser(MixtureData(schedule))
    scheduler = on_our_tables(
        DPMSolverMultistepScheduler, schedule, V(), algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    x = X_T
    for clock in scheduler.timesteps:
        output, _ = denoiser.output(x, torch.full((len(x),), int(clock) + 1))
        x = scheduler.step(output, clock, x).prev_sample
    ours = DPMSolverPP2M(num_steps).sample(denoiser, X_T)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ Heun


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
@pytest.mark.parametrize("target", [X0(), V()], ids=["x0", "v"])
def test_heun_is_diffusers(num_steps, target):
    schedule = schedules.linear(40, rescale=False)
    denoiser = exact_denoiser(MixtureData(schedule), target)
    sampler = Heun(num_steps)
    times = sampler.times(schedule)
    scheduler = on_our_tables(HeunDiscreteScheduler, schedule, target)
    scheduler.set_timesteps(num_steps)
    k = noise_to_signal(schedule)
    scheduler.sigmas = k[[times[0], *(t for t in times[1:-1] for _ in range(2)), 0]]
    x = X_T / schedule.alpha[-1]
    for index, clock in enumerate(scheduler.timesteps):
        t = int(clock) + 1
        assert float(scheduler.sigmas[index]) == float(k[t])
        output, _ = denoiser.output(schedule.alpha[t] * x, torch.full((len(x),), t))
        x = scheduler.step(output, clock, x).prev_sample
    torch.testing.assert_close(sampler.sample(denoiser, X_T), x, rtol=1e-9, atol=1e-9)


def edm_algorithm_2(
    denoiser: Denoiser,
    times: list[int],
    churn: float,
    interval: tuple[float, float],
    noise_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Karras et al., 2206.00364, algorithm 2, line by line, in x / alpha; only the times are ours."""
    schedule = denoiser.schedule
    k = noise_to_signal(schedule)
    N = len(times) - 1
    x = X_T / schedule.alpha[-1]

    def denoised(x: Tensor, t: int) -> Tensor:
        return estimates_of(denoiser, schedule.alpha[t] * x, t).x0

    for i, (t, s) in enumerate(pairwise(times)):
        gamma = min(churn / N, math.sqrt(2) - 1) if interval[0] <= float(k[t]) <= interval[1] else 0.0
        hat = t
        if gamma > 0 and i > 0:  # from T there is no way up
            hat = min(range(t, times[0] + 1), key=lambda time: abs(float(k[time] - k[t] * (1 + gamma))))
        if hat > t:
            noise = noise_scale * torch.randn(x.shape, generator=generator).to(x)
            x = x + (k[hat] ** 2 - k[t] ** 2).sqrt() * noise
        d = (x - denoised(x, hat)) / k[hat]
        following = x + (k[s] - k[hat]) * d
        if s != 0:
            d_prime = (following - denoised(following, s)) / k[s]
            following = x + (k[s] - k[hat]) * (d + d_prime) / 2
        x = following
    return x


@pytest.mark.parametrize("name", ["linear", "sigmoid_beta"])
@pytest.mark.parametrize(
    ("churn", "interval", "noise_scale"),
    [(0.0, (0.0, math.inf), 1.0), (5.0, (0.0, math.inf), 1.0), (100.0, (0.05, 3.0), 1.1)],
)
@pytest.mark.parametrize("grid", GRIDS)
def test_heun_is_edms_algorithm_2(name, churn, interval, noise_scale, grid):
    schedule = getattr(schedules, name)(300, rescale=False)
    denoiser = exact_denoiser(MixtureData(schedule))
    sampler = Heun(12, churn, interval, noise_scale, grid)
    ours = sampler.sample(denoiser, X_T, torch.Generator().manual_seed(4))
    theirs = edm_algorithm_2(
        denoiser, sampler.times(schedule), churn, interval, noise_scale, torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_beyond_edms_range_heun_takes_ddims_steps(name):
    schedule = getattr(schedules, name)(1000)
    denoiser = exact_denoiser(MixtureData(schedule))
    k = noise_to_signal(schedule)
    heun, ddim = ([m.x for m in make(10).steps(denoiser, X_T)] for make in (Heun, DDIM))
    assert float(k[1000]) > 80 > float(k[900])
    assert torch.equal(heun[1], ddim[1])
    assert not torch.allclose(heun[2], ddim[2])


# ---------------------------------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("num_steps", [1, 4, 16, 64])
def test_ddim_on_the_flow_schedule_is_diffusers_euler(num_steps):
    """x + (sigma_s - sigma_t) u. With T = 64 all numbers of the schedule are exact in float32, as is x_T."""
    schedule = schedules.flow(64)
    denoiser = exact_denoiser(MixtureData(schedule), Velocity())
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=64)
    times = DDIM(num_steps).times(schedule)
    scheduler.set_timesteps(sigmas=[t / 64 for t in times[:-1]])
    for (t, s), clock in zip(pairwise(times), scheduler.timesteps, strict=True):
        x = normal(3, 1, 1, 1, seed=t).double()
        u, _ = denoiser.output(x, torch.full((3,), t))
        theirs = scheduler.step(u, clock, x).prev_sample
        _, ours = islice(DDIM(num_steps).steps(denoiser, x, start=t), 2)
        torch.testing.assert_close(ours.x, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(theirs, x + (s - t) / 64 * u, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------- learned variance


@pytest.mark.parametrize("num_steps", [1, 8, 10, 40])
def test_learned_variance_is_diffusers_learned_range(num_steps):
    schedule = schedules.cosine(40)
    scheduler = on_our_tables(DDPMScheduler, schedule, V(), variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(num_steps)

    class Net(torch.nn.Module):
        learned_variance = True

        def forward(self, x: Tensor, clock: Tensor) -> Tensor:
            return torch.cat((0.2 * x, (x + clock[:, None, None, None] / 40).sin()), dim=1)

    denoiser = Denoiser(Net(), schedule, V(), 1, 4, clip="none")
    x = x_T = normal(2, 1, 4, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for clock in scheduler.timesteps:
        output = denoiser.net(x, torch.full((2,), int(clock)))
        noise = torch.randn(x.shape, generator=generator).double()
        t = int(clock) + 1
        s = t - 40 // num_steps
        mean = ddpm_mean(schedule, x, estimates_of(denoiser, x, t).x0, t, s)
        log_variance = scheduler._get_variance(int(clock), predicted_variance=output[:, 1:])
        x = mean + (log_variance / 2).exp() * noise if s > 0 else mean
    ours = DDPM(num_steps, "learned").sample(denoiser, x_T, torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def ddpm_mean(schedule: Schedule, x_t: Tensor, x0: Tensor, t: int, s: int) -> Tensor:
    """DDPM's equation 7 between two times of a respaced grid (2102.09672, section 4)."""
    bar_t, bar_s = (float(schedule.alpha[time]) ** 2 for time in (t, s))
    beta = 1 - bar_t / bar_s
    return (bar_s**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - bar_s) * x_t) / (1 - bar_t)


def test_our_log_snr_grid_starts_and_ends_where_theirs_does():
    schedule = schedules.linear(1000)
    scheduler = on_our_tables(DPMSolverMultistepScheduler, schedule, V(), use_lu_lambdas=True)
    scheduler.set_timesteps(20)
    theirs = [int(clock) + 1 for clock in scheduler.timesteps]
    assert grid_times(schedule, 20, "log_snr")[:-1] == pytest.approx(theirs, abs=1)
