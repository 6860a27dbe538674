"""Noise schedules: how fast the image drowns.

A schedule is two tables over t = 0..T, with t = 0 the clean image (alpha_0 = 1, sigma_0 = 0):

    x_t = alpha_t x_0 + sigma_t eps,        eps ~ N(0, I)

DDPM (Ho et al., 2006.11239) speaks of beta_1..beta_T and alpha_bar_t = prod_{s <= t} (1 - beta_s); then
alpha_t = sqrt(alpha_bar_t) and sigma_t = sqrt(1 - alpha_bar_t). DDPM's own "alpha_t" (1 - beta_t) is called
``1 - betas`` here.

To add a schedule, write a function that returns a ``Schedule`` and a YAML file that names it. Nothing else asks
that alpha^2 + sigma^2 = 1; but the network is given x_t as it is, so one for a schedule whose sigma grows large
(variance-exploding) has to scale its input itself.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

DDPM_STEPS = 1000
"""The number of steps that DDPM's beta_1 = 1e-4 and beta_T = 0.02 were chosen for."""


class Schedule(nn.Module):
    """The tables alpha and sigma, in float64, on whatever device the model is.

    ``host_alpha`` and ``host_sigma`` are the same tables, always on the CPU: what is decided by the numbers at a time
    is decided there, without waiting for the device.

    Args:
        alpha: alpha_0..alpha_T, falling from 1.
        sigma: sigma_0..sigma_T, rising from 0.

    Raises:
        ValueError: the tables do not start at a clean image, or the signal-to-noise ratio does not fall.
    """

    alpha: Tensor
    sigma: Tensor
    host_alpha: Tensor
    host_sigma: Tensor

    def __init__(self, alpha: Float64[Tensor, " times"], sigma: Float64[Tensor, " times"]) -> None:
        super().__init__()
        if len(alpha) < 2:
            raise ValueError("num_steps must be at least 1")
        if alpha[0] != 1 or sigma[0] != 0:
            raise ValueError("a schedule starts at the clean image: alpha_0 = 1 and sigma_0 = 0")
        if bool((alpha < 0).any()) or bool((sigma < 0).any()):
            raise ValueError("alpha and sigma may not be negative")
        snr = (alpha[1:] / sigma[1:]).square()
        if not bool((snr.diff() < 0).all()) or not bool(torch.isfinite(snr).all()):
            raise ValueError("the signal-to-noise ratio of a schedule must fall at every step")
        self.register_buffer("alpha", alpha, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        # Plain attributes, so they stay where they are when the module moves.
        self.host_alpha, self.host_sigma = alpha.cpu(), sigma.cpu()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Schedule":
        """Follow the module's device, never its precision: bfloat16 has no room for alpha_bar near 1."""
        device = fn(torch.empty(0, device=self.alpha.device)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.alpha, self.sigma = self.alpha.to(device, dtype), self.sigma.to(device, dtype)
        return self

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.alpha) - 1

    @property
    def alphas_cumprod(self) -> Float64[Tensor, " T"]:
        """alpha_bar_1..alpha_bar_T, of the variance-preserving schedule with these signal-to-noise ratios."""
        signal, noise = self.alpha[1:].square(), self.sigma[1:].square()
        return signal / (signal + noise)

    @property
    def betas(self) -> Float64[Tensor, " T"]:
        """beta_1..beta_T: the variances of q(x_t | x_{t-1})."""
        a = self.alpha[1:] / self.alpha[:-1]
        return self.sigma[1:].square() - a.square() * self.sigma[:-1].square()

    @property
    def log_snr(self) -> Float64[Tensor, " T"]:
        """log(alpha_t^2 / sigma_t^2) for t = 1..T; minus infinity where alpha_T = 0."""
        return _log_snr(self.alpha, self.sigma)

    @property
    def host_log_snr(self) -> Float64[Tensor, " T"]:
        """``log_snr`` on the CPU."""
        return _log_snr(self.host_alpha, self.host_sigma)

    @property
    def terminal_std(self) -> float:
        """The standard deviation of the noise that sampling begins with: of x_T, for images of unit variance.

        It is 1 for every variance-preserving schedule and for the straight path of flow matching.
        """
        return float((self.host_alpha[-1].square() + self.host_sigma[-1].square()).sqrt())

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether x_T is pure noise: then the network cannot be asked for eps there."""
        return bool(self.host_alpha[-1] == 0)

    def at(self, t: Int[Tensor, " batch"], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t as [batch, 1, 1, 1]."""
        alpha, sigma = self.alpha[t].to(dtype), self.sigma[t].to(dtype)
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def at_time(self, t: int) -> tuple[float, float]:
        """Return alpha_t and sigma_t as numbers, read from the tables on the host."""
        return float(self.host_alpha[t]), float(self.host_sigma[t])


def from_alphas_cumprod(alphas_cumprod: Float64[Tensor, " T"], zero_terminal_snr: bool = False) -> Schedule:
    """Return the variance-preserving schedule with alpha_bar_1..alpha_bar_T.

    ``zero_terminal_snr`` shifts and scales sqrt(alpha_bar) so that alpha_bar_T is exactly 0 while
    alpha_bar_1 stays (Lin et al., 2305.08891, algorithm 1).
    """
    alpha = alphas_cumprod.sqrt()
    if zero_terminal_snr:
        if len(alpha) < 2:
            raise ValueError(
                "zero_terminal_snr=true keeps alpha_1 and sets alpha_T to 0: num_steps must be at least 2"
            )
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    alpha = torch.cat((torch.ones(1, dtype=torch.float64), alpha))
    return Schedule(alpha, (1 - alpha.square()).sqrt())


def from_betas(betas: Float64[Tensor, " T"], zero_terminal_snr: bool = False) -> Schedule:
    """Return the variance-preserving schedule with beta_1..beta_T, each in (0, 1)."""
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"every beta must lie in (0, 1); they run from {betas.min():g} to {betas.max():g}")
    return from_alphas_cumprod((1 - betas).cumprod(0), zero_terminal_snr)


