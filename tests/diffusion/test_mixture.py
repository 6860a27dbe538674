"""A mixture of normal distributions has a closed-form score: every sampler finds its modes and their weights."""

import pytest
import torch
from torch import Tensor

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    Denoiser,
    DPMSolverPP2M,
    Heun,
    Labelled,
    Sampler,
)
from small_worlds import ALL_SCHEDULES, TARGETS, MixtureData, draws, exact_denoiser, normal

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 2500
DATA = {name: MixtureData(ALL_SCHEDULES[name](num_steps=100)) for name in ("cosine", "flow", "ve")}
SAMPLERS = {
    "ddpm": DDPM(),
    "ddpm_beta": DDPM(variance="beta"),
    "ddpm_learned": DDPM(variance="learned"),
    "ddim": DDIM(None),
    "ddim_eta": DDIM(None, eta=0.7),
    "dpmpp_2m": DPMSolverPP2M(30, "log_snr"),
    "heun": Heun(30, spacing="log_snr"),
    "heun_churn": Heun(40, churn=10.0, spacing="log_snr"),
    "heun_karras": Heun(40, spacing="karras"),
}


def drawn(sampler: Sampler, denoiser: Denoiser, count: int = COUNT) -> Tensor:
    x_T = denoiser.schedule.init_noise_sigma * normal(count, 1, 1, 1)
    return sampler.sample(denoiser, x_T, draws(count)).flatten()


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
    pixels = drawn(
        sampler, exact_denoiser(data, TARGETS["edm" if data is DATA["ve"] else "velocity"], fraction=0.3)
    )
    assert_drawn_from(pixels, data, data.weights)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m"])
def test_guidance_of_scale_1_draws_the_class_asked_for(name):
    data = DATA["flow"]
    denoiser = exact_denoiser(data, num_classes=3, fraction=0.3)
    guided = Labelled(denoiser, torch.full((500,), 2))
    assert_drawn_from(drawn(SAMPLERS[name], guided, 500), data, (0.0, 0.0, 1.0))


def test_labels_of_a_batch_are_each_images_own():
    data = DATA["cosine"]
    labels = torch.arange(300) % 3
    guided = Labelled(exact_denoiser(data, num_classes=3), labels)
    pixels = drawn(DDIM(50), guided, 300)
    assert torch.equal((pixels[:, None] - torch.tensor(data.means)).abs().argmin(1), labels)


@pytest.mark.parametrize("name", ALL_SCHEDULES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_estimate_of_eps_is_the_score(name, target):
    """eps = -sigma_t grad log p_t(x_t) (Song et al., 2011.13456), here by automatic differentiation."""
    schedule = ALL_SCHEDULES[name](num_steps=61)
    if schedule.has_zero_terminal_snr and not target.defined_at_zero_snr:
        return
    data, t = MixtureData(schedule), torch.arange(1, 62, dtype=torch.float64) / 61
    x_t = normal(61, 1, 1, 1, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(data.log_densities(x_t, t).logsumexp(-1).sum(), x_t)
    _, sigma = schedule.at(t)
    estimate = exact_denoiser(data, target)(x_t.detach(), t)
    # EDM's clock, log(sigma / alpha) / 4 in float32, tells the time to 1e-7 only.
    rtol, atol = (1e-4, 1e-4) if target is TARGETS["edm"] else (1e-7, 1e-9)
    torch.testing.assert_close(estimate.eps, -sigma * score, rtol=rtol, atol=atol)
