"""Static and dynamic thresholding of the estimate of x_0."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litdiffusion.diffusion import DDIM, X0, Clipped, Preconditioned, V, schedules
from small_worlds import SAMPLERS, TARGETS, Affine, affine_denoiser, draws, normal, times

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.linear(40)
T = times(1 / 40, 0.125, 0.5, 1)


def estimated(x0: Tensor, clip: str, quantile: float = 0.995) -> Tensor:
    """What clipping makes of ``x0``."""

    class Knows(torch.nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return x0

    core = Preconditioned(Knows(), SCHEDULE, X0(), x0.shape[1], tuple(x0.shape[2:]))
    return Clipped(core, clip, quantile)(torch.zeros_like(x0), 0.5).x0


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(4, 1, 4, 4), (3, 3, 5, 7)])
def test_dynamic_clipping_is_diffusers(quantile, shape):
    x0 = 2 * normal(*shape, dtype=torch.float64) * torch.arange(shape[0])[:, None, None, None]
    scheduler = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=float("inf")
    )
    expected = scheduler._threshold_sample(x0)
    torch.testing.assert_close(estimated(x0, "dynamic", quantile), expected, rtol=1e-12, atol=1e-12)


@given(scale=st.floats(0.01, 30), quantile=st.floats(0.01, 1.0), seed=st.integers(0, 100))
def test_dynamic_clipping_keeps_within_1_and_shrinks_each_image_by_its_own_quantile(scale, quantile, seed):
    x0 = scale * normal(3, 1, 3, 3, seed=seed, dtype=torch.float64)
    clipped = estimated(x0, "dynamic", quantile)
    assert float(clipped.abs().max()) <= 1
    for image, result in zip(x0, clipped, strict=True):
        size = max(1.0, float(image.abs().flatten().quantile(quantile)))
        inside = image.abs() <= size
        torch.testing.assert_close(result[inside], image[inside] / size, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result[~inside], image[~inside].sign(), rtol=1e-9, atol=0)


def test_dynamic_clipping_leaves_an_image_within_1_alone():
    x0 = normal(4, 1, 4, 4).clamp(-1, 1)
    assert torch.equal(estimated(x0, "dynamic", 0.7), x0)
    assert torch.equal(estimated(x0, "static"), x0)


def test_dynamic_clipping_of_the_largest_value_only_scales():
    x0 = 3 * normal(4, 1, 4, 4)
    largest = x0.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(estimated(x0, "dynamic", 1.0), x0 / largest)


@pytest.mark.parametrize("clip", ["none", "static", "dynamic"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_noise_goes_with_the_clipped_image_for_every_target(target, clip):
    x_t = 3 * normal(4, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        estimate = affine_denoiser(SCHEDULE, target, clip, Affine().double())(x_t, T)
    alpha, sigma = SCHEDULE.at(T)
    torch.testing.assert_close(alpha * estimate.x0 + sigma * estimate.eps, x_t, rtol=1e-12, atol=1e-12)
    assert (float(estimate.x0.abs().max()) > 1) is (clip == "none")


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_clipped_samples_end_within_1(make):
    x_T = 3 * normal(3, 1, 4, 4)
    for clip in ("static", "dynamic"):
        sampled = make(5).sample(affine_denoiser(SCHEDULE, V(), clip), x_T, draws(3))
        assert float(sampled.abs().max()) <= 1 + 1e-6
    free = DDIM(5).sample(affine_denoiser(SCHEDULE, V(), "none"), x_T, draws(3))
    assert float(free.abs().max()) > 1


@pytest.mark.parametrize("quantile", [0.0, -0.5, 1.01])
def test_a_quantile_outside_of_0_to_1_is_refused(quantile):
    with pytest.raises(ValueError, match=f"clip_quantile={quantile}"):
        Clipped(Preconditioned(Affine(), SCHEDULE, V(), 1, 4), "dynamic", quantile)
