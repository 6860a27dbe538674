"""The forward process q and its exact reversal, for any two times s < t.

With a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2:

    q(x_t | x_0)      = N( alpha_t x_0,  sigma_t^2 I )
    q(x_t | x_s)      = N( a x_s,  v I )
    q(x_s | x_t, x_0) = N( (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) x_0,  (v sigma_s^2 / sigma_t^2) I )

At s = t - 1 the last line is DDPM's equations 6 and 7. Images run in float32 under any autocast; the
coefficients are taken in the schedule's float64.
"""

from typing import NamedTuple

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
    alpha, sigma = schedule.at(t)
    return alpha * x0 + sigma * eps


class Transition(NamedTuple):
    """The numbers a and v of q(x_t | x_s), and what the posterior needs of both ends."""

    a: float
    v: float
    alpha_s: float
    sigma_s: float
    sigma_t: float

    @property
    def posterior_variance(self) -> float:
        """Variance of q(x_s | x_t, x_0): beta-tilde_t at s = t - 1."""
        return self.v * self.sigma_s**2 / self.sigma_t**2


def transition(schedule: Schedule, t: int, s: int) -> Transition:
    """Return the transition between times 0 <= s < t <= T.

    Raises:
        ValueError: the times are not in that order.
    """
    if not 0 <= s < t <= schedule.num_steps:
        raise ValueError(f"times must satisfy 0 <= s < t <= {schedule.num_steps}, not s={s}, t={t}")
    alpha_t, alpha_s = float(schedule.alpha[t]), float(schedule.alpha[s])
    sigma_t, sigma_s = float(schedule.sigma[t]), float(schedule.sigma[s])
    a = alpha_t / alpha_s
    return Transition(a, sigma_t**2 - a**2 * sigma_s**2, alpha_s, sigma_s, sigma_t)


def posterior(
    schedule: Schedule,
    x_t: Float[Tensor, "batch channels h w"],
    x0: Float[Tensor, "batch channels h w"],
    t: int,
    s: int,
) -> tuple[Float[Tensor, "batch channels h w"], float]:
    """Return mean and variance of q(x_s | x_t, x_0)."""
    step = transition(schedule, t, s)
    mean = (step.a * step.sigma_s**2 / step.sigma_t**2) * x_t + (step.alpha_s * step.v / step.sigma_t**2) * x0
    return mean, step.posterior_variance
