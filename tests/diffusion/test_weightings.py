"""A weighting is a weight on the squared error of x_0: it means the same whatever the network is asked for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from litdiffusion.diffusion import (
    EDM,
    L2,
    P2,
    X0,
    Denoising,
    Epsilon,
    Estimate,
    MinSNR,
    Parametrization,
    Schedule,
    Sigmoid,
    Uniform,
    UniformLevels,
    V,
    Variational,
    Velocity,
    Weighting,
    q_sample,
    schedules,
)
from litdiffusion.diffusion.likelihood import reverse_bits
from small_worlds import ALL_SCHEDULES, TARGETS, affine_denoiser, images, normal, time_from, times

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTINGS = {
    "min_snr": MinSNR(),
    "min_snr_2": MinSNR(2.0),
    "p2": P2(),
    "p2_half": P2(0.5, 0.3),
    "sigmoid": Sigmoid(),
    "sigmoid_bias": Sigmoid(-1.5),
    "variational": Variational(),
}


def with_snr(*snr: float) -> Schedule:
    ratio = torch.tensor(snr, dtype=torch.float64)
    return schedules.Discrete(ratio / (1 + ratio))


def in_steps(count: int, first: int = 1) -> Tensor:
    return torch.arange(first, count + 1).double() / count


def objective(weighting: Weighting) -> Denoising:
    return Denoising(L2(), weighting, UniformLevels())


class Wrong(nn.Module):
    """A network whose estimate of x_0 is ``x0``, whatever it is asked for."""

    def __init__(self, x0: Tensor, schedule: Schedule, target: Parametrization) -> None:
        super().__init__()
        self.x0, self.schedule, self.target = x0, schedule, target

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        steps = (time_from(c_noise, self.schedule, self.target) * self.schedule.num_steps).round()
        alpha, sigma = self.schedule.at(steps / self.schedule.num_steps)
        x_t = x / self.target.coefficients(alpha, sigma).c_in
        return self.target.target(self.x0, (x_t - alpha * self.x0) / sigma, alpha, sigma)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_one_error_of_the_image_costs_the_same_for_every_target(weighting, make):
    """And it costs its square, times the weight."""
    schedule, t = make(num_steps=30), in_steps(30)
    x0, eps = images(30).double(), normal(30, 1, 4, 4, seed=1, dtype=torch.float64)
    errors = normal(30, 1, 4, 4, seed=2, dtype=torch.float64)
    expected = weighting.x0_weight(schedule, t) * errors.square().mean((1, 2, 3))
    for target in TARGETS.values():
        if target.defined_at_zero_snr or not schedule.has_zero_terminal_snr:
            denoiser = affine_denoiser(schedule, target, "none", Wrong(x0 + errors, schedule, target))
            losses = objective(weighting).losses(denoiser, x0, t, eps)
            torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-12)


def test_p2_is_the_papers():
    """Choi et al., 2204.00227, equation 8: L_simple's weight by (k + SNR)^gamma; gamma = 0 is L_simple."""
    snr = [1e4, 30.0, 1.0, 0.2, 1e-3]
    schedule, t = with_snr(*snr), in_steps(5)
    on_eps = [1 / (0.7 + ratio) ** 1.3 for ratio in snr]
    assert P2(1.3, 0.7)(schedule, t, Epsilon()).flatten().tolist() == pytest.approx(on_eps, rel=1e-9)
    assert P2(0.0)(schedule, t, Epsilon()).flatten().tolist() == pytest.approx([1.0] * 5, rel=1e-9)
    # With gamma = k = 1, the error of v counts the same at every time, scaled by SNR / (1 + SNR)^2.
    on_v = [ratio / (1 + ratio) ** 2 for ratio in snr]
    assert P2()(schedule, t, V()).flatten().tolist() == pytest.approx(on_v, rel=1e-9)


@pytest.mark.parametrize("bias", [-2.0, 0.0, 3.0])
def test_sigmoid_is_a_sigmoid_of_the_log_snr_on_eps(bias):
    """Hoogeboom et al., 2410.19324: sigmoid(bias - log SNR); half where the SNR is e^bias."""
    log_snr = torch.tensor([9.0, bias + 1, bias, -1.0 + min(bias, 0), -8.0], dtype=torch.float64)
    log_snr = log_snr.sort(descending=True).values
    schedule, t = with_snr(*log_snr.exp().tolist()), in_steps(5)
    weights = Sigmoid(bias)(schedule, t, Epsilon()).flatten()
    torch.testing.assert_close(weights, torch.sigmoid(bias - log_snr), rtol=1e-9, atol=0)
    assert 0.5 in [pytest.approx(float(weight)) for weight in weights]


