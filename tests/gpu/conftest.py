"""Small data, and float32 that is float32: by default, torch's convolutions on a GPU round to TF32."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_world import write_small_fashion_mnist


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of every part in seconds, on data that needs nothing but this repository."""
    folder: Path = tmp_path_factory.mktemp("data") / "fashion-mnist"
    write_small_fashion_mnist(folder)
    return [
        "debug=tiny",
        "data=fashion_mnist",
        f"data.path={folder}",
        "data.image_size=8",
        "datamodule.num_val=16",
    ]


@pytest.fixture(autouse=True)
def true_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in those that a test starts."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


@pytest.fixture(autouse=True)
def own_determinism() -> Iterator[None]:
    """``trainer.deterministic=true`` is a setting of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
