"""The data that a model or images are measured on."""

from collections.abc import Iterable
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from litdiffusion.configuration.allowlist import require_allowed
from litdiffusion.configuration.messages import one_line
from litdiffusion.configuration.nodes import build
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.fingerprint import changes
from litdiffusion.data.sources import FashionMNIST, Source
from litdiffusion.errors import UserError
from litdiffusion.inference import TrainedModel


def chosen_source(
    node: DictConfig | None, model: TrainedModel | None, folder: Path, trust: Iterable[str]
) -> Source:
    """Return the data source that ``node`` builds, or the one that the model was trained on, or Fashion-MNIST.

    Raises:
        UserError: its images do not fit the model.
    """
    source: Source
    if node:
        source = build(node, "data")
    elif model is None:
        return FashionMNIST(folder / "fashion-mnist")
    else:
        source = _trained_on(model, trust)
    shape = (source.channels, *source.image_size)
    if model is not None and shape != model.denoiser.image_shape:
        raise UserError(
            f"data gives images of {list(shape)} (channels, height, width) and the model takes"
            f" {list(model.denoiser.image_shape)}: set data.channels and data.image_size"
        )
    return source


def _trained_on(model: TrainedModel, trust: Iterable[str]) -> Source:
    require_allowed(
        model.data_config, ours=("litdiffusion.data.sources",), layers=(), kind=Source, trust=trust
    )
    try:
        source = instantiate(model.data_config, _convert_="all")
    except Exception as error:  # values from elsewhere can trip a constructor in any way
        reason = one_line(error.__cause__ or error)
        raise UserError(f"the checkpoint names no data to measure on ({reason}): give data=...") from error
    if not isinstance(source, Source):
        raise UserError("the checkpoint names no data to measure on: give data=...")
    return source


def held_out_images(
    source: Source, model: TrainedModel, num_images: int, batch_size: int, is_given: bool
) -> ImageDataModule:
    """Return the first ``num_images`` held-out images of a data source.

    Unless the user has given the source they must be those beside which the model was trained. They may have changed
    since; and a checkpoint from elsewhere may name a folder of this machine that has nothing to do with it.

    Raises:
        UserError: the data cannot be had, its classes are not those of a class-conditional model, or the images are
            others.
    """
    data = ImageDataModule(source, batch_size, seed=0, num_val=num_images)
    data.prepare_data()
    data.setup("validate")
    known, found = model.denoiser.num_classes, data.num_classes
    if known is not None and found is not None and known != found:
        raise UserError(f"data has {found} classes, and the model was trained on {known}: choose other data")
    way_out = "to measure on what is there all the same, give data=..."
    if not is_given and model.held_out is None:
        raise UserError(
            f"no images of {source.name} were held out of the training (datamodule.num_val=0): {way_out}"
        )
    if not is_given and changes(model.held_out or {}, data.held_out_fingerprint() or {}):
        raise UserError(
            f"{source.name} does not hold the images that the checkpoint was trained beside: {way_out}"
        )
    return data
