"""The forward process q and its exact reversal, for any two times s < t.

With a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2:

    q(x_t | x_0)      = N( alpha_t x_0,  sigma_t^2 I )
    q(x_t | x_s)      = N( a x_s,  v I )
    q(x_s | x_t, x_0) = N( (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) x_0,  (v sigma_s^2 / sigma_t^2) I )

At s = t - 1 / T the last line is DDPM's equations 6 and 7. Images run in float32 under any autocast (float64 where
they are given so); the coefficients are taken in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.schedule import Number, Schedule, Time

Images = Float[Tensor, "batch channels h w"]


def q_sample(schedule: Schedule, x0: Images, t: Time, eps: Images) -> Images:
    """Return x_t = alpha_t x_0 + sigma_t eps, for t in [0, 1]."""
    alpha, sigma = schedule.at(t)
    return scaled(at_least_float32(x0), alpha) + scaled(at_least_float32(eps), sigma)


def scaled(x: Images, factor: Number) -> Images:
    """Return ``factor`` times ``x``, in the precision of ``x``."""
    return x * (factor.to(x.dtype) if isinstance(factor, Tensor) else factor)


def at_least_float32(x: Images) -> Images:
    """Return ``x`` in float32, or as it is where it is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Transition(NamedTuple):
    """Scale a and variance v of q(x_t | x_s), and what the posterior needs of both ends.

    a is 0 where x_t is pure noise.
    """

    a: Number
    v: Number
    alpha_s: Number
    sigma_s: Number
    sigma_t: Number

    @property
    def posterior_variance(self) -> Number:
        """Variance of q(x_s | x_t, x_0): beta-tilde_t at s = t - 1 / T."""
        return self.v * self.sigma_s**2 / self.sigma_t**2


def transition(schedule: Schedule, t: Time, s: Time) -> Transition:
    """Return the transition between times 0 <= s < t <= 1.

    Raises:
        ValueError: the times are not in that order (checked where they are plain numbers).
    """
    if isinstance(t, float) and isinstance(s, float) and not 0 <= s < t <= 1:
        raise ValueError(f"times must satisfy 0 <= s < t <= 1, not s={s}, t={t}")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    a = alpha_t / alpha_s
    return Transition(a, sigma_t**2 - a**2 * sigma_s**2, alpha_s, sigma_s, sigma_t)


def posterior(schedule: Schedule, x_t: Images, x0: Images, t: Time, s: Time) -> tuple[Images, Number]:
    """Return mean and variance of q(x_s | x_t, x_0)."""
    step = transition(schedule, t, s)
    of_x_t, of_x0 = step.a * step.sigma_s**2 / step.sigma_t**2, step.alpha_s * step.v / step.sigma_t**2
    return scaled(x_t, of_x_t) + scaled(x0, of_x0), step.posterior_variance


def renoise(schedule: Schedule, x_s: Images, s: float, t: float, eps: Images) -> Images:
    """Return x_t ~ q(x_t | x_s) for times s < t: the forward process from s on."""
    step = transition(schedule, t, s)
    return scaled(x_s, step.a) + scaled(eps, step.v**0.5)


def learned_log_variance(schedule: Schedule, fraction: Images, t: Time, s: Time) -> Images:
    """Return the logarithm of the variance of p(x_s | x_t) where the network gives its place between two bounds.

        log variance = fraction log beta_t + (1 - fraction) log beta-tilde_t        (2102.09672, equation 15)

    with v for beta_t and the posterior's variance for beta-tilde_t, so that it is right at any s < t.
    """
    # A number stays on the CPU, as a scalar that a GPU takes along with the operation.
    low, high = (
        torch.as_tensor(variance, dtype=torch.float64).log().to(fraction.dtype)
        if isinstance(variance, float)
        else variance.log().to(fraction.dtype)
        for variance in (clipped_posterior_variance(schedule, t, s), transition(schedule, t, s).v)
    )
    return fraction * high + (1 - fraction) * low


def clipped_posterior_variance(schedule: Schedule, t: Time, s: Time) -> Number:
    """Return the variance of q(x_s | x_t, x_0), or where that is 0 (at s = 0) the smallest that is not.

    The smallest is beta-tilde_2, as in DDPM's and IDDPM's code; a schedule of one step has v alone.
    """
    step, T = transition(schedule, t, s), schedule.num_steps
    first = transition(schedule, 2 / T, 1 / T).posterior_variance if T > 1 else step.v
    if isinstance(s, float):
        return first if s == 0 else step.posterior_variance
    return torch.where(s[:, None, None, None] == 0, first, step.posterior_variance)
