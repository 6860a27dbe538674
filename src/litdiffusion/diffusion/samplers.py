"""Samplers: from noise to images, one step of a few lines each.

To add a sampler, subclass ``Sampler``, write ``step``, and name the class in a YAML file. The loop that calls it is
in ``sampler.py``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch

from litdiffusion.diffusion.denoiser import Denoiser
from litdiffusion.diffusion.process import learned_log_variance, posterior, renoise, transition
from litdiffusion.diffusion.sampler import Images, Noise, Sampler, SamplerState
from litdiffusion.diffusion.schedule import Schedule
from litdiffusion.diffusion.spacing import Spacing


class DDPM(Sampler):
    """Ancestral sampling (Ho et al., 2006.11239, algorithm 2), at any times.

    x_s ~ N( mean of q(x_s | x_t, x_0 = estimate),  variance ), and no noise in the last step.

    Args:
        num_steps, spacing: as for every sampler.
        variance: ``beta_tilde``, the posterior's own (right for a point mass); ``beta``, that of q(x_t | x_s)
            (right for data of unit variance; DDPM's "fixedlarge"); or ``learned``, between the two as the network
            says (2102.09672).
    """

    def __init__(
        self,
        num_steps: int | None = None,
        variance: Literal["beta", "beta_tilde", "learned"] = "beta_tilde",
        spacing: Spacing = "uniform",
    ) -> None:
        super().__init__(num_steps, spacing)
        if variance not in ("beta", "beta_tilde", "learned"):
            raise ValueError(f"variance={variance!r}: choose beta, beta_tilde or learned")
        self.variance = variance

    def require_support(self, denoiser: Denoiser) -> None:
        """Make sure that a learned variance has been learned, too."""
        super().require_support(denoiser)
        if self.variance == "learned" and not denoiser.learned_variance:
            raise ValueError(
                "variance=learned: this network does not learn its variance; use beta_tilde, or train one with"
                " net.learned_variance=true"
            )

    def step(self, state: SamplerState) -> Images:
        """Draw x_s from the posterior at the estimate."""
        schedule, t, s = state.schedule, state.t, state.s
        mean, variance = posterior(schedule, state.x_t, state.estimate.x0, t, s)
        if s == 0:
            return mean
        if self.variance == "beta":
            variance = transition(schedule, t, s).v
        elif self.variance == "learned":
            assert state.estimate.variance is not None, "see require_support"
            variance = learned_log_variance(schedule, state.estimate.variance, t, s).exp()
        return mean + variance**0.5 * state.noise()


class DDIM(Sampler):
    """Implicit sampling (Song et al., 2010.02502, equation 12).

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z,        c^2 = eta^2 . variance of q(x_s | x_t, x_0)

    Args:
        num_steps, spacing: as for every sampler.
        eta: 0 is deterministic; 1 is DDPM with beta-tilde.
    """

    def __init__(self, num_steps: int | None = 50, eta: float = 0.0, spacing: Spacing = "uniform") -> None:
        super().__init__(num_steps, spacing)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: DDIM's eta lies in [0, 1]")
        self.eta = float(eta)

    def step(self, state: SamplerState) -> Images:
        """Move along the line from eps to x_0, with fresh noise where eta asks for it."""
        step = transition(state.schedule, state.t, state.s)
        # Where alpha_t = 0 and eta = 1, c^2 is sigma_s^2 but for rounding.
        c2 = min(self.eta**2 * step.posterior_variance, step.sigma_s**2)
        x_s = step.alpha_s * state.estimate.x0 + (step.sigma_s**2 - c2) ** 0.5 * state.estimate.eps
        return x_s if c2 == 0 else x_s + c2**0.5 * state.noise()

    @torch.no_grad()
    def invert(
        self, denoiser: Denoiser, x0: Images, iterations: int = 1, times: Sequence[float] | None = None
    ) -> Images:
        """Return the noise x_1 from which deterministic steps lead to the image ``x0`` (eta is taken as 0).

        Going up, eps is evaluated at the unknown x_t: x_t = a x_s + (sigma_t - a sigma_s) eps(x_t, t), solved
        by fixed-point iteration from x_s on (Pan et al., 2309.04907). Where noise prevails, eps is that of x_s at
        the estimate of x_0: the network's own says next to nothing there, and nothing at all where alpha_t = 0.
        One iteration is the usual inversion; with more, the way back meets the image more closely. A
        self-conditioned network is given the estimate made before, first the image itself; on the way back it is
        given the one from the other side, so the two ways meet as the steps become fine.

        Args:
            denoiser: estimates x_0; guided or not.
            x0: images.
            iterations: of each step.
            times: from 1 down to 0; by default this sampler's own.

        Raises:
            ValueError: fewer than 1 iteration.
        """
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: inversion needs at least 1")
        schedule, x_s, self_cond = denoiser.schedule, x0, x0
        for s, t in pairwise(reversed(times or self.times(schedule))):
            step, x_t = transition(schedule, t, s), x_s
            for _ in range(iterations):
                earlier = self_cond if t < 1 else None  # the way back begins without
                estimate = denoiser(x_t, t, earlier)
                self_cond = estimate.x0
                eps = estimate.eps
                if s > 0 and step.sigma_t > step.a * step.alpha_s:
                    eps = (x_s - step.alpha_s * estimate.x0) / step.sigma_s
                x_t = step.a * x_s + (step.sigma_t - step.a * step.sigma_s) * eps
            x_s = x_t
        return x_s


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M), the multistep solver of second order (Lu et al., 2211.01095, algorithm 2).

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t, and r = (the step before) / h:

        D   = x_0(t) + (x_0(t) - x_0(before)) / 2r
        x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) D

    The first step, and the last, at whose end lambda is infinite, take D = x_0(t), which is DDIM's step. With
    spacing ``log_snr`` the whole is of second order. With others the last step's error may prevail as the steps
    become smaller: it falls only like 1 / num_steps where sigma^2 leaves 0 in proportion to t.

    Args:
        num_steps, spacing: as for every sampler.
    """

    order = 2

    def __init__(self, num_steps: int | None = 20, spacing: Spacing = "uniform") -> None:
        super().__init__(num_steps, spacing)

    def step(self, state: SamplerState) -> Images:
        """Extrapolate x_0 over the step, and follow it exactly."""
        schedule, t, s = state.schedule, state.t, state.s
        step = transition(schedule, t, s)
        d = state.estimate.x0
        if state.history and s > 0:
            before = state.history[0]
            lambda_before, lambda_t, lambda_s = (_lambda(schedule, time) for time in (before.t, t, s))
            # Pure noise has lambda = -infinity: then this is 0, and the estimate made there counts for nothing.
            half_of_1_by_r = (lambda_s - lambda_t) / (lambda_t - lambda_before) / 2
            d = d + half_of_1_by_r * (d - before.estimate.x0)
        shrink = step.sigma_s / step.sigma_t
        return shrink * state.x_t + (step.alpha_s - step.a * step.alpha_s * shrink) * d


class Heun(Sampler):
    """Heun's method with churn (Karras et al., 2206.00364, algorithm 2), of second order.

    With k = sigma / alpha, the probability flow is d(x / alpha) / dk = eps. A step follows the mean of eps at its
    two ends, so it evaluates the network twice. Two kinds of step are DDIM's instead: the last, which has no eps at
    its end, and those from k > 80, where the paper's noise begins: in k, the first step of a schedule that ends in
    less signal would have no bounds. The order is the second with spacing ``log_snr``; for others see
    ``DPMSolverPP2M``.

    Args:
        num_steps, spacing: as for every sampler.
        churn: how much noise a whole run adds on the way (S_churn): each step first goes back to the time at which k
            is (1 + churn / num_steps) k_t, at most sqrt(2) k_t.
        churn_interval: of k, where there is churn (S_tmin, S_tmax).
        churn_noise: standard deviation of the noise added (S_noise).
    """

    largest_k = 80.0

    def __init__(
        self,
        num_steps: int | None = 18,
        churn: float = 0.0,
        churn_interval: Sequence[float] = (0.0, math.inf),
        churn_noise: float = 1.0,
        spacing: Spacing = "uniform",
    ) -> None:
        super().__init__(num_steps, spacing)
        if not (0 <= churn < math.inf and 0 <= churn_noise < math.inf):
            raise ValueError(
                f"churn={churn}, churn_noise={churn_noise}: neither may be negative, or infinite"
            )
        if not 0 <= churn_interval[0] <= churn_interval[1]:
            raise ValueError(f"churn_interval={list(churn_interval)}: must be [from, to], of sigma / alpha")
        self.s_churn = float(churn)
        self.s_interval = churn_interval
        self.s_noise = float(churn_noise)

    def churn(self, schedule: Schedule, x_t: Images, t: float, noise: Noise) -> tuple[Images, float]:
        """Add noise by the forward process."""
        gamma = min(self.s_churn / (self.num_steps or schedule.num_steps), 2**0.5 - 1)
        k, (low, high) = math.exp(-_lambda(schedule, t)), self.s_interval
        if gamma == 0 or t == 1 or not low <= k <= high:
            return x_t, t
        log_snr = torch.tensor([-2 * math.log((1 + gamma) * k)], dtype=torch.float64)
        up = max(float(schedule.time_of(log_snr)), t)
        return (x_t, t) if up == t else (renoise(schedule, x_t, t, up, self.s_noise * noise()), up)

    def step(self, state: SamplerState) -> Images:
        """Take the mean of eps at both ends of the step, where both have one."""
        step = transition(state.schedule, state.t, state.s)
        eps = state.estimate.eps
        x_s = step.alpha_s * state.estimate.x0 + step.sigma_s * eps
        # Times are exact to rounding only, and the VE schedule of the paper begins at k = 80 itself.
        if state.s == 0 or step.sigma_t > self.largest_k * (1 + 1e-9) * step.a * step.alpha_s:
            return x_s
        mean_eps = (eps + state.denoise(x_s, state.s).eps) / 2
        return state.x_t / step.a + (step.sigma_s - step.sigma_t / step.a) * mean_eps


def _lambda(schedule: Schedule, t: float) -> float:
    """Return log(alpha_t / sigma_t)."""
    alpha, sigma = schedule.at(t)
    return math.log(alpha / sigma) if alpha > 0 else -math.inf
