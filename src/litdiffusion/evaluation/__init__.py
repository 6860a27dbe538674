"""How good a model is: metrics, one class each, which ``configs/metrics`` lists."""

from litdiffusion.evaluation.bits_per_dim import BitsPerDim
from litdiffusion.evaluation.held_out import HeldOutLoss
from litdiffusion.evaluation.metric import Mean, Metric, Model, listed, numbers
from litdiffusion.evaluation.x0_error import X0MeanAbsoluteError

__all__ = ["BitsPerDim", "HeldOutLoss", "Mean", "Metric", "Model", "X0MeanAbsoluteError", "listed", "numbers"]
