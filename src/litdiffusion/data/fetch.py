"""Fetch Fashion-MNIST without root: ``python -m litdiffusion.data.fetch [DIR]``.

DIR is by default where ``data=fashion_mnist`` looks: ``$LITDIFFUSION_DATA/fashion-mnist``, else
``data/fashion-mnist``. It tries, in this order: files already there, Debian's package (downloaded and unpacked,
not installed), the Hub. Each of the four files appears in DIR whole or not at all.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from litdiffusion.data.decoding import decode_column
from litdiffusion.data.idx import write_idx
from litdiffusion.data.sources.fashion_mnist import (
    DEBIAN_FOLDER,
    FILES,
    HUB_NAME,
    THREE_WAYS,
    find_folder,
    read_split,
)
from litdiffusion.data.sources.hub import load_from_hub
from litdiffusion.errors import UserError
from litdiffusion.system.files import whole_file

PACKAGE = "dataset-fashion-mnist"
DEBIAN_SECONDS = 900
"""How long a command of Debian's may take."""


def main(arguments: list[str] | None = None) -> int:
    """Fetch the data and return the exit code: 0, or 2 after one line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m litdiffusion.data.fetch", description="Fetch Fashion-MNIST."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder(), metavar="DIR")
    folder: Path = parser.parse_args(arguments).folder.expanduser()
    try:
        fetch(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def default_folder() -> Path:
    """Return the folder that ``configs/data/fashion_mnist.yaml`` names."""
    return Path(os.environ.get("LITDIFFUSION_DATA", "data")) / "fashion-mnist"


def fetch(folder: Path) -> None:
    """Make sure that Fashion-MNIST is in ``folder`` or in Debian's.

    Raises:
        UserError: ``folder`` cannot be written, or no way to get the data works.
    """
    if _is_there(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            unpacked = _first_that_works(Path(work))
            for file in sorted(unpacked.iterdir()):
                with whole_file(folder / file.name) as temporary:
                    shutil.copyfile(file, temporary)
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from error
    print(f"Fashion-MNIST is in {folder}")


def _is_there(folder: Path) -> bool:
    try:
        found = find_folder(folder)
        if found is None:
            return False
        _check(found)
    except UserError as error:
        if folder.is_file():
            raise
        print(f"{error}: fetching it anew")
        return False
    print(f"Fashion-MNIST is already in {found}: nothing to do")
    return True


def _check(folder: Path) -> None:
    """Read all files; raise UserError naming one that is damaged."""
    read_split(folder, "train")
    read_split(folder, "test")


def _first_that_works(work: Path) -> Path:
    """Return a folder in ``work`` that holds just the four files, checked."""
    ways: list[Callable[[Path], Path]] = [_from_debian, _from_hub]
    for way in ways:
        try:
            folder = way(work)
            _check(folder)
            return folder
        except UserError as error:
            print(f"that failed: {error}")
    raise UserError(f"cannot fetch Fashion-MNIST (reasons above): {THREE_WAYS}")


def _from_debian(work: Path) -> Path:
    """Download and unpack Debian's package; nothing is installed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"no Debian package: this system has no {tool}")
    print(f"downloading Debian's package {PACKAGE} (31 MB) ...")
    download = ["apt-get", "download", PACKAGE]
    try:
        _run(download, work)
    except UserError as error:
        if os.geteuid() != 0:
            advice = "the list of packages may be missing or old: `sudo apt-get update`, then again"
            raise UserError(f"{error}; {advice}") from error
        print(f"{error}; updating the list of packages ...")
        _run(["apt-get", "update"], work)
        _run(download, work)
    for package in work.glob("*.deb"):
        _run(["dpkg-deb", "-x", package.name, "package"], work)
    return work / "package" / DEBIAN_FOLDER.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    """Run a command in ``folder``; raise UserError with its last line if it fails."""
    try:
        subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=DEBIAN_SECONDS
        )
    except subprocess.SubprocessError as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        last = (said.strip() or str(error)).splitlines()[-1]
        raise UserError(f"`{' '.join(command)}` failed ({last})") from error


def _from_hub(work: Path) -> Path:
    """Download from the Hub and write it as the same four files."""
    print(f"downloading {HUB_NAME} from the Hub ...")
    found = load_from_hub(HUB_NAME)
    folder = work / "hub"
    folder.mkdir()
    for split, (image_file, label_file) in FILES.items():
        table = found[split].with_format("arrow")[:]
        images = decode_column(table["image"], (28, 28), channels=1)
        write_idx(folder / f"{image_file}.gz", images[:, 0])
        write_idx(folder / f"{label_file}.gz", np.asarray(table["label"], dtype=np.uint8))
    return folder


if __name__ == "__main__":
    sys.exit(main())
