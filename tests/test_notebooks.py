"""The notebooks run from top to bottom, show every figure they promise, and lead nowhere that does not exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from litdiffusion.data.sources.fashion_mnist import find_folder

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
RELATIVE_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
MAX_BYTES = 1_500_000

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training for a dozen steps, on one thread: small networks gain little from two."""
    monkeypatch.setenv("LITDIFFUSION_NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def fashion_mnist() -> None:
    if find_folder(REPOSITORY / "data" / "fashion-mnist") is None:
        pytest.skip("no Fashion-MNIST on this machine: `make data` fetches it")


def execute(notebook: NotebookNode, path: Path) -> None:
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


def tagged(notebook: NotebookNode, tag: str) -> set[int]:
    return {i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])}


def with_pictures(notebook: NotebookNode) -> set[int]:
    """Positions of the cells whose output holds an image."""
    return {
        i
        for i, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", [])
        if any(kind.startswith("image/") for kind in output.get("data", {}))
    }


def complaints(notebook: NotebookNode) -> Iterator[str]:
    """What went to the error stream, and errors."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"{output.ename}: {output.evalue}"
            elif output.output_type == "stream" and output.name == "stderr":
                yield output.text


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@every_notebook
@pytest.mark.usefixtures("few_steps", "fashion_mnist")
def test_it_runs_and_shows_every_figure(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # only what this run makes may count

    execute(notebook, path)

    assert not list(complaints(notebook))
    assert tagged(notebook, "figure")
    assert with_pictures(notebook) == tagged(notebook, "figure")


@every_notebook
def test_it_ships_executed_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]

    assert counts == list(range(1, len(counts) + 1))
    assert with_pictures(notebook) == tagged(notebook, "figure")
    assert not list(complaints(notebook))
    assert path.stat().st_size < MAX_BYTES


@every_notebook
def test_its_links_lead_somewhere(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    links = [
        link for cell in cells if cell.cell_type == "markdown" for link in RELATIVE_LINK.findall(cell.source)
    ]

    assert links
    assert not [link for link in links if not (path.parent / link).exists()]


def test_without_data_it_stops_with_one_line(tmp_path: Path) -> None:
    """Half a data set: the one lack that looks the same on a machine with Debian's package or a network."""
    (tmp_path / "train-images-idx3-ubyte").touch()
    path = REPOSITORY / "notebooks" / "annotated.ipynb"
    notebook = nbformat.read(path, as_version=4)
    parameters, setup, *rest = (cell for cell in notebook.cells if cell.cell_type == "code")
    parameters.source += f"\nDATA = {str(tmp_path)!r}"
    loading = next(cell for cell in rest if "FashionMNIST(DATA)" in cell.source)
    notebook.cells = [parameters, setup, loading]

    with pytest.raises(CellExecutionError) as stopped:
        execute(notebook, path)

    line = stopped.value.evalue
    assert line.startswith(f"{tmp_path} lacks train-labels-idx1-ubyte")
    assert "\n" not in line
    (shown,) = loading.outputs
    assert len("".join(shown.traceback).splitlines()) == 2  # IPython's own heading, and the line
