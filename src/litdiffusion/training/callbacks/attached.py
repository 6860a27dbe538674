"""Callbacks and datamodule of a trainer, typed; Lightning attaches them untyped."""

from typing import Any, TypeVar

from lightning import Trainer

from litdiffusion.data.datamodule import ImageDataModule

T = TypeVar("T")


def get_callback(trainer: Trainer, kind: type[T]) -> T | None:
    """Return the trainer's callback of a kind; None where the configuration leaves it out."""
    attached: Any = trainer
    return next((callback for callback in attached.callbacks if isinstance(callback, kind)), None)


def datamodule_of(trainer: Trainer) -> ImageDataModule:
    """Return the trainer's datamodule."""
    attached: Any = trainer
    return attached.datamodule


def images_seen(trainer: Trainer) -> int:
    """How many images the weights have been trained on, all processes together."""
    return trainer.global_step * trainer.accumulate_grad_batches * datamodule_of(trainer).batch_size
