"""What the network is asked for: the noise, the image, or the velocity between them.

    epsilon:  eps
    x0:       x_0
    v:        v_t = alpha_t eps - sigma_t x_0                      (Salimans & Ho, 2202.00512)

Given x_t = alpha_t x_0 + sigma_t eps, any one of them gives the other two. Loss and samplers never ask which
one it is. To add a target, subclass ``Target`` here and name it in a YAML file.
"""

from abc import ABC, abstractmethod

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
    def x0_weight(self, snr: PerImage) -> PerImage:
        """Return w with ||target error||^2 = w(snr) ||x_0 error||^2, for alpha^2 + sigma^2 = 1."""


class Epsilon(Target):
    """The noise: DDPM's choice, and the blog's."""

    defined_at_zero_snr = False

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """Eps."""
        return eps

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """(x_t - sigma_t eps) / alpha_t."""
        return (x_t - sigma * output) / alpha

    def x0_weight(self, snr: PerImage) -> PerImage:
        """SNR."""
        return snr


class X0(Target):
    """The clean image."""

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """x_0."""
        return x0

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """The output itself."""
        return output

    def x0_weight(self, snr: PerImage) -> PerImage:
        """1."""
        return snr.new_ones(snr.shape)


class V(Target):
    """The velocity: well scaled at both ends, and so the corrected presets' choice."""

    def of(self, x0: Images, eps: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """alpha_t eps - sigma_t x_0."""
        return alpha * eps - sigma * x0

    def x0(self, output: Images, x_t: Images, alpha: PerImage, sigma: PerImage) -> Images:
        """(alpha_t x_t - sigma_t v) / (alpha_t^2 + sigma_t^2)."""
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())

    def x0_weight(self, snr: PerImage) -> PerImage:
        """SNR + 1."""
        return snr + 1
