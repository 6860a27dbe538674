"""The denoiser: network + schedule + target, as one estimate of the clean image.

Everything that stands between a raw network and the mathematics lives here and only here: the network's
clock, the conversion of its output, clipping, self-conditioning, learned variance, class labels, guidance.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from litdiffusion.diffusion.devices import to_device
from litdiffusion.diffusion.network import Network
from litdiffusion.diffusion.process import Time, at_least_float32
from litdiffusion.diffusion.schedules import Schedule
from litdiffusion.diffusion.targets import Target

Images = Float[Tensor, "batch channels h w"]
Labels = Int[Tensor, " batch"]


@dataclass(frozen=True)
class Estimate:
    """An estimate of the clean image and the noise that is consistent with it: x_t = alpha_t x0 + sigma_t eps.

    ``variance``, where it is learned, says pixel by pixel where between beta-tilde (0) and beta (1) the
    logarithm of the variance of p(x_s | x_t) lies (Nichol & Dhariwal, 2102.09672, equation 15).
    """

    x0: Images
    eps: Images
    variance: Images | None = None


@dataclass(frozen=True)
class Guidance:
    """What a denoiser is asked to draw, and how firmly (Ho & Salimans, 2207.12598).

    output = without labels + scale (with labels - without labels)

    Args:
        labels: a class for each image.
        scale: 1 follows the labels as the network has learned them, more exaggerates them, 0 ignores them.
        interval: guide only where t / T lies in it (Kynkäänniemi et al., 2404.07724); elsewhere as for 1.
    """

    labels: Labels
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(
                f"guidance_interval={list(self.interval)}: must be [from, to], fractions of T in 0..1"
            )


class Denoiser(nn.Module):
    """Estimate x_0 from x_t.

    Args:
        net: returns the target. ``Network`` says how it is called, and what it may declare that it can do.
        schedule: the tables alpha and sigma.
        target: what the network returns.
        channels: of the images.
        image_size: their height and width, or one number for both.
        clip: ``static`` clamps the estimate to [-1, 1], as DDPM does; ``dynamic`` to the ``clip_quantile`` of its
            absolute values, then scales it into [-1, 1] (Saharia et al., 2205.11487); ``none`` leaves it, as the
            blog does.
        clip_quantile: which quantile of each image ``dynamic`` takes.

    Raises:
        ValueError: the target says nothing at the schedule's last step, the network cannot take images of this
            size, or an argument is out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Target,
        channels: int,
        image_size: int | Sequence[int],
        clip: Literal["none", "static", "dynamic"] = "static",
        clip_quantile: float = 0.995,
    ) -> None:
        super().__init__()
        if schedule.has_zero_terminal_snr and not target.defined_at_zero_snr:
            name = type(target).__name__.lower()
            raise ValueError(
                f"target={name} cannot be used with a schedule that ends in pure noise: choose target=v"
            )
        if clip not in ("none", "static", "dynamic"):
            raise ValueError(f"clip={clip!r}: choose none, static or dynamic")
        if not 0 < clip_quantile <= 1:
            raise ValueError(f"clip_quantile={clip_quantile}: must lie in (0, 1]")
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
        self.clip = clip
        self.clip_quantile = clip_quantile
        self.guidance: Guidance | None = None

    def with_net(self, net: nn.Module) -> "Denoiser":
        """Return the same denoiser around another network."""
        twin = self._twin()
        twin.net = net
        return twin

    def guided(self, guidance: Guidance | None) -> "Denoiser":
        """Return a denoiser of the same network that draws what ``guidance`` asks for.

        Labels on the CPU are checked there and then moved; checking labels on a GPU waits for it.

        Raises:
            ValueError: the network knows no classes, or a label is none of them.
        """
        if guidance is not None:
            if self.num_classes is None:
                raise ValueError("labels: this network was trained without class labels")
            if not bool(((guidance.labels >= 0) & (guidance.labels < self.num_classes)).all()):
                raise ValueError(f"labels: each must be one of 0..{self.num_classes - 1}")
            device = self.schedule.alpha.device
            if guidance.labels.device != device:
                guidance = replace(guidance, labels=to_device(guidance.labels, device))
        twin = self._twin()
        twin.guidance = guidance
        return twin

    @property
    def self_condition(self) -> bool:
        """Whether the network takes an earlier estimate of x_0."""
        return bool(getattr(self.net, "self_condition", Network.self_condition))

    @property
    def learned_variance(self) -> bool:
        """Whether the network says how uncertain a step is."""
        return bool(getattr(self.net, "learned_variance", Network.learned_variance))

    @property
    def num_classes(self) -> int | None:
        """How many classes the network can be asked for; None where it knows of none."""
        return getattr(self.net, "num_classes", Network.num_classes)

    def output(
        self,
        x_t: Images,
        t: Int[Tensor, " batch"],
        self_cond: Images | None = None,
        labels: Labels | None = None,
    ) -> tuple[Images, Images | None]:
        """Return the network's output for t in 1..T, in float32: the target, and the variance where it is learned.

        The network's clock starts at 0, as in every published code: it sees t - 1. No labels means no class.
        """
        further = {}
        if self.self_condition:
            further["self_cond"] = self_cond
        if self.num_classes is not None:
            further["labels"] = torch.full_like(t, self.num_classes) if labels is None else labels
        raw = self.net(x_t, t - 1, **further)
        raw = raw.to(at_least_float32(raw))
        if not self.learned_variance:
            return raw, None
        target, variance = raw.chunk(2, dim=1)
        return target, (variance + 1) / 2

    def forward(self, x_t: Images, t: Time, self_cond: Images | None = None) -> Estimate:
        """Estimate x_0 and eps at times t in 1..T, one for the whole batch or one for each image.

        With guidance in a part of [0, 1], times on a GPU have to be read, and waited for, to see which lie in it.
        """
        times = torch.full((len(x_t),), t, device=x_t.device) if isinstance(t, int) else t
        output, variance = self._guided_output(x_t, t, times, self_cond)
        return self.estimate(output, x_t, times, variance)

    def estimate(
        self,
        output: Images,
        x_t: Images,
        t: Int[Tensor, " batch"],
        variance: Images | None = None,
        clipped: bool = True,
    ) -> Estimate:
        """Return what an output at x_t stands for, clipped unless that is not wanted."""
        alpha, sigma = self.schedule.at(t, at_least_float32(x_t))
        x0 = self.target.x0(output, x_t, alpha, sigma)
        clip = self.clip if clipped else "none"
        if clip == "static":
            x0 = x0.clamp(-1, 1)
        elif clip == "dynamic":
            size = x0.abs().flatten(1).quantile(self.clip_quantile, dim=1).clamp(min=1)[:, None, None, None]
            x0 = x0.clamp(-size, size) / size
        # From the clipped x_0, not from the output: a sampler that mixes the two would leave the line between them.
        return Estimate(x0, (x_t - alpha * x0) / sigma, variance)

    @torch.no_grad()
    def self_conditioning(
        self, x_t: Images, t: Int[Tensor, " batch"], labels: Labels | None = None
    ) -> Images:
        """Return the estimate that training feeds back, without gradient (Chen et al., 2208.04202, algorithm 1)."""
        output, _ = self.output(x_t, t, labels=labels)
        return self.estimate(output, x_t, t).x0

    def _guided_output(
        self, x_t: Images, t: Time, times: Int[Tensor, " batch"], self_cond: Images | None
    ) -> tuple[Images, Images | None]:
        guidance = self.guidance
        if guidance is None:
            return self.output(x_t, times, self_cond)
        inside, labels = self._inside(guidance.interval, t), to_device(guidance.labels, x_t.device)
        if guidance.scale == 1 or not bool(inside.any()):
            return self.output(x_t, times, self_cond, labels)
        if guidance.scale == 0 and bool(inside.all()):
            return self.output(x_t, times, self_cond)
        # One call for both branches; where output is linear in x_0, guiding the one guides the other.
        assert self.num_classes is not None
        both = torch.cat((labels, torch.full_like(labels, self.num_classes)))
        output, variance = self.output(
            x_t.repeat(2, 1, 1, 1),
            times.repeat(2),
            None if self_cond is None else self_cond.repeat(2, 1, 1, 1),
            both,
        )
        given, free = output.chunk(2)
        scale = torch.where(inside, guidance.scale, 1.0).to(output.dtype)
        return free + scale * (given - free), None if variance is None else variance.chunk(2)[0]

    def _inside(
        self, interval: tuple[float, float], t: Time
    ) -> Bool[Tensor, "batch 1 1 1"] | Bool[Tensor, ""]:
        """Whether t / T lies in the interval: one answer for each image, or a single one, on the CPU, for all."""
        low, high = interval
        if (low, high) == (0, 1):
            return torch.tensor(True)
        fraction = torch.as_tensor(t) / self.schedule.num_steps
        inside = (fraction >= low) & (fraction <= high)
        return inside if isinstance(t, int) else inside[:, None, None, None]

    def _twin(self) -> "Denoiser":
        # Shares every module and table with this one; only its own attributes may be set.
        twin = copy.copy(self)
        twin._modules = self._modules.copy()
        return twin
