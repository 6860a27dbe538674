"""Noise schedules: how fast the signal-to-noise ratio falls.

To add one, subclass ``Schedule``, write ``alpha`` and ``sigma`` as functions of t in (0, 1], and name the class in a
YAML file.

DDPM (Ho et al., 2006.11239) has T steps with variances beta_1..beta_T, and alpha_bar_i = prod_{j <= i} (1 - beta_j).
Step i is time i / T; there, alpha = sqrt(alpha_bar_i) and sigma = sqrt(1 - alpha_bar_i). ``Discrete`` is that table.
DDPM's own "alpha_i" (1 - beta_i) is called ``1 - betas`` here.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from litdiffusion.diffusion.devices import precise_dtype
from litdiffusion.diffusion.schedule import MIN_TIME, Schedule, Times, fractions, require_steps

DDPM_STEPS = 1000
"""The number of steps that DDPM's beta_1 = 1e-4 and beta_T = 0.02 were chosen for."""


class Discrete(Schedule):
    """DDPM's variance-preserving table, exact at t = i / T, with the log-SNR interpolated linearly between.

    Where that is infinite there is no line to follow. Before 1 / T, sigma^2 grows in proportion to t; after the last
    time before pure noise, alpha falls in proportion to 1 - t.

    Args:
        alphas_cumprod: alpha_bar_1..alpha_bar_T, falling, each in [0, 1).
        zero_terminal_snr: shift and scale sqrt(alpha_bar) so that alpha_bar_T is exactly 0 while alpha_bar_1 stays
            (Lin et al., 2305.08891, algorithm 1).

    Raises:
        ValueError: the signal-to-noise ratio does not fall.
    """

    discrete = True
    table: Tensor

    def __init__(self, alphas_cumprod: Float64[Tensor, " T"], zero_terminal_snr: bool = False) -> None:
        super().__init__(len(alphas_cumprod))
        alpha = alphas_cumprod.sqrt()
        if zero_terminal_snr:
            if len(alpha) < 2:
                raise ValueError(
                    "zero_terminal_snr=true keeps alpha_1 and sets alpha_T to 0: num_steps must be at least 2"
                )
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        table = torch.cat((torch.ones(1, dtype=torch.float64), alpha))
        if not bool((table.diff() < 0).all()) or not bool((table >= 0).all()):
            raise ValueError("the signal-to-noise ratio of a schedule must fall at every step")
        self.register_buffer("table", table, persistent=False)
        self.host_table = table  # a plain attribute, so it stays on the CPU when the module moves

    def alpha(self, t: Times) -> Times:
        """Return sqrt(alpha_bar)."""
        table = self.host_table if t.device.type == "cpu" else self.table
        step = self.step_of(t)
        below = step.floor().clamp(max=self.num_steps - 1)
        part = step - below
        a, b = table[below.long()].to(t), table[below.long() + 1].to(t)
        sloped = _alpha_of(torch.lerp(_log_snr_of(a), _log_snr_of(b), part))
        at_start = (1 - (1 - b.square()) * part).sqrt()
        between = torch.where(below == 0, at_start, torch.where(b == 0, a * (1 - part), sloped))
        return torch.where(part == 0, a, torch.where(part == 1, b, between))

    def sigma(self, t: Times) -> Times:
        """Return sqrt(1 - alpha_bar)."""
        return (1 - self.alpha(t).square()).sqrt()

    def time_of(self, log_snr: Times) -> Times:
        """Return the time, by inverting the interpolation between two entries of the table."""
        table = self.host_table if log_snr.device.type == "cpu" else self.table
        alpha, variance = _alpha_of(log_snr), (-log_snr).sigmoid()
        below = (torch.searchsorted(-table, -alpha, right=True) - 1).clamp(0, self.num_steps - 1)
        a, b = table[below].to(log_snr), table[below + 1].to(log_snr)
        sloped = (log_snr - _log_snr_of(a)) / (_log_snr_of(b) - _log_snr_of(a))
        part = torch.where(
            below == 0, variance / (1 - b.square()), torch.where(b == 0, 1 - alpha / a, sloped)
        )
        return ((below + part.clamp(0, 1)) / self.num_steps).clamp(MIN_TIME, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Discrete":
        """Follow the module's device, never its precision: bfloat16 has no room for alpha_bar near 1."""
        device = fn(torch.empty(0, device=self.table.device)).device
        self.table = self.table.to(device, precise_dtype(device))
        return self


def from_betas(betas: Float64[Tensor, " T"], zero_terminal_snr: bool = False) -> Discrete:
    """Return the variance-preserving schedule with beta_1..beta_T, each in (0, 1)."""
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"every beta must lie in (0, 1); they run from {betas.min():g} to {betas.max():g}")
    return Discrete((1 - betas).cumprod(0), zero_terminal_snr)


