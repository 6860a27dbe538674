import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import EDM, X0, Epsilon, Parametrization, V, Velocity, schedules
from small_worlds import ALL_SCHEDULES, TARGETS, normal, times

X_0, EPS = normal(1, 3, 4, 5, dtype=torch.float64), normal(1, 3, 4, 5, seed=1, dtype=torch.float64)


def per_image(*values: float) -> Tensor:
    return times(*values)[:, None, None, None]


def read(target: Parametrization, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The image that an output speaks of."""
    c_skip, c_out, _ = target.coefficients(alpha, sigma)
    return c_skip * x_t + c_out * output


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_every_target_gives_back_the_image_at_every_time(make, target):
    schedule = make(num_steps=100)
    t = torch.cat((torch.arange(1, 100).double() / 100, times(1e-3, 0.5005, 1.0)))
    t = t if target.defined_at_zero_snr or not schedule.has_zero_terminal_snr else t[:-1]
    alpha, sigma = schedule.at(t)
    x0, eps = X_0.expand(len(t), -1, -1, -1), EPS.expand(len(t), -1, -1, -1)
    output = target.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(read(target, output, alpha * x0 + sigma * eps, alpha, sigma), x0)


def test_the_targets_are_what_their_names_say():
    alpha, sigma = per_image(0.6), per_image(0.8)
    torch.testing.assert_close(Epsilon().target(X_0, EPS, alpha, sigma), EPS)
    assert torch.equal(X0().target(X_0, EPS, alpha, sigma), X_0)
    torch.testing.assert_close(V().target(X_0, EPS, alpha, sigma), 0.6 * EPS - 0.8 * X_0)
    torch.testing.assert_close(Velocity().target(X_0, EPS, alpha, sigma), EPS - X_0)


@pytest.mark.parametrize("target", [Epsilon(), X0(), V(), Velocity()], ids=lambda t: type(t).__name__)
def test_but_for_edm_the_network_sees_the_noisy_image_itself_and_counts_the_steps(target):
    """The blog's clock: 0 at step 1, T - 1 at step T."""
    assert target.coefficients(0.3, 0.9).c_in == 1
    schedule = schedules.linear(300)
    steps = torch.arange(1, 301).double()
    assert torch.equal(target.c_noise(schedule, steps / 300), steps - 1)


def test_v_is_a_rotation_of_image_and_noise():
    alpha, sigma = schedules.cosine(50).at(torch.arange(51).double() / 50)
    x0, eps = X_0.expand(51, -1, -1, -1), EPS.expand(51, -1, -1, -1)
    x_t, v = (alpha * x0 + sigma * eps)[1:], V().target(x0[1:], eps[1:], alpha[1:], sigma[1:])
    alpha, sigma, x0, eps = alpha[1:], sigma[1:], x0[1:], eps[1:]
    torch.testing.assert_close(alpha * x_t - sigma * v, x0)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps)
    torch.testing.assert_close(x_t.square() + v.square(), x0.square() + eps.square())
    # Near the clean image there is nothing else to predict.
    torch.testing.assert_close(V().target(X_0, EPS, per_image(1.0), per_image(1e-12)), EPS)


def test_v_is_the_derivative_of_x_t_along_the_angle():
    angle, step = per_image(0.7), 1e-6

    def x_at(phi: Tensor) -> Tensor:
        return phi.cos() * X_0 + phi.sin() * EPS

    slope = (x_at(angle + step) - x_at(angle - step)) / (2 * step)
    torch.testing.assert_close(V().target(X_0, EPS, angle.cos(), angle.sin()), slope, rtol=1e-7, atol=1e-9)


def test_velocity_is_the_derivative_of_x_t_along_the_straight_path():
    t, step = per_image(0.7), 1e-6

    def x_at(t: Tensor) -> Tensor:
        return (1 - t) * X_0 + t * EPS

    slope = (x_at(t + step) - x_at(t - step)) / (2 * step)
    torch.testing.assert_close(Velocity().target(X_0, EPS, 1 - t, t), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@given(alpha=st.floats(0.01, 3), sigma=st.floats(0.01, 3), error=st.floats(0.01, 2))
def test_every_target_inverts_at_any_alpha_and_sigma(target, alpha, sigma, error):
    """On no schedule at all, in float32 too; an error of the output is one of x_0 by c_out, as numbers or tensors."""
    numbers = target.coefficients(alpha, sigma)
    alpha, sigma = per_image(alpha), per_image(sigma)
    assert [float(c) for c in target.coefficients(alpha, sigma)] == pytest.approx(list(numbers), rel=1e-12)
    x_t, output = alpha * X_0 + sigma * EPS, target.target(X_0, EPS, alpha, sigma)
    torch.testing.assert_close(read(target, output, x_t, alpha, sigma), X_0, rtol=1e-7, atol=1e-9)
    wrong = read(target, output + error, x_t, alpha, sigma) - X_0
    torch.testing.assert_close(wrong / numbers.c_out, torch.full_like(X_0, error), rtol=1e-6, atol=1e-9)
    single = target.target(X_0.float(), EPS.float(), alpha, sigma)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), output, rtol=1e-4, atol=1e-4)


def test_v_needs_no_unit_variance():
    alpha, sigma = torch.full((1, 1, 1, 1), 0.9), torch.full((1, 1, 1, 1), 2.0)
    x0, eps = X_0.float(), EPS.float()
    output = V().target(x0, eps, alpha, sigma)
    torch.testing.assert_close(read(V(), output, alpha * x0 + sigma * eps, alpha, sigma), x0)


@pytest.mark.parametrize("target", [X0(), V(), Velocity()], ids=["x0", "v", "velocity"])
def test_targets_defined_at_zero_snr_give_the_image_there(target):
    alpha, sigma = per_image(0.0), per_image(1.0)
    assert target.defined_at_zero_snr
    torch.testing.assert_close(read(target, target.target(X_0, EPS, alpha, sigma), EPS, alpha, sigma), X_0)


def test_epsilon_and_edm_are_not_defined_at_zero_snr():
    assert not Epsilon().defined_at_zero_snr
    assert not EDM().defined_at_zero_snr


# ---------------------------------------------------------------------------------------------- EDM


@pytest.mark.parametrize("d", [0.5, 0.2, 1.3])
@pytest.mark.parametrize("s", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_edm_is_the_papers_table_1(s, d):
    """Karras et al., 2206.00364: c_skip, c_out, c_in and c_noise at noise level s, for alpha = 1."""
    schedule, r = schedules.VE(), (s**2 + d**2) ** 0.5
    expected = (d**2 / r**2, s * d / r, 1 / r)
    assert EDM(d).coefficients(1.0, s) == pytest.approx(expected, rel=1e-12)
    t = schedule.time_of(-2 * times(s).log())
    torch.testing.assert_close(EDM(d).c_noise(schedule, t), times(s).log() / 4, rtol=1e-6, atol=1e-9)
    # The target is the paper's (1 / c_out) (y - c_skip (y + n)), equation 8.
    noise, c_skip, c_out = s * EPS, expected[0], expected[1]
    theirs = (X_0 - c_skip * (X_0 + noise)) / c_out
    torch.testing.assert_close(
        EDM(d).target(X_0, EPS, per_image(1.0), per_image(s)), theirs, rtol=1e-6, atol=1e-6
    )


@given(alpha=st.floats(0.01, 3), sigma=st.floats(0.01, 80), d=st.floats(0.05, 3))
def test_edms_input_and_target_have_unit_variance(alpha, sigma, d):
    """For data of variance d^2, on any schedule: both are linear in x_0 and eps, which are independent."""
    target, one, zero = EDM(d), per_image(1.0), per_image(0.0)
    c_in = target.coefficients(alpha, sigma).c_in
    assert (c_in * alpha * d) ** 2 + (c_in * sigma) ** 2 == pytest.approx(1, rel=1e-12)
    of_x0, of_eps = (float(target.target(*pair, alpha, sigma)) for pair in ((one, zero), (zero, one)))
    assert (of_x0 * d) ** 2 + of_eps**2 == pytest.approx(1, rel=1e-6)


@given(alpha=st.floats(0.01, 3), sigma=st.floats(0.01, 3))
def test_edm_on_another_schedule_is_the_papers_at_sigma_by_alpha(alpha, sigma):
    """It applies to x_t / alpha, whose noise is sigma / alpha."""
    here, paper = EDM().coefficients(alpha, sigma), EDM().coefficients(1.0, sigma / alpha)
    assert here.c_skip * alpha == pytest.approx(paper.c_skip, rel=1e-9)
    assert here.c_out == pytest.approx(paper.c_out, rel=1e-9)
    assert here.c_in * alpha == pytest.approx(paper.c_in, rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "vp_cosine", "flow"])
def test_edms_clock_goes_by_the_noise_on_every_schedule(name):
    schedule, t = ALL_SCHEDULES[name](num_steps=50), times(0.1, 0.5, 0.9)
    expected = (schedule.sigma(t) / schedule.alpha(t)).log() / 4
    torch.testing.assert_close(EDM().c_noise(schedule, t), expected)


@pytest.mark.parametrize("d", [0.0, -0.5, float("inf"), float("nan")])
def test_edm_needs_a_positive_standard_deviation(d):
    with pytest.raises(ValueError, match="sigma_data="):
        EDM(d)
