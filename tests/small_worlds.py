"""Worlds small enough to have exact answers: what the tests of the mathematics live in.

``Oracle`` knows the image, ``GaussianData`` and ``MixtureData`` have an exact denoiser, which ``Exact`` turns into
a network, ``Spy`` remembers what it was asked, and ``Affine`` is a network that a batch cannot disturb.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litdiffusion.diffusion import (
    DDIM,
    DDPM,
    EDM,
    X0,
    Clipped,
    Denoiser,
    DPMSolverPP2M,
    Draws,
    Epsilon,
    Estimate,
    Heun,
    Parametrization,
    Preconditioned,
    Sampler,
    SamplerState,
    Schedule,
    V,
    Velocity,
    schedules,
)
from litdiffusion.diffusion.likelihood import Variance, bound_term, prior_bits

SCHEDULES = {
    "linear": schedules.linear,
    "quadratic": schedules.quadratic,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "sigmoid_beta": schedules.sigmoid_beta,
}
"""The variance-preserving ones."""

CONTINUOUS = {
    "vp_linear": schedules.VPLinear,
    "vp_cosine": schedules.VPCosine,
    "flow": schedules.Flow,
    "ve": schedules.VE,
}
"""Those whose networks are trained at every t."""

ALL_SCHEDULES = {
    **SCHEDULES,
    **{name: partial(kind, num_steps=1000) for name, kind in CONTINUOUS.items()},
}

TARGETS = {"epsilon": Epsilon(), "x0": X0(), "v": V(), "velocity": Velocity(), "edm": EDM()}

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


def every_pair(first: Iterable, second: Iterable, third: Sequence) -> list[tuple]:
    """Cases for three parameters: every pair of the first two, each of which meets every value of the third in turn.

    In place of the whole product, where two parameters may spoil each other's case and three need not be feared.
    """
    seconds = list(second)
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(seconds)]


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


def time_from(c_noise: Tensor, schedule: Schedule, target: Parametrization) -> Tensor:
    """The time of which a network is told ``c_noise``."""
    if isinstance(target, EDM):
        return schedule.time_of(-8 * c_noise.double())
    # A network's clock is in float32: of times next to 0 it says 0.
    return ((c_noise.double() + 1) / schedule.num_steps).clamp(min=schedules.MIN_TIME)


class Oracle(nn.Module):
    """A network that knows ``x0``, and so returns the target of the very noise that made x_t of it."""

    def __init__(self, x0: Tensor, schedule: Schedule, target: Parametrization) -> None:
        super().__init__()
        self.x0, self.schedule, self.target = x0, schedule, target

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        t = time_from(c_noise, self.schedule, self.target)
        alpha, sigma = self.schedule.at(t)
        x_t = x / self.target.coefficients(alpha, sigma).c_in
        return self.target.target(self.x0, (x_t - alpha * self.x0) / sigma, alpha, sigma).to(x.dtype)


class Affine(nn.Module):
    """gain x + time_gain c_noise + feedback_gain self_cond: pixel by pixel, so that batches cannot matter."""

    def __init__(self, self_condition: bool = False) -> None:
        super().__init__()
        self.self_condition = self_condition
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.time_gain = nn.Parameter(torch.tensor(0.03))
        self.feedback_gain = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, c_noise: Tensor, self_cond: Tensor | None = None) -> Tensor:
        out = self.gain * x + self.time_gain * c_noise[:, None, None, None]
        return out if self_cond is None else out + self.feedback_gain * self_cond


@dataclass
class Call:
    x: Tensor
    c_noise: Tensor
    self_cond: Tensor | None
    grad_enabled: bool


class Spy(Affine):
    """An ``Affine`` that keeps its calls."""

    def __init__(self, self_condition: bool = True) -> None:
        super().__init__(self_condition)
        self.calls: list[Call] = []

    def forward(self, x: Tensor, c_noise: Tensor, self_cond: Tensor | None = None) -> Tensor:
        self.calls.append(Call(x, c_noise, self_cond, torch.is_grad_enabled()))
        return super().forward(x, c_noise, self_cond)


@dataclass
class GaussianData:
    """Pixels that are independently N(mean, std^2); everything about their diffusion is known."""

    schedule: Schedule
    mean: float = 0.3
    std: float = 0.5

    def mean_at(self, t: float) -> float:
        return self.schedule.at(t)[0] * self.mean

    def variance_at(self, t: float) -> float:
        alpha, sigma = self.schedule.at(t)
        return alpha**2 * self.std**2 + sigma**2

    def posterior_variance(self, t: float) -> float:
        """Var(x_0 | x_t)."""
        return self.std**2 * self.schedule.at(t)[1] ** 2 / self.variance_at(t)

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t] for a time of each image, in the precision of x_t."""
        alpha, sigma = (number.to(x_t.dtype) for number in self.schedule.at(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def estimate(self, x_t: Tensor, t: float) -> Estimate:
        """The exact denoiser at one time."""
        alpha, sigma = self.schedule.at(t)
        x0 = self.denoise(x_t, torch.full((len(x_t),), t, dtype=torch.float64))
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    def flow_to_image(self, x_T: Tensor) -> Tensor:
        """Where the probability flow leads: it keeps (x_t - mean_t) / std_t."""
        return self.mean + self.std * (x_T - self.mean_at(1.0)) / self.variance_at(1.0) ** 0.5

    def step(
        self,
        sampler: Sampler,
        x_t: Tensor,
        t: float,
        s: float,
        noise: Callable[[], Tensor],
        fraction: float | None = None,
    ) -> Tensor:
        """One step with the exact denoiser, and ``fraction`` as the learned variance of every pixel."""
        estimate = self.estimate(x_t, t)
        if fraction is not None:
            estimate = replace(estimate, variance=torch.full_like(x_t, fraction))
        return sampler.step(SamplerState(self.schedule, t, s, x_t, estimate, noise, self.estimate))


@dataclass
class MixtureData:
    """Pixels that are of class k with probability weights[k], and then N(means[k], stds[k]^2), independently."""

    schedule: Schedule
    means: tuple[float, ...] = (-0.8, 0.0, 0.7)
    stds: tuple[float, ...] = (0.08, 0.12, 0.1)
    weights: tuple[float, ...] = (0.2, 0.5, 0.3)

    def log_densities(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """log of weights[k] N(x_t; alpha_t means[k], alpha_t^2 stds[k]^2 + sigma_t^2), along a last axis of k.

        With a label, its class alone has weight; with the label after the last class, all of them have theirs.
        """
        alpha, sigma = (number[..., None].to(x_t.dtype) for number in self.schedule.at(t))
        mean, std, weight = (torch.tensor(x, dtype=x_t.dtype) for x in (self.means, self.stds, self.weights))
        variance = alpha**2 * std**2 + sigma**2
        if labels is not None:
            only = torch.cat((torch.eye(len(weight), dtype=x_t.dtype), weight[None]))
            weight = only[labels][:, None, None, None]
        distance = (x_t[..., None] - alpha * mean) ** 2 / variance
        return weight.log() - (distance + (2 * torch.pi * variance).log()) / 2

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], for data of the labelled classes where there are labels."""
        alpha, sigma = (number[..., None].to(x_t.dtype) for number in self.schedule.at(t))
        mean, std = (torch.tensor(x, dtype=x_t.dtype) for x in (self.means, self.stds))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        of_class = mean + gain * (x_t[..., None] - alpha * mean)
        return (self.log_densities(x_t, t, labels).softmax(-1) * of_class).sum(-1)


class Mine(V):
    """A parametrization that somebody defines outside of the package."""


class Exact(nn.Module):
    """A network that knows the data: it returns the target at E[x_0 | x_t], in the precision of x_t.

    ``calls`` keeps the size of each batch; ``fraction``, if given, is the learned variance of every pixel.
    """

    def __init__(
        self,
        data: GaussianData | MixtureData,
        target: Parametrization,
        num_classes: int | None = None,
        fraction: float | None = None,
    ) -> None:
        super().__init__()
        self.data, self.target, self.num_classes, self.fraction = data, target, num_classes, fraction
        self.learned_variance = fraction is not None
        self.calls: list[int] = []

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        t = time_from(c_noise, self.data.schedule, self.target)
        alpha, sigma = self.data.schedule.at(t)
        x_t = (x / self.target.coefficients(alpha, sigma).c_in).to(x.dtype)
        x0 = self.data.denoise(x_t, t, labels)
        output = self.target.target(x0, ((x_t - alpha * x0) / sigma).to(x.dtype), alpha, sigma)
        if self.fraction is None:
            return output
        return torch.cat((output, torch.full_like(output, 2 * self.fraction - 1)), dim=1)


def exact_denoiser(
    data: GaussianData | MixtureData, target: Parametrization | None = None, **options
) -> Denoiser:
    """The exact denoiser of one-pixel images, unclipped."""
    target = target or V()
    return Preconditioned(Exact(data, target, **options), data.schedule, target, 1, 1)


def affine_denoiser(
    schedule: Schedule,
    target: Parametrization | None = None,
    clip: str = "static",
    net: nn.Module | None = None,
) -> Denoiser:
    """A denoiser of 4x4 images around ``net`` or a fresh ``Affine``."""
    return Clipped(Preconditioned(net or Affine(), schedule, target or Epsilon(), 1, 4), clip)


def draws(count: int, seed: int = 0, device: str = "cpu") -> Draws:
    """The random numbers of ``count`` images."""
    return Draws.at(seed, "test", start=0, stop=count, device=device)


def times(*t: float) -> Tensor:
    """A time of each image."""
    return torch.tensor(t, dtype=torch.float64)


class Bound(NamedTuple):
    """The bound of each image, part by part, in bits per dimension.

    Attributes:
        prior: L_T.
        terms: L_0..L_{T-1}, in this order.
    """

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """The bound: all parts together."""
        return self.prior + self.terms.sum(1)


def variational_bound(
    denoiser: Denoiser, x0: Tensor, noise: Callable[[Tensor], Tensor], variance: Variance
) -> Bound:
    """Return the whole bound of each image, each term's expectation over x_t taken at one draw of noise.

    The network is called once (twice where it is self-conditioned) at each of the T times, on all images.

    Args:
        denoiser: of the model; with its guidance, where it has any.
        x0: images in [-1, 1], on the gray levels.
        noise: from the times, the same for every image, to standard normal images.
        variance: of p(x_s | x_t).
    """
    terms = []
    T = denoiser.schedule.num_steps
    for step in range(1, T + 1):
        t = torch.full((len(x0),), step / T, dtype=torch.float64, device=x0.device)
        terms.append(bound_term(denoiser, x0, t, noise(t), variance))
    return Bound(prior_bits(denoiser.schedule, x0), torch.stack(terms, dim=1))
