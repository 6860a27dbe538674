"""A mixture of normal distributions has a closed-form score: every sampler finds its modes and their weights."""

import pytest
import torch
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    X0,
    Denoiser,
    DPMSolverPP2M,
    Guidance,
    Heun,
    Sampler,
    V,
    Velocity,
    schedules,
)
from small_worlds import TARGETS, MixtureData, exact_denoiser, normal

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 2500
DATA = {name: MixtureData(getattr(schedules, name)(100)) for name in ("cosine", "flow")}
SAMPLERS = {
    "ddpm": DDPM(),
    "ddpm_beta": DDPM(variance="beta"),
    "ddpm_learned": DDPM(variance="learned"),
    "ddim": DDIM(None),
    "ddim_eta": DDIM(None, eta=0.7),
    "dpmpp_2m": DPMSolverPP2M(30, "log_snr"),
    "heun": Heun(30, grid="log_snr"),
    "heun_churn": Heun(40, churn=10.0, grid="log_snr"),
}


def drawn(sampler: Sampler, denoiser: Denoiser, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return sampler.sample(denoiser, normal(count, 1, 1, 1), generator).flatten()


def assert_drawn_from(pixels: Tensor, data: MixtureData, weights: tuple[float, ...]) -> None:
    """Modes to an eighth of their width, weights to four standard errors of as many independent draws."""
    mode = (pixels[:, None] - torch.tensor(data.means)).abs().argmin(1)
    for k, (mean, std, weight) in enumerate(zip(data.means, data.stds, weights, strict=True)):
        found = pixels[mode == k]
        standard_error = (weight * (1 - weight) / len(pixels)) ** 0.5
        assert len(found) / len(pixels) == pytest.approx(weight, abs=4 * standard_error)
        if weight > 0:
            assert float(found.mean()) == pytest.approx(mean, abs=std / 8)
            assert float(found.std()) == pytest.approx(std, rel=0.25)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_sampler_finds_the_modes_and_their_weights(sampler, data):
    pixels = drawn(sampler, exact_denoiser(data, TARGETS["velocity"], fraction=0.3))
    assert_drawn_from(pixels, data, data.weights)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_guidance_of_scale_1_draws_the_class_asked_for(name):
    data = DATA["flow"]
    denoiser = exact_denoiser(data, num_classes=3, fraction=0.3)
    guided = denoiser.guided(Guidance(torch.full((500,), 2)))
    assert_drawn_from(drawn(SAMPLERS[name], guided, 500), data, (0.0, 0.0, 1.0))


def test_labels_of_a_batch_are_each_images_own():
    data = DATA["cosine"]
    labels = torch.arange(300) % 3
    guided = exact_denoiser(data, num_classes=3).guided(Guidance(labels))
    pixels = drawn(DDIM(50), guided, 300)
    assert torch.equal((pixels[:, None] - torch.tensor(data.means)).abs().argmin(1), labels)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_without_effect_is_no_guidance(scale):
    """Scale 0 ignores the labels; scale 1 of the label "none" would be the same network call."""
    data = DATA["flow"]
    denoiser = exact_denoiser(data, num_classes=3)
    guided = denoiser.guided(Guidance(torch.zeros(COUNT, dtype=torch.int64), scale))
    pixels = drawn(DPMSolverPP2M(30, "log_snr"), guided)
    assert_drawn_from(pixels, data, data.weights if scale == 0 else (1.0, 0.0, 0.0))


@pytest.mark.parametrize("make", [schedules.cosine, schedules.flow], ids=["cosine", "flow"])
@pytest.mark.parametrize("target", [X0(), V(), Velocity()], ids=lambda target: type(target).__name__)
def test_the_estimate_of_eps_is_the_score(make, target):
    """eps = -sigma_t grad log p_t(x_t) (Song et al., 2011.13456), here by automatic differentiation."""
    data = MixtureData(make(61))
    t = torch.arange(1, 62)
    x_t = normal(61, 1, 1, 1, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(data.log_densities(x_t, t).logsumexp(-1).sum(), x_t)
    _, sigma = data.schedule.at(t, torch.float64)
    estimate = exact_denoiser(data, target)(x_t.detach(), t)
    torch.testing.assert_close(estimate.eps, -sigma * score, rtol=1e-7, atol=1e-9)
