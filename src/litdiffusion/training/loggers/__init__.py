"""Where a run's numbers and pictures go: ``metrics.csv``, W&B, TensorBoard.

To add a logger, subclass ``RunLogger`` and name the class in ``configs/logger/NAME.yaml``.
"""

from litdiffusion.training.loggers.base import ForeignLogger, RunLogger
from litdiffusion.training.loggers.csv import CSVLogger
from litdiffusion.training.loggers.tensorboard import TensorBoard
from litdiffusion.training.loggers.wandb import WandB

__all__ = ["CSVLogger", "ForeignLogger", "RunLogger", "TensorBoard", "WandB"]
