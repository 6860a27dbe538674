"""``load_model``: from a checkpoint file, and nothing else, to a model that samples."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from litdiffusion.configuration.allowlist import require_allowed
from litdiffusion.configuration.entry import config_folder
from litdiffusion.configuration.messages import one_line, suggestion
from litdiffusion.configuration.nodes import build, require_arguments
from litdiffusion.diffusion import Denoiser, Objective, Sampler
from litdiffusion.diffusion.editing import (
    Edit,
    Given,
    Inpaint,
    Interpolate,
    Masks,
    Slerp,
    Variation,
    how_many,
)
from litdiffusion.diffusion.guidance import Classes, Guidance
from litdiffusion.errors import UserError
from litdiffusion.nn.blocks import fold_weight_standardization
from litdiffusion.runs.checkpoint import read_checkpoint
from litdiffusion.sampling import Watch, sample_images

MODEL_PARTS: dict[str, type] = {"denoiser": Denoiser, "sampler": Sampler, "objective": Objective}
"""The configuration nodes that a checkpoint carries as ``model_config``, and what they build."""


class TrainedModel:
    """A denoiser ready to sample, and what its checkpoint says of its training.

    Attributes:
        denoiser: network, schedule and parametrization, in evaluation mode.
        default_sampler: the one that its run used.
        objective: the loss that it was trained on.
        data_config: the configuration of its data source, as plain values, not yet checked.
        step: optimizer steps it was trained for.
        weights: ``ema`` or ``raw``.
        held_out: what the first held-out images of its data are known by (see ``data.fingerprint``).
        class_names: the names of the labels 0, 1, ... in its data; None where it had none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        default_sampler: Sampler,
        objective: Objective,
        data_config: dict[str, Any],
        step: int,
        weights: str,
        held_out: dict[str, Any] | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.default_sampler = default_sampler
        self.objective = objective
        self.data_config = data_config
        self.step = step
        self.weights = weights
        self.held_out = held_out
        self.class_names = class_names

    def sample(
        self,
        num_images: int,
        sampler: str | Sampler | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        watch: Watch | None = None,
        labels: Classes = "all",
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guide: "TrainedModel | None" = None,
        edit: Edit | None = None,
        **options: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw images in [-1, 1], float32 on the CPU; image i of a seed is the same in any batch.

        Args:
            num_images: how many.
            sampler: a name in ``configs/sampler``, a ``Sampler``, or None for the one used in training.
            num_steps: steps of a sampler given by name; None for its default.
            seed: of the noise.
            batch_size: images at a time.
            watch: called at every time of every batch.
            labels: the classes drawn by a network that knows some: ``all``, each in turn; one, or several, of which
                image i gets number i modulo how many there are; None for no class in particular.
            guidance_scale: 1 is no guidance; more exaggerates what tells the class from others.
            guidance_interval: guide only at times in it, from image (0) to noise (1).
            guide: a weaker model of the same kind (an earlier checkpoint, a smaller network): autoguidance, which
                exaggerates what tells this model from that one.
            edit: draw from given images; see also ``inpaint``, ``vary`` and ``interpolate``.
            **options: further arguments of a sampler given by name, such as ``eta``.

        Raises:
            ValueError: ``num_images`` or ``batch_size`` is less than 1.
            UserError: an unknown sampler, or a request that this model cannot fulfil.
        """
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if num_steps is not None:
            options["num_steps"] = num_steps
        if isinstance(sampler, str):
            sampler = named_sampler(sampler, **options)
        elif options:
            raise UserError(
                f"{', '.join(options)}: give a sampler by name, as in sampler='ddim', num_steps=50"
            )
        if guide is not None and not isinstance(guide, TrainedModel):
            raise UserError(f"guide={guide}: must be a model, as load_model returns it")
        if sampler is not None and not isinstance(sampler, Sampler):
            raise UserError(f"sampler={sampler}: must be a name in configs/sampler, or a Sampler")
        try:
            guidance = Guidance(labels, guidance_scale, guidance_interval, guide.denoiser if guide else None)
            return sample_images(
                self.denoiser,
                sampler or self.default_sampler,
                num_images,
                seed,
                batch_size,
                watch,
                guidance,
                edit,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def inpaint(
        self,
        images: Given,
        masks: Masks,
        num_images: int | None = None,
        repeats: int = 10,
        labels: Classes = None,
        **how: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw anew the pixels of images in [-1, 1] where ``masks`` is true; the others come out as they were.

        As ``sample``, whose arguments ``how`` are; see ``Inpaint``. By default one for each of the images.
        """
        return self.sample(
            how_many(images) if num_images is None else num_images,
            labels=labels,
            edit=Inpaint(images, masks, repeats),
            **how,
        )

    def vary(
        self,
        images: Given,
        strength: float = 0.5,
        num_images: int | None = None,
        labels: Classes = None,
        **how: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw images in [-1, 1] again from ``strength`` of the way to noise.

        As ``sample``, whose arguments ``how`` are; see ``Variation``. By default one for each of the images.
        """
        return self.sample(
            how_many(images) if num_images is None else num_images,
            labels=labels,
            edit=Variation(images, strength),
            **how,
        )

    def interpolate(
        self,
        image: Given,
        image2: Given,
        num_images: int = 9,
        strength: float | None = 0.5,
        labels: Classes = None,
        **how: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw a path from one image in [-1, 1] to another.

        As ``sample``, whose arguments ``how`` are; see ``Interpolate``, or, for strength None, ``Slerp``.
        """
        edit: Edit = Slerp(image, image2, num_images)
        if strength is not None:
            edit = Interpolate(image, image2, num_images, strength)
        return self.sample(num_images, labels=labels, edit=edit, **how)


def named_sampler(name: str, **options: Any) -> Sampler:
    """Build the sampler of ``configs/sampler/NAME.yaml``; ``options`` replace values there.

    Raises:
        UserError: there is none of that name, or it refuses an option.
    """
    folder = config_folder() / "sampler"
    names = [path.stem for path in folder.glob("*.yaml")]
    if name not in names:
        raise UserError(f"there is no sampler {name!r}{suggestion(name, names)}")
    node = OmegaConf.load(folder / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    sampler: Sampler = build(node, f"sampler={name}", **options)
    return sampler


def load_model(
    path: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    device: str | torch.device | None = None,
    trust: Iterable[str] = (),
) -> TrainedModel:
    """Load the model of a checkpoint.

    Args:
        path: a ``.ckpt`` file.
        weights: ``ema`` for the averaged weights (the raw ones where the run had no average), or ``raw``.
        device: where to put it; None for a GPU if there is one.
        trust: packages, besides this one, whose classes and functions the checkpoint may name. It can have any of
            them called, with arguments of its choice, so name only packages that you would run anyway.

    Raises:
        UserError: the file is missing, damaged, foreign, or names classes that a checkpoint may not name.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: choose ema or raw")
    checkpoint = read_checkpoint(Path(path))
    parts = _build(checkpoint["model_config"], path, trust)
    denoiser: Denoiser = parts["denoiser"]

    state = checkpoint["state_dict"]
    averaged = _part(state, "ema_net.")
    used = "ema" if weights == "ema" and averaged else "raw"
    try:
        if used == "ema":
            denoiser.core.net.load_state_dict(averaged)
        else:
            denoiser.load_state_dict(_part(state, "denoiser."))
        parts["objective"].load_state_dict(_part(state, "objective."))
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit the network its configuration names") from error
    # The weights are final from here on.
    fold_weight_standardization(denoiser.core.net)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for part in (denoiser, parts["objective"]):
        part.requires_grad_(False).eval().to(device)
    return TrainedModel(
        denoiser,
        parts["sampler"],
        parts["objective"],
        checkpoint["data_config"],
        int(checkpoint["global_step"]),
        used,
        checkpoint.get("held_out"),
        checkpoint.get("class_names"),
    )


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _build(config: dict[str, Any], path: str | Path, trust: Iterable[str]) -> dict[str, Any]:
    """Build a checkpoint's model from what it says of it, which anybody may have written.

    Raises:
        UserError: it names what it may not, or nothing that can be built.
    """
    require_allowed(config, trust=trust)
    try:
        nodes = OmegaConf.create(config)
        require_arguments(nodes)
        parts = {name: build(nodes[name], name) for name in MODEL_PARTS}
    except Exception as error:  # values from elsewhere can trip a constructor in any way
        reason = one_line(error if isinstance(error, UserError) else error.__cause__ or error)
        raise UserError(f"{path} describes no model that this version can build ({reason})") from error
    for name, kind in MODEL_PARTS.items():
        if not isinstance(parts[name], kind):
            raise UserError(f"{path} describes no model: its {name} is no {kind.__name__}")
    return parts
