import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from peer_schedulers import on_our_tables

from litdiffusion.diffusion import Epsilon, Schedule, posterior, q_sample, renoise, schedules, transition
from litdiffusion.diffusion.process import clipped_posterior_variance
from small_worlds import ALL_SCHEDULES, SCHEDULES, normal, times

BOTH_ENDS = [1, 2, 7, 23, 59, 60]
ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)
names = st.sampled_from(sorted(ALL_SCHEDULES))
moments = st.integers(0, 60).map(lambda i: i / 60) | st.integers(5, 995).map(lambda i: i / 1000)
"""The steps of a schedule of 60, the clean image included, and what lies between them."""


def coefficients(schedule: Schedule, t: float, s: float) -> tuple[float, float, float]:
    """k, m and variance of q(x_s | x_t, x_0) = N(k x_t + m x_0, variance)."""
    k, variance = posterior(schedule, ONE, 0 * ONE, t, s)
    m, _ = posterior(schedule, 0 * ONE, ONE, t, s)
    return float(k), float(m), variance


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_q_sample_has_the_moments_of_q(make):
    schedule, t = make(num_steps=60), times(*(i / 60 for i in BOTH_ENDS), 0.005, 0.444)
    x0 = normal(1, 3, 4, 5).expand(len(t), -1, -1, -1)
    eps = torch.ones(x0.shape)
    up, down = q_sample(schedule, x0, t, eps), q_sample(schedule, x0, t, -eps)  # mean 0 and variance 1
    alpha, sigma = (x.float()[:, None, None, None] for x in (schedule.alpha(t), schedule.sigma(t)))
    torch.testing.assert_close((up + down) / 2, alpha * x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((up - down) / 2, sigma.expand_as(x0), rtol=1e-5, atol=1e-6)


def test_q_sample_starts_at_the_image_and_reads_each_time_of_a_batch():
    schedule = schedules.cosine(60)
    x0, eps = normal(4, 1, 2, 3), normal(4, 1, 2, 3, seed=1)
    t = times(0, 1, 5 / 60, 0)
    x_t = q_sample(schedule, x0, t, eps)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[3], x0[3])
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.equal(x_t[row], q_sample(schedule, x0[row], t[row], eps[row]))
        torch.testing.assert_close(x_t[row], q_sample(schedule, x0[row], float(t[i]), eps[row]))


def test_q_sample_is_float32_under_autocast():
    schedule, x0, eps = schedules.cosine(60), normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    t = times(1 / 60, 1)
    with torch.autocast("cpu", torch.bfloat16):
        x_t = q_sample(schedule, x0, t, eps)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, q_sample(schedule, x0, t, eps))
    half = q_sample(schedule, x0.bfloat16(), t, eps.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_the_posterior_of_one_step_is_ddpms_equations_6_and_7(make):
    schedule = make(num_steps=60)
    betas = schedule.betas
    alphas_cumprod = (1 - betas).cumprod(0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]))
    of_x0 = before.sqrt() * betas / (1 - alphas_cumprod)
    of_x_t = (1 - betas).sqrt() * (1 - before) / (1 - alphas_cumprod)
    beta_tilde = (1 - before) / (1 - alphas_cumprod) * betas
    for t in BOTH_ENDS:
        expected = (float(of_x_t[t - 1]), float(of_x0[t - 1]), float(beta_tilde[t - 1]))
        assert coefficients(schedule, t / 60, (t - 1) / 60) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("num_steps", [60, 20, 6])
def test_the_posterior_of_any_step_is_diffusers(num_steps):
    schedule = schedules.cosine(60)
    scheduler = on_our_tables(DDPMScheduler, schedule, Epsilon(), variance_type="fixed_small")
    scheduler.set_timesteps(num_steps)
    stride = 60 // num_steps
    for t in range(60, stride, -stride):
        variance = float(scheduler._get_variance(t - 1))
        assert coefficients(schedule, t / 60, (t - stride) / 60)[2] == pytest.approx(variance, rel=1e-9)


@given(name=names, times=st.lists(moments, min_size=3, max_size=3, unique=True))
def test_transitions_compose(name, times):
    schedule = ALL_SCHEDULES[name](num_steps=60)
    r, s, t = sorted(times)
    whole, late, early = transition(schedule, t, r), transition(schedule, t, s), transition(schedule, s, r)
    assert whole.a == pytest.approx(late.a * early.a, rel=1e-12)
    assert whole.v == pytest.approx(late.v + late.a**2 * early.v, rel=1e-9)


