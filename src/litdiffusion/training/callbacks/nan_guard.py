"""What stops a run that has gone astray: a loss or a weight that is no finite number."""

from pathlib import Path

import torch
from lightning import Trainer

from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder


def check_weights(trainer: Trainer) -> None:
    """Stop the run if a weight, or the average of one, is not finite: nothing good can be saved, shown or measured.

    All processes call this: what one sees, where each holds a part of the weights, stops all.

    Raises:
        UserError: naming the step.
    """
    sound = all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters())
    astray = torch.tensor(float(not sound), device=trainer.strategy.root_device)
    if trainer.strategy.reduce(astray, reduce_op="max"):
        raise diverged(trainer, "a weight", trainer.global_step)


def diverged(trainer: Trainer, what: str, step: int) -> UserError:
    """Return the error that says what is no number since which step, what is left, and what to do."""
    last = RunFolder(Path(trainer.default_root_dir)).last_checkpoint
    left = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
    return UserError(
        f"{what} became infinite or NaN at step {step}; {left}. Lower optimizer.lr, clip gradients"
        " (trainer.gradient_clip_val=1), or train with trainer.precision=32-true in a new run_dir"
    )
