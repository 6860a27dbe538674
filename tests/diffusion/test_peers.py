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
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from peer_schedulers import InTurn, on_our_tables
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    EDM,
    X0,
    Denoiser,
    DPMSolverPP2M,
    Heun,
    Preconditioned,
    Schedule,
    V,
    Velocity,
    schedules,
)
from litdiffusion.diffusion.spacing import spaced_times
from small_worlds import ALL_SCHEDULES, MixtureData, draws, every_pair, exact_denoiser, normal

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers
]

X_T = normal(3, 1, 1, 1, dtype=torch.float64)
SPACINGS = ["uniform", "quadratic", "log_snr", "karras"]
NAMES = ["cosine", "linear", "flow", "vp_cosine"]


def tables(schedule: Schedule, times: list[float]) -> tuple[Tensor, Tensor]:
    """alpha and sigma."""
    alpha, sigma = schedule.at(torch.tensor(times, dtype=torch.float64))
    return alpha.flatten(), sigma.flatten()


def noise_to_signal(schedule: Schedule, times: list[float]) -> Tensor:
    """k = sigma / alpha: what diffusers and EDM call sigma."""
    alpha, sigma = tables(schedule, times)
    return sigma / alpha


# ------------------------------------------------------------------------------------------- DPM-Solver++(2M)


def diffusers_2m(denoiser: Denoiser, times: list[float], flow: bool, **config) -> Tensor:
    """Diffusers' two update formulas at our times, each given what our network estimates."""
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
    scheduler.sigmas = tables(schedule, times)[1] if flow else noise_to_signal(schedule, times)
    x, earlier = X_T, None
    for index, (t, s) in enumerate(pairwise(times)):
        scheduler._step_index = index
        x0 = denoiser(x, t).x0
        if earlier is None or s == 0:
            x = scheduler.dpm_solver_first_order_update(x0, sample=x)
        else:
            x = scheduler.multistep_dpm_solver_second_order_update([earlier, x0], sample=x)
        earlier = x0
    return x


