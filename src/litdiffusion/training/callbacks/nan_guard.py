"""Stop a run whose loss or weights are not finite."""

from pathlib import Path

import torch
from lightning import Trainer

from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder


def check_weights(trainer: Trainer) -> None:
    """Stop the run if a weight, or the average of one, is not finite.

    All processes must call this: where each holds a part of the weights, what one finds stops all.

    Raises:
        UserError: naming the step.
    """
    finite = all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters())
    diverges = torch.tensor(float(not finite), device=trainer.strategy.root_device)
    if trainer.strategy.reduce(diverges, reduce_op="max"):
        raise diverged(trainer, "a weight", trainer.global_step)


def diverged(trainer: Trainer, what: str, step: int) -> UserError:
    """Return the error for ``what`` being infinite or NaN since ``step``: what is saved, and what to try."""
    last = RunFolder(Path(trainer.default_root_dir)).last_checkpoint
    left = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
    return UserError(
        f"{what} became infinite or NaN at step {step}; {left}. Lower optimizer.lr, clip gradients"
        " (trainer.gradient_clip_val=1), or train with trainer.precision=32-true in a new run_dir"
    )
