"""IDDPM's learned variance: its objective, and its samples at any times."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    L1,
    L2,
    Clipped,
    Denoising,
    Epsilon,
    Huber,
    MinSNR,
    Preconditioned,
    Uniform,
    UniformLevels,
    V,
    q_sample,
    schedules,
    transition,
)
from litdiffusion.diffusion.likelihood import reverse_bits
from litdiffusion.diffusion.process import learned_log_variance
from small_worlds import (
    ALL_SCHEDULES,
    Affine,
    GaussianData,
    affine_denoiser,
    draws,
    exact_denoiser,
    images,
    normal,
    times,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(30)
T = times(1 / 30, 2 / 30, 0.5, 1)


class Halves(nn.Module):
    """One parameter for the target, one for the variance."""

    learned_variance = True

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.4))
        self.variance = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.cat((self.mean * x, (self.variance * x).tanh()), dim=1)


class FirstHalf(nn.Module):
    """The target of ``Halves``, without a variance."""

    def __init__(self, net: Halves) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.net(x, c_noise)[:, :1]


def gradients(net: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*net.named_parameters(), strict=True)
    found = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("vlb_weight", [0.001, 0.5])
@pytest.mark.parametrize(("loss", "weighting"), [(L2(), Uniform()), (L1(), MinSNR()), (Huber(), Uniform())])
@pytest.mark.parametrize("clip", ["none", "static"])
def test_each_half_learns_from_its_own_term(loss, weighting, vlb_weight, clip):
    """The mean from the simple loss alone, the variance from the bound alone (2102.09672, section 3.1)."""
    net = Halves()
    x0, eps = images(4), normal(4, 1, 4, 4, seed=1)
    denoiser = affine_denoiser(SCHEDULE, V(), clip, net)
    losses = Denoising(loss, weighting, UniformLevels(), vlb_weight).losses(denoiser, x0, T, eps)
    plain = affine_denoiser(SCHEDULE, V(), clip, FirstHalf(net))
    simple = Denoising(loss, weighting, UniformLevels()).losses(plain, x0, T, eps)
    x_t = q_sample(SCHEDULE, x0, T, eps)
    # Of the unclipped estimate, whatever clips the samples.
    bound = reverse_bits(SCHEDULE, affine_denoiser(SCHEDULE, V(), "none", net)(x_t, T), x0, x_t, T)
    torch.testing.assert_close(losses, simple + vlb_weight * 30 * bound)

    ours = gradients(net, losses)
    torch.testing.assert_close(ours["mean"], gradients(net, simple)["mean"])
    torch.testing.assert_close(ours["variance"], vlb_weight * 30 * gradients(net, bound)["variance"])
    # Each would have had something to say to the other half.
    assert abs(float(gradients(net, bound)["mean"])) > 1e-3
    assert float(ours["variance"]) != 0


@pytest.mark.parametrize("t", [1 / 30, 2 / 30, 1.0])
def test_the_bound_is_least_at_the_variance_that_fits(t):
    """Descending it finds where between the two ends log E|x_s - mean|^2 lies, at every t but the first."""
    data = GaussianData(SCHEDULE, mean=0.0, std=0.4)
    each, s = torch.full((2000,), t, dtype=torch.float64), float(SCHEDULE.previous(times(t)))
    x0 = 0.4 * normal(2000, 1, 1, 1, dtype=torch.float64)
    x_t = q_sample(SCHEDULE, x0, each, normal(2000, 1, 1, 1, seed=1, dtype=torch.float64))
    estimate = exact_denoiser(data, fraction=0.5)(x_t, each)
    fractions = torch.linspace(0, 1, 41, dtype=torch.float64)
    bounds = [
        reverse_bits(
            SCHEDULE, replace(estimate, variance=torch.full_like(x_t, fraction)), x0, x_t, each
        ).mean()
        for fraction in fractions.tolist()
    ]
    best = float(fractions[int(torch.stack(bounds).argmin())])
    if s == 0:
        wanted = data.posterior_variance(t)
    else:
        step = transition(SCHEDULE, t, s)
        gain = step.alpha_s * step.v / step.sigma_t**2
        wanted = step.posterior_variance + gain**2 * data.posterior_variance(t)
    low, high = (
        float(learned_log_variance(SCHEDULE, torch.full((1, 1, 1, 1), end).double(), t, s))
        for end in (0.0, 1.0)
    )
    exact = (torch.tensor(wanted).log().item() - low) / (high - low)
    assert best == pytest.approx(min(max(exact, 0), 1), abs=0.06)


def test_the_second_half_of_the_channels_is_the_variance_from_minus_1_to_1():
    net = Halves()
    x, t = normal(2, 1, 4, 4), times(1 / 30, 1)
    target, fraction = affine_denoiser(SCHEDULE, V(), net=net).core.output(x, t)
    torch.testing.assert_close(target, 0.4 * x)
    torch.testing.assert_close(fraction, ((0.3 * x).tanh() + 1) / 2)
    estimate = affine_denoiser(SCHEDULE, V(), net=net)(x, t)
    assert torch.equal(estimate.variance, fraction)
    assert affine_denoiser(SCHEDULE, V(), net=Affine())(x, t).variance is None


@pytest.mark.parametrize(("fraction", "variance"), [(0.0, "beta_tilde"), (1.0, "beta")])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
@pytest.mark.parametrize("name", ["cosine", "flow", "ve"])
def test_the_ends_of_the_learned_range_are_beta_tilde_and_beta(name, num_steps, fraction, variance):
    """With fewer steps too, where both are those of the longer steps."""
    data = GaussianData(ALL_SCHEDULES[name](num_steps=30))
    x_T = normal(3, 1, 1, 1, dtype=torch.float64)
    denoiser = exact_denoiser(data, fraction=fraction)
    learned, fixed = (
        [moment.x for moment in DDPM(num_steps, kind).steps(denoiser, x_T, draws(3, seed=7))]
        for kind in ("learned", variance)
    )
    torch.testing.assert_close(learned, fixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_between_the_ends_the_logarithm_is_interpolated(fraction):
    for t, s in ((1.0, 29 / 30), (1.0, 11 / 30), (0.4, 0.1), (0.431, 0.25), (2 / 30, 1 / 30)):
        step = transition(SCHEDULE, t, s)
        expected = step.v**fraction * step.posterior_variance ** (1 - fraction)
        place = torch.full((1, 1, 1, 1), fraction, dtype=torch.float64)
        assert float(learned_log_variance(SCHEDULE, place, t, s).exp()) == pytest.approx(expected, rel=1e-12)
    # One step from the image, where beta-tilde is 0, the lower end is beta-tilde_2.
    expected = transition(SCHEDULE, 1 / 30, 0.0).v ** fraction
    expected *= transition(SCHEDULE, 2 / 30, 1 / 30).posterior_variance ** (1 - fraction)
    assert float(learned_log_variance(SCHEDULE, place, 1 / 30, 0.0).exp()) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("name", ALL_SCHEDULES)
@pytest.mark.parametrize("std", [0.2, 1.0])
@pytest.mark.parametrize("num_steps", [4, 30])
def test_the_right_fraction_makes_ancestral_sampling_of_a_gaussian_exact(name, std, num_steps):
    """p(x_s | x_t) of Gaussian data is normal: with its variance, mean and variance stay exact at any times."""
    data = GaussianData(ALL_SCHEDULES[name](num_steps=30), std=std)
    sampler = DDPM(num_steps, "learned")
    # x_s = A x_t + b + c z, read off at three points.
    mean, spread = data.mean_at(1.0), data.variance_at(1.0)
    for t, s in pairwise(sampler.times(data.schedule)[:-1]):
        step = transition(data.schedule, t, s)
        m = step.alpha_s * step.v / step.sigma_t**2
        exact = torch.tensor(step.posterior_variance + m**2 * data.posterior_variance(t))
        low, high = torch.tensor(step.posterior_variance).log(), torch.tensor(step.v).log()
        fraction = float((exact.double().log() - low) / (high - low))

        def at(x: float, z: float, t: float = t, s: float = s, fraction: float = fraction) -> float:
            x_t = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
            return float(data.step(sampler, x_t, t, s, lambda: torch.full_like(x_t, z), fraction))

        b = at(0, 0)
        A, c = at(1, 0) - b, at(0, 1) - b
        mean, spread = A * mean + b, A**2 * spread + c**2
        assert mean == pytest.approx(data.mean_at(s), abs=1e-9)
        assert spread == pytest.approx(data.variance_at(s), rel=1e-5)


def test_a_learned_variance_needs_a_network_that_gives_one():
    with pytest.raises(ValueError, match="variance=learned: this network does not learn its variance"):
        DDPM(5, "learned").require_support(affine_denoiser(SCHEDULE, V()))


def test_samplers_without_noise_ignore_the_learned_variance():
    plain, learned = (
        affine_denoiser(SCHEDULE, V(), net=FirstHalf(Halves())),
        affine_denoiser(SCHEDULE, V(), net=Halves()),
    )
    x_T = normal(2, 1, 4, 4)
    assert torch.equal(DDIM(7).sample(learned, x_T, draws(2)), DDIM(7).sample(plain, x_T, draws(2)))


def test_twice_the_channels_go_through_the_denoiser_in_colour():
    net = Halves()
    net.forward = lambda x, c_noise: torch.cat((0.4 * x, 0.1 * x), dim=1)
    denoiser = Clipped(Preconditioned(net, SCHEDULE, Epsilon(), 3, 4))
    assert denoiser(normal(2, 3, 4, 4), times(1 / 30, 1)).variance.shape == (2, 3, 4, 4)
    assert DDPM(5, "learned").sample(denoiser, normal(2, 3, 4, 4), draws(2)).shape == (2, 3, 4, 4)
