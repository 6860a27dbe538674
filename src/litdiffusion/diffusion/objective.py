"""The training objective: what is asked of a denoiser on a batch of images, times and noise included.

    L = E_{x_0, t, eps}  w_t c_out^2 . loss( F(c_in x_t; c_noise), target(x_0, eps, t) )

An objective owns everything that is random about a training step, so one with two times is one class. To add one,
subclass ``Objective`` in a file of its own, and name the class in a YAML file.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from litdiffusion.diffusion.denoiser import Denoiser
from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.likelihood import reverse_bits
from litdiffusion.diffusion.losses import Loss, Weighting
from litdiffusion.diffusion.noise_levels import NoiseLevels
from litdiffusion.diffusion.process import q_sample, scaled

Images = Float[Tensor, "batch channels h w"]
Times = Float[Tensor, " batch"]


@runtime_checkable
class Batch(Protocol):
    """A share of a global batch: images [batch, C, H, W] in [-1, 1], and a class of each, or None."""

    @property
    def images(self) -> Tensor:
        """The images."""

    @property
    def labels(self) -> Tensor | None:
        """The classes."""


class ObjectiveOutput(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        losses: of each image; training lowers their weighted mean.
        t: the time of each image, by which the loss is shown; None for an objective that has no such time.
        weights: of each loss; None for 1.
        logs: more numbers to log, by their full names (``train/...``).
    """

    losses: Float[Tensor, " batch"]
    t: Times | None = None
    weights: Float[Tensor, " batch"] | None = None
    logs: dict[str, Tensor] | None = None

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The mean over the batch."""
        return (self.losses if self.weights is None else self.weights * self.losses).mean()


class Objective(nn.Module, ABC):
    """A loss of each image, with its own times and noise.

    In evaluation mode each image of a fixed set always meets the same time and the same noise.
    """

    @abstractmethod
    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Return the loss of each image.

        Args:
            denoiser: ``denoiser.core`` has the network's own output; the denoiser itself clips its estimate.
            batch: images and labels.
            draws: the random numbers of these images.
        """

    def require_support(self, denoiser: Denoiser) -> None:
        """Raise ValueError if this denoiser cannot be trained so."""

    def observe(self, denoiser: Denoiser, t: Times | None, losses: Float[Tensor, " batch"]) -> None:
        """Learn from the times and losses of a global batch; called where ``learns`` is true."""

    @property
    def learns(self) -> bool:
        """Whether ``observe`` wants to be told every step's losses."""
        return False


class Denoising(Objective):
    """Loss, weighting and noise levels together: the objective of DDPM, EDM and flow matching.

    A network that learns its variance is given IDDPM's hybrid objective: the bound at t, with the mean held
    fixed, is added (Nichol & Dhariwal, 2102.09672, section 3.1). That mean is not clipped, as in their code: the
    variance has to cover the errors that the network makes.

    A self-conditioned network is given its own estimate of x_0 in half of the steps, without gradient (Chen et al.,
    2208.04202, algorithm 1); in evaluation mode always, as in sampling.

    Args:
        loss: between the network's output and its target.
        weighting: of the times.
        noise_levels: the distribution of the times.
        vlb_weight: of T times the bound's term at t, in bits per dimension; for learned variance only.
        label_dropout: share of the images whose label a class-conditional network is not told in training, so that
            it learns to draw without one too, as guidance needs (2207.12598).

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        loss: Loss,
        weighting: Weighting,
        noise_levels: NoiseLevels,
        vlb_weight: float = 0.001,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if vlb_weight <= 0:
            raise ValueError(
                f"vlb_weight={vlb_weight}: must be positive, or the variance would learn nothing"
            )
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout}: must lie in [0, 1]")
        self.loss = loss
        self.weighting = weighting
        self.noise_levels = noise_levels
        self.vlb_weight = vlb_weight
        self.label_dropout = label_dropout

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Draw t and eps, and compare the network's output with its target."""
        x0 = batch.images
        t = self.noise_levels(denoiser.schedule, draws)
        eps = draws.normal("eps", tuple(x0.shape[1:]))
        self_condition = not self.training or draws.shared_uniform("self-conditioning") < 0.5
        labels = self._labels(denoiser, batch.labels, draws)
        losses = self.losses(denoiser, x0, t, eps, labels, self_condition)
        return ObjectiveOutput(losses, t, self.noise_levels.weights(denoiser.schedule, t).to(losses))

    def losses(
        self,
        denoiser: Denoiser,
        x0: Images,
        t: Times,
        eps: Images,
        labels: Int[Tensor, " batch"] | None = None,
        self_condition: bool = False,
    ) -> Float[Tensor, " batch"]:
        """Return the loss of each image at its own t in (0, 1] and noise, with self-conditioning or without."""
        schedule, core = denoiser.schedule, denoiser.core
        x_t = q_sample(schedule, x0, t, eps)
        self_cond = None
        if self_condition and denoiser.self_condition:
            with torch.no_grad():
                self_cond = denoiser(x_t, t, labels=labels).x0
        output, variance = core.output(x_t, t, self_cond, labels)
        errors = self.loss(output, core.target.target(x0, eps, *schedule.at(t)).to(output))
        losses = scaled(errors, self.weighting(schedule, t, core.target)).flatten(1).mean(1)
        if variance is None:
            return losses
        fixed = core.estimate(output.detach(), x_t, t, variance)
        return losses + self.vlb_weight * schedule.num_steps * reverse_bits(schedule, fixed, x0, x_t, t)

    def require_support(self, denoiser: Denoiser) -> None:
        """Raise ValueError if the noise levels cannot be drawn."""
        self.noise_levels.require_support(denoiser.schedule)

    @property
    def learns(self) -> bool:
        """Whether the distribution of the times learns from the losses."""
        return self.noise_levels.learns

    def observe(self, denoiser: Denoiser, t: Times | None, losses: Float[Tensor, " batch"]) -> None:
        """Update the noise-level distribution."""
        assert t is not None
        self.noise_levels.observe(denoiser.schedule, t, losses)

    def _labels(
        self, denoiser: Denoiser, labels: Int[Tensor, " batch"] | None, draws: Draws
    ) -> Int[Tensor, " batch"] | None:
        """Return the labels that the network is told: some are withheld, as ``num_classes``."""
        if denoiser.num_classes is None:
            return None
        if labels is None or not self.training:
            return labels
        return labels.masked_fill(draws.uniform("label") < self.label_dropout, denoiser.num_classes)
