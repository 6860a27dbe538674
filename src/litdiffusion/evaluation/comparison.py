"""Generated images compared with those of a data set: what ``evaluate`` and a training share."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.stores import to_float
from litdiffusion.errors import UserError
from litdiffusion.evaluation.features import extract_shared, module_hash
from litdiffusion.evaluation.reference import real_features
from litdiffusion.evaluation.sample_metrics import Copying, Reference, SampleMetric, measured
from litdiffusion.reporting.images import grid, save, to_uint8

PAIRS = 16
"""Generated images shown above their nearest training images."""


class NothingToMeasureError(UserError):
    """No number would say anything about the images."""


class Comparison(NamedTuple):
    """The numbers of generated images under their full names, and the hash of the network they come from."""

    numbers: dict[str, float | None]
    feature_hash: str


def to_pixels(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return drawn images as they are measured.

    Raises:
        NothingToMeasureError: they are not finite.
    """
    if not images.isfinite().all():
        raise NothingToMeasureError(
            "the images came out infinite or NaN: use an earlier checkpoint, or weights=raw"
        )
    return to_uint8(images)


def compare(
    metrics: Mapping[str, SampleMetric],
    images: UInt8[Tensor, "_ channels h w"],
    data: ImageDataModule,
    network: nn.Module,
    cache: Path,
    batch_size: int,
) -> Comparison:
    """Compare images with a data set; every process must call this, with all images.

    Args:
        metrics: what is measured, by name.
        images: generated ones.
        data: the real ones.
        network: finds the features of both.
        cache: folder where the features of real images are kept.
        batch_size: images at a time.

    Raises:
        NothingToMeasureError: all images are the same.
        UserError: there are too few of them for a metric, or the network returns no features.
    """
    if bool((images == images[0]).all()):  # their features might differ by rounding
        raise NothingToMeasureError(f"all {len(images)} images are the same: there is nothing to compare")
    feature_hash = module_hash(network)
    samples = extract_shared(network, images, batch_size)
    splits = (real_features(data, split, network, cache, feature_hash) for split in ("train", "test"))
    return Comparison(measured(metrics, samples, Reference(*splits)), feature_hash)


def save_nearest(
    metrics: Mapping[str, SampleMetric],
    images: UInt8[Tensor, "_ channels h w"],
    data: ImageDataModule,
    path: Path,
) -> None:
    """Save the images that are nearest to a training image, each above that one, where that was measured."""
    for metric in metrics.values():
        if isinstance(metric, Copying) and metric.nearest is not None:
            closest = metric.nearest.distances.argsort()[:PAIRS]
            train = data.read("train", metric.nearest.indices[closest].tolist())
            save(grid(to_float(torch.cat((images[closest], train))), columns=len(closest)), path)
