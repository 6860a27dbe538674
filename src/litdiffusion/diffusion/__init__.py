"""The mathematics: pure torch, no framework, nothing of ours. The network is passed in."""

from litdiffusion.diffusion import schedules
from litdiffusion.diffusion.denoiser import Clipped, Denoiser, Estimate, Preconditioned
from litdiffusion.diffusion.draws import Draws
from litdiffusion.diffusion.guidance import Guided, Labelled
from litdiffusion.diffusion.losses import (
    L1,
    L2,
    P2,
    Huber,
    Loss,
    MinSNR,
    Sigmoid,
    Uniform,
    Variational,
    Weighting,
)
from litdiffusion.diffusion.network import Network
from litdiffusion.diffusion.noise_levels import Importance, LogitNormal, Lognormal, NoiseLevels, UniformLevels
from litdiffusion.diffusion.objective import Denoising, Objective, ObjectiveOutput
from litdiffusion.diffusion.parametrizations import EDM, X0, Epsilon, Parametrization, V, Velocity
from litdiffusion.diffusion.process import posterior, q_sample, renoise, transition
from litdiffusion.diffusion.sampler import Sampler, SamplerOutput, SamplerState
from litdiffusion.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Heun
from litdiffusion.diffusion.schedule import Schedule

__all__ = [
    "schedules",
    "Schedule",
    "Draws",
    "q_sample",
    "renoise",
    "posterior",
    "transition",
    "Parametrization",
    "Epsilon",
    "X0",
    "V",
    "Velocity",
    "EDM",
    "Network",
    "Denoiser",
    "Preconditioned",
    "Clipped",
    "Labelled",
    "Guided",
    "Estimate",
    "NoiseLevels",
    "UniformLevels",
    "Lognormal",
    "LogitNormal",
    "Importance",
    "Objective",
    "ObjectiveOutput",
    "Denoising",
    "Loss",
    "L1",
    "L2",
    "Huber",
    "Weighting",
    "Uniform",
    "MinSNR",
    "P2",
    "Sigmoid",
    "Variational",
    "Sampler",
    "SamplerState",
    "SamplerOutput",
    "DDPM",
    "DDIM",
    "DPMSolverPP2M",
    "Heun",
]
