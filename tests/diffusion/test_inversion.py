"""DDIM's way up from an image to the noise that leads to it."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from litdiffusion.diffusion import DDIM, X0, Guided, Labelled, Preconditioned, V, schedules
from small_worlds import (
    ALL_SCHEDULES,
    TARGETS,
    GaussianData,
    MixtureData,
    Spy,
    affine_denoiser,
    draws,
    exact_denoiser,
    normal,
    time_from,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None, None, None]


@pytest.mark.parametrize("make", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_the_way_back_meets_the_image(make):
    """Ever more closely, as the fixed points are found: noise and image belong to one another."""
    denoiser, sampler = exact_denoiser(GaussianData(make(num_steps=200))), DDIM(20)
    x_T = sampler.invert(denoiser, IMAGES, iterations=14)
    torch.testing.assert_close(sampler.sample(denoiser, x_T, draws(9)), IMAGES, rtol=0, atol=1e-6)


def test_the_way_back_meets_the_image_from_pure_noise():
    """Where alpha_t = 0, the network's eps is x_t itself, whatever x_t: only its x_0 leads anywhere."""
    schedule = schedules.linear(200, zero_terminal_snr=True)
    denoiser, sampler = exact_denoiser(GaussianData(schedule)), DDIM(20, spacing="quadratic")
    x_T = sampler.invert(denoiser, IMAGES, iterations=14)
    torch.testing.assert_close(sampler.sample(denoiser, x_T, draws(9)), IMAGES, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "flow", "vp_cosine"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_inversion_converges_to_the_exact_flow_at_first_order(name, iterations):
    """Upwards, the flow takes an image to mean_1 + std_1 (x_0 - mean) / std."""
    data = GaussianData(ALL_SCHEDULES[name](num_steps=4000))
    exact = data.mean_at(1.0) + data.variance_at(1.0) ** 0.5 * (IMAGES - data.mean) / data.std
    errors = [
        float((DDIM(count).invert(exact_denoiser(data), IMAGES, iterations) - exact).abs().max())
        for count in (25, 50, 100)
    ]
    slopes = torch.tensor(errors).log2().diff().neg()
    torch.testing.assert_close(slopes, torch.ones(2), rtol=0, atol=0.2)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_inversion_is_the_same_for_every_target(target):
    data = GaussianData(schedules.cosine(100))
    expected = DDIM(20).invert(exact_denoiser(data), IMAGES, 3)
    tolerance = 1e-6 if target is TARGETS["edm"] else 1e-9  # EDM's clock tells the time in float32
    torch.testing.assert_close(
        DDIM(20).invert(exact_denoiser(data, target), IMAGES, 3), expected, rtol=0, atol=tolerance
    )


def test_inversion_of_a_class_comes_back_under_the_same_guidance():
    data = MixtureData(schedules.cosine(400), stds=(0.5, 0.6, 0.7))
    denoiser, labels = exact_denoiser(data, num_classes=3), torch.arange(9) % 3

    def guided(labels: Tensor) -> Guided:
        return Guided(Labelled(denoiser, labels), denoiser, 1.5)

    x_T = DDIM(25).invert(guided(labels), IMAGES, iterations=12)
    torch.testing.assert_close(DDIM(25).sample(guided(labels), x_T, draws(9)), IMAGES, rtol=0, atol=1e-6)
    elsewhere = DDIM(25).sample(guided((labels + 1) % 3), x_T, draws(9))
    assert not torch.allclose(elsewhere, IMAGES, rtol=0, atol=0.1)


def test_inversion_climbs_the_times_evaluating_once_per_iteration():
    net = Spy(self_condition=False)
    sampler = DDIM(4, eta=0.8)  # eta is taken as 0: the way up has no noise
    x_T = sampler.invert(
        affine_denoiser(schedules.linear(40), V(), net=net), normal(2, 1, 4, 4), iterations=2
    )
    assert [call.c_noise.tolist() for call in net.calls] == [
        [i - 1] * 2 for i in (10, 10, 20, 20, 30, 30, 40, 40)
    ]
    assert not any(call.grad_enabled for call in net.calls)
    assert not x_T.requires_grad
    assert bool(torch.isfinite(x_T).all())


@pytest.mark.parametrize("iterations", [0, -1])
def test_inversion_needs_an_iteration(iterations):
    denoiser = affine_denoiser(schedules.linear(40), V())
    with pytest.raises(ValueError, match=f"iterations={iterations}"):
        DDIM(4).invert(denoiser, normal(2, 1, 4, 4), iterations)


class Remembering(nn.Module):
    """The exact network, drawn by ``share`` towards the estimate it is given."""

    self_condition = True

    def __init__(self, data: GaussianData, share: float) -> None:
        super().__init__()
        self.data, self.share = data, share

    def forward(self, x_t: Tensor, c_noise: Tensor, self_cond: Tensor | None = None) -> Tensor:
        x0 = self.data.denoise(x_t, time_from(c_noise, self.data.schedule, X0()))
        return x0 + self.share * ((torch.zeros_like(x0) if self_cond is None else self_cond) - x0)


def test_the_way_back_meets_the_image_with_self_conditioning():
    """Ever more closely as the steps become finer, for the two ways then see the same estimates."""
    data = GaussianData(schedules.VPCosine())
    denoiser = Preconditioned(Remembering(data, 0.3), data.schedule, X0(), 1, 1)
    errors = [
        float((DDIM(n).sample(denoiser, DDIM(n).invert(denoiser, IMAGES, 6), draws(9)) - IMAGES).abs().max())
        for n in (20, 50, 100, 200)
    ]
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.05
