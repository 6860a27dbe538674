"""Lightning's trainer with the callbacks and loggers of a run, and what it does after the last step."""

import logging
import warnings
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from omegaconf import DictConfig

from litdiffusion.configuration.nodes import build
from litdiffusion.runs.run import Run
from litdiffusion.slurm.cluster import cluster_environment
from litdiffusion.training.callbacks import Monitor, SampleImages, SaveCheckpoints
from litdiffusion.training.callbacks.attached import datamodule_of, get_callback
from litdiffusion.training.checkpoint_io import WholeCheckpointIO
from litdiffusion.training.loggers import ForeignLogger, RunLogger
from litdiffusion.training.module import LitDiffusion

IGNORED = (
    ".*LeafSpec.* is deprecated",  # Lightning's own, with this torch
    "The `srun` command is available",  # and need not be used
    # DDP compares strides of 1x1 convolutions, where channels last and first are the same order in memory.
    r"(?s)Grad strides do not match.*grad\.sizes\(\) = \[\d+, \d+, 1, 1\]",
    # Of a batch's fields it takes the first, the images, whose number is the right one.
    "Trying to infer the `batch_size`",
)
"""Warnings that no user can act on."""


def build_loggers(cfg: DictConfig) -> list[RunLogger]:
    """Build the loggers of the configuration; none is opened yet."""
    loggers = [build(node, f"logger.{name}") for name, node in cfg.logger.items() if node]
    return [logger if isinstance(logger, RunLogger) else ForeignLogger(logger) for logger in loggers]


def build_trainer(cfg: DictConfig, loggers: list[RunLogger]) -> Trainer:
    """Build the callbacks and the trainer that runs them."""
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for name in ("profilers", "callbacks"):  # what they say has been asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    for message in IGNORED:
        warnings.filterwarnings("ignore", message=message)
    callbacks = [build(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node]
    supplied: dict[str, Any] = {
        "logger": loggers,
        "callbacks": callbacks,
        # Or Lightning would add its own.
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "plugins": [plugin for plugin in (WholeCheckpointIO(), cluster_environment()) if plugin],
    }
    if not cfg.datamodule.num_val:
        supplied["limit_val_batches"] = 0  # or Lightning warns that there is nothing to validate on
    trainer: Trainer = build(cfg.trainer, "trainer", **supplied)
    return trainer


def reason_to_stop(trainer: Trainer) -> str | None:
    """Return why a callback, such as Lightning's ``EarlyStopping``, ended the training early; None where none did."""
    if trainer.global_step >= trainer.max_steps:
        return None
    attached: Any = trainer
    said = (getattr(callback, "stopping_reason_message", None) for callback in attached.callbacks)
    reason = next(filter(None, said), "a callback ended the training")
    return reason.removesuffix(" Signaling Trainer to stop.")


def validate_and_sample(trainer: Trainer, module: LitDiffusion, run: Run) -> None:
    """Validate the trained model, unless its last step was validated, and draw its samples."""
    monitor = get_callback(trainer, Monitor)
    if monitor and monitor.validated_step != trainer.global_step and datamodule_of(trainer).num_val:
        trainer.validate(module, datamodule=datamodule_of(trainer), verbose=False)
        if saving := get_callback(trainer, SaveCheckpoints):
            saving.save(trainer, again=True)  # a run that is stopped from here on has validated its end
    if trainer.is_global_zero:
        run.folder.summary.unlink(missing_ok=True)  # of an earlier end, whose pictures are overwritten now
    if sampling := get_callback(trainer, SampleImages):
        sampling.finish(trainer, module)
