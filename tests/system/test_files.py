import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from litdiffusion.system.files import hardlink, whole_file, write_text

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from litdiffusion.system.files import whole_file

with whole_file(Path(sys.argv[1])) as temporary:
    with temporary.open("wb") as file:
        file.write(b"half of the new")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "notes.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # so that the rename stays within one file system
        assert temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["notes.txt"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "a long old text")
    write_text(path, "né")
    assert path.read_bytes() == "né".encode()
    assert names(tmp_path) == ["notes.txt"]


def test_a_second_name_outlasts_the_first(tmp_path):
    path, other = tmp_path / "last.txt", tmp_path / "previous.txt"
    write_text(path, "first")
    for _ in range(2):  # the second time it is there already, as after a kill before the next file was whole
        hardlink(path, other)
        assert names(tmp_path) == ["last.txt", "previous.txt"]
    write_text(path, "second")
    assert other.read_text() == "first"
    hardlink(path, other)
    assert other.read_text() == "second"
    assert names(tmp_path) == ["last.txt", "previous.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", ["old", None])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error, old):
    path = tmp_path / "notes.txt"
    if old is not None:
        path.write_text(old)

    def write() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half of the new")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ([] if old is None else ["notes.txt"])
    assert old is None or path.read_text() == old


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    run = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_text(path, "new")  # and the next one is not in the way of what was left
    assert path.read_text() == "new"


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_what_the_umask_says(tmp_path, mask):
    os.umask(mask)
    write_text(tmp_path / "notes.txt", "new")
    assert (tmp_path / "notes.txt").stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.umask(mask) == mask


def test_a_writer_may_replace_the_temporary_file_itself(tmp_path):
    """As libraries do that write atomically on their own."""
    path = tmp_path / "table.csv"
    with whole_file(path) as temporary:
        other = tmp_path / "other"
        other.write_text("new")
        other.replace(temporary)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["table.csv"]


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"), whole_file(tmp_path / "nowhere" / "notes.txt"):
        pytest.fail("there is nowhere to write")


def test_a_folder_in_the_way_is_an_os_error_and_stays(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    with pytest.raises(OSError, match="notes"):
        write_text(tmp_path / "notes.txt", "new")
    assert names(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").is_dir()


def test_the_content_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    """Or a power cut leaves an empty file under the final name."""
    path, order = tmp_path / "notes.txt", []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(path, "new")
    assert order == ["file", "rename", "folder"]
