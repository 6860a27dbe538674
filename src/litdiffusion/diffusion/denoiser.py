"""Denoisers: at any noisy image x_t and time t, an estimate of the clean image.

``Preconditioned`` makes one of a network, a schedule and a parametrization. The others are denoisers around
denoisers: ``Clipped`` keeps the estimate among the images; those of guidance are in guidance.py. They compose:
``Clipped(Guided(Labelled(d, labels), guide=d, scale=2))``.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from litdiffusion.diffusion.network import Network
from litdiffusion.diffusion.parametrizations import Parametrization
from litdiffusion.diffusion.process import at_least_float32, scaled
from litdiffusion.diffusion.schedule import Schedule, Time

Images = Float[Tensor, "batch channels h w"]
Labels = Int[Tensor, " batch"]
D = TypeVar("D", bound=nn.Module)


@dataclass(frozen=True)
class Estimate:
    """An estimate of the clean image and the noise that is consistent with it: x_t = alpha_t x0 + sigma_t eps.

    ``variance``, where it is learned, says pixel by pixel where between beta-tilde (0) and beta (1) the
    logarithm of the variance of p(x_s | x_t) lies (Nichol & Dhariwal, 2102.09672, equation 15).
    """

    x0: Images
    eps: Images
    variance: Images | None = None


class Denoiser(nn.Module, ABC):
    """What samplers, edits and bounds work with: a schedule, and an estimate of x_0 at each time of it.

    Attributes:
        schedule: alpha(t) and sigma(t).
        image_shape: (channels, height, width).
        num_classes: how many classes the network can be asked for; None where it knows of none.
        self_condition: whether the network takes an earlier estimate of x_0.
        learned_variance: whether the network says how uncertain a step is.
    """

    schedule: Schedule
    image_shape: tuple[int, int, int]
    num_classes: int | None
    self_condition: bool
    learned_variance: bool

    @abstractmethod
    def forward(
        self, x_t: Images, t: Time, self_cond: Images | None = None, labels: Labels | None = None
    ) -> Estimate:
        """Estimate x_0 and eps at times in (0, 1]: one for the whole batch, or one for each image."""

    @property
    @abstractmethod
    def core(self) -> "Preconditioned":
        """The network's own denoiser, without anything around it."""

    @abstractmethod
    def with_core(self, change: Callable[["Denoiser"], "Denoiser"]) -> "Denoiser":
        """Return the same composition around ``change(core)``; networks and tables are shared."""

    def with_net(self, net: nn.Module) -> "Denoiser":
        """Return the same composition around another network."""

        def exchanged(core: Denoiser) -> Denoiser:
            twin = _shallow_copy(core)
            twin.net = net
            return twin

        return self.with_core(exchanged)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        core = self.core
        return next((tensor.device for tensor in (*core.parameters(), *core.buffers())), torch.device("cpu"))


class Preconditioned(Denoiser):
    """A network, a schedule and a parametrization.

    Args:
        net: ``Network`` says how it is called, and what it may declare that it can do.
        schedule: alpha(t) and sigma(t).
        target: the parametrization: what the network returns.
        channels: of the images.
        image_size: their height and width, or one number for both.

    Raises:
        ValueError: the network does not take images of that size, or its output says nothing about the image at the
            end of the schedule.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Parametrization,
        channels: int,
        image_size: int | Sequence[int],
    ) -> None:
        super().__init__()
        if schedule.has_zero_terminal_snr and not target.defined_at_zero_snr:
            name = type(target).__name__.lower()
            raise ValueError(
                f"target={name}: says nothing about the image where there is only noise, as at the end of this"
                f" schedule; use target=v{', or schedule.zero_terminal_snr=false' if schedule.discrete else ''}"
            )
        log_snr = schedule.log_snr(torch.linspace(0.01, 1, 100, dtype=torch.float64))
        if not bool((log_snr.diff() < 0).all()):
            raise ValueError(f"schedule={type(schedule).__name__}: its signal-to-noise ratio must fall in t")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        multiple = int(getattr(net, "size_multiple", Network.size_multiple))
        if height % multiple or width % multiple:
            size = max(height if height % multiple else width, multiple)
            near = sorted({size // multiple * multiple, -(-size // multiple) * multiple})
            raise ValueError(
                f"image_size={height}x{width}: this network takes sides that are multiples of {multiple}; use"
                f" data.image_size={' or '.join(map(str, near))}, or divide the image less (fewer net.dim_mults, a"
                " smaller net.patch_size)"
            )
        self.net = net
        self.schedule = schedule
        self.target = target
        self.image_shape = (channels, height, width)
        self.num_classes = getattr(net, "num_classes", Network.num_classes)
        self.self_condition = bool(getattr(net, "self_condition", Network.self_condition))
        self.learned_variance = bool(getattr(net, "learned_variance", Network.learned_variance))

    @property
    def core(self) -> "Preconditioned":
        """Itself."""
        return self

    def with_core(self, change: Callable[[Denoiser], Denoiser]) -> Denoiser:
        """Return ``change(self)``."""
        return change(self)

    @property
    def largest_input(self) -> float:
        """The standard deviation of the network's input at t = 1, for images of unit variance."""
        return self.schedule.init_noise_sigma * float(self.target.coefficients(*self.schedule.at(1.0)).c_in)

    def output(
        self, x_t: Images, t: Time, self_cond: Images | None = None, labels: Labels | None = None
    ) -> tuple[Images, Images | None]:
        """Return F(c_in x_t; c_noise) in at least float32, and the variance where it is learned.

        No labels means no class in particular.
        """
        further: dict[str, Tensor | None] = {}
        if self.self_condition:
            further["self_cond"] = self_cond
        if self.num_classes is not None:
            anything = torch.full((len(x_t),), self.num_classes, device=x_t.device)
            further["labels"] = anything if labels is None else labels
        x = scaled(x_t, self.target.coefficients(*self.schedule.at(t)).c_in)
        of_net = next((parameter.dtype for parameter in self.net.parameters()), x.dtype)
        x = x.to(torch.promote_types(x.dtype, of_net))  # noise is float32, and a network may be in float64
        raw = at_least_float32(self.net(x, self._clock(x_t, t), **further))
        if not self.learned_variance:
            return raw, None
        target, variance = raw.chunk(2, dim=1)
        return target, (variance + 1) / 2

    def estimate(self, output: Images, x_t: Images, t: Time, variance: Images | None = None) -> Estimate:
        """Return what an output at x_t says: x_0 = c_skip x_t + c_out F."""
        c_skip, c_out, _ = self.target.coefficients(*self.schedule.at(t))
        x_t = at_least_float32(x_t)
        return consistent(self.schedule, scaled(x_t, c_skip) + scaled(output, c_out), x_t, t, variance)

    def forward(
        self, x_t: Images, t: Time, self_cond: Images | None = None, labels: Labels | None = None
    ) -> Estimate:
        """Run the network, and convert its output to an estimate."""
        output, variance = self.output(x_t, t, self_cond, labels)
        return self.estimate(output, x_t, t, variance)

    def _clock(self, x_t: Images, t: Time) -> Float[Tensor, " batch"]:
        if isinstance(t, Tensor):
            return self.target.c_noise(self.schedule, t).float()
        c_noise = float(self.target.c_noise(self.schedule, torch.tensor([t], dtype=torch.float64)))
        return torch.full((len(x_t),), c_noise, dtype=torch.float32, device=x_t.device)


