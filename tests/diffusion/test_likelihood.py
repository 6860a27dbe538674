import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from litdiffusion.diffusion import (
    EDM,
    X0,
    Denoiser,
    Epsilon,
    Estimate,
    Guided,
    Labelled,
    Parametrization,
    Preconditioned,
    Schedule,
    V,
    q_sample,
    schedules,
    transition,
)
from litdiffusion.diffusion.likelihood import (
    Variance,
    bound_term,
    decoder_log_prob,
    normal_kl,
    prior_bits,
    reverse_bits,
)
from small_worlds import (
    ALL_SCHEDULES,
    SCHEDULES,
    Affine,
    Bound,
    GaussianData,
    Oracle,
    Spy,
    affine_denoiser,
    normal,
    time_from,
    times,
    variational_bound,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANCE_PRESERVING = {name: make for name, make in ALL_SCHEDULES.items() if name not in ("flow", "ve")}

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
BIN = 2 / 255


def on_levels(*shape: int, seed: int = 0) -> Tensor:
    """Images of 8-bit pixels, in float64."""
    return LEVELS[torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))]


def image(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


# ---------------------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-7.0, -1.003, -1.0, -0.999, -0.502, 0.0, 0.0039, 0.33, 1.0, 1.5])
def test_the_decoder_sums_to_1_and_is_finite_everywhere(mean, dtype):
    scales = torch.tensor([1e-4, 1e-3, 0.007, 0.02, 0.3, 1.0, 30.0], dtype=dtype)
    x0 = LEVELS.to(dtype).expand(len(scales), 256)[:, :, None, None]
    means = torch.full_like(x0, mean, requires_grad=True)
    log_scales = scales.log()[:, None, None, None].expand_as(x0).clone().requires_grad_()
    log_p = decoder_log_prob(x0, means, log_scales)
    assert log_p.dtype == dtype
    assert bool(torch.isfinite(log_p).all())
    sums = log_p.detach().double().exp().flatten(1).sum(1)
    atol = 3e-7 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=atol)
    for gradient in torch.autograd.grad(log_p.sum(), (means, log_scales)):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("level", [0, 1, 77, 128, 254, 255])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.007), (-1.0, 0.02), (0.98, 0.004), (0.3, 2.0)])
def test_the_decoder_is_the_mass_of_its_bin(level, mean, scale):
    """Some of these bins are 500 standard deviations away."""
    mpmath.mp.dps = 60
    edges = [
        -mpmath.inf if level == 0 else (mpmath.mpf(2 * level - 1) / 255 - 1 - mean) / scale,
        mpmath.inf if level == 255 else (mpmath.mpf(2 * level + 1) / 255 - 1 - mean) / scale,
    ]
    tails = [mpmath.erfc(abs(edge) / mpmath.sqrt(2)) / 2 for edge in edges]
    same_side = edges[0] > 0 or edges[1] < 0
    mass = abs(tails[0] - tails[1]) if same_side else 1 - tails[0] - tails[1]
    found = decoder_log_prob(image(float(LEVELS[level])), image(mean), image(math.log(scale)))
    assert float(found) == pytest.approx(float(mpmath.log(mass)), rel=1e-9)


# ---------------------------------------------------------------------------------------------- the parts


def test_the_divergence_of_two_normals_is_torchs():
    mean1, mean2 = normal(50, dtype=torch.float64), normal(50, seed=1, dtype=torch.float64)
    log1, log2 = normal(50, seed=2, dtype=torch.float64), normal(50, seed=3, dtype=torch.float64)
    expected = kl_divergence(Normal(mean1, (log1 / 2).exp()), Normal(mean2, (log2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected)


def test_a_small_divergence_survives_float32():
    """KL of N(0, 1) from N(0, e^d) is d^2 / 4 + O(d^3)."""
    d = torch.tensor([1e-3, -1e-3, 3e-4])
    zero = torch.zeros(3)
    torch.testing.assert_close(normal_kl(zero, d, zero, zero), d.square() / 4, rtol=0.05, atol=0)
    shift = torch.full((3,), 1e-5)
    torch.testing.assert_close(normal_kl(shift, zero, zero, zero), shift.square() / 2)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 30])