def linear(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale: bool = True,
    zero_terminal_snr: bool = False,
) -> Schedule:
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
) -> Schedule:
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
) -> Schedule:
    """Betas on a sigmoid from -6 to 6 (GeoDiff, 2203.02923): the blog's "sigmoid"."""
    betas = _linspace(-6, 6, num_steps).sigmoid() * (beta_end - beta_start) + beta_start
    return from_betas(_rescaled(betas, rescale), zero_terminal_snr)


def cosine(
    num_steps: int = 1000,
    s: float = 0.008,
    beta_min: float = 0.0,
    beta_max: float = 0.999,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2) (Nichol & Dhariwal, 2102.09672, eq. 17).

    IDDPM clips beta from above at 0.999 and not from below; the blog clips to [1e-4, 0.9999].
    """
    time = _fractions(num_steps)
    alphas_cumprod = torch.cos((time + s) / (1 + s) * math.pi / 2).square()
    betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
    return from_betas(betas.clamp(beta_min, beta_max), zero_terminal_snr)


def sigmoid(
    num_steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """alpha_bar on a sigmoid of t/T from ``start`` to ``end`` (Jabri et al., 2212.11972, algorithm 2).

    The paper floors alpha_bar at 1e-9, which keeps the last step short of pure noise.
    """
    if tau <= 0 or start >= end:
        raise ValueError(f"start={start}, end={end}, tau={tau}: needs start < end and a positive tau")
    time = _fractions(num_steps)[1:]
    first, last = (torch.tensor(edge / tau, dtype=torch.float64).sigmoid() for edge in (start, end))
    alphas_cumprod = (last - ((time * (end - start) + start) / tau).sigmoid()) / (last - first)
    return from_alphas_cumprod(alphas_cumprod.clamp(min=1e-9), zero_terminal_snr)


def flow(num_steps: int = 1000) -> Schedule:
    """alpha_t = 1 - t/T, sigma_t = t/T: the straight path of flow matching (2210.02747, 2209.03003)."""
    time = _fractions(num_steps)
    return Schedule(1 - time, time)


def _log_snr(alpha: Float64[Tensor, " times"], sigma: Float64[Tensor, " times"]) -> Float64[Tensor, " T"]:
    return 2 * (alpha[1:].log() - sigma[1:].log())


def _linspace(start: float, end: float, num_steps: int) -> Float64[Tensor, " T"]:
    _require_steps(num_steps)
    return torch.linspace(start, end, num_steps, dtype=torch.float64)


def _fractions(num_steps: int) -> Float64[Tensor, " times"]:
    """Return t / T for t = 0..T."""
    _require_steps(num_steps)
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a schedule needs at least 1 step")


def _rescaled(betas: Float64[Tensor, " T"], rescale: bool) -> Float64[Tensor, " T"]:
    # Below about 20 steps DDPM's numbers would pass 1; IDDPM's ceiling serves here too.
    return (betas * DDPM_STEPS / len(betas)).clamp(max=0.999) if rescale else betas