@pytest.mark.parametrize(("name", "spacing", "num_steps"), every_pair(NAMES, SPACINGS, [1, 2, 11, 40]))
def test_dpm_solver_pp_2m_is_diffusers(name, num_steps, spacing):
    schedule = ALL_SCHEDULES[name](num_steps=40)
    denoiser = exact_denoiser(MixtureData(schedule))
    sampler = DPMSolverPP2M(num_steps, spacing)
    theirs = diffusers_2m(denoiser, sampler.times(schedule), flow=name == "flow")
    torch.testing.assert_close(sampler.sample(denoiser, X_T, draws(3)), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_dpm_solver_pp_2m_is_diffusers_from_end_to_end(num_steps):
    """Their own loop: times, history and orders are theirs too, with tables and images in float32."""
    schedule = schedules.linear(40, rescale=False)
    denoiser = exact_denoiser(MixtureData(schedule))
    scheduler = on_our_tables(
        DPMSolverMultistepScheduler, schedule, V(), algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    x = X_T
    for clock in scheduler.timesteps:
        output, _ = denoiser.core.output(x, (int(clock) + 1) / 40)
        x = scheduler.step(output, clock, x).prev_sample
    ours = DPMSolverPP2M(num_steps).sample(denoiser, X_T, draws(3))
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
    twice = [times[0], *(t for t in times[1:-1] for _ in range(2))]
    scheduler.sigmas = noise_to_signal(schedule, [*twice, 0.0])
    x = X_T / schedule.at(1.0)[0]
    for t, clock in zip(twice, scheduler.timesteps, strict=True):
        assert int(clock) + 1 == round(40 * t)
        output, _ = denoiser.core.output(schedule.at(t)[0] * x, t)
        x = scheduler.step(output, clock, x).prev_sample
    torch.testing.assert_close(sampler.sample(denoiser, X_T, draws(3)), x, rtol=1e-9, atol=1e-9)


def edm_algorithm_2(
    denoiser: Denoiser,
    times: list[float],
    churn: float,
    interval: tuple[float, float],
    noise_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Karras et al., 2206.00364, algorithm 2, line by line, in x / alpha; only the times are ours."""
    schedule = denoiser.schedule
    k = noise_to_signal(schedule, times)
    N = len(times) - 1
    x = X_T * schedule.init_noise_sigma / schedule.at(1.0)[0]

    def denoised(x: Tensor, k: Tensor) -> Tensor:
        t = float(schedule.time_of(-2 * k.log()[None]))
        return denoiser(schedule.at(t)[0] * x, t).x0

    for i in range(N):
        gamma = min(churn / N, math.sqrt(2) - 1) if interval[0] <= float(k[i]) <= interval[1] else 0.0
        k_hat = (k[i] + gamma * k[i]).clamp(max=k[0])  # the schedule has no more noise than at its end
        if k_hat > k[i]:
            noise = noise_scale * torch.randn(x.shape, generator=generator).to(x)
            x = x + (k_hat**2 - k[i] ** 2).sqrt() * noise
        d = (x - denoised(x, k_hat)) / k_hat
        following = x + (k[i + 1] - k_hat) * d
        if i + 1 < N:
            d_prime = (following - denoised(following, k[i + 1])) / k[i + 1]
            following = x + (k[i + 1] - k_hat) * (d + d_prime) / 2
        x = following
    return x


@pytest.mark.parametrize(
    ("spacing", "schedule", "churning"),
    every_pair(
        SPACINGS,
        [schedules.linear(300, rescale=False), schedules.VPCosine(-8.0, 15.0), schedules.VE()],
        [(0.0, (0.0, math.inf), 1.0), (5.0, (0.0, math.inf), 1.0), (100.0, (0.05, 3.0), 1.1)],
    ),
)
def test_heun_is_edms_algorithm_2(spacing, schedule, churning):
    churn, interval, noise_scale = churning
    denoiser = exact_denoiser(MixtureData(schedule))
    sampler = Heun(12, churn, interval, noise_scale, spacing)
    ours = sampler.sample(denoiser, schedule.init_noise_sigma * X_T, InTurn(4, 3))
    generator = torch.Generator().manual_seed(4)
    theirs = edm_algorithm_2(denoiser, sampler.times(schedule), churn, interval, noise_scale, generator)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_beyond_edms_range_heun_takes_ddims_steps(name):
    schedule = ALL_SCHEDULES[name](num_steps=1000)
    denoiser = exact_denoiser(MixtureData(schedule))
    first, second = noise_to_signal(schedule, [1.0, 0.9]).tolist()
    heun, ddim = ([o.x for o in make(10).steps(denoiser, X_T, draws(3))] for make in (Heun, DDIM))
    assert first > 80 > second
    assert torch.equal(heun[1], ddim[1])
    assert not torch.allclose(heun[2], ddim[2])


# ------------------------------------------------------------------------------------------------------- EDM


class Wavy(torch.nn.Module):
    """A network F(x; c_noise) as smooth as any, that knows nothing of images."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return (1.3 * x + c_noise.to(x)[:, None, None, None]).sin() + 0.2 * x


def edm_denoiser(net: torch.nn.Module) -> Preconditioned:
    return Preconditioned(net, schedules.VE(), EDM(), 1, 1)


def edm_algorithm_1(net: torch.nn.Module, x: Tensor, num_steps: int) -> list[Tensor]:
    """Karras et al., 2206.00364, algorithm 1, with sigma(t) = t and s(t) = 1; steps and D by their table 1."""
    sigma_min, sigma_max, sigma_data, rho = 0.002, 80.0, 0.5, 7

    def denoised(x: Tensor, sigma: float) -> Tensor:
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
        c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
        c_noise = torch.full((len(x),), math.log(sigma) / 4)
        return c_skip * x + c_out * net(c_in * x, c_noise)

    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    t = [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(num_steps)] + [0.0]
    path = [x]
    for i in range(num_steps):
        d = (x - denoised(x, t[i])) / t[i]
        following = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (following - denoised(following, t[i + 1])) / t[i + 1]
            following = x + (t[i + 1] - t[i]) * (d / 2 + d_prime / 2)
        x = following
        path.append(x)
    return path


@pytest.mark.parametrize("num_steps", [2, 5, 18, 40])
def test_heun_is_edms_sampler(num_steps):
    """The schedule, the parametrization, the spacing and the solver, each of them ours, at every step."""
    x_T, net = 80.0 * X_T, Wavy()
    outputs = Heun(num_steps, spacing="karras").steps(edm_denoiser(net), x_T, draws(3))
    for output, theirs in zip(outputs, edm_algorithm_1(net, x_T, num_steps), strict=True):
        torch.testing.assert_close(output.x, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [10, 20])
@pytest.mark.parametrize(
    ("make", "kind"), [(DDIM, EDMEulerScheduler), (DPMSolverPP2M, EDMDPMSolverMultistepScheduler)]
)
def test_edms_parts_are_those_of_diffusers(make, kind, num_steps):
    """Theirs compute in float32; x_T is about 80."""
    x, denoiser = (80.0 * X_T).float(), edm_denoiser(Wavy())
    sampler = make(num_steps, spacing="karras")
    scheduler = kind()
    scheduler.set_timesteps(num_steps)
    path = [x]
    for clock in scheduler.timesteps:
        output = denoiser.net(scheduler.scale_model_input(x, clock), clock.expand(3))
        x = scheduler.step(output, clock, x).prev_sample
        path.append(x)
    for output, theirs in zip(sampler.steps(denoiser, path[0], draws(3)), path, strict=True):
        torch.testing.assert_close(output.x, theirs, rtol=1e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("num_steps", [1, 4, 16, 64])
def test_ddim_on_the_flow_schedule_is_diffusers_euler(num_steps):
    """x + (sigma_s - sigma_t) u. With T = 64 all numbers of the schedule are exact in float32, as is x_T."""
    schedule = schedules.Flow(num_steps=64)
    denoiser = exact_denoiser(MixtureData(schedule), Velocity())
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=64)
    times = DDIM(num_steps).times(schedule)
    scheduler.set_timesteps(sigmas=times[:-1])
    for (t, s), clock in zip(pairwise(times), scheduler.timesteps, strict=True):
        x = normal(3, 1, 1, 1, seed=round(64 * t)).double()
        u, _ = denoiser.core.output(x, t)
        theirs = scheduler.step(u, clock, x).prev_sample
        _, ours = islice(DDIM(num_steps).steps(denoiser, x, draws(3), start=t), 2)
        torch.testing.assert_close(ours.x, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(theirs, x + (s - t) * u, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------- learned variance


@pytest.mark.parametrize("num_steps", [1, 8, 10, 40])
def test_learned_variance_is_diffusers_learned_range(num_steps):
    schedule = schedules.cosine(40)
    scheduler = on_our_tables(DDPMScheduler, schedule, V(), variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(num_steps)

    class Net(torch.nn.Module):
        learned_variance = True

        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return torch.cat((0.2 * x, (x + c_noise[:, None, None, None] / 40).sin()), dim=1)

    denoiser = Preconditioned(Net(), schedule, V(), 1, 4)
    x = x_T = normal(2, 1, 4, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for clock in scheduler.timesteps:
        output = denoiser.net(x, clock.float().expand(2))
        noise = torch.randn(x.shape, generator=generator).double()
        i = int(clock) + 1
        t, s = i / 40, (i - 40 // num_steps) / 40
        mean = ddpm_mean(schedule, x, denoiser(x, t).x0, t, s)
        log_variance = scheduler._get_variance(int(clock), predicted_variance=output[:, 1:])
        x = mean + (log_variance / 2).exp() * noise if s > 0 else mean
    ours = DDPM(num_steps, "learned").sample(denoiser, x_T, InTurn(5, 2))
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def ddpm_mean(schedule: Schedule, x_t: Tensor, x0: Tensor, t: float, s: float) -> Tensor:
    """DDPM's equation 7 between any two times (2102.09672, section 4)."""
    bar_t, bar_s = (schedule.at(time)[0] ** 2 for time in (t, s))
    beta = 1 - bar_t / bar_s
    return (bar_s**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - bar_s) * x_t) / (1 - bar_t)


def test_our_log_snr_spacing_starts_and_ends_where_theirs_does():
    schedule = schedules.linear(1000)
    scheduler = on_our_tables(DPMSolverMultistepScheduler, schedule, V(), use_lu_lambdas=True)
    scheduler.set_timesteps(20)
    theirs = [int(clock) + 1 for clock in scheduler.timesteps]
    ours = [1000 * t for t in spaced_times(schedule, 20, "log_snr")[:-1]]
    assert ours == pytest.approx(theirs, abs=1)
