"""What the network is asked for: the noise, the image, or a velocity between them.

    epsilon:   eps
    x0:        x_0
    v:         v_t = alpha_t eps - sigma_t x_0                     (Salimans & Ho, 2202.00512)
    velocity:  u_t = eps - x_0                                     (flow matching: Lipman et al., 2210.02747)

Given x_t = alpha_t x_0 + sigma_t eps, any one of them gives the other two. Loss and samplers never ask which
one it is. To add a target, subclass ``Target`` here and name it in a YAML file.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch channels h w"]
PerImage = Float[Tensor, "batch 1 1 1"]


class Target(ABC):
    """A linear combination of x_0 and eps that the network is trained to return."""

    defined_at_zero_snr = True
    """Whether the target says anything about x_0 where alpha_t = 0."""

    @abstractmethod
    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """Return the target of a training pair."""

    @abstractmethod
    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """Return the x_0 that an output at x_t stands for."""

    @abstractmethod
    def x0_weight(self, alpha: PerImage, sigma: PerImage) -> PerImage:
        """Return w with ||target error||^2 = w ||x_0 error||^2 at the same x_t."""


class Epsilon(Target):
    """The noise: DDPM's choice, and the blog's."""

    defined_at_zero_snr = False

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """Eps."""
        return eps

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """(x_t - sigma_t eps) / alpha_t."""
        return (x_t - sigma * output) / alpha

    def x0_weight(self, alpha: PerImage, sigma: PerImage) -> PerImage:
        """(alpha_t / sigma_t)^2: the signal-to-noise ratio."""
        return (alpha / sigma).square()


class X0(Target):
    """The clean image."""

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """x_0."""
        return x0

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """The output itself."""
        return output

    def x0_weight(self, alpha: PerImage, sigma: PerImage) -> PerImage:
        """1."""
        return torch.ones_like(alpha)


class V(Target):
    """The velocity: well scaled at both ends, and so the corrected presets' choice."""

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """alpha_t eps - sigma_t x_0."""
        return alpha * eps - sigma * x0

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """(alpha_t x_t - sigma_t v) / (alpha_t^2 + sigma_t^2)."""
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())

    def x0_weight(self, alpha: PerImage, sigma: PerImage) -> PerImage:
        """((alpha_t^2 + sigma_t^2) / sigma_t)^2: SNR + 1 where alpha_t^2 + sigma_t^2 = 1."""
        return ((alpha.square() + sigma.square()) / sigma).square()


class Velocity(Target):
    """The velocity dx_t/dt of the straight path from image to noise: flow matching's target."""

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """Eps - x_0."""
        return eps - x0

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """(x_t - sigma_t u) / (alpha_t + sigma_t)."""
        return (x_t - sigma * output) / (alpha + sigma)

    def x0_weight(self, alpha: PerImage, sigma: PerImage) -> PerImage:
        """((alpha_t + sigma_t) / sigma_t)^2."""
        return ((alpha + sigma) / sigma).square()
