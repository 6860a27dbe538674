"""What watches a training run: one file for each concern. To add one, write it here and name it in YAML."""

from litdiffusion.training.callbacks.checkpoints import SaveCheckpoints
from litdiffusion.training.callbacks.interruption import Interrupted, StopCleanly
from litdiffusion.training.callbacks.monitor import Monitor
from litdiffusion.training.callbacks.progress import Progress
from litdiffusion.training.callbacks.quality import MeasureSamples
from litdiffusion.training.callbacks.samples import SampleImages

__all__ = [
    "Interrupted",
    "MeasureSamples",
    "Monitor",
    "Progress",
    "SampleImages",
    "SaveCheckpoints",
    "StopCleanly",
]
