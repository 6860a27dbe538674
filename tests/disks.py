"""Real disks for the tests: small enough to fill, and folders that cannot be written."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A file system of its own in memory, of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leave not one block."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def resize(self, megabytes: int) -> None:
        _mount("-o", f"remount,size={megabytes}m", self.path)


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Disk]:
    """Mount one for a while; skip the test where this user may not."""
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a disk to fill")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Make a folder one that nobody can write into, not even root; skip the test where that cannot be done."""
    mode = folder.stat().st_mode
    if os.geteuid() == 0:
        if (
            shutil.which("chattr") is None
            or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode
        ):
            pytest.skip("this file system cannot make a folder that root may not write")
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", folder], check=True)
        else:
            folder.chmod(mode)


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
