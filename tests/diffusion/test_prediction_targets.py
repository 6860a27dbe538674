import pytest
import torch
from torch import Tensor

from litdiffusion.diffusion import X0, Epsilon, Target, V, schedules
from small_worlds import SCHEDULES, normal

TARGETS = [Epsilon(), X0(), V()]
X_0, EPS = normal(1, 3, 4, 5, dtype=torch.float64), normal(1, 3, 4, 5, seed=1, dtype=torch.float64)


def per_image(table: Tensor) -> Tensor:
    return table[:, None, None, None]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_every_target_gives_back_the_image_at_every_time(make, target):
    schedule = make(100)
    alpha, sigma = per_image(schedule.alpha[1:]), per_image(schedule.sigma[1:])
    x0, eps = X_0.expand(100, -1, -1, -1), EPS.expand(100, -1, -1, -1)
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


def test_v_needs_no_unit_variance():
    alpha, sigma = torch.full((1, 1, 1, 1), 0.9), torch.full((1, 1, 1, 1), 2.0)
    x0, eps = X_0.float(), EPS.float()
    output = V().of(x0, eps, alpha, sigma)
    torch.testing.assert_close(V().x0(output, alpha * x0 + sigma * eps, alpha, sigma), x0)


@pytest.mark.parametrize("target", [X0(), V()], ids=["x0", "v"])
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
