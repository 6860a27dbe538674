from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from peer_schedulers import on_our_tables
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    X0,
    Denoiser,
    Epsilon,
    Estimate,
    Here,
    Sampler,
    Schedule,
    V,
    Velocity,
    schedules,
    transition,
)
from litdiffusion.nn import UNet
from peers import blog
from small_worlds import (
    ALL_SCHEDULES,
    SAMPLERS,
    SCHEDULES,
    GaussianData,
    Oracle,
    affine_denoiser,
    images,
    normal,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = [Epsilon(), X0(), V()]


def class_name(x: object) -> str:
    return type(x).__name__


def no_noise() -> Tensor:
    raise AssertionError("a deterministic step asked for noise")


def never(x: Tensor, t: int) -> Estimate:
    raise AssertionError("a step that looks once looked twice")


# ---------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
@pytest.mark.parametrize("target", [*TARGETS, Velocity()], ids=class_name)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_oracle_is_followed_to_its_image(make, target, num_steps):
    schedule, x0 = schedules.linear(40), images(3, channels=2)
    denoiser = Denoiser(Oracle(x0, schedule, target), schedule, target, 2, 4)
    sampled = make(num_steps).sample(denoiser, normal(3, 2, 4, 4), torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", [X0(), V(), Velocity()], ids=class_name)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_oracle_is_followed_from_zero_terminal_snr(make, target):
    schedule, x0 = schedules.cosine(40, zero_terminal_snr=True), images(3)
    denoiser = Denoiser(Oracle(x0, schedule, target), schedule, target, 1, 4)
    sampled = make(10).sample(denoiser, normal(3, 1, 4, 4), torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, x0, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the peers


def one_step(
    sampler: Sampler, schedule: Schedule, target, clip: bool, output: Tensor, x_t: Tensor, t: int, s: int
) -> Tensor:
    """Our step in float64, from the network's output, with ``normal(seed=9)`` as noise."""
    alpha, sigma = (table[t].expand(len(x_t), 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    x0 = target.x0(output, x_t, alpha, sigma)
    x0 = x0.clamp(-1, 1) if clip else x0
    estimate = Estimate(x0, (x_t - alpha * x0) / sigma)
    return sampler.step(Here(schedule, t, s, x_t, estimate, lambda: noise_of(x_t), never))


def noise_of(x: Tensor) -> Tensor:
    return normal(*x.shape, seed=9, dtype=x.dtype)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=class_name)
@pytest.mark.parametrize(("variance", "theirs"), [("beta_tilde", "fixed_small"), ("beta", "fixed_large")])
def test_a_ddpm_step_is_diffusers(variance, theirs, target, clip, stride):
    schedule = schedules.cosine(40)
    scheduler = on_our_tables(DDPMScheduler, schedule, target, variance_type=theirs, clip_sample=clip)
    scheduler.set_timesteps(40 // stride)
    x_t, output = (normal(2, 1, 4, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    # But for the end of a respaced grid, where diffusers adds beta's noise to the finished image.
    for t in (40, 20, 8, *((4, 3, 2, 1) if stride == 1 else ())):
        expected = scheduler.step(output, t - 1, x_t, generator=torch.Generator().manual_seed(9)).prev_sample
        ours = one_step(DDPM(variance=variance), schedule, target, clip, output, x_t, t, t - stride)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=class_name)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_ddim_step_is_diffusers(eta, target, clip, stride):
    schedule = schedules.cosine(40)
    scheduler = on_our_tables(DDIMScheduler, schedule, target, clip_sample=clip)
    scheduler.set_timesteps(40 // stride)
    x_t, output = (normal(2, 1, 4, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    for t in (40, 20, 8, 4, *((3, 2, 1) if stride == 1 else ())):
        expected = scheduler.step(
            output, t - 1, x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise_of(x_t)
        ).prev_sample
        ours = one_step(DDIM(eta=eta), schedule, target, clip, output, x_t, t, t - stride)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_our_grid_is_diffusers_trailing_grid():
    schedule = schedules.cosine(40)
    scheduler = on_our_tables(DDIMScheduler, schedule, Epsilon())
    for num_steps in (1, 2, 8, 10, 40):
        scheduler.set_timesteps(num_steps)
        assert [t - 1 for t in DDIM(num_steps).times(schedule)[:-1]] == scheduler.timesteps.tolist()


def test_unclipped_ddpm_with_beta_tilde_is_the_blogs_sampling():
    torch.manual_seed(0)
    net = UNet(8, 1, (1, 2), heads=2, head_dim=4)
    theirs = blog.Diffusion(blog.linear_betas(12))
    x = x_T = normal(2, 1, 4, 4)
    generator = torch.Generator().manual_seed(3)
    trajectory = [x]
    for index in reversed(range(12)):
        x = theirs.p_sample(net, x, torch.full((2,), index), index, generator)
        trajectory.append(x)
    denoiser = affine_denoiser(schedules.linear(12, rescale=False), Epsilon(), "none", net)
    ours = [step.x for step in DDPM().steps(denoiser, x_T, torch.Generator().manual_seed(3))]
    torch.testing.assert_close(ours, trajectory, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- Gaussian data


def affine_step(data: GaussianData, sampler: Sampler, t: int, s: int) -> tuple[float, float, float]:
    """A, b, c of x_s = A x_t + b + c z, with the exact denoiser."""

    def at(x: float, z: float) -> float:
        x_t = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        return float(data.step(sampler, x_t, t, s, lambda: torch.full_like(x_t, z)))

    b = at(0, 0)
    return at(1, 0) - b, b, at(0, 1) - b


names = st.sampled_from(sorted(ALL_SCHEDULES))
grids = st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True).map(
    lambda times: sorted(times, reverse=True)
)


@given(name=names, grid=grids, variance=st.sampled_from(["beta", "beta_tilde"]), std=st.floats(0.05, 2))
def test_ancestral_sampling_keeps_the_mean_and_lacks_only_the_images_own_variance(name, grid, variance, std):
    """Given x_t, the true x_s varies by the posterior's variance *and* by that of x_0, which one estimate lacks."""
    data = GaussianData(ALL_SCHEDULES[name](60), std=std)
    for t, s in pairwise(grid):
        A, b, c = affine_step(data, DDPM(variance=variance), t, s)
        step = transition(data.schedule, t, s)
        assert A * data.mean_at(t) + b == pytest.approx(data.mean_at(s), abs=1e-9)
        m = step.alpha_s * step.v / step.sigma_t**2
        missing = m**2 * data.posterior_variance(t)
        if s == 0:
            assert c == 0
            assert A**2 * data.variance_at(t) + missing == pytest.approx(data.variance_at(s), rel=1e-7)
        elif variance == "beta_tilde":
            assert A**2 * data.variance_at(t) + c**2 + missing == pytest.approx(data.variance_at(s), rel=1e-7)
        else:
            assert c**2 == pytest.approx(step.v, rel=1e-7)


@pytest.mark.parametrize("num_steps", [1, 3, 10, 37, 60])
@pytest.mark.parametrize(
    ("name", "std", "variance"),
    [(name, 1e-6, "beta_tilde") for name in ALL_SCHEDULES] + [(name, 1.0, "beta") for name in SCHEDULES],
)
def test_each_variance_is_exact_for_the_data_it_is_right_for(name, num_steps, std, variance):
    """Beta-tilde for a point mass and, where variance is preserved, beta for unit variance, along any grid."""
    data = GaussianData(ALL_SCHEDULES[name](60), std=std)
    sampler = DDPM(num_steps, variance)
    grid = sampler.times(data.schedule)
    mean, spread = data.mean_at(60), data.variance_at(60)
    for t, s in pairwise(grid[:-1]):
        A, b, c = affine_step(data, sampler, t, s)
        mean, spread = A * mean + b, A**2 * spread + c**2
        assert mean == pytest.approx(data.mean_at(s), abs=1e-9)
        assert spread == pytest.approx(data.variance_at(s), rel=1e-6)


@given(name=names, grid=grids, std=st.floats(0.05, 2))
def test_ddim_with_eta_1_is_ddpm_with_beta_tilde(name, grid, std):
    data = GaussianData(ALL_SCHEDULES[name](60), std=std)
    for t, s in pairwise(grid):
        ddim, ddpm = (affine_step(data, sampler, t, s) for sampler in (DDIM(eta=1.0), DDPM()))
        assert ddim == pytest.approx(ddpm, rel=1e-7, abs=1e-9)


@given(name=names, grid=grids, eta=st.floats(0, 1))
def test_ddim_keeps_q_of_a_known_image_for_every_eta(name, grid, eta):
    """With x_0 known, x_t ~ q(x_t | x_0) goes to x_s ~ q(x_s | x_0): what makes DDIM share DDPM's training."""
    data = GaussianData(ALL_SCHEDULES[name](60), std=0.0)
    for t, s in pairwise(grid):
        A, b, c = affine_step(data, DDIM(eta=eta), t, s)
        assert A * data.mean_at(t) + b == pytest.approx(data.mean_at(s), abs=1e-9)
        assert A**2 * data.variance_at(t) + c**2 == pytest.approx(data.variance_at(s), rel=1e-7, abs=1e-12)


@given(name=names, grid=grids, eta=st.floats(0, 1), std=st.floats(0.05, 2))
def test_ddim_keeps_the_mean_for_every_eta_and_adds_eta_times_the_noise(name, grid, eta, std):
    data = GaussianData(ALL_SCHEDULES[name](60), std=std)
    for t, s in pairwise(grid):
        A, b, c = affine_step(data, DDIM(eta=eta), t, s)
        assert A * data.mean_at(t) + b == pytest.approx(data.mean_at(s), abs=1e-9)
        assert abs(c) == pytest.approx(
            eta * transition(data.schedule, t, s).posterior_variance ** 0.5, rel=1e-6, abs=1e-12
        )


def test_ddim_converges_to_the_exact_flow_at_first_order():
    """The probability flow keeps (x_t - mean_t) / std_t; halving the steps halves the error."""
    data = GaussianData(schedules.cosine(8192))
    start, errors = 1.7, []
    for num_steps in (32, 64, 128, 256):
        sampler = DDIM(num_steps)
        grid = sampler.times(data.schedule)
        x = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        for t, s in pairwise(grid):
            x = data.step(sampler, x, t, s, no_noise)
        z = (start - data.mean_at(8192)) / data.variance_at(8192) ** 0.5
        errors.append(abs(float(x) - (data.mean + data.std * z)))
    slopes = torch.tensor(errors).log2().diff().neg()
    assert errors[0] < 0.1
    torch.testing.assert_close(slopes, torch.ones(3), rtol=0, atol=0.1)


def test_a_deterministic_step_draws_nothing():
    data = GaussianData(schedules.cosine(10))
    x = torch.ones(1, 1, 1, 1)
    data.step(DDIM(), x, 5, 4, no_noise)
    for sampler in (DDPM(), DDPM(variance="beta"), DDIM(eta=1.0)):
        data.step(sampler, x, 5, 0, no_noise)  # nor does any last step


@pytest.mark.parametrize("sigma", torch.linspace(0.01, 2, 100, dtype=torch.float64).tolist())
def test_ddim_survives_a_first_step_from_pure_noise(sigma):
    """Where alpha_T = 0, c^2 may pass sigma_s^2 by a rounding; its root must stay real."""
    alphas, sigmas = torch.tensor([[1, 0.5, 0], [0, sigma, 1.37 * sigma]], dtype=torch.float64)
    x = torch.ones(1, 1, 1, 1)
    step = DDIM(eta=1.0).step(Here(Schedule(alphas, sigmas), 2, 1, x, Estimate(x, x), lambda: 0 * x, never))
    torch.testing.assert_close(step, 0.5 * x)
