"""Generated images compared with a data set's; images of which no number would say anything are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources import Digits
from litdiffusion.evaluation import FID
from litdiffusion.evaluation.comparison import NothingToMeasureError, compare, to_pixels
from litdiffusion.evaluation.features import module_hash


def test_images_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    data, same = ImageDataModule(Digits(), 64, seed=0), torch.full((5, 1, 8, 8), 200, dtype=torch.uint8)
    with pytest.raises(NothingToMeasureError, match="all 5 images are the same"):
        compare({"fid": FID()}, same, data, nn.Flatten(), tmp_path, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(NothingToMeasureError, match="the images came out infinite or NaN"):
        to_pixels(torch.tensor([0.0, value]))
    assert to_pixels(torch.tensor([-1.0, 1.0])).tolist() == [0, 255]


def test_the_numbers_come_with_the_hash_of_the_network(tmp_path: Path) -> None:
    data, network = ImageDataModule(Digits(), 64, seed=0), nn.Flatten()
    pixels = torch.cat([batch.images for batch in data.in_order("test")])
    found = compare({"fid": FID()}, pixels, data, network, tmp_path, 50)
    assert found.numbers["val/fid"] == found.numbers["val/fid_floor"]
    assert found.feature_hash == module_hash(network)
    assert all(path.stem.endswith(found.feature_hash) for path in tmp_path.iterdir())