def test_the_prior_term_is_how_far_the_last_image_is_from_pure_noise(make, num_steps):
    schedule, x0 = make(num_steps=num_steps), on_levels(3, 2, 4, 4)
    alpha, sigma = schedule.at(1.0)
    prior = Normal(torch.zeros_like(x0), schedule.init_noise_sigma)
    nats = kl_divergence(Normal(alpha * x0, sigma), prior).mean((1, 2, 3))
    torch.testing.assert_close(prior_bits(schedule, x0), nats / math.log(2))


# ---------------------------------------------------------------------------------------------- Gaussian data

ROUGH = 5
"""Steps so few that x_1 is much noisier than a bin is wide: then bins cost nothing."""


class GaussianNet(nn.Module):
    """The exact denoiser of ``GaussianData``, and the exact variance of q(x_s | x_t) as a learned one."""

    learned_variance = True

    def __init__(self, data: GaussianData, target: Parametrization) -> None:
        super().__init__()
        self.data, self.target = data, target

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        schedule = self.data.schedule
        # Which step it is, exactly: EDM's clock is log(sigma / alpha) / 4 in float32.
        step = round(float(time_from(c_noise[:1], schedule, self.target)) * schedule.num_steps)
        t = step / schedule.num_steps
        low, high = bounds_of_variance(schedule, step)
        fraction = math.log(self.reverse_variance(step) / low) / math.log(high / low)
        alpha, sigma = schedule.at(t)
        estimate = self.data.estimate(x / self.target.coefficients(alpha, sigma).c_in, t)
        output = self.target.target(estimate.x0, estimate.eps, alpha, sigma)
        return torch.cat((output, torch.full_like(output, 2 * fraction - 1)), dim=1)

    def reverse_variance(self, step: int) -> float:
        """Of q(x_s | x_t), where x_t = a x_s + sqrt(v) noise, and x_s has variance V_s: V_s v / V_t."""
        T, data = self.data.schedule.num_steps, self.data
        earlier = data.variance_at((step - 1) / T)
        return earlier * step_variance(data.schedule, step) / data.variance_at(step / T)


def step_variance(schedule: Schedule, step: int) -> float:
    """beta_i."""
    return transition(schedule, step / schedule.num_steps, (step - 1) / schedule.num_steps).v


def bounds_of_variance(schedule: Schedule, step: int) -> tuple[float, float]:
    """beta-tilde_i (at i = 1 beta-tilde_2) and beta_i."""
    up, T = max(step, 2), schedule.num_steps
    low = step_variance(schedule, up) * (schedule.at((up - 1) / T)[1] / schedule.at(up / T)[1]) ** 2
    return low, step_variance(schedule, step)


def gaussian_denoiser(data: GaussianData, target: Parametrization | None = None) -> Denoiser:
    target = target or X0()
    return Preconditioned(GaussianNet(data, target), data.schedule, target, 1, 1)


