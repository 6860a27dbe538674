"""The variational bound on the likelihood, in bits per dimension.

    -log2 p(x_0) / D  <=  L_T + sum_{i=2..T} L_{i-1} + L_0                            (DDPM, equation 5)

    L_T     = KL( q(x_1 | x_0) || N(0, I) )        (I times init_noise_sigma^2, where that is not 1)
    L_{i-1} = KL( q(x_s | x_t, x_0) || p(x_s | x_t) ),        t = i / T,  s = (i - 1) / T
    L_0     = -log p(x_0 | x_t),   t = 1 / T: a normal distribution integrated over the 256 gray levels    (eq. 13)

p(x_s | x_t) is normal around the posterior mean at the denoiser's estimate, with variance beta, beta-tilde, or
what the network has learned. At t = 1 / T, where beta-tilde is 0, beta-tilde_2 takes the place of beta-tilde and of
beta (as in DDPM's and IDDPM's code), and of the lower end of what can be learned.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from litdiffusion.diffusion.denoiser import Denoiser, Estimate
from litdiffusion.diffusion.devices import precise_dtype
from litdiffusion.diffusion.process import (
    clipped_posterior_variance,
    learned_log_variance,
    posterior,
    q_sample,
    transition,
)
from litdiffusion.diffusion.schedule import Schedule

Images = Float[Tensor, "batch channels h w"]
PerImage = Float[Tensor, " batch"]
Times = Float[Tensor, " batch"]
Variance = Literal["beta", "beta_tilde", "learned"]

LEVELS = 256
"""Gray levels of a pixel, evenly spaced over [-1, 1]."""


def bound_term(denoiser: Denoiser, x0: Images, t: Times, eps: Images, variance: Variance) -> PerImage:
    """Return L_{i-1} of each image at its own t = i / T and noise, in bits per dimension.

    A self-conditioned network is given its own estimate first.
    """
    x_t = q_sample(denoiser.schedule, x0, t, eps)
    self_cond = None
    if denoiser.self_condition:
        with torch.no_grad():
            self_cond = denoiser(x_t, t).x0
    return reverse_bits(denoiser.schedule, denoiser(x_t, t, self_cond), x0, x_t, t, variance)


def reverse_bits(
    schedule: Schedule,
    estimate: Estimate,
    x0: Images,
    x_t: Images,
    t: Times,
    variance: Variance = "learned",
) -> PerImage:
    """Return the bound's term of each image for a step from t in (0, 1] to t - 1 / T, in bits per dimension.

    Raises:
        ValueError: an unknown variance, or the learned one where there is none.
    """
    s = schedule.previous(t)
    true_mean, _ = posterior(schedule, x_t, x0, t, s)
    mean, _ = posterior(schedule, x_t, estimate.x0, t, s)
    true_log_variance = torch.as_tensor(clipped_posterior_variance(schedule, t, s)).log().to(mean)
    log_variance = reverse_log_variance(schedule, estimate, t, variance).to(mean).expand_as(mean)
    nats = normal_kl(true_mean, true_log_variance, mean, log_variance)
    end = (s == 0)[:, None, None, None]
    if end.device.type == "cpu" and not bool(end.any()):  # on a GPU, looking would wait for it
        return bits(nats)
    # For every row, so that none has to be picked out. Those not at the end are given dummy values, so that
    # the gradient of the branch that is not used is finite.
    decoder = -decoder_log_prob(x0, torch.where(end, mean, 0.0), torch.where(end, log_variance / 2, 0.0))
    return bits(torch.where(end, decoder.to(nats.dtype), nats))


def reverse_log_variance(
    schedule: Schedule, estimate: Estimate, t: Times, variance: Variance
) -> Float[Tensor, "batch _ _ _"]:
    """Return the logarithm of the variance of p(x_s | x_t), for s = t - 1 / T.

    Raises:
        ValueError: an unknown variance, or the learned one where there is none.
    """
    s = schedule.previous(t)
    if variance == "learned":
        if estimate.variance is None:
            raise ValueError("variance=learned: this network was not trained to give its variance")
        return learned_log_variance(schedule, estimate.variance, t, s)
    smallest = torch.as_tensor(clipped_posterior_variance(schedule, t, s))
    if variance == "beta_tilde":
        return smallest.log()
    if variance != "beta":
        raise ValueError(f"variance={variance!r}: choose beta, beta_tilde or learned")
    v = transition(schedule, t, s).v
    return torch.where(s[:, None, None, None] == 0, smallest, v).log()


def prior_bits(schedule: Schedule, x0: Images) -> PerImage:
    """Return L_T of each image, in bits per dimension: how far x_1 is from pure noise."""
    alpha, sigma = schedule.at(1.0)
    mean = alpha * x0
    log_variance, prior_log_variance = (
        torch.full_like(mean, 2 * math.log(std)) for std in (sigma, schedule.init_noise_sigma)
    )
    return bits(normal_kl(mean, log_variance, torch.zeros_like(mean), prior_log_variance))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL( N(mean1, variance1) || N(mean2, variance2) ) of every pixel, in nats."""
    log_ratio = log_variance1 - log_variance2
    # expm1: with exp and "- 1" apart, rounding would swallow a small divergence.
    return (log_ratio.expm1() - log_ratio + (mean1 - mean2).square() * (-log_variance2).exp()) / 2


def decoder_log_prob(x0: Images, mean: Images, log_scale: Images) -> Images:
    """Return log p(x_0) of every pixel in nats: the mass that N(mean, scale^2) has in the bin around x_0.

    The bins are 2 / 255 wide; the first and the last reach to infinity, so that all 256 add up to 1. Computed
    in float64, from whichever tail is the thinner: no bin is ever empty by rounding.
    """
    precise = precise_dtype(x0.device)
    x, mean, scale = x0.to(precise), mean.to(precise), log_scale.to(precise).exp()
    half = 1 / (LEVELS - 1)
    # A gray level is meant exactly: rounded to float32, neighbouring bins would overlap or leave gaps.
    level = ((x + 1) / (2 * half)).round() * 2 * half - 1
    x = torch.where((x - level).abs() <= 4 * torch.finfo(x0.dtype).eps, level, x)
    lower, upper = (x - mean - half) / scale, (x - mean + half) / scale
    is_first, is_last = x < -1 + half, x > 1 - half
    # Mirrored where the bin lies above the mean: there both ends are near 1, and their difference is rounding.
    above = x > mean
    low, high = torch.where(above, -upper, lower), torch.where(above, -lower, upper)
    no_low, no_high = torch.where(above, is_last, is_first), torch.where(above, is_first, is_last)
    log_low = torch.special.log_ndtr(low).masked_fill(no_low, -math.inf)
    log_high = torch.special.log_ndtr(high).masked_fill(no_high, 0.0)
    return (log_high + _log_1_minus_exp(log_low - log_high)).to(x0.dtype)


def bits(nats: Images) -> PerImage:
    """Return bits per dimension of each image."""
    return nats.flatten(1).mean(1) / math.log(2)


def _log_1_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0 (Mächler, 2012)."""
    near = x > -math.log(2)
    # Each branch is given a dummy value where the other one counts, so that its gradient is finite.
    a, b = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(a)).log(), torch.log1p(-b.exp()))
