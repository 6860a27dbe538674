from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from peer_schedulers import InTurn, on_our_tables
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    X0,
    Epsilon,
    Estimate,
    Preconditioned,
    Sampler,
    SamplerState,
    Schedule,
    V,
    schedules,
    transition,
)
from litdiffusion.nn import UNet
from peers import blog
from small_worlds import (
    ALL_SCHEDULES,
    SAMPLERS,
    SCHEDULES,
    TARGETS,
    GaussianData,
    Oracle,
    affine_denoiser,
    draws,
    every_pair,
    images,
    normal,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFUSERS_TARGETS = [Epsilon(), X0(), V()]
DEFINED_AT_ZERO_SNR = {name: target for name, target in TARGETS.items() if target.defined_at_zero_snr}
PRESERVING = (*SCHEDULES, "vp_linear", "vp_cosine")
OFF_THE_GRID = 997
"""Times i / 997 lie between the steps of every table here."""


def class_name(x: object) -> str:
    return type(x).__name__


def no_noise() -> Tensor:
    raise AssertionError("a deterministic step asked for noise")


def never(x: Tensor, t: float) -> Estimate:
    raise AssertionError("a step that looks once looked twice")


# ---------------------------------------------------------------------------------------------- the oracle


def followed(make, schedule: Schedule, target, num_steps: int) -> tuple[Tensor, Tensor]:
    """The sampled images, in float64, and those that the network knows; its clock is in float32."""
    x0 = images(3, channels=2).double()
    x_T = schedule.init_noise_sigma * normal(3, 2, 4, 4, dtype=torch.float64)
    denoiser = Preconditioned(Oracle(x0, schedule, target), schedule, target, 2, 4)
    return make(num_steps).sample(denoiser, x_T, draws(3)), x0


@pytest.mark.parametrize(("sampler", "target", "num_steps"), every_pair(SAMPLERS, TARGETS, [1, 2, 5, 12]))
def test_an_oracle_is_followed_to_its_image(sampler, target, num_steps):
    sampled, x0 = followed(SAMPLERS[sampler], schedules.linear(12), TARGETS[target], num_steps)
    torch.testing.assert_close(sampled, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "target"), [("vp_linear", "epsilon"), ("vp_cosine", "v"), ("flow", "velocity"), ("ve", "edm")]
)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_oracle_is_followed_in_continuous_time(make, name, target):
    sampled, x0 = followed(make, ALL_SCHEDULES[name](), TARGETS[target], 7)
    torch.testing.assert_close(sampled, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", DEFINED_AT_ZERO_SNR.values(), ids=DEFINED_AT_ZERO_SNR)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_an_oracle_is_followed_from_zero_terminal_snr(make, target):
    sampled, x0 = followed(make, schedules.cosine(12, zero_terminal_snr=True), target, 6)
    torch.testing.assert_close(sampled, x0, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------- the peers


def one_step(
    sampler: Sampler, schedule: Schedule, target, clip: bool, output: Tensor, x_t: Tensor, i: int, j: int
) -> Tensor:
    """Our step from i to j in float64, from the network's output, with ``normal(seed=9)`` as noise."""
    t, s = i / schedule.num_steps, j / schedule.num_steps
    alpha, sigma = schedule.at(t)
    c_skip, c_out, _ = target.coefficients(alpha, sigma)
    x0 = c_skip * x_t + c_out * output
    x0 = x0.clamp(-1, 1) if clip else x0
    estimate = Estimate(x0, (x_t - alpha * x0) / sigma)
    return sampler.step(SamplerState(schedule, t, s, x_t, estimate, lambda: noise_of(x_t), never))


def noise_of(x: Tensor) -> Tensor:
    return normal(*x.shape, seed=9, dtype=x.dtype)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("target", DIFFUSERS_TARGETS, ids=class_name)
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
@pytest.mark.parametrize("target", DIFFUSERS_TARGETS, ids=class_name)
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


def test_our_uniform_spacing_is_diffusers_trailing_one():
    schedule = schedules.cosine(40)
    scheduler = on_our_tables(DDIMScheduler, schedule, Epsilon())
    for num_steps in (1, 2, 8, 10, 40):
        scheduler.set_timesteps(num_steps)
        assert [
            round(40 * t) - 1 for t in DDIM(num_steps).times(schedule)[:-1]
        ] == scheduler.timesteps.tolist()


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
    ours = [output.x for output in DDPM().steps(denoiser, x_T, InTurn(3, 2))]
    torch.testing.assert_close(ours, trajectory, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- Gaussian data


def affine_step(data: GaussianData, sampler: Sampler, t: float, s: float) -> tuple[float, float, float]:
    """A, b, c of x_s = A x_t + b + c z, with the exact denoiser."""

    def at(x: float, z: float) -> float:
        x_t = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        return float(data.step(sampler, x_t, t, s, lambda: torch.full_like(x_t, z)))

    b = at(0, 0)
    return at(1, 0) - b, b, at(0, 1) - b


names = st.sampled_from(sorted(ALL_SCHEDULES))
times = st.integers(0, 60).map(lambda i: i / 60) | st.integers(0, OFF_THE_GRID).map(
    lambda i: i / OFF_THE_GRID
)
paths = st.lists(times, min_size=2, max_size=3, unique=True).map(lambda times: sorted(times, reverse=True))


@given(name=names, path=paths, variance=st.sampled_from(["beta", "beta_tilde"]), std=st.floats(0.05, 2))
def test_ancestral_sampling_keeps_the_mean_and_lacks_only_the_images_own_variance(name, path, variance, std):
    """Given x_t, the true x_s varies by the posterior's variance *and* by that of x_0, which one estimate lacks."""
    data = GaussianData(ALL_SCHEDULES[name](num_steps=60), std=std)
    for t, s in pairwise(path):
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


@pytest.mark.parametrize("num_steps", [3, 37])
@pytest.mark.parametrize(
    ("name", "std", "variance"),
    [(name, 1e-6, "beta_tilde") for name in ALL_SCHEDULES] + [(name, 1.0, "beta") for name in PRESERVING],
)
def test_each_variance_is_exact_for_the_data_it_is_right_for(name, num_steps, std, variance):
    """Beta-tilde for a point mass and, where variance is preserved, beta for unit variance, at any times."""
    data = GaussianData(ALL_SCHEDULES[name](num_steps=60), std=std)
    sampler = DDPM(num_steps, variance)
    path = sampler.times(data.schedule)
    mean, spread = data.mean_at(1.0), data.variance_at(1.0)
    for t, s in pairwise(path[:-1]):
        A, b, c = affine_step(data, sampler, t, s)
        mean, spread = A * mean + b, A**2 * spread + c**2
        assert mean == pytest.approx(data.mean_at(s), abs=1e-9)
        assert spread == pytest.approx(data.variance_at(s), rel=1e-6)


@given(name=names, path=paths, std=st.floats(0.05, 2))
def test_ddim_with_eta_1_is_ddpm_with_beta_tilde(name, path, std):
    data = GaussianData(ALL_SCHEDULES[name](num_steps=60), std=std)
    for t, s in pairwise(path):
        ddim, ddpm = (affine_step(data, sampler, t, s) for sampler in (DDIM(eta=1.0), DDPM()))
        assert ddim == pytest.approx(ddpm, rel=1e-7, abs=1e-9)


@given(name=names, path=paths, eta=st.floats(0, 1))
def test_ddim_keeps_q_of_a_known_image_for_every_eta(name, path, eta):
    """With x_0 known, x_t ~ q(x_t | x_0) goes to x_s ~ q(x_s | x_0): what makes DDIM share DDPM's training."""
    data = GaussianData(ALL_SCHEDULES[name](num_steps=60), std=0.0)
    for t, s in pairwise(path):
        A, b, c = affine_step(data, DDIM(eta=eta), t, s)
        assert A * data.mean_at(t) + b == pytest.approx(data.mean_at(s), abs=1e-9)
        assert A**2 * data.variance_at(t) + c**2 == pytest.approx(data.variance_at(s), rel=1e-7, abs=1e-12)


@given(name=names, path=paths, eta=st.floats(0, 1), std=st.floats(0.05, 2))
def test_ddim_keeps_the_mean_for_every_eta_and_adds_eta_times_the_noise(name, path, eta, std):
    data = GaussianData(ALL_SCHEDULES[name](num_steps=60), std=std)
    for t, s in pairwise(path):
        A, b, c = affine_step(data, DDIM(eta=eta), t, s)
        assert A * data.mean_at(t) + b == pytest.approx(data.mean_at(s), abs=1e-9)
        assert abs(c) == pytest.approx(
            eta * transition(data.schedule, t, s).posterior_variance ** 0.5, rel=1e-6, abs=1e-12
        )


def test_a_deterministic_step_draws_nothing():
    data = GaussianData(schedules.cosine(10))
    x = torch.ones(1, 1, 1, 1)
    data.step(DDIM(), x, 0.5, 0.4, no_noise)
    for sampler in (DDPM(), DDPM(variance="beta"), DDIM(eta=1.0)):
        data.step(sampler, x, 0.5, 0.0, no_noise)  # nor does any last step


class PureNoiseAtLast(Schedule):
    """alpha = 1 - t, and sigma 1.37 times as large at the end as before."""

    def __init__(self, size: float) -> None:
        super().__init__(2)
        self.size = size

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return torch.where(t == 1, 1.37 * self.size, self.size)


@pytest.mark.parametrize("size", torch.linspace(0.01, 2, 100, dtype=torch.float64).tolist())
def test_ddim_survives_a_first_step_from_pure_noise(size):
    """Where alpha_1 = 0, c^2 may pass sigma_s^2 by a rounding; its root must stay real."""
    x = torch.ones(1, 1, 1, 1)
    state = SamplerState(PureNoiseAtLast(size), 1.0, 0.5, x, Estimate(x, x), lambda: 0 * x, never)
    torch.testing.assert_close(DDIM(eta=1.0).step(state), 0.5 * x)
