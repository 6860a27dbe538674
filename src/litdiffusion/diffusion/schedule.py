"""What a noise schedule is: alpha(t), sigma(t), and what follows from them.

Time runs over [0, 1]: t = 0 is the clean image, t = 1 the end of the schedule. A schedule is two functions,

    x_t = alpha(t) x_0 + sigma(t) eps,        eps ~ N(0, I)

whose signal-to-noise ratio alpha^2 / sigma^2 falls. Nothing asks that alpha^2 + sigma^2 = 1.
"""

import math
from abc import ABC, abstractmethod
from typing import overload

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from litdiffusion.diffusion.devices import precise_dtype

Times = Float[Tensor, "*times"]
Time = float | Float[Tensor, " batch"]
"""One time for a whole batch, or one for each image."""
Number = float | Float[Tensor, "batch 1 1 1"]
"""What belongs to a ``Time``; tensors in float64."""

MIN_TIME = 1e-12
"""The smallest positive time."""
BISECTIONS = 64
"""Halvings of [0, 1] that leave nothing between neighbouring numbers of float64."""


class Schedule(nn.Module, ABC):
    """alpha(t) and sigma(t), in the precision of t: float64 but on Apple's GPUs.

    Args:
        num_steps: T, the number of steps of the reverse process where nobody asks for another. The bound on the
            likelihood is that of these T steps, and the blog's clock counts in them.
    """

    discrete = False
    """Whether the network is trained at the times i / T alone."""

    def __init__(self, num_steps: int = 1000) -> None:
        super().__init__()
        require_steps(num_steps)
        self.num_steps = num_steps
        self._numbers = {0.0: (1.0, 0.0)}  # of the times that samplers have asked for

    @abstractmethod
    def alpha(self, t: Times) -> Times:
        """Return alpha at times in (0, 1], each at least 0."""

    @abstractmethod
    def sigma(self, t: Times) -> Times:
        """Return sigma at times in (0, 1], each above 0."""

    def time_of(self, log_snr: Times) -> Times:
        """Return the time at which log(alpha^2 / sigma^2) is ``log_snr``, the nearest in (0, 1] if there is none.

        By bisection; a schedule that knows the inverse of its log-SNR overrides this.
        """
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_later = self.log_snr(middle) > log_snr
            low, high = torch.where(is_later, middle, low), torch.where(is_later, high, middle)
        return high.clamp(min=MIN_TIME)

    def log_snr(self, t: Times) -> Times:
        """Return log(alpha^2 / sigma^2) at times in (0, 1]; minus infinity where alpha = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    @overload
    def at(self, t: float) -> tuple[float, float]: ...

    @overload
    def at(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def at(self, t: Time) -> tuple[Number, Number]:
        """Return alpha and sigma at t in [0, 1]: numbers for a number, [batch, 1, 1, 1] for one time of each image.

        At t = 0 they are 1 and 0, whatever the limits of the functions are.
        """
        if not isinstance(t, Tensor):
            if t not in self._numbers:
                on_host = torch.tensor(t, dtype=torch.float64)
                self._numbers[t] = float(self.alpha(on_host)), float(self.sigma(on_host))
            return self._numbers[t]
        is_clean = t == 0
        later = torch.where(is_clean, 1.0, t)
        alpha, sigma = self.alpha(later), self.sigma(later)
        alpha, sigma = torch.where(is_clean, 1.0, alpha), torch.where(is_clean, 0.0, sigma)
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def step_of(self, t: Times) -> Times:
        """Return T t: a whole number where t is i / T up to rounding."""
        step = t * self.num_steps
        whole = step.round()
        tolerance = 4 * torch.finfo(t.dtype).eps * self.num_steps
        return torch.where((step - whole).abs() <= tolerance, whole, step)

    def previous(self, t: Times) -> Times:
        """Return the times one of T steps earlier; 0 where there is none."""
        return (self.step_of(t) - 1).clamp(min=0) / self.num_steps

    def trained_time(self, t: Times) -> Times:
        """Return the time a network is trained at for a number in [0, 1): uniform times from uniform numbers."""
        t = t.to(precise_dtype(t.device))
        if not self.discrete:
            return t.clamp(min=MIN_TIME)  # at 0 there is nothing to learn
        return ((t * self.num_steps).floor() + 1).clamp(max=self.num_steps) / self.num_steps

    @property
    def betas(self) -> Float64[Tensor, " T"]:
        """beta_1..beta_T: the variances of q(x_t | x_s) between neighbouring times of i / T."""
        alpha, sigma = self._tables()
        return sigma[1:].square() - (alpha[1:] / alpha[:-1] * sigma[:-1]).square()

    @property
    def alphas_cumprod(self) -> Float64[Tensor, " T"]:
        """alpha_bar_1..alpha_bar_T, of the variance-preserving schedule with these signal-to-noise ratios."""
        signal, noise = (table[1:].square() for table in self._tables())
        return signal / (signal + noise)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that sampling begins with: of x_1, for images of unit variance.

        It is 1 for every variance-preserving schedule and for the straight path of flow matching.
        """
        return math.hypot(*self.at(1.0))

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether x_1 is pure noise: then the network cannot be asked for eps there."""
        return self.at(1.0)[0] == 0

    def _tables(self) -> tuple[Float64[Tensor, " times"], Float64[Tensor, " times"]]:
        alpha, sigma = self.at(fractions(self.num_steps))
        return alpha.flatten(), sigma.flatten()


def fractions(num_steps: int) -> Float64[Tensor, " times"]:
    """Return i / T for i = 0..T."""
    require_steps(num_steps)
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def require_steps(num_steps: int) -> None:
    """Raise ValueError for a schedule without steps."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a schedule needs at least 1 step")
