"""The training objective: how far the network's output is from its target, and how much each t counts.

    L = E_{x_0, t, eps}  w_t / r_t . distance( output(x_t, t), target(x_0, eps, t) )

A distance is a function of two image batches, elementwise. A weighting is a weight w_t on the squared error *of
x_0*; dividing by the target's own r_t (``x0_weight``) makes one weighting mean the same for every target. To add
either, write it here and name it in a YAML file.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser
from litdiffusion.diffusion.likelihood import reverse_bits
from litdiffusion.diffusion.process import at_least_float32, clipped_posterior_variance, q_sample
from litdiffusion.diffusion.schedules import Schedule
from litdiffusion.diffusion.targets import Target

Images = Float[Tensor, "batch channels h w"]
PerImage = Float[Tensor, "batch 1 1 1"]


class Distance(ABC):
    """An elementwise distance."""

    @abstractmethod
    def __call__(self, output: Images, target: Images) -> Images:
        """Return the distance of every pixel."""


class L1(Distance):
    """Absolute error."""

    def __call__(self, output: Images, target: Images) -> Images:
        """|output - target|."""
        return F.l1_loss(output, target, reduction="none")


class L2(Distance):
    """Squared error: DDPM's L_simple."""

    def __call__(self, output: Images, target: Images) -> Images:
        """(output - target)^2."""
        return F.mse_loss(output, target, reduction="none")


class Huber(Distance):
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
    def x0_weight(self, schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the weight of the squared error of x_0 at times t in 1..T, in float64."""

    def __call__(self, schedule: Schedule, t: Int[Tensor, " batch"], target: Target) -> PerImage:
        """Return the weight of the target's error at times t in 1..T, in float64."""
        alpha, sigma = schedule.at(t, schedule.alpha.dtype)
        return self.x0_weight(schedule, t)[:, None, None, None] / target.x0_weight(alpha, sigma)


class Uniform(Weighting):
    """Every t counts the same in the target's own space: DDPM's L_simple, and the blog's."""

    def x0_weight(self, schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """1, where the target is x_0."""
        return torch.ones_like(schedule.alpha[t])

    def __call__(self, schedule: Schedule, t: Int[Tensor, " batch"], target: Target) -> PerImage:
        """1."""
        return self.x0_weight(schedule, t)[:, None, None, None]


class MinSNR(Weighting):
    """min(SNR, gamma) (Hang et al., 2303.09556)."""

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma={gamma}: min-SNR needs a positive gamma")
        self.gamma = gamma

    def x0_weight(self, schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """min(SNR, gamma)."""
        return _snr(schedule, t).clamp(max=self.gamma)


class P2(Weighting):
    """SNR / (k + SNR)^gamma: L_simple with clean times held down (Choi et al., 2204.00227, equation 8)."""

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if gamma < 0 or k <= 0:
            raise ValueError(f"gamma={gamma}, k={k}: P2 needs gamma of at least 0 and a positive k")
        self.gamma, self.k = gamma, k

    def x0_weight(self, schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
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

    def x0_weight(self, schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """SNR sigmoid(bias - log SNR)."""
        snr = _snr(schedule, t)
        return snr * (self.bias - snr.log()).sigmoid()


class Variational(Weighting):
    """The weights of the variational bound: the loss's mean over t is the bound in nats per pixel (DDPM, eq. 8).

        w_t = T / 2 . (SNR_{t-1} - SNR_t)  =  T / (2 beta-tilde_t) . (alpha_{t-1} v / sigma_t^2)^2

    At t = 1, where beta-tilde is 0, the variance is beta-tilde_2, as in ``likelihood``.
    """

    def x0_weight(self, schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """T / 2 . (SNR_{t-1} - SNR_t)."""
        snr = (schedule.alpha / schedule.sigma).square()
        snr[0] = snr[1] + 1 / clipped_posterior_variance(schedule, 1, 0)
        return schedule.num_steps / 2 * (snr[t - 1] - snr[t])


def _snr(schedule: Schedule, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return alpha_t^2 / sigma_t^2. Pure noise, where it is 0, is given that of the time before.

    A weight of 0 would leave the network untrained at T, where every sampler begins.
    """
    if schedule.has_zero_terminal_snr:
        t = t.clamp(max=max(schedule.num_steps - 1, 1))
    return (schedule.alpha[t] / schedule.sigma[t]).square()


class Objective:
    """Distance and weighting together: the loss of each image of a batch.

    A network that learns its variance is given IDDPM's hybrid objective: the bound at t, with the mean held
    fixed, is added (Nichol & Dhariwal, 2102.09672, section 3.1). That mean is not clipped, as in their code: the
    variance has to cover the errors that the network makes.

    Args:
        distance: between output and target.
        weighting: of the times.
        vlb_weight: of T times the bound's term at t, in bits per dimension; for learned variance only.
    """

    def __init__(self, distance: Distance, weighting: Weighting, vlb_weight: float = 0.001) -> None:
        if vlb_weight <= 0:
            raise ValueError(
                f"vlb_weight={vlb_weight}: must be positive, or the variance would learn nothing"
            )
        self.distance = distance
        self.weighting = weighting
        self.vlb_weight = vlb_weight

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Images,
        t: Int[Tensor, " batch"],
        eps: Images,
        feed_back: bool = False,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the loss of each image at its own t in 1..T and noise.

        ``feed_back`` gives a self-conditioned network its own estimate; training does so in half of its steps.
        """
        schedule, target = denoiser.schedule, denoiser.target
        dtype = at_least_float32(x0)
        x_t = q_sample(schedule, x0, t, eps)
        feed_back = feed_back and denoiser.self_condition
        self_cond = denoiser.self_conditioning(x_t, t, labels) if feed_back else None
        output, variance = denoiser.output(x_t, t, self_cond, labels)
        errors = self.distance(output, target.of(x0, eps, *schedule.at(t, dtype)))
        losses = (self.weighting(schedule, t, target).to(dtype) * errors).flatten(1).mean(1)
        if variance is None:
            return losses
        fixed = denoiser.estimate(output.detach(), x_t, t, variance, clipped=False)
        return losses + self.vlb_weight * schedule.num_steps * reverse_bits(schedule, fixed, x0, x_t, t)