def expected_term(
    data: GaussianData,
    step: int,
    variance: Variance,
    nodes: int = 3,
    target: Parametrization | None = None,
) -> float:
    """E[L_{i-1}] over x_0 and x_t in nats, by Gauss-Hermite quadrature: exact for 3 nodes, where L is quadratic."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    z0, z1 = (grid.ravel() for grid in np.meshgrid(z, z))
    terms = bound_term(
        gaussian_denoiser(data, target),
        image(*(data.mean + data.std * z0)),
        times(*[step / data.schedule.num_steps] * nodes**2),
        image(*z1),
        variance,
    )
    return float(terms @ torch.from_numpy(np.outer(weights, weights).ravel())) * math.log(2)


def expected_prior(data: GaussianData) -> float:
    """E[L_T] in nats: L_T is quadratic in x_0, so it is enough to take it one standard deviation on either side."""
    x0 = image(data.mean - data.std, data.mean + data.std)
    return float(prior_bits(data.schedule, x0).mean()) * math.log(2)


def far_from_prior(data: GaussianData) -> float:
    """KL of x_1 from the noise that sampling begins with, N(0, I) but for VE."""
    prior = data.schedule.init_noise_sigma**2
    mean, ratio = data.mean_at(1.0), data.variance_at(1.0) / prior
    return (mean**2 / prior + ratio - 1 - math.log(ratio)) / 2


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_expected_terms_have_their_closed_form(make, variance):
    """(log p/q + q/p - 1 + c^2 Var(x_0 | x_t) / p) / 2, with c the weight of x_0 in the posterior mean."""
    data = GaussianData(make(num_steps=40), mean=0.3, std=0.5)
    schedule, net = data.schedule, GaussianNet(data, X0())
    for i in (2, 3, 40):
        q, v = bounds_of_variance(schedule, i)
        p = {"beta": v, "beta_tilde": q, "learned": net.reverse_variance(i)}[variance]
        c = schedule.at((i - 1) / 40)[0] * v / schedule.at(i / 40)[1] ** 2
        expected = (math.log(p / q) + q / p - 1 + c**2 * data.posterior_variance(i / 40) / p) / 2
        assert expected_term(data, i, variance) == pytest.approx(expected, rel=1e-7), i
        if not schedule.has_zero_terminal_snr:
            edm = expected_term(data, i, variance, target=EDM())
            assert edm == pytest.approx(expected, rel=1e-6), i
        if variance == "learned":
            assert expected == pytest.approx(math.log(p / q) / 2)  # the law of total variance


@pytest.mark.parametrize("std", [0.1, 1.5])
@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_with_the_exact_variance_no_step_loses_anything(make, std):
    """Prior and steps together: I(x_0; x_{1/T}) + KL( q(x_1) || prior ), whatever T."""
    for num_steps in (2, 12):
        data = GaussianData(make(num_steps=num_steps), mean=-0.2, std=std)
        steps = sum(expected_term(data, i, "learned") for i in range(2, num_steps + 1))
        alpha, sigma = data.schedule.at(1 / num_steps)
        information = math.log1p((alpha * std / sigma) ** 2) / 2
        assert expected_prior(data) + steps == pytest.approx(information + far_from_prior(data), abs=1e-9)


@pytest.mark.parametrize("make", VARIANCE_PRESERVING.values(), ids=VARIANCE_PRESERVING)
def test_beta_is_exact_for_data_of_unit_variance(make):
    data = GaussianData(make(num_steps=30), mean=0.3, std=1.0)
    for i in (2, 15, 30):
        assert GaussianNet(data, X0()).reverse_variance(i) == pytest.approx(
            step_variance(data.schedule, i), rel=1e-9
        )
        exact = expected_term(data, i, "learned")
        assert expected_term(data, i, "beta") == pytest.approx(exact, rel=1e-9)
        assert expected_term(data, i, "beta_tilde") > exact


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_beta_tilde_is_exact_for_a_point_mass(make, level):
    """Every step costs nothing; the decoder costs what its scale spills into other bins."""
    data = GaussianData(make(num_steps=12), mean=float(LEVELS[level]), std=0.0)
    denoiser = Preconditioned(Oracle(image(data.mean), data.schedule, X0()), data.schedule, X0(), 1, 1)
    bound = variational_bound(denoiser, image(data.mean), lambda t: normal(1, 1, 1, 1).double(), "beta_tilde")
    torch.testing.assert_close(
        bound.terms[:, 1:], torch.zeros(1, 11, dtype=torch.float64), rtol=0, atol=1e-12
    )
    scale = bounds_of_variance(data.schedule, 1)[0] ** 0.5
    spilled = math.erfc(BIN / 2 / scale / 2**0.5) / (2 if level in (0, 255) else 1)
    decoder = -math.log1p(-spilled) / math.log(2)
    assert float(bound.terms[0, 0]) == pytest.approx(decoder, rel=1e-7)
    assert float(bound.total) == pytest.approx(far_from_prior(data) / math.log(2) + decoder, rel=1e-7)


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_the_whole_bound_is_the_entropy_of_gaussian_data(make):
    """With the exact variance: h(x_0) in units of a bin, and what x_1 lacks of pure noise. With any other, more."""
    data = GaussianData(make(num_steps=ROUGH), mean=0.1, std=0.12)
    entropy = math.log(2 * math.pi * math.e * data.std**2) / 2 - math.log(BIN)
    totals = {
        variance: expected_prior(data)
        + expected_term(data, 1, variance, nodes=24)
        + sum(expected_term(data, i, variance) for i in range(2, ROUGH + 1))
        for variance in ("learned", "beta", "beta_tilde")
    }
    assert totals["learned"] == pytest.approx(entropy + far_from_prior(data), abs=1e-6)
    assert min(totals["beta"], totals["beta_tilde"]) > totals["learned"] + 0.01


# ---------------------------------------------------------------------------------------------- the peer


class Doubled(Affine):
    """An ``Affine`` that learns its variance, anywhere between beta-tilde and beta and a little beyond."""

    learned_variance = True

    def forward(self, x: Tensor, c_noise: Tensor, self_cond: Tensor | None = None) -> Tensor:
        return torch.cat((super().forward(x, c_noise, self_cond), 1.2 * torch.sin(7 * x)), dim=1)


def iddpm_normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (
        -1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + ((mean1 - mean2) ** 2) * torch.exp(-logvar2)
    )


def iddpm_decoder(x, means, log_scales):
    """discretized_gaussian_log_likelihood, with the exact distribution function for its tanh."""
    cdf = Normal(torch.zeros_like(x), 1.0).cdf
    centered_x, inv_stdv = x - means, torch.exp(-log_scales)
    cdf_plus = cdf(inv_stdv * (centered_x + 1.0 / 255.0))
    cdf_min = cdf(inv_stdv * (centered_x - 1.0 / 255.0))
    middle = torch.log((cdf_plus - cdf_min).clamp(min=1e-12))
    last = torch.log((1.0 - cdf_min).clamp(min=1e-12))
    return torch.where(x < -0.999, torch.log(cdf_plus.clamp(min=1e-12)), torch.where(x > 0.999, last, middle))


def iddpm_bound(net: nn.Module, betas: np.ndarray, x0: Tensor, noise, kind: str) -> Bound:
    """GaussianDiffusion.calc_bpd_loop of improved-diffusion, for epsilon and clip_denoised, in float64."""
    alphas_cumprod = np.cumprod(1.0 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    posterior_log_variance_clipped = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    coef1 = betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    coef2 = (1.0 - alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod)
    terms = []
    for i in range(len(betas)):
        t = torch.full((len(x0),), i)
        x_t = np.sqrt(alphas_cumprod[i]) * x0 + np.sqrt(1.0 - alphas_cumprod[i]) * noise(t + 1)
        output = net(x_t, t)
        if kind == "learned":
            output, var_values = output.chunk(2, dim=1)
            fraction = (var_values + 1) / 2
            min_log, max_log = posterior_log_variance_clipped[i], np.log(betas)[i]
            log_variance = fraction * max_log + (1 - fraction) * min_log
        elif kind == "beta":
            log_variance = torch.full_like(x0, np.log(np.append(posterior_variance[1], betas[1:]))[i])
        else:
            log_variance = torch.full_like(x0, posterior_log_variance_clipped[i])
        pred = np.sqrt(1.0 / alphas_cumprod[i]) * x_t - np.sqrt(1.0 / alphas_cumprod[i] - 1) * output
        pred = pred.clamp(-1, 1)
        mean, true_mean = coef1[i] * pred + coef2[i] * x_t, coef1[i] * x0 + coef2[i] * x_t
        true_log = torch.full_like(x0, posterior_log_variance_clipped[i])
        kl = iddpm_normal_kl(true_mean, true_log, mean, log_variance)
        nll = -iddpm_decoder(x0, mean, 0.5 * log_variance)
        terms.append((nll if i == 0 else kl).mean((1, 2, 3)) / np.log(2.0))
    zero = torch.zeros_like(x0)
    log_1 = torch.full_like(x0, np.log(1.0 - alphas_cumprod[-1]))
    prior = iddpm_normal_kl(np.sqrt(alphas_cumprod[-1]) * x0, log_1, zero, zero)
    return Bound(prior.mean((1, 2, 3)) / np.log(2.0), torch.stack(terms, dim=1))


@pytest.mark.parametrize("kind", ["beta", "beta_tilde", "learned"])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_the_bound_is_improved_diffusions(make, kind):
    schedule, net = make(10), Doubled().double() if kind == "learned" else Affine().double()
    x0 = on_levels(3, 2, 4, 4)
    x0[0, 0, 0] = torch.tensor([-1, 1, -1, 1])  # the bins that reach to infinity
    x0[2] += 0.003 * normal(2, 4, 4, dtype=torch.float64)  # and what lies between two levels

    def noise(t: Tensor) -> Tensor:
        return normal(3, 2, 4, 4, seed=round(float(t[0])), dtype=torch.float64)

    theirs = iddpm_bound(net, schedule.betas.numpy(), x0, noise, kind)
    ours = variational_bound(affine_denoiser(schedule, Epsilon(), net=net), x0, lambda t: noise(10 * t), kind)
    torch.testing.assert_close(ours.prior, theirs.prior)
    torch.testing.assert_close(ours.terms, theirs.terms)
    torch.testing.assert_close(ours.total, theirs.prior + theirs.terms.sum(1))


# ---------------------------------------------------------------------------------------------- what is asked


def seeded_noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
    return lambda t: torch.cat(
        [normal(1, *shape[1:], seed=round(7 * float(t[0]))) for _ in range(shape[0])]
    ).to(dtype)


def test_the_network_is_called_once_for_each_time_on_all_images():
    net, x0 = Spy(self_condition=False), on_levels(3, 1, 4, 4).float()
    denoiser = affine_denoiser(schedules.cosine(7), V(), net=net)
    bound = variational_bound(denoiser, x0, seeded_noise(x0.shape), "beta")
    assert bound.terms.shape == (3, 7)
    assert [call.c_noise.tolist() for call in net.calls] == [[step] * 3 for step in range(7)]
    alone = variational_bound(denoiser, x0[1:2], seeded_noise((1, 1, 4, 4)), "beta")
    torch.testing.assert_close(bound.terms[1:2], alone.terms)
    torch.testing.assert_close(bound.total[1:2], alone.total)


def test_images_at_times_of_their_own_have_the_terms_of_those_times():
    x0, steps = on_levels(4, 1, 4, 4), torch.tensor([5, 1, 30, 1])
    denoiser = affine_denoiser(schedules.cosine(30), V(), net=Affine().double())
    eps = normal(4, 1, 4, 4, dtype=torch.float64)
    bound = variational_bound(denoiser, x0, lambda t: eps, "beta_tilde")
    terms = bound_term(denoiser, x0, steps.double() / 30, eps, "beta_tilde")
    torch.testing.assert_close(terms, bound.terms[torch.arange(4), steps - 1])


def test_a_self_conditioned_network_is_given_its_own_estimate():
    net, x0 = Spy(), on_levels(2, 1, 4, 4).float()
    denoiser = affine_denoiser(schedules.cosine(7), V(), net=net)
    terms = bound_term(denoiser, x0, times(3 / 7, 1), normal(2, 1, 4, 4), "beta")
    first, second = net.calls
    assert (first.self_cond, first.grad_enabled, second.grad_enabled) == (None, False, True)
    own = denoiser(first.x, times(3 / 7, 1)).x0
    assert torch.equal(second.self_cond, own)
    assert terms.requires_grad

    class Fed(Affine):
        def forward(self, x, c_noise, self_cond=None):
            return super().forward(x, c_noise, own)

    fed = affine_denoiser(schedules.cosine(7), V(), net=Fed())
    torch.testing.assert_close(bound_term(fed, x0, times(3 / 7, 1), normal(2, 1, 4, 4), "beta"), terms)


class Classes(Affine):
    """An ``Affine`` whose gain goes by the label, and which counts its calls."""

    num_classes = 3
    calls = 0

    def forward(self, x, c_noise, self_cond=None, labels=None):
        self.calls += 1
        return (1 + labels[:, None, None, None]) * super().forward(x, c_noise, self_cond) / 4


@pytest.mark.parametrize("self_condition", [False, True])
def test_the_bound_of_a_guided_denoiser_is_that_of_what_it_draws(self_condition):
    """1 + label is linear: guidance of scale 3 from the label "none" (3) to 1 is the label 3 + 3 (1 - 3) = -3."""
    net, x0 = Classes(self_condition), on_levels(2, 1, 4, 4).float()
    denoiser = affine_denoiser(schedules.cosine(7), V(), net=net)
    labels = torch.tensor([1, 1])
    guided = denoiser.with_core(lambda core: Guided(Labelled(core, labels), core, scale=3.0))
    bound = variational_bound(guided, x0, seeded_noise(x0.shape), "beta")
    assert net.calls == 2 * 7 * (2 if self_condition else 1)

    class Firm(Affine):
        def forward(self, x, c_noise, self_cond=None):
            return -2 * super().forward(x, c_noise, self_cond) / 4

    firm = affine_denoiser(schedules.cosine(7), V(), net=Firm(self_condition))
    torch.testing.assert_close(bound, variational_bound(firm, x0, seeded_noise(x0.shape), "beta"))
    unguided = variational_bound(denoiser, x0, seeded_noise(x0.shape), "beta")
    assert not torch.allclose(bound.total, unguided.total)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
@pytest.mark.parametrize(
    "make",
    [*ALL_SCHEDULES.values(), lambda num_steps: schedules.cosine(num_steps, zero_terminal_snr=num_steps > 1)],
    ids=[*ALL_SCHEDULES, "pure_noise"],
)
def test_float32_is_enough_at_any_length(make, num_steps):
    schedule, t = make(num_steps=num_steps), torch.arange(1, num_steps + 1).double() / num_steps
    x0, eps = on_levels(1, 1, 4, 4).expand(num_steps, 1, 4, 4), normal(num_steps, 1, 4, 4)
    denoiser = affine_denoiser(schedule, V())
    for variance in ("beta", "beta_tilde"):
        rough = bound_term(denoiser, x0.float(), t, eps, variance).detach()
        fine = bound_term(denoiser.with_net(Affine().double()), x0, t, eps.double(), variance).detach()
        assert rough.dtype == torch.float32
        assert bool(torch.isfinite(rough).all())
        assert float(rough.min()) >= 0
        torch.testing.assert_close(rough.double().sum(), fine.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_row_at_the_end_and_one_that_is_not_do_not_disturb_each_other(variance):
    """Each is given both terms, and keeps its own, with its gradient."""
    schedule, t = schedules.cosine(30), times(1 / 30, 1, 1 / 30, 2 / 30, 0.5)
    x0, eps = on_levels(5, 1, 4, 4).float(), normal(5, 1, 4, 4)
    denoiser = affine_denoiser(schedule, V(), "none")

    def terms_and_gradients(rows: slice) -> tuple[Tensor, Tensor]:
        image = x0[rows].clone().requires_grad_()
        terms = bound_term(denoiser, image, t[rows], eps[rows], variance)
        return terms.detach(), torch.autograd.grad(terms.sum(), image)[0]

    together = terms_and_gradients(slice(0, 5))
    alone = zip(*(terms_and_gradients(slice(i, i + 1)) for i in range(5)), strict=True)
    for found, wanted in zip(together, alone, strict=True):
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found, torch.cat(wanted))


def test_a_wild_estimate_elsewhere_leaves_the_gradient_at_the_end_finite():
    """So far out, the decoder would find nothing in any bin; but that row has no use for it."""
    schedule, t = schedules.cosine(30), times(1 / 30, 1)
    x0 = on_levels(2, 1, 4, 4)
    guess = (x0 * torch.tensor([1.0, 1e18], dtype=torch.float64)[:, None, None, None]).requires_grad_()
    x_t = q_sample(schedule, x0, t, normal(2, 1, 4, 4, dtype=torch.float64))
    reverse_bits(schedule, Estimate(guess, x_t), x0, x_t, t, "beta").sum().backward()
    assert bool(torch.isfinite(guess.grad).all())


def test_a_learned_variance_that_was_not_learned_is_refused():
    denoiser, x0 = affine_denoiser(schedules.cosine(7), V()), on_levels(2, 1, 4, 4).float()
    with pytest.raises(ValueError, match="variance=learned: this network"):
        bound_term(denoiser, x0, times(1 / 7, 3 / 7), normal(2, 1, 4, 4), "learned")
