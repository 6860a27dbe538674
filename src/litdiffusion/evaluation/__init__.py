"""How good a model is: metrics, one class each, which ``configs/metrics`` lists."""

from litdiffusion.evaluation.bits_per_dim import BitsPerDim
from litdiffusion.evaluation.held_out import HeldOutLoss
from litdiffusion.evaluation.metric import Mean, Metric, Model, listed, numbers
from litdiffusion.evaluation.sample_metrics import (
    FID,
    KID,
    ClassBalance,
    Copying,
    Coverage,
    Density,
    InceptionScore,
    Precision,
    Recall,
    SampleMetric,
)
from litdiffusion.evaluation.x0_error import X0MeanAbsoluteError

__all__ = [
    "Metric",
    "Mean",
    "Model",
    "HeldOutLoss",
    "BitsPerDim",
    "X0MeanAbsoluteError",
    "SampleMetric",
    "FID",
    "KID",
    "Precision",
    "Recall",
    "Density",
    "Coverage",
    "InceptionScore",
    "ClassBalance",
    "Copying",
    "listed",
    "numbers",
]
