"""Losses and weightings: how far the network is from its target, and how much each t counts.

A loss is a function of two image batches, elementwise. A weighting is a weight w_t on the squared error *of x_0*;
c_out^2 turns it into one on the error of the network's own output, so that one weighting means the same for every
parametrization. To add either, write it here and name it in a YAML file.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.parametrizations import Parametrization
from litdiffusion.diffusion.process import clipped_posterior_variance
from litdiffusion.diffusion.schedule import Schedule

Images = Float[Tensor, "batch channels h w"]
Times = Float[Tensor, " batch"]


class Loss(ABC):
    """An elementwise loss."""

    @abstractmethod
    def __call__(self, output: Images, target: Images) -> Images:
        """Return the loss of every pixel."""


class L1(Loss):
    """Absolute error."""

    def __call__(self, output: Images, target: Images) -> Images:
        """|output - target|."""
        return F.l1_loss(output, target, reduction="none")


class L2(Loss):
    """Squared error: DDPM's L_simple."""

    def __call__(self, output: Images, target: Images) -> Images:
        """(output - target)^2."""
        return F.mse_loss(output, target, reduction="none")


class Huber(Loss):
    """Half the squared error below ``delta``, linear above: smooth_l1_loss at the blog's delta = 1."""

    def __init__(self, delta: float = 1.0) -> None:
        if delta <= 0:
            raise ValueError(f"delta={delta}: the Huber loss needs a positive delta")
        self.delta = delta

    def __call__(self, output: Images, target: Images) -> Images:
        """Huber's function of output - target."""
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


class Weighting(ABC):
    """A weight for each time."""

    @abstractmethod
    def x0_weight(self, schedule: Schedule, t: Times) -> Times:
        """Return the weight of the squared error of x_0 at times t in (0, 1], in float64."""

    def __call__(self, schedule: Schedule, t: Times, target: Parametrization) -> Float[Tensor, "batch 1 1 1"]:
        """Return the weight of the squared error of the network's output, in float64."""
        c_out = target.coefficients(*schedule.at(t)).c_out
        return self.x0_weight(schedule, t)[:, None, None, None] * c_out**2


class Uniform(Weighting):
    """1 for the error of the network's own output: DDPM's L_simple, the blog's, and EDM's weight."""

    def x0_weight(self, schedule: Schedule, t: Times) -> Times:
        """1, where the network returns x_0."""
        return torch.ones_like(t)

    def __call__(self, schedule: Schedule, t: Times, target: Parametrization) -> Float[Tensor, "batch 1 1 1"]:
        """1."""
        return torch.ones_like(t)[:, None, None, None]


class MinSNR(Weighting):
    """min(SNR, gamma) (Hang et al., 2303.09556)."""

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma={gamma}: min-SNR needs a positive gamma")
        self.gamma = gamma

    def x0_weight(self, schedule: Schedule, t: Times) -> Times:
        """min(SNR, gamma)."""
        return _snr(schedule, t).clamp(max=self.gamma)


class P2(Weighting):
    """SNR / (k + SNR)^gamma: L_simple with clean times held down (Choi et al., 2204.00227, equation 8)."""

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if gamma < 0 or k <= 0:
            raise ValueError(f"gamma={gamma}, k={k}: P2 needs gamma of at least 0 and a positive k")
        self.gamma, self.k = gamma, k

    def x0_weight(self, schedule: Schedule, t: Times) -> Times:
        """SNR / (k + SNR)^gamma."""
        snr = _snr(schedule, t)
        return snr / (self.k + snr) ** self.gamma


class Sigmoid(Weighting):
    """SNR sigmoid(bias - log SNR): the smooth form of min-SNR with gamma = e^bias.

    On the error of eps it is sigmoid(bias - log SNR), the function of Kingma & Gao (2303.00848) and Hoogeboom et al.
    (2410.19324). They weigh an integral over log SNR by it; here, as with every weighting, t is uniform, which
    gives each log SNR the density that the schedule has there.
    """

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    def x0_weight(self, schedule: Schedule, t: Times) -> Times:
        """SNR sigmoid(bias - log SNR)."""
        snr = _snr(schedule, t)
        return snr * (self.bias - snr.log()).sigmoid()


class Variational(Weighting):
    """The weights of the variational bound: the loss's mean over t is the bound in nats per pixel (DDPM, eq. 8).

        w_t = T / 2 . (SNR_s - SNR_t)  =  T / (2 beta-tilde_t) . (alpha_s v / sigma_t^2)^2,        s = t - 1 / T

    At t = 1 / T, where beta-tilde is 0, the variance is beta-tilde_2, as in ``likelihood``.
    """

    def x0_weight(self, schedule: Schedule, t: Times) -> Times:
        """T / 2 . (SNR_s - SNR_t)."""
        s = schedule.previous(t)
        smallest = clipped_posterior_variance(schedule, 1 / schedule.num_steps, 0.0)
        snr = schedule.log_snr(t).exp()
        earlier = torch.where(s == 0, snr + 1 / smallest, schedule.log_snr(torch.where(s == 0, t, s)).exp())
        return schedule.num_steps / 2 * (earlier - snr)


def _snr(schedule: Schedule, t: Times) -> Times:
    """Return alpha_t^2 / sigma_t^2. Pure noise, where it is 0, is given that of the time before.

    A weight of 0 would leave the network untrained at T, where every sampler begins.
    """
    if schedule.has_zero_terminal_snr:
        t = t.clamp(max=max(schedule.num_steps - 1, 1) / schedule.num_steps)
    return schedule.log_snr(t).exp()
