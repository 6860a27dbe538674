"""The mathematics: pure torch, no framework, nothing of ours. The network is passed in."""

from litdiffusion.diffusion import schedules
from litdiffusion.diffusion.denoiser import Denoiser, Estimate
from litdiffusion.diffusion.losses import L1, L2, Huber, MinSNR, Objective, Uniform
from litdiffusion.diffusion.process import posterior, q_sample, transition
from litdiffusion.diffusion.samplers import DDIM, DDPM, Sampler, Step
from litdiffusion.diffusion.schedules import Schedule
from litdiffusion.diffusion.targets import X0, Epsilon, Target, V
from litdiffusion.diffusion.timesteps import StratifiedTimesteps, UniformTimesteps

__all__ = [
    "schedules",
    "Schedule",
    "q_sample",
    "posterior",
    "transition",
    "Target",
    "Epsilon",
    "X0",
    "V",
    "Objective",
    "L1",
    "L2",
    "Huber",
    "Uniform",
    "MinSNR",
    "UniformTimesteps",
    "StratifiedTimesteps",
    "Denoiser",
    "Estimate",
    "Sampler",
    "Step",
    "DDPM",
    "DDIM",
]
