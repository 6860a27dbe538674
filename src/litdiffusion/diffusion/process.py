"""The forward process q and its exact reversal, for any two times s < t.

With a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2:

    q(x_t | x_0)      = N( alpha_t x_0,  sigma_t^2 I )
    q(x_t | x_s)      = N( a x_s,  v I )
    q(x_s | x_t, x_0) = N( (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) x_0,  (v sigma_s^2 / sigma_t^2) I )

At s = t - 1 the last line is DDPM's equations 6 and 7. Images run in float32 under any autocast (float64 where
they are given so); the coefficients are taken in the schedule's float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.diffusion.schedules import Schedule


def q_sample(
    schedule: Schedule,
    x0: Float[Tensor, "batch channels h w"],
    t: Int[Tensor, " batch"],
    eps: Float[Tensor, "batch channels h w"],
) -> Float[Tensor, "batch channels h w"]:
    """Return x_t = alpha_t x_0 + sigma_t eps, for t in 0..T."""
    alpha, sigma = schedule.at(t, at_least_float32(x0))
    return alpha * x0 + sigma * eps


def at_least_float32(x: Tensor) -> torch.dtype:
    """Return the precision to work in: that of ``x``, where it is not lower than float32."""
    return torch.promote_types(x.dtype, torch.float32)


Time = int | Int[Tensor, " batch"]
"""One time for a whole batch, or one for each image."""
Number = float | Float[Tensor, "batch 1 1 1"]
"""What belongs to a ``Time``; tensors in float64."""


class Transition(NamedTuple):
    """The numbers a and v of q(x_t | x_s), and what the posterior needs of both ends."""

    a: Number
    v: Number
    alpha_s: Number
    sigma_s: Number
    sigma_t: Number

    @property
    def posterior_variance(self) -> Number:
        """Variance of q(x_s | x_t, x_0): beta-tilde_t at s = t - 1."""
        return self.v * self.sigma_s**2 / self.sigma_t**2


def transition(schedule: Schedule, t: Time, s: Time) -> Transition:
    """Return the transition between times 0 <= s < t <= T.

    Raises:
        ValueError: the times are not in that order (checked where they are plain numbers).
    """
    if isinstance(t, int) and isinstance(s, int) and not 0 <= s < t <= schedule.num_steps:
        raise ValueError(f"times must satisfy 0 <= s < t <= {schedule.num_steps}, not s={s}, t={t}")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _tables(schedule, t), _tables(schedule, s)
    a = alpha_t / alpha_s
    return Transition(a, sigma_t**2 - a**2 * sigma_s**2, alpha_s, sigma_s, sigma_t)


def posterior(
    schedule: Schedule,
    x_t: Float[Tensor, "batch channels h w"],
    x0: Float[Tensor, "batch channels h w"],
    t: Time,
    s: Time,
) -> tuple[Float[Tensor, "batch channels h w"], Number]:
    """Return mean and variance of q(x_s | x_t, x_0)."""
    step = transition(schedule, t, s)
    of_x_t, of_x0 = step.a * step.sigma_s**2 / step.sigma_t**2, step.alpha_s * step.v / step.sigma_t**2
    if isinstance(of_x_t, Tensor) and isinstance(of_x0, Tensor):
        of_x_t, of_x0 = of_x_t.to(x_t.dtype), of_x0.to(x_t.dtype)
    return of_x_t * x_t + of_x0 * x0, step.posterior_variance


def diffuse(
    schedule: Schedule,
    x_s: Float[Tensor, "batch channels h w"],
    s: int,
    t: int,
    eps: Float[Tensor, "batch channels h w"],
) -> Float[Tensor, "batch channels h w"]:
    """Return the x_t of q(x_t | x_s) that standard normal noise ``eps`` leads to, for s < t."""
    step = transition(schedule, t, s)
    return step.a * x_s + step.v**0.5 * eps


def learned_log_variance(
    schedule: Schedule, fraction: Float[Tensor, "batch channels h w"], t: Time, s: Time
) -> Float[Tensor, "batch channels h w"]:
    """Return the logarithm of the variance of p(x_s | x_t) where the network gives its place between two bounds.

        log variance = fraction log beta_t + (1 - fraction) log beta-tilde_t        (2102.09672, equation 15)

    with v for beta_t and the posterior's variance for beta-tilde_t, so that it is right at any s < t.
    """
    # A number stays on the CPU, as a scalar that a GPU takes along with the operation.
    low, high = (
        torch.as_tensor(variance, dtype=schedule.alpha.dtype).log().to(fraction.dtype)
        for variance in (clipped_posterior_variance(schedule, t, s), transition(schedule, t, s).v)
    )
    return fraction * high + (1 - fraction) * low


def clipped_posterior_variance(schedule: Schedule, t: Time, s: Time) -> Number:
    """Return the variance of q(x_s | x_t, x_0), or where that is 0 (at s = 0) the smallest that is not.

    The smallest is beta-tilde_2, as in DDPM's and IDDPM's code; a schedule of one step has v alone.
    """
    step = transition(schedule, t, s)
    first = transition(schedule, 2, 1).posterior_variance if schedule.num_steps > 1 else step.v
    if isinstance(s, int):
        return first if s == 0 else step.posterior_variance
    return torch.where(s[:, None, None, None] == 0, first, step.posterior_variance)


def _tables(schedule: Schedule, t: Time) -> tuple[Number, Number]:
    return schedule.at_time(t) if isinstance(t, int) else schedule.at(t, schedule.alpha.dtype)
