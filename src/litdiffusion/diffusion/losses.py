"""The training objective: how far the network's output is from its target, and how much each t counts.

    L = E_{x_0, t, eps}  w(t) . distance( output(x_t, t), target(x_0, eps, t) )

A distance is a function of two image batches, elementwise. A weighting is a weight on the squared error *of
x_0* as a function of the signal-to-noise ratio; dividing by the target's own ``x0_weight`` makes one weighting
mean the same for every target. To add either, write it here and name it in a YAML file.
"""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser
from litdiffusion.diffusion.process import q_sample
from litdiffusion.diffusion.targets import Target

Images = Float[Tensor, "batch channels h w"]
PerImage = Float[Tensor, "batch 1 1 1"]


class Distance(ABC):
    """An elementwise distance."""

    @abstractmethod
    def __call__(self, output: Images, target: Images) -> Images:
        """Return the distance of every pixel."""


class L1(Distance):
    """Absolute error."""

    def __call__(self, output: Images, target: Images) -> Images:
        """|output - target|."""
        return F.l1_loss(output, target, reduction="none")


class L2(Distance):
    """Squared error: DDPM's L_simple."""

    def __call__(self, output: Images, target: Images) -> Images:
        """(output - target)^2."""
        return F.mse_loss(output, target, reduction="none")


class Huber(Distance):
    """Half the squared error below ``delta``, linear above: smooth_l1_loss at the blog's delta = 1."""

    def __init__(self, delta: float = 1.0) -> None:
        if delta <= 0:
            raise ValueError(f"delta={delta}: the Huber loss needs a positive delta")
        self.delta = delta

    def __call__(self, output: Images, target: Images) -> Images:
        """Huber's function of output - target."""
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


class Weighting(ABC):
    """A weight for each noise level."""

    @abstractmethod
    def __call__(self, snr: PerImage, target: Target) -> PerImage:
        """Return the weight of the target's error at a signal-to-noise ratio."""


class Uniform(Weighting):
    """Every t counts the same in the target's own space: DDPM's L_simple, and the blog's."""

    def __call__(self, snr: PerImage, target: Target) -> PerImage:
        """1."""
        return snr.new_ones(snr.shape)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x_0 (Hang et al., 2303.09556)."""

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma={gamma}: min-SNR needs a positive gamma")
        self.gamma = gamma

    def __call__(self, snr: PerImage, target: Target) -> PerImage:
        """min(SNR, gamma), expressed in the target's space."""
        return snr.clamp(max=self.gamma) / target.x0_weight(snr)


class Objective:
    """Distance and weighting together: the loss of each image of a batch."""

    def __init__(self, distance: Distance, weighting: Weighting) -> None:
        self.distance = distance
        self.weighting = weighting

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Images,
        t: Int[Tensor, " batch"],
        eps: Images,
        feed_back: bool = False,
    ) -> Float[Tensor, " batch"]:
        """Return the loss of each image at its own t in 1..T and noise.

        ``feed_back`` gives a self-conditioned network its own estimate; training does so in half of its steps.
        """
        schedule, target = denoiser.schedule, denoiser.target
        alpha, sigma = schedule.at(t)
        x_t = q_sample(schedule, x0, t, eps)
        self_cond = denoiser.self_conditioning(x_t, t) if feed_back and denoiser.self_condition else None
        errors = self.distance(denoiser.output(x_t, t, self_cond), target.of(x0, eps, alpha, sigma))
        weights = self.weighting((alpha / sigma).square(), target)
        return (weights * errors).flatten(1).mean(1)
