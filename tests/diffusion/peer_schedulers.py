"""Diffusers' schedulers on our tables, in float64."""

from typing import Any

import torch

from litdiffusion.diffusion import Epsilon, Schedule, Target, V

PREDICTION_TYPES: dict[type[Target], str] = {Epsilon: "epsilon", V: "v_prediction"}


def on_our_tables(kind: type, schedule: Schedule, target: Target, **config: Any) -> Any:
    """A scheduler of ``kind`` whose t = 0..T-1 are our t = 1..T."""
    scheduler = kind(
        num_train_timesteps=schedule.num_steps,
        prediction_type=PREDICTION_TYPES.get(type(target), "sample"),
        timestep_spacing="trailing",
        **config,
    )
    scheduler.betas = schedule.betas
    scheduler.alphas = 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler
