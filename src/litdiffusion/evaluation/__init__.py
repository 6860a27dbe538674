"""How good a model is. Image metrics join here: features in ``features.py``, scores in ``metrics.py``."""

from litdiffusion.evaluation.held_out import held_out_losses

__all__ = ["held_out_losses"]
