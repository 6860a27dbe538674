"""Each file of ``configs/data`` builds its source, and names every argument of it."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from image_worlds import REPOSITORY
from omegaconf import OmegaConf

from litdiffusion.data.sources import Source

FILES = sorted((REPOSITORY / "configs" / "data").glob("*.yaml"))
REQUIRED = {"image_folder": {"path": "photos"}, "hub": {"name": "owner/images"}}


def test_there_is_one_for_each_source() -> None:
    assert [file.stem for file in FILES] == ["digits", "fashion_mnist", "hub", "image_folder"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_builds_with_the_constructor_s_own_defaults(file: Path) -> None:
    node = OmegaConf.load(file)
    config = OmegaConf.create({"paths": {"data": "somewhere"}, "data": node})
    missing = {key for key in node if OmegaConf.is_missing(node, key)}
    assert missing == set(REQUIRED.get(file.stem, {}))
    for key, value in REQUIRED.get(file.stem, {}).items():
        config.data[key] = value
    source = instantiate(config.data)
    assert isinstance(source, Source)
    parameters = inspect.signature(get_class(node["_target_"])).parameters
    assert set(node) - {"_target_", "_convert_"} == set(parameters)
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty and name not in missing:
            assert config.data[name] == parameter.default


def test_images_are_mirrored_only_where_the_data_set_is_known() -> None:
    """Digits and text are not what they were."""
    flipped = {file.stem for file in FILES if OmegaConf.load(file).flip}
    assert flipped == {"fashion_mnist"}
    assert OmegaConf.load(REPOSITORY / "configs" / "experiment" / "cifar10.yaml").data.flip


def test_the_data_folder_comes_from_the_paths() -> None:
    config = OmegaConf.create({"paths": {"data": "here"}, "data": OmegaConf.load(FILES[1])})
    assert config.data.path == "here/fashion-mnist"
