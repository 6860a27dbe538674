"""The run folder: made when it can be, refused in one line when not, and checked without a trace."""

import os
from pathlib import Path

import pytest

from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder, writable_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    RunFolder(tmp_path / "deep" / "run").require_usable()
    assert names(tmp_path) == []
    RunFolder(tmp_path).require_usable()
    assert names(tmp_path) == []


def test_preparing_makes_the_folders(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    run.prepare()
    assert names(run.path) == ["checkpoints", "samples"]
    run.prepare()


@pytest.mark.parametrize("place", ["file", "file/run", "run"], ids=["itself", "above", "below"])
def test_a_file_in_the_way_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("mine")
    run = RunFolder(tmp_path / place)
    with pytest.raises(UserError, match=f"run_dir={run.path}.* cannot be written"):
        run.prepare()
    if place != "run":
        with pytest.raises(UserError, match=f"run_dir={run.path}.* cannot be written"):
            run.require_usable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(UserError, match="Permission denied"):
            RunFolder(folder).require_usable()
        with pytest.raises(UserError, match="Permission denied"):
            RunFolder(folder).prepare()


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 100)
    with pytest.raises(UserError, match="too long"):
        RunFolder(folder).require_usable()
    with pytest.raises(UserError, match="too long"):
        writable_folder("out", str(folder))


def test_a_run_that_a_callback_stopped_has_ended_unless_more_steps_are_asked_for(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_summary({"steps": 6, "stopped": "no improvement", "max_steps": 20})
    assert [run.has_ended_at(step) for step in (6, 20, 21)] == [True, True, False]
    run.write_summary({"steps": 6})
    assert [run.has_ended_at(step) for step in (6, 20)] == [True, False]