def linear(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = True,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """Betas on a straight line (DDPM, section 4).

    ``rescale`` multiplies them by 1000 / T, so that x_T is as good as pure noise at any T. The blog does not:
    its alpha_bar_T at T = 300 is 0.048.
    """
    betas = _linspace(beta_start, beta_end, num_steps)
    return from_betas(_rescaled(betas, rescale), zero_terminal_snr)


def quadratic(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = True,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """Square roots of the betas on a straight line; ``rescale`` as in ``linear``."""
    if beta_start < 0 or beta_end < 0:
        raise ValueError(f"beta_start={beta_start} and beta_end={beta_end}: neither may be negative")
    betas = _linspace(beta_start**0.5, beta_end**0.5, num_steps).square()
    return from_betas(_rescaled(betas, rescale), zero_terminal_snr)


def sigmoid_beta(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = True,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """Betas on a sigmoid from -6 to 6 (GeoDiff, 2203.02923): the blog's "sigmoid"."""
    betas = _linspace(-6, 6, num_steps).sigmoid() * (beta_end - beta_start) + beta_start
    return from_betas(_rescaled(betas, rescale), zero_terminal_snr)


def cosine(
    num_steps: int = 1000,
    s: float = 0.008,
    beta_min: float = 0.0,
    beta_max: float = 0.999,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi/2) (Nichol & Dhariwal, 2102.09672, eq. 17).

    IDDPM clips beta from above at 0.999 and not from below; the blog clips to [1e-4, 0.9999].
    """
    time = fractions(num_steps)
    alphas_cumprod = torch.cos((time + s) / (1 + s) * math.pi / 2).square()
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return from_betas(betas.clamp(beta_min, beta_max), zero_terminal_snr)


def sigmoid(
    num_steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    zero_terminal_snr: bool = False,
) -> Discrete:
    """alpha_bar on a sigmoid of t from ``start`` to ``end`` (Jabri et al., 2212.11972, algorithm 2).

    The paper floors alpha_bar at 1e-9, which keeps the last step short of pure noise.
    """
    if tau <= 0 or start >= end:
        raise ValueError(f"start={start}, end={end}, tau={tau}: needs start < end and a positive tau")
    time = fractions(num_steps)[1:]
    first, last = (torch.tensor(edge / tau, dtype=torch.float64).sigmoid() for edge in (start, end))
    alphas_cumprod = (last - ((time * (end - start) + start) / tau).sigmoid()) / (last - first)
    return Discrete(alphas_cumprod.clamp(min=1e-9), zero_terminal_snr)


class VariancePreserving(Schedule):
    """A schedule of alpha^2 + sigma^2 = 1 that is given by its log-SNR, and by the inverse of that."""

    @abstractmethod
    def log_snr(self, t: Times) -> Times:
        """Return log(alpha^2 / sigma^2), falling in t."""

    def alpha(self, t: Times) -> Times:
        """Return alpha, whose square is sigmoid(log-SNR)."""
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t: Times) -> Times:
        """Return sigma, whose square is sigmoid(-log-SNR)."""
        return (-self.log_snr(t)).sigmoid().sqrt()


class VPLinear(VariancePreserving):
    """The limit of ``linear`` for infinitely many steps (Song et al., 2011.13456, equation 33).

        alpha(t)^2 = exp(-B(t)),        B(t) = beta_min t + (beta_max - beta_min) t^2 / 2

    Args:
        beta_min, beta_max: DDPM's beta_1 and beta_T, times 1000.
        num_steps: T.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, num_steps: int = 1000) -> None:
        super().__init__(num_steps)
        if not 0 <= beta_min < beta_max < math.inf:
            raise ValueError(
                f"beta_min={beta_min}, beta_max={beta_max}: needs 0 <= beta_min < beta_max, finite"
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_snr(self, t: Times) -> Times:
        """-log(e^B - 1)."""
        return -torch.expm1(self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2).log()

    def time_of(self, log_snr: Times) -> Times:
        """Solve B(t) = log(1 + 1 / SNR)."""
        B, slope = nn.functional.softplus(-log_snr.clamp(min=-1e9)), self.beta_max - self.beta_min
        return (2 * B / (self.beta_min + (self.beta_min**2 + 2 * slope * B).sqrt())).clamp(MIN_TIME, 1)


class VPCosine(VariancePreserving):
    """The cosine schedule in continuous time, its log-SNR kept within bounds (Hoogeboom et al., 2301.11093).

        log-SNR(t) = -2 log tan(pi u / 2),        u from t_min to t_max in proportion to t

    Args:
        log_snr_min, log_snr_max: the log-SNR at t = 1 and its limit at t = 0.
        num_steps: T.
    """

    def __init__(self, log_snr_min: float = -15.0, log_snr_max: float = 15.0, num_steps: int = 1000) -> None:
        super().__init__(num_steps)
        if not -60 <= log_snr_min < log_snr_max <= 60:
            raise ValueError(
                f"log_snr_min={log_snr_min}, log_snr_max={log_snr_max}: needs -60 <= log_snr_min < log_snr_max <= 60"
            )
        self.start, self.end = (math.atan(math.exp(-edge / 2)) for edge in (log_snr_max, log_snr_min))

    def log_snr(self, t: Times) -> Times:
        """-2 log tan of the angle."""
        return -2 * torch.tan(self.start + t * (self.end - self.start)).log()

    def time_of(self, log_snr: Times) -> Times:
        """Return the angle's place between its ends."""
        angle = torch.exp(-log_snr / 2).atan()
        return ((angle - self.start) / (self.end - self.start)).clamp(MIN_TIME, 1)


class Flow(Schedule):
    """alpha = 1 - t, sigma = t: the straight path of flow matching (2210.02747, 2209.03003)."""

    def alpha(self, t: Times) -> Times:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Times) -> Times:
        """The time itself."""
        return t

    def time_of(self, log_snr: Times) -> Times:
        """1 / (1 + alpha / sigma)."""
        return (-log_snr / 2).sigmoid().clamp(min=MIN_TIME)


class VE(Schedule):
    """EDM's variance-exploding schedule: alpha = 1, and sigma^(1 / rho) on a straight line (2206.00364, eq. 5).

    sigma rises to ``sigma_max`` at t = 1 from ``sigma_min``, below which noise is invisible. Use it with a
    parametrization that scales its input, such as target=edm.
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, num_steps: int = 1000
    ) -> None:
        super().__init__(num_steps)
        if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
            raise ValueError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: needs 0 < sigma_min < sigma_max and a"
                " positive rho, all finite"
            )
        self.low, self.high, self.rho = sigma_min ** (1 / rho), sigma_max ** (1 / rho), rho

    def alpha(self, t: Times) -> Times:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Times) -> Times:
        """(sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho."""
        return (self.low + t * (self.high - self.low)) ** self.rho

    def time_of(self, log_snr: Times) -> Times:
        """Return where sigma^(1 / rho) lies between its ends."""
        root = torch.exp(-log_snr / (2 * self.rho))
        return ((root - self.low) / (self.high - self.low)).clamp(MIN_TIME, 1)


def _log_snr_of(alpha: Times) -> Times:
    return 2 * alpha.log() - (1 - alpha.square()).log()


def _alpha_of(log_snr: Times) -> Times:
    return log_snr.sigmoid().sqrt()


def _linspace(start: float, end: float, num_steps: int) -> Float64[Tensor, " T"]:
    require_steps(num_steps)
    return torch.linspace(start, end, num_steps, dtype=torch.float64)


def _rescaled(betas: Float64[Tensor, " T"], rescale: bool) -> Float64[Tensor, " T"]:
    # Below about 20 steps DDPM's numbers would pass 1; IDDPM's ceiling serves here too.
    return (betas * DDPM_STEPS / len(betas)).clamp(max=0.999) if rescale else betas
