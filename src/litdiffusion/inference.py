"""``load_model``: from a checkpoint file, and nothing else, to a model that samples."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, Num, Shaped
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from litdiffusion.configuration import config_folder
from litdiffusion.configuration.allowlist import require_allowed
from litdiffusion.configuration.checks import MAX_SEED, whole_number
from litdiffusion.configuration.hardware import torch_device
from litdiffusion.configuration.messages import one_line, suggestion
from litdiffusion.configuration.nodes import build, refused, require_arguments
from litdiffusion.diffusion import Denoiser, Objective, Sampler
from litdiffusion.diffusion.devices import torch_defaults
from litdiffusion.diffusion.editing import Edit, Inpaint, Interpolate, Slerp, Variation
from litdiffusion.diffusion.guidance import Classes, Guidance, plain
from litdiffusion.errors import UserError
from litdiffusion.nn.blocks import fold_weight_standardization
from litdiffusion.runs.checkpoint import read_checkpoint
from litdiffusion.sampling import Watch, sample_images

Given = Num[Tensor | np.ndarray, "*_images _channels _h _w"]
"""Images as floats in [-1, 1], or a single one."""
Masks = Shaped[Tensor | np.ndarray, "*_masks _h _w"]
"""True or 1 where pixels are drawn anew: one mask or more, for all channels or for each."""
MODEL_PARTS: dict[str, type] = {"denoiser": Denoiser, "sampler": Sampler, "objective": Objective}
"""The configuration nodes that a checkpoint carries as ``model_config``, and what they build."""


@dataclass(eq=False, repr=False)
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

    denoiser: Denoiser
    default_sampler: Sampler
    objective: Objective
    data_config: dict[str, Any]
    step: int
    weights: str
    held_out: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None

    @refused()
    def sample(
        self,
        num_images: SupportsIndex | None,
        sampler: str | Sampler | None = None,
        num_steps: SupportsIndex | None = None,
        seed: SupportsIndex = 0,
        batch_size: SupportsIndex = 64,
        watch: Watch | None = None,
        labels: Classes = "all",
        guidance_scale: SupportsFloat = 1.0,
        guidance_interval: Iterable[SupportsFloat] = (0.0, 1.0),
        guide: "TrainedModel | None" = None,
        edit: Edit | None = None,
        **options: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw images in [-1, 1], float32 on the CPU; image i of a seed is the same in any batch.

        Numbers may be Python's, NumPy's or torch's. Under ``torch.autocast`` the network computes in its precision;
        no other setting of torch changes the images, but for rounding.

        Args:
            num_images: how many; None for one for each image that an edit is given.
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
            UserError: an unknown sampler, or a request that this model cannot fulfil.
        """
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
        if edit is not None and not isinstance(edit, Edit):
            raise UserError(f"edit={edit}: must be an Edit; inpaint, vary and interpolate take images")
        if edit is not None and num_images is None:
            num_images = edit.num_images
        return sample_images(
            self.denoiser,
            sampler or self.default_sampler,
            whole_number("num_images", num_images, 1),
            whole_number("seed", seed, 0, MAX_SEED),
            whole_number("batch_size", batch_size, 1),
            watch,
            Guidance(labels, guidance_scale, guidance_interval, guide.denoiser if guide else None),
            edit,
        )

    @refused()
    def inpaint(
        self,
        images: Given,
        masks: Masks,
        num_images: SupportsIndex | None = None,
        repeats: SupportsIndex = 10,
        labels: Classes = None,
        **how: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw anew the pixels of images in [-1, 1] where ``masks`` is true; the others come out as they were.

        As ``sample``, whose arguments ``how`` are; see ``Inpaint``. By default one for each of the images.
        """
        edit = Inpaint(_images(images), _masks(masks), whole_number("repeats", repeats, 1))
        return self.sample(num_images, labels=labels, edit=edit, **how)

    @refused()
    def vary(
        self,
        images: Given,
        strength: SupportsFloat = 0.5,
        num_images: SupportsIndex | None = None,
        labels: Classes = None,
        **how: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw images in [-1, 1] again from ``strength`` of the way to noise.

        As ``sample``, whose arguments ``how`` are; see ``Variation``. By default one for each of the images.
        """
        return self.sample(num_images, labels=labels, edit=Variation(_images(images), plain(strength)), **how)

    @refused()
    def interpolate(
        self,
        image: Given,
        image2: Given,
        num_images: SupportsIndex = 9,
        strength: SupportsFloat | None = 0.5,
        labels: Classes = None,
        **how: Any,
    ) -> Float[Tensor, "num_images channels h w"]:
        """Draw a path from one image in [-1, 1] to another.

        As ``sample``, whose arguments ``how`` are; see ``Interpolate``, or, for strength None, ``Slerp``.
        """
        ends, number = (_images(image), _images(image2)), whole_number("num_images", num_images, 2)
        edit = Slerp(*ends, number) if strength is None else Interpolate(*ends, number, plain(strength))
        return self.sample(None, labels=labels, edit=edit, **how)


def named_sampler(name: str, **options: Any) -> Sampler:
    """Build the sampler of ``configs/sampler/NAME.yaml``; ``options`` replace values there.

    Raises:
        UserError: there is none of that name, or it refuses an option.
    """
    folder = config_folder() / "sampler"
    names = [path.stem for path in folder.glob("*.yaml")]
    if name not in names:
        raise UserError(f"there is no sampler {name!r}{suggestion(name, names)}")
    given = {key: plain(value) for key, value in options.items()}
    try:
        cfg = OmegaConf.create({"sampler": OmegaConf.merge(OmegaConf.load(folder / f"{name}.yaml"), given)})
    except OmegaConfBaseException as error:
        raise UserError(f"sampler.{one_line(error)}") from error
    require_arguments(cfg)
    sampler: Sampler = build(cfg.sampler, "sampler")
    return sampler


def _images(given: Given) -> Float[Tensor, "*images channels h w"]:
    """Return given images in float32; UserError where they are not."""
    images = _tensor("images", given)
    if not (images.is_floating_point() and bool((images.abs() <= 1.001).all())):
        kind, low, high = str(images.dtype).removeprefix("torch."), images.min().item(), images.max().item()
        raise UserError(f"images: must be floats in [-1, 1], not {kind} from {low:g} to {high:g}")
    return images.float()


def _masks(given: Masks) -> Bool[Tensor, "*masks h w"]:
    """Return given masks as true and false; UserError where they hold something else."""
    masks = _tensor("masks", given)
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise UserError(
            "masks: must hold true or 1 where pixels are drawn anew, else false or 0; as in mask > 0.5"
        )
    return masks == 1


def _tensor(name: str, given: Any) -> Tensor:
    try:
        return given if isinstance(given, Tensor) else torch.tensor(np.ascontiguousarray(given), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise UserError(f"{name}: must be a tensor or an array of numbers, not a {kind}") from error


@torch_defaults()
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
        device: where to put it; None for the best there is.
        trust: packages, besides this one, whose classes and functions the checkpoint may name. It can have any of
            them called, with arguments of its choice, so name only packages that you would run anyway.

    Raises:
        UserError: the file is missing, damaged, foreign, or names classes that a checkpoint may not name; or there
            is no such device.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: choose ema or raw")
    place = torch_device("auto" if device is None else device)
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
    for part in (denoiser, parts["objective"]):
        part.requires_grad_(False).eval().to(place)
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


def _part(state: dict[Any, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}


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
