"""The mathematics: pure torch, no framework, nothing of ours. The network is passed in."""

from litdiffusion.diffusion import schedules
from litdiffusion.diffusion.denoiser import Denoiser, Estimate, Guidance
from litdiffusion.diffusion.losses import (
    L1,
    L2,
    P2,
    Huber,
    MinSNR,
    Objective,
    Sigmoid,
    Uniform,
    Variational,
)
from litdiffusion.diffusion.network import Network
from litdiffusion.diffusion.process import posterior, q_sample, transition
from litdiffusion.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Heun
from litdiffusion.diffusion.schedules import Schedule
from litdiffusion.diffusion.targets import X0, Epsilon, Target, V, Velocity
from litdiffusion.diffusion.timesteps import ImportanceTimesteps, StratifiedTimesteps, UniformTimesteps
from litdiffusion.diffusion.walk import Here, Sampler, Step

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
    "Velocity",
    "Objective",
    "L1",
    "L2",
    "Huber",
    "Uniform",
    "MinSNR",
    "P2",
    "Sigmoid",
    "Variational",
    "UniformTimesteps",
    "StratifiedTimesteps",
    "ImportanceTimesteps",
    "Network",
    "Denoiser",
    "Estimate",
    "Guidance",
    "Sampler",
    "Step",
    "Here",
    "DDPM",
    "DDIM",
    "DPMSolverPP2M",
    "Heun",
]
