"""Every shape in the package's signatures is checked while the tests run."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything of ours is imported. An int may stand for a float, as PEP 484 says.
install_import_hook("litdiffusion", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes: each, and what it starts, has one core
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

LONGEST = (
    "test_notebooks.py",
    "test_processes.py",
    "test_interruption.py",
    "test_wandb_logger.py",
    "test_storage.py",
    "test_end_of_run.py",
)
"""Where several processes share the tests, they begin with these, so that none has one of them left at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


# The same examples in every run. To search further: pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """What draws from torch's global generator, such as a new layer's weights, draws the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that sharing their work among threads costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``train_tiny``, for tests that only read it or copy it."""
    from commands import train_tiny  # here: the tests of the core import no framework

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads rounds differently
    try:
        return train_tiny(tmp_path_factory.mktemp("runs") / "trained")
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process compute as on a machine without bfloat16, so that they can be compared to rounding."""
    monkeypatch.setattr("litdiffusion.configuration.hardware.native_precision", lambda accelerator: "32-true")


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Hydra sets the root logger's handlers up for the streams of the moment."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    logging.disable(logging.NOTSET)