@given(bias=st.floats(-5, 5), log_snr=st.floats(-12, 12))
def test_sigmoid_is_a_smooth_min_snr(bias, log_snr):
    """SNR gamma / (SNR + gamma), gamma = e^bias: below both SNR and gamma, and at least half of the smaller."""
    schedule, t, gamma = with_snr(math.exp(log_snr)), times(1.0), math.exp(bias)
    soft, hard = (float(w.x0_weight(schedule, t)) for w in (Sigmoid(bias), MinSNR(gamma)))
    assert hard / 2 <= soft * (1 + 1e-9)
    assert soft <= hard * (1 + 1e-9)
    snr = float(schedule.log_snr(t).exp())
    assert soft == pytest.approx(snr * gamma / (snr + gamma), rel=1e-7)


@pytest.mark.parametrize("name", ["linear", "vp_linear", "flow", "ve"])
def test_variational_is_the_bounds_kl(name):
    """T / 2 (SNR_{t-1} - SNR_t) |error|^2 is T times KL(q || p) in nats, with beta-tilde as the variance."""
    schedule, t = ALL_SCHEDULES[name](num_steps=50), in_steps(50, first=2)
    x0, eps = images(49).double(), normal(49, 1, 4, 4, seed=1, dtype=torch.float64)
    x_t = q_sample(schedule, x0, t, eps)
    wrong = x0 + normal(49, 1, 4, 4, seed=2, dtype=torch.float64)
    nats = math.log(2) * reverse_bits(schedule, Estimate(wrong, x_t), x0, x_t, t, "beta_tilde")
    for target in (X0(), V(), Velocity()):
        denoiser = affine_denoiser(schedule, target, "none", Wrong(wrong, schedule, target))
        losses = objective(Variational()).losses(denoiser, x0, t, eps)
        torch.testing.assert_close(losses, 50 * nats, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("d", [0.5, 0.3])
def test_uniform_is_edms_weight_under_edms_preconditioning(d):
    """(s^2 + d^2) / (s d)^2 on the error of the denoised image (Karras et al., 2206.00364, table 1)."""
    schedule = schedules.VE(num_steps=30)
    x0, eps, t = images(30).double(), normal(30, 1, 4, 4, seed=1, dtype=torch.float64), in_steps(30)
    net = Wrong(x0 + normal(30, 1, 4, 4, seed=2, dtype=torch.float64), schedule, EDM(d))
    denoiser = affine_denoiser(schedule, EDM(d), "none", net)
    s = schedule.sigma(t)
    error = (denoiser(q_sample(schedule, x0, t, eps), t).x0 - x0).square().mean((1, 2, 3))
    expected = (s**2 + d**2) / (s * d) ** 2 * error
    torch.testing.assert_close(objective(Uniform()).losses(denoiser, x0, t, eps), expected, rtol=1e-6, atol=0)


def test_variational_is_ddpms_equation_8():
    """beta_t^2 / (2 beta-tilde_t (1 - beta_t) (1 - alpha_bar_t)) on eps, with DDPM's sigma^2 = beta-tilde."""
    schedule = schedules.linear(40)
    beta, alpha_bar = schedule.betas[1:], schedule.alphas_cumprod
    beta_tilde = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta
    expected = beta**2 / (2 * beta_tilde * (1 - beta) * (1 - alpha_bar[1:]))
    weights = Variational()(schedule, in_steps(40), Epsilon()).flatten()
    torch.testing.assert_close(weights[1:], 40 * expected, rtol=1e-9, atol=0)
    # At t = 1 the mean is the estimate of x_0 itself, and the variance beta-tilde_2.
    first = Variational().x0_weight(schedule, times(1 / 40))
    torch.testing.assert_close(first, 40 / (2 * beta_tilde[:1]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("name", ["cosine", "sigmoid"])
def test_pure_noise_has_the_weight_of_the_time_before_or_its_share_of_the_bound(weighting, name):
    """Its SNR is 0. At weight 0 the network would learn nothing of where every sampler begins."""
    schedule = ALL_SCHEDULES[name](20, zero_terminal_snr=True)
    weights = weighting.x0_weight(schedule, in_steps(20))
    assert bool(torch.isfinite(weights).all())
    if isinstance(weighting, Variational):
        before = float(schedule.log_snr(times(0.95)).exp())
        assert float(weights[-1]) == pytest.approx(20 / 2 * before)
    else:
        assert float(weights[-1]) == float(weights[-2]) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P2(gamma=-0.1), "gamma=-0.1"),
        (lambda: P2(k=0.0), "k=0.0"),
        (lambda: Denoising(L2(), MinSNR(), UniformLevels(), vlb_weight=0.0), "vlb_weight=0.0"),
        (lambda: Denoising(L2(), MinSNR(), UniformLevels(), label_dropout=1.5), "label_dropout=1.5"),
    ],
)
def test_weights_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
