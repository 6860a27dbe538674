"""Learning-rate schedules, as factors on the optimizer's own rate, stepped every optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, warmup_steps: int = 0) -> LambdaLR:
    """Rise linearly over ``warmup_steps``, then stay: DDPM's, and with no warm-up the blog's."""
    _checked(warmup_steps)
    return LambdaLR(optimizer, lambda step: _warmup(step, warmup_steps))


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> LambdaLR:
    """Rise linearly over ``warmup_steps``, then fall on half a cosine to ``final_factor`` at ``total_steps``.

    The rise takes at most half of the run, so that a run of a few steps needs no other setting.
    """
    if total_steps < 1 or not 0 <= final_factor <= 1:
        raise ValueError(
            f"total_steps={total_steps}, final_factor={final_factor}: must be at least 1, and in [0, 1]"
        )
    warmup_steps = min(_checked(warmup_steps), total_steps // 2)

    def factor(step: int) -> float:
        progress = min(max(step - warmup_steps, 0) / (total_steps - warmup_steps), 1.0)
        fall = final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2
        return _warmup(step, warmup_steps) * fall

    return LambdaLR(optimizer, factor)


def _checked(warmup_steps: int) -> int:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}: must be at least 0")
    return warmup_steps


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))
