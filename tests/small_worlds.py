"""Worlds small enough to have exact answers: what the tests of the mathematics live in.

``Oracle`` knows the image, ``GaussianData`` has an exact denoiser, ``Spy`` remembers what it was asked, and
``Affine`` is a network that a batch cannot disturb.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    Denoiser,
    DPMSolverPP2M,
    Epsilon,
    Estimate,
    Here,
    Heun,
    Sampler,
    Schedule,
    Target,
    schedules,
)

SCHEDULES = {
    "linear": schedules.linear,
    "quadratic": schedules.quadratic,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "sigmoid_beta": schedules.sigmoid_beta,
}
"""The variance-preserving ones."""

ALL_SCHEDULES = {**SCHEDULES, "flow": schedules.flow}

SAMPLERS = {
    "ddpm": DDPM,
    "ddpm_beta": lambda num_steps: DDPM(num_steps, variance="beta"),
    "ddim": DDIM,
    "ddim_eta": lambda num_steps: DDIM(num_steps, eta=0.7),
    "ddim_eta_1": lambda num_steps: DDIM(num_steps, eta=1.0),
    "dpmpp_2m": DPMSolverPP2M,
    "heun": Heun,
    "heun_churn": lambda num_steps: Heun(num_steps, churn=10.0),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(count: int, channels: int = 1, size: int = 4, seed: int = 0) -> Tensor:
    """Images in [-1, 1]."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value of its own, so that no gain is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


class Oracle(nn.Module):
    """A network that knows ``x0``, and so returns the target of the very noise that made x_t of it."""

    def __init__(self, x0: Tensor, schedule: Schedule, target: Target) -> None:
        super().__init__()
        self.x0, self.schedule, self.target = x0, schedule, target

    def forward(self, x_t: Tensor, clock: Tensor) -> Tensor:
        alpha, sigma = self.schedule.at(clock + 1)
        return self.target.of(self.x0, (x_t - alpha * self.x0) / sigma, alpha, sigma)


class Affine(nn.Module):
    """gain x_t + time_gain clock + feedback_gain self_cond: pixel by pixel, so that batches cannot matter."""

    def __init__(self, self_condition: bool = False) -> None:
        super().__init__()
        self.self_condition = self_condition
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.time_gain = nn.Parameter(torch.tensor(0.03))
        self.feedback_gain = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, clock: Tensor, self_cond: Tensor | None = None) -> Tensor:
        out = self.gain * x + self.time_gain * clock[:, None, None, None]
        return out if self_cond is None else out + self.feedback_gain * self_cond


@dataclass
class Call:
    x: Tensor
    clock: Tensor
    self_cond: Tensor | None
    grad_enabled: bool


class Spy(Affine):
    """An ``Affine`` that keeps its calls."""

    def __init__(self, self_condition: bool = True) -> None:
        super().__init__(self_condition)
        self.calls: list[Call] = []

    def forward(self, x: Tensor, clock: Tensor, self_cond: Tensor | None = None) -> Tensor:
        self.calls.append(Call(x, clock, self_cond, torch.is_grad_enabled()))
        return super().forward(x, clock, self_cond)


@dataclass
class GaussianData:
    """Pixels that are independently N(mean, std^2); everything about their diffusion is known."""

    schedule: Schedule
    mean: float = 0.3
    std: float = 0.5

    def tables(self, t: int) -> tuple[float, float]:
        return float(self.schedule.alpha[t]), float(self.schedule.sigma[t])

    def mean_at(self, t: int) -> float:
        return self.tables(t)[0] * self.mean

    def variance_at(self, t: int) -> float:
        alpha, sigma = self.tables(t)
        return alpha**2 * self.std**2 + sigma**2

    def posterior_variance(self, t: int) -> float:
        """Var(x_0 | x_t)."""
        return self.std**2 * self.tables(t)[1] ** 2 / self.variance_at(t)

    def estimate(self, x_t: Tensor, t: int) -> Estimate:
        """The exact denoiser: x_0 = E[x_0 | x_t], in the precision of x_t."""
        alpha, sigma = self.tables(t)
        x0 = self.mean + alpha * self.std**2 / self.variance_at(t) * (x_t - alpha * self.mean)
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    def step(self, sampler: Sampler, x_t: Tensor, t: int, s: int, noise: Callable[[], Tensor]) -> Tensor:
        return sampler.step(Here(self.schedule, t, s, x_t, self.estimate(x_t, t), noise, self.estimate))


def affine_denoiser(
    schedule: Schedule, target: Target | None = None, clip: str = "static", net: nn.Module | None = None
) -> Denoiser:
    """A denoiser of 4x4 images around ``net`` or a fresh ``Affine``."""
    return Denoiser(net or Affine(), schedule, target or Epsilon(), 1, 4, clip)
