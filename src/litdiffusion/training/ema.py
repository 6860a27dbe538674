"""The exponential moving average of the weights, which is what one samples from."""

import copy

import torch
from torch import nn


def no_average() -> None:
    """What ``ema=none`` builds: nothing is averaged, and one samples from the weights themselves."""


class EMA:
    """Averaging with a warm-up, so that an early average is not mostly the random start.

        d_n = min(decay, (1 + n) / (10 + n))                   n: optimizer steps taken
        ema_net <- d_n ema_net + (1 - d_n) net

    Holds no weights itself: the copy is a submodule of the LightningModule, so checkpoints, devices and resuming
    need no code of their own.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: an average's decay lies in [0, 1)")
        self.decay = decay

    def decay_at(self, step: int) -> float:
        """Return d_n."""
        return min(self.decay, (1 + step) / (10 + step))

    @staticmethod
    def copy_of(net: nn.Module) -> nn.Module:
        """Return the network that will hold the average: a copy that no gradient reaches."""
        return copy.deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def update(self, ema_net: nn.Module, net: nn.Module, step: int) -> None:
        """Move ``ema_net`` towards ``net`` after optimizer step ``step`` (counted from 1)."""
        torch._foreach_lerp_(list(ema_net.parameters()), list(net.parameters()), 1 - self.decay_at(step))
