"""Parametrizations: what the network's output F says about the clean image.

Each is four numbers at a time t (Karras et al., 2206.00364, equation 7):

    x_0 estimate = c_skip x_t + c_out F(c_in x_t; c_noise)

                c_skip                         c_out                           c_in
    epsilon     1 / alpha                      -sigma / alpha                  1
    x0          0                              1                               1
    v           alpha / (alpha^2 + sigma^2)    -sigma / (alpha^2 + sigma^2)    1
    velocity    1 / (alpha + sigma)            -sigma / (alpha + sigma)        1
    EDM         alpha d^2 / r^2                sigma d / r                     1 / r,    r^2 = alpha^2 d^2 + sigma^2

What the network is trained to return follows, and so does the weight that turns its squared error into one of x_0,
c_out^2. To add a parametrization, subclass ``Parametrization`` here and name it in a YAML file.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.process import scaled
from litdiffusion.diffusion.schedule import Number, Schedule

Images = Float[Tensor, "batch channels h w"]


class Coefficients(NamedTuple):
    """c_skip, c_out and c_in at one time, or at one time of each image."""

    c_skip: Number
    c_out: Number
    c_in: Number


class Parametrization(ABC):
    """Three coefficients, and the network's clock."""

    defined_at_zero_snr = True
    """Whether the output says anything about x_0 where alpha = 0."""

    @abstractmethod
    def coefficients(self, alpha: Number, sigma: Number) -> Coefficients:
        """Return c_skip, c_out and c_in, for sigma above 0."""

    def c_noise(self, schedule: Schedule, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return what the network is told about t: here T t - 1, the blog's 0..T - 1."""
        return schedule.step_of(t) - 1

    def target(self, x0: Images, eps: Images, alpha: Number, sigma: Number) -> Images:
        """Return what the network should: the F for which the estimate is x_0.

        (x_0 - c_skip x_t) / c_out, with x_t = alpha x_0 + sigma eps put in, so that nothing large cancels.
        """
        c_skip, c_out, _ = self.coefficients(alpha, sigma)
        return scaled(x0, (1 - c_skip * alpha) / c_out) - scaled(eps, c_skip * sigma / c_out)


class Epsilon(Parametrization):
    """The noise eps: DDPM's choice, and the blog's."""

    defined_at_zero_snr = False

    def coefficients(self, alpha: Number, sigma: Number) -> Coefficients:
        """x_0 = (x_t - sigma eps) / alpha."""
        return Coefficients(1 / alpha, -sigma / alpha, 1.0)


class X0(Parametrization):
    """The clean image x_0."""

    def coefficients(self, alpha: Number, sigma: Number) -> Coefficients:
        """The output itself."""
        return Coefficients(0.0, 1.0, 1.0)


class V(Parametrization):
    """v = alpha eps - sigma x_0 (Salimans & Ho, 2202.00512): well scaled at both ends of the schedule."""

    def coefficients(self, alpha: Number, sigma: Number) -> Coefficients:
        """x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)."""
        square = alpha**2 + sigma**2
        return Coefficients(alpha / square, -sigma / square, 1.0)


class Velocity(Parametrization):
    """u = eps - x_0, the velocity of the straight path from image to noise (Lipman et al., 2210.02747)."""

    def coefficients(self, alpha: Number, sigma: Number) -> Coefficients:
        """x_0 = (x_t - sigma u) / (alpha + sigma)."""
        return Coefficients(1 / (alpha + sigma), -sigma / (alpha + sigma), 1.0)


class EDM(Parametrization):
    """Karras et al.'s preconditioning (2206.00364, table 1): input and target have unit variance at every t.

    Written there for alpha = 1; for any other schedule it applies to x_t / alpha.

    Args:
        sigma_data: d, the standard deviation of the data.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """

    defined_at_zero_snr = False

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data={sigma_data}: must be positive")
        self.sigma_data = sigma_data

    def coefficients(self, alpha: Number, sigma: Number) -> Coefficients:
        """See the table above."""
        square = (alpha * self.sigma_data) ** 2 + sigma**2
        return Coefficients(
            alpha * self.sigma_data**2 / square, sigma * self.sigma_data / square**0.5, square**-0.5
        )

    def c_noise(self, schedule: Schedule, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """log(sigma / alpha) / 4."""
        return schedule.log_snr(t) / -8
