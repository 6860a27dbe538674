"""Under bfloat16 autocast every loss has finite gradients at every time."""

import pytest
import torch
from torch import Tensor, nn

from litdiffusion.diffusion import (
    L1,
    L2,
    P2,
    Denoiser,
    Denoising,
    Huber,
    Loss,
    MinSNR,
    Schedule,
    Sigmoid,
    Uniform,
    UniformLevels,
    Variational,
    Weighting,
    schedules,
)
from small_worlds import TARGETS, affine_denoiser, every_pair, images, normal

pytestmark = pytest.mark.usefixtures("one_thread")

T = 120
SCHEDULES = {
    "linear": schedules.linear(T),
    "cosine": schedules.cosine(T),
    "pure_noise": schedules.cosine(T, zero_terminal_snr=True),
    "flow": schedules.Flow(num_steps=T),
    "ve": schedules.VE(num_steps=T),
}
LOSSES = {"l1": L1(), "l2": L2(), "huber": Huber()}
WEIGHTINGS = [Uniform(), MinSNR(), P2(), Sigmoid(), Variational()]
EVERY_T = torch.arange(1, T + 1).double() / T
X_0, EPS = images(T), normal(T, 1, 4, 4, seed=1)


class Convolution(nn.Conv2d):
    """A network that autocast runs in bfloat16."""

    def __init__(self, learned_variance: bool) -> None:
        super().__init__(1, 1 + learned_variance, 3, padding=1)
        self.learned_variance = learned_variance
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        output = super().forward(x * (1 + c_noise[:, None, None, None] / T))
        self.dtypes.add(output.dtype)
        return output


def losses_of(loss: Loss, weighting: Weighting, denoiser: Denoiser) -> Tensor:
    return Denoising(loss, weighting, UniformLevels()).losses(denoiser, X_0, EVERY_T, EPS)


def allowed(schedule: Schedule, target) -> bool:
    return target.defined_at_zero_snr or not schedule.has_zero_terminal_snr


@pytest.mark.parametrize(("name", "kind", "learned_variance"), every_pair(SCHEDULES, TARGETS, [False, True]))
def test_gradients_are_finite_at_every_time(name, kind, learned_variance):
    schedule, target = SCHEDULES[name], TARGETS[kind]
    if not allowed(schedule, target):
        with pytest.raises(ValueError, match=r"target=(epsilon|edm)"):
            affine_denoiser(schedule, target)
        return
    net = Convolution(learned_variance)
    denoiser = affine_denoiser(schedule, target, net=net)
    for loss in LOSSES.values():
        for weighting in WEIGHTINGS:
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(loss, weighting, denoiser)
            assert losses.dtype == torch.float32
            assert bool(torch.isfinite(losses).all())
            gradients = torch.autograd.grad(losses.sum(), list(net.parameters()))
            assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            assert any(bool(gradient.any()) for gradient in gradients)
    assert net.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_each_time_alone_has_a_finite_gradient_for_its_image(target):
    """A sum could hide two infinities that cancel; the gradient of each image's own output cannot."""
    schedule = SCHEDULES["linear"]
    for weighting in WEIGHTINGS:
        output = (0.1 * normal(T, 2, 4, 4, seed=2)).requires_grad_()
        net = nn.Module()
        net.learned_variance = True
        net.forward = lambda x, c_noise, output=output: output.bfloat16()
        losses = losses_of(L2(), weighting, affine_denoiser(schedule, target, net=net))
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        assert bool(torch.isfinite(gradient).all())
        assert bool(gradient.flatten(1).any(1).all())
