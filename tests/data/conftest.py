"""What the tests of the data room share: the real data set, and machines that lack something."""

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


Serve = Callable[[type[socketserver.BaseRequestHandler]], None]


@pytest.fixture
def serve_as_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Return what lets a handler answer in the Hub's place, on a machine with a network too."""
    with ExitStack() as servers:

        def serve(handler: type[socketserver.BaseRequestHandler]) -> None:
            server = servers.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.callback(server.shutdown)
            address = f"http://127.0.0.1:{server.server_address[1]}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
            monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
            template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

        yield serve


@pytest.fixture
def no_hub(serve_as_hub: Serve) -> list[str]:
    """A Hub that hangs up on whoever calls; return what was asked so far."""
    asked: list[str] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(65536).decode().partition("\r\n")[0])

    serve_as_hub(HangUp)
    return asked


@pytest.fixture
def no_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Debian's package."""
    nowhere = tmp_path / "not-installed"
    monkeypatch.setattr("litdiffusion.data.sources.fashion_mnist.DEBIAN_FOLDER", nowhere)
