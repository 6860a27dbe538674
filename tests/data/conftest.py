"""What the tests of the data room share: the real data set, and machines that lack something."""

from pathlib import Path

import datasets
import datasets.config
import huggingface_hub.constants
import pytest
from image_worlds import REPOSITORY

from litdiffusion.data.fetch import default_folder
from litdiffusion.data.sources.fashion_mnist import find_folder


@pytest.fixture(scope="session")
def fashion_mnist_folder() -> Path:
    folder = find_folder(REPOSITORY / default_folder())
    if folder is None:
        pytest.skip("no Fashion-MNIST on this machine: `make data` fetches it")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what ``datasets`` writes out of the user's cache, and its progress bars out of the test report."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()
    return cache


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that cannot be reached, on a machine with a network too: nothing listens on port 9."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def no_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Debian's package."""
    nowhere = tmp_path / "not-installed"
    monkeypatch.setattr("litdiffusion.data.sources.fashion_mnist.DEBIAN_FOLDER", nowhere)
