"""Diffusers' schedulers on our tables, in float64, and random numbers as the peers draw them."""

from typing import Any

import torch
from torch import Tensor

from litdiffusion.diffusion import Draws, Epsilon, Parametrization, Schedule, V

PREDICTION_TYPES: dict[type[Parametrization], str] = {Epsilon: "epsilon", V: "v_prediction"}


def on_our_tables(kind: type, schedule: Schedule, target: Parametrization, **config: Any) -> Any:
    """A scheduler of ``kind`` whose t = 0..T-1 are our steps 1..T, the times i / T."""
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


class InTurn(Draws):
    """Normal numbers from one of torch's generators, in the order in which they are asked for."""

    def __init__(self, seed: int, count: int) -> None:
        super().__init__((), torch.arange(count))
        object.__setattr__(self, "generator", torch.Generator().manual_seed(seed))

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn((len(self), *shape), generator=self.generator)
