import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import X0, Epsilon, Target, V, Velocity, schedules
from small_worlds import ALL_SCHEDULES, normal

TARGETS = [Epsilon(), X0(), V(), Velocity()]
X_0, EPS = normal(1, 3, 4, 5, dtype=torch.float64), normal(1, 3, 4, 5, seed=1, dtype=torch.float64)


def per_image(table: Tensor) -> Tensor:
    return table[:, None, None, None]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_every_target_gives_back_the_image_at_every_time(make, target):
    schedule = make(100)
    count = 100 if target.defined_at_zero_snr or not schedule.has_zero_terminal_snr else 99
    alpha, sigma = per_image(schedule.alpha[1 : count + 1]), per_image(schedule.sigma[1 : count + 1])
    x0, eps = X_0.expand(count, -1, -1, -1), EPS.expand(count, -1, -1, -1)
    output = target.of(x0, eps, alpha, sigma)
    torch.testing.assert_close(target.x0(output, alpha * x0 + sigma * eps, alpha, sigma), x0)


def test_the_targets_are_what_their_names_say():
    alpha, sigma = torch.tensor([0.6, 0.8], dtype=torch.float64).view(2, 1, 1, 1, 1)
    assert torch.equal(Epsilon().of(X_0, EPS, alpha, sigma), EPS)
    assert torch.equal(X0().of(X_0, EPS, alpha, sigma), X_0)
    torch.testing.assert_close(V().of(X_0, EPS, alpha, sigma), 0.6 * EPS - 0.8 * X_0)


def test_v_is_a_rotation_of_image_and_noise():
    schedule = schedules.cosine(50)
    alpha, sigma = per_image(schedule.alpha), per_image(schedule.sigma)
    x0, eps = X_0.expand(51, -1, -1, -1), EPS.expand(51, -1, -1, -1)
    x_t, v = alpha * x0 + sigma * eps, V().of(x0, eps, alpha, sigma)
    torch.testing.assert_close(alpha * x_t - sigma * v, x0)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps)
    torch.testing.assert_close(x_t.square() + v.square(), x0.square() + eps.square())
    torch.testing.assert_close(v[0], EPS[0])  # at t = 0 there is nothing else to predict


def test_v_is_the_derivative_of_x_t_along_the_angle():
    angle, step = torch.tensor(0.7, dtype=torch.float64).view(1, 1, 1, 1), 1e-6

    def x_at(phi: Tensor) -> Tensor:
        return phi.cos() * X_0 + phi.sin() * EPS

    slope = (x_at(angle + step) - x_at(angle - step)) / (2 * step)
    torch.testing.assert_close(V().of(X_0, EPS, angle.cos(), angle.sin()), slope, rtol=1e-7, atol=1e-9)


def test_velocity_is_the_derivative_of_x_t_along_the_straight_path():
    t, step = torch.tensor(0.7, dtype=torch.float64).view(1, 1, 1, 1), 1e-6

    def x_at(t: Tensor) -> Tensor:
        return (1 - t) * X_0 + t * EPS

    slope = (x_at(t + step) - x_at(t - step)) / (2 * step)
    torch.testing.assert_close(Velocity().of(X_0, EPS, 1 - t, t), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
@given(alpha=st.floats(0.01, 3), sigma=st.floats(0.01, 3), error=st.floats(0.01, 2))
def test_every_target_inverts_at_any_alpha_and_sigma(target, alpha, sigma, error):
    """Image and noise come back, and an error of the output is one of x_0 by the weight, on no schedule at all."""
    alpha, sigma = (torch.full((1, 1, 1, 1), x, dtype=torch.float64) for x in (alpha, sigma))
    x_t, output = alpha * X_0 + sigma * EPS, target.of(X_0, EPS, alpha, sigma)
    torch.testing.assert_close(target.x0(output, x_t, alpha, sigma), X_0, rtol=1e-7, atol=1e-9)
    wrong = target.x0(output + error, x_t, alpha, sigma) - X_0
    weight = target.x0_weight(alpha, sigma)
    torch.testing.assert_close(weight * wrong.square(), torch.full_like(X_0, error**2), rtol=1e-6, atol=1e-9)


def test_v_needs_no_unit_variance():
    alpha, sigma = torch.full((1, 1, 1, 1), 0.9), torch.full((1, 1, 1, 1), 2.0)
    x0, eps = X_0.float(), EPS.float()
    output = V().of(x0, eps, alpha, sigma)
    torch.testing.assert_close(V().x0(output, alpha * x0 + sigma * eps, alpha, sigma), x0)


@pytest.mark.parametrize("target", [X0(), V(), Velocity()], ids=["x0", "v", "velocity"])
def test_targets_defined_at_zero_snr_give_the_image_there(target):
    alpha, sigma = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert target.defined_at_zero_snr
    torch.testing.assert_close(target.x0(target.of(X_0, EPS, alpha, sigma), EPS, alpha, sigma), X_0)


def test_epsilon_is_not_defined_at_zero_snr():
    assert not Epsilon().defined_at_zero_snr


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
def test_x0_weight_is_the_ratio_of_squared_errors(target: Target):
    schedule = schedules.linear(80)
    alpha, sigma = per_image(schedule.alpha[1:]), per_image(schedule.sigma[1:])
    x0, eps = X_0.expand(80, -1, -1, -1), EPS.expand(80, -1, -1, -1)
    x_t, output = alpha * x0 + sigma * eps, target.of(x0, eps, alpha, sigma)
    wrong = target.x0(output + 0.1, x_t, alpha, sigma)
    measured = 0.1**2 / (wrong - x0).square().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(target.x0_weight(alpha, sigma), measured, rtol=1e-6, atol=0)
