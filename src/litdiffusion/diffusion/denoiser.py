"""The denoiser: network + schedule + target, as one estimate of the clean image.

Everything that stands between a raw network and the mathematics lives here and only here: the network's
clock, the conversion of its output, clipping, self-conditioning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from litdiffusion.diffusion.schedules import Schedule
from litdiffusion.diffusion.targets import Target

Images = Float[Tensor, "batch channels h w"]


@dataclass(frozen=True)
class Estimate:
    """An estimate of the clean image and the noise that is consistent with it: x_t = alpha_t x0 + sigma_t eps."""

    x0: Images
    eps: Images


class Denoiser(nn.Module):
    """Estimate x_0 from x_t.

    Args:
        net: called as ``net(x_t, t - 1)``, or ``net(x_t, t - 1, self_cond)`` where it has a true attribute
            ``self_condition``; returns the target.
        schedule: the tables alpha and sigma.
        target: what the network returns.
        channels: of the images.
        image_size: their height and width, or one number for both.
        clip: ``static`` clamps the estimate to [-1, 1], as DDPM does; ``none`` leaves it, as the blog does.

    Raises:
        ValueError: the target says nothing at the schedule's last step.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Target,
        channels: int,
        image_size: int | Sequence[int],
        clip: Literal["none", "static"] = "static",
    ) -> None:
        super().__init__()
        if schedule.has_zero_terminal_snr and not target.defined_at_zero_snr:
            raise ValueError(
                "target=epsilon cannot be used with a zero-terminal-SNR schedule: choose target=v"
            )
        if clip not in ("none", "static"):
            raise ValueError(f"clip={clip!r}: choose none or static")
        self.net = net
        self.schedule = schedule
        self.target = target
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_shape = (channels, height, width)
        self.clip: Literal["none", "static"] = clip

    def with_net(self, net: nn.Module) -> "Denoiser":
        """Return the same denoiser around another network."""
        channels, *image_size = self.image_shape
        return Denoiser(net, self.schedule, self.target, channels, image_size, self.clip)

    @property
    def self_condition(self) -> bool:
        """Whether the network takes an earlier estimate of x_0."""
        return bool(getattr(self.net, "self_condition", False))

    def output(self, x_t: Images, t: Int[Tensor, " batch"], self_cond: Images | None = None) -> Images:
        """Return the network's output in float32, for t in 1..T.

        The network's clock starts at 0, as in every published code: it sees t - 1.
        """
        raw = self.net(x_t, t - 1, self_cond) if self.self_condition else self.net(x_t, t - 1)
        result: Tensor = raw.float()
        return result

    def forward(self, x_t: Images, t: Int[Tensor, " batch"], self_cond: Images | None = None) -> Estimate:
        """Estimate x_0 and eps at times t in 1..T."""
        alpha, sigma = self.schedule.at(t)
        x0 = self.target.x0(self.output(x_t, t, self_cond), x_t, alpha, sigma)
        if self.clip == "static":
            x0 = x0.clamp(-1, 1)
        # From the clipped x_0, not from the output: a sampler that mixes the two would leave the line between them.
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    @torch.no_grad()
    def self_conditioning(self, x_t: Images, t: Int[Tensor, " batch"]) -> Images:
        """Return the estimate that training feeds back, without gradient (Chen et al., 2208.04202, algorithm 1)."""
        estimate: Estimate = self(x_t, t)
        return estimate.x0