class Wrapped(Denoiser):
    """A denoiser around another, with the other's schedule and abilities."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner
        self.schedule = inner.schedule
        self.image_shape = inner.image_shape
        self.num_classes = inner.num_classes
        self.self_condition = inner.self_condition
        self.learned_variance = inner.learned_variance

    @property
    def core(self) -> Preconditioned:
        """The innermost denoiser."""
        return self.inner.core

    def with_core(self, change: Callable[[Denoiser], Denoiser]) -> Denoiser:
        """Return the same wrapper around the changed inside."""
        twin = _shallow_copy(self)
        twin.inner = self.inner.with_core(change)
        return twin


class Clipped(Wrapped):
    """Clip the estimate of x_0 to the range of images, [-1, 1].

    eps follows from the clipped x_0, not from the output: a sampler that mixes the two would leave the line between
    them.

    Args:
        inner: the denoiser whose estimates are clipped.
        clip: ``static`` clamps the estimate to [-1, 1], as DDPM does; ``dynamic`` to the ``clip_quantile`` of its
            absolute values, then scales it into [-1, 1] (Saharia et al., 2205.11487); ``none`` leaves it, as the
            blog does.
        clip_quantile: which quantile of each image ``dynamic`` takes, in (0, 1].
    """

    def __init__(
        self,
        inner: Denoiser,
        clip: Literal["static", "dynamic", "none"] = "static",
        clip_quantile: float = 0.995,
    ) -> None:
        super().__init__(inner)
        if clip not in ("none", "static", "dynamic"):
            raise ValueError(f"clip={clip!r}: choose none, static or dynamic")
        if not 0 < clip_quantile <= 1:
            raise ValueError(f"clip_quantile={clip_quantile}: must lie in (0, 1]")
        self.clip = clip
        self.clip_quantile = clip_quantile

    def forward(
        self, x_t: Images, t: Time, self_cond: Images | None = None, labels: Labels | None = None
    ) -> Estimate:
        """Clip the inner estimate."""
        estimate: Estimate = self.inner(x_t, t, self_cond, labels)
        if self.clip == "none":
            return estimate
        if self.clip == "static":
            x0 = estimate.x0.clamp(-1, 1)
        else:
            sizes = estimate.x0.abs().flatten(1).sort().values
            # As torch.quantile has it, to the bit, which needs float64 on the device.
            rank = float(torch.tensor(self.clip_quantile, dtype=sizes.dtype)) * (sizes.shape[1] - 1)
            size = torch.lerp(sizes[:, math.floor(rank)], sizes[:, math.ceil(rank)], rank % 1)
            size = size.clamp(min=1)[:, None, None, None]
            x0 = estimate.x0.clamp(-size, size) / size
        return consistent(self.schedule, x0, x_t, t, estimate.variance)


def consistent(
    schedule: Schedule, x0: Images, x_t: Images, t: Time, variance: Images | None = None
) -> Estimate:
    """Return the estimate x_0 with the eps that belongs to it: (x_t - alpha_t x_0) / sigma_t."""
    alpha, sigma = schedule.at(t)
    return Estimate(x0, scaled(at_least_float32(x_t) - scaled(x0, alpha), 1 / sigma), variance)


def _shallow_copy(module: D) -> D:
    # Shares every submodule and table with the original; those that are set anew are its own.
    twin = copy.copy(module)
    twin._modules = module._modules.copy()
    return twin
