"""``load_model``: from a checkpoint file, and nothing else, to a model that samples."""

from pathlib import Path
from typing import Any, Literal

import torch
from hydra.utils import instantiate
from jaxtyping import Float
from torch import Tensor

from litdiffusion.configuration.targets import check_targets
from litdiffusion.diffusion import DDIM, DDPM, Denoiser, Objective, Sampler
from litdiffusion.errors import UserError
from litdiffusion.nn.blocks import fold_weight_standardization
from litdiffusion.runs.checkpoint import read_checkpoint
from litdiffusion.sampling import Watch, sample_images

MODEL_PARTS = ("denoiser", "sampler", "objective")
"""The configuration nodes that a checkpoint carries as ``model_config``."""

SAMPLERS: dict[str, type[Sampler]] = {"ddpm": DDPM, "ddim": DDIM}


class TrainedModel:
    """A denoiser ready to sample, and what its checkpoint says of its training.

    Attributes:
        denoiser: network, schedule and target, in evaluation mode.
        default_sampler: the one that its run used.
        objective: the loss that it was trained on.
        data_config: the configuration of its data source, as plain values, not yet checked.
        step: optimizer steps it was trained for.
        weights: ``ema`` or ``raw``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        default_sampler: Sampler,
        objective: Objective,
        data_config: dict[str, Any],
        step: int,
        weights: str,
    ) -> None:
        self.denoiser = denoiser
        self.default_sampler = default_sampler
        self.objective = objective
        self.data_config = data_config
        self.step = step
        self.weights = weights

    def sample(
        self,
        num_images: int,
        sampler: str | Sampler | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        watch: Watch | None = None,
        **options: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw images in [-1, 1], float32 on the CPU; image i of a seed is the same in any batch.

        Args:
            num_images: how many.
            sampler: a name (``ddpm``, ``ddim``), a ``Sampler``, or None for the one used in training.
            num_steps: steps of a sampler given by name; None for its default.
            seed: of the noise.
            batch_size: images at a time.
            watch: called with every moment of every batch.
            **options: further arguments of a sampler given by name, such as ``eta``.

        Raises:
            UserError: an unknown sampler.
        """
        if isinstance(sampler, str):
            if sampler not in SAMPLERS:
                raise UserError(f"there is no sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
            if num_steps is not None:
                options["num_steps"] = num_steps
            sampler = SAMPLERS[sampler](**options)
        elif sampler is None:
            sampler = self.default_sampler
            if num_steps is not None:
                raise UserError("num_steps needs a sampler: say sampler='ddim', num_steps=50")
        return sample_images(self.denoiser, sampler, num_images, seed, batch_size, watch)


def load_model(
    path: str | Path, weights: Literal["ema", "raw"] = "ema", device: str | torch.device | None = None
) -> TrainedModel:
    """Load the model of a checkpoint.

    Args:
        path: a ``.ckpt`` file.
        weights: ``ema`` for the averaged weights (the raw ones where the run had no average), or ``raw``.
        device: where to put it; None for a GPU if there is one.

    Raises:
        UserError: the file is missing, damaged, foreign, or names classes that a checkpoint may not name.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: choose ema or raw")
    checkpoint = read_checkpoint(Path(path))
    config = checkpoint["model_config"]
    check_targets(config)
    parts = {name: instantiate(config[name], _convert_="all") for name in MODEL_PARTS}
    denoiser: Denoiser = parts["denoiser"]

    state = checkpoint["state_dict"]
    averaged = any(name.startswith("averaged.") for name in state)
    prefix = "averaged." if weights == "ema" and averaged else "denoiser.net."
    net_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        denoiser.net.load_state_dict(net_state)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit the network its configuration names") from error
    # The weights stand still from here on.
    fold_weight_standardization(denoiser.net)
    denoiser.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    used = "ema" if prefix == "averaged." else "raw"
    return TrainedModel(
        denoiser,
        parts["sampler"],
        parts["objective"],
        checkpoint["data_config"],
        int(checkpoint["global_step"]),
        used,
    )