@given(name=names, times=st.lists(moments, min_size=3, max_size=3, unique=True))
def test_posteriors_compose(name, times):
    """From t to r at once, or by way of s: q(x_r | x_t, x_0) is the same normal distribution."""
    schedule = ALL_SCHEDULES[name](num_steps=60)
    r, s, t = sorted(times)
    k, m, variance = coefficients(schedule, t, r)
    (k_late, m_late, variance_late), (k_early, m_early, variance_early) = (
        coefficients(schedule, t, s),
        coefficients(schedule, s, r),
    )
    assert k == pytest.approx(k_early * k_late, rel=1e-9, abs=1e-15)
    assert m == pytest.approx(m_early + k_early * m_late, rel=1e-9)
    assert variance == pytest.approx(variance_early + k_early**2 * variance_late, rel=1e-9, abs=1e-15)


@given(name=names, times=st.lists(moments, min_size=3, max_size=3, unique=True))
def test_renoising_is_noising_at_once(name, times):
    """x_t from x_s by ``renoise`` has the mean and variance of q(x_t | x_0), if x_s has those of q(x_s | x_0)."""
    schedule = ALL_SCHEDULES[name](num_steps=60)
    _, s, t = sorted(times)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.at(s), schedule.at(t)
    gain = float(renoise(schedule, ONE, s, t, 0 * ONE))
    spread = float(renoise(schedule, 0 * ONE, s, t, ONE))
    assert gain * alpha_s == pytest.approx(alpha_t, rel=1e-12)
    assert gain**2 * sigma_s**2 + spread**2 == pytest.approx(sigma_t**2, rel=1e-12)


@given(name=names, times=st.lists(moments, min_size=2, max_size=2, unique=True))
def test_the_posterior_marginalises_to_q_and_obeys_bayes(name, times):
    options = {"zero_terminal_snr": True} if name in SCHEDULES else {}
    schedule = ALL_SCHEDULES[name](num_steps=60, **options)
    s, t = sorted(times)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.at(s), schedule.at(t)
    k, m, variance = coefficients(schedule, t, s)
    # Over x_t ~ q(x_t | x_0), it is q(x_s | x_0).
    assert k * alpha_t + m == pytest.approx(alpha_s, rel=1e-9)
    assert k**2 * sigma_t**2 + variance == pytest.approx(sigma_s**2, rel=1e-9, abs=1e-15)
    # The covariance of x_s and x_t given x_0 is that of the forward process.
    a, v = transition(schedule, t, s)[:2]
    assert k * sigma_t**2 == pytest.approx(a * sigma_s**2, rel=1e-9, abs=1e-15)
    # Precisions add: q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0).
    if s > 0:
        assert 1 / variance == pytest.approx(a**2 / v + 1 / sigma_s**2, rel=1e-9)
    else:
        assert (k, variance) == (0, 0)
        assert m == pytest.approx(1)


def test_from_pure_noise_only_the_estimate_counts():
    schedule = schedules.linear(60, zero_terminal_snr=True)
    k, m, variance = coefficients(schedule, 1.0, 0.5)
    assert k == 0
    assert m == pytest.approx(schedule.at(0.5)[0])
    assert variance == pytest.approx(schedule.at(0.5)[1] ** 2)


@pytest.mark.parametrize(("t", "s"), [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1), (0.0, 0.0)])
def test_times_out_of_order_are_refused(t, s):
    with pytest.raises(ValueError, match=f"0 <= s < t <= 1, not s={s}, t={t}"):
        transition(schedules.linear(60), t, s)


@given(name=names, steps=st.lists(st.integers(1, 60), min_size=1, max_size=6), end=st.booleans())
def test_a_time_for_each_image_gives_the_numbers_of_each_time(name, steps, end):
    """For tensors of times, as the bound takes them, all numbers are those of the plain times, in float64."""
    schedule = ALL_SCHEDULES[name](num_steps=60)
    t = times(*(i / 60 for i in steps))
    s = 0 * t if end else schedule.previous(t)
    batch, clipped = transition(schedule, t, s), clipped_posterior_variance(schedule, t, s)
    assert clipped.dtype == batch.v.dtype == torch.float64
    for i, (time, earlier) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        one = transition(schedule, time, earlier)
        assert [float(x[i]) for x in batch] == pytest.approx(list(one), rel=1e-12)
        assert float(clipped[i]) == pytest.approx(
            clipped_posterior_variance(schedule, time, earlier), rel=1e-12
        )


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_the_variance_at_the_last_step_is_beta_tilde_2(make):
    """As in DDPM's and IDDPM's code: never 0, whose logarithm the bound would ask for."""
    schedule = make(num_steps=60)
    second = transition(schedule, 2 / 60, 1 / 60).posterior_variance
    assert transition(schedule, 1 / 60, 0.0).posterior_variance == 0
    for t in (1 / 60, 2 / 60, 0.5, 0.123):
        assert clipped_posterior_variance(schedule, t, 0.0) == second
    later = transition(schedule, 0.5, 0.12).posterior_variance
    assert clipped_posterior_variance(schedule, 0.5, 0.12) == later
    single = make(num_steps=1)
    assert clipped_posterior_variance(single, 1.0, 0.0) == transition(single, 1.0, 0.0).v
