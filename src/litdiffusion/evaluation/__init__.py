"""How good a model is: each module measures one thing, and returns flat names and numbers for ``evaluate`` to merge.

Image metrics join here: features in ``features.py``, scores in ``metrics.py``.
"""

from litdiffusion.evaluation.bits_per_dim import bound_parts
from litdiffusion.evaluation.held_out import held_out_losses

__all__ = ["held_out_losses", "bound_parts"]
