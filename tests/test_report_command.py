"""The command ``report``, and the report that a run writes of itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import type_command
from litdiffusion.runs.folder import RunFolder
from litdiffusion.train import write_report

pytestmark = pytest.mark.usefixtures("quiet_logging")


def data_of(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    return found


def test_a_finished_run_has_written_its_own(trained: Path) -> None:
    data = data_of(trained / "report.html")
    (run,) = data["runs"]
    assert (run["status"], run["numbers"]["steps"]) == ("finished", 4)
    assert data["title"] == f"{trained.parent.name}/{trained.name}"
    assert len(run["reverse"]) == 5  # of 4 steps
    assert run["reverse"][0]["t"] == 1
    assert [each["step"] for each in run["samples"]] == [4]


def test_paths_are_typed_as_they_are(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "logs/a b", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(tmp_path / "logs/a b", tmp_path / "logs/lr=1,x")
    monkeypatch.chdir(tmp_path)
    typed = type_command("report", "logs/a b", "logs/lr=1,x", f"out={tmp_path}/both.html")
    assert (typed.code, typed.out) == (0, f"A report of 2 runs: {tmp_path}/both.html\n")
    data = data_of(tmp_path / "both.html")
    assert [run["name"] for run in data["runs"]] == ["a b", "lr=1,x"]
    assert data["ranked_by"] == "val_loss"
    assert type_command("report", "logs").out == f"A report of 2 runs: {tmp_path}/logs/report.html\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: give a run folder, a sweep, or a folder of runs"),
        (["nowhere"], "nowhere does not exist"),
        (["."], "holds no run"),
        (["runs=null"], "error: give a run folder"),
        (["rnus=a"], "rnus"),
    ],
)
def test_a_path_without_runs_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = type_command("report", *arguments)
    assert typed.code == 2
    assert said in typed.err
    assert typed.err.count("\n") == 1


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: RunFolder) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("litdiffusion.train.write_run_page", fail)
    assert write_report(RunFolder(trained)) == {
        "report": "report.html"
    }  # it is there, and the run has not changed
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    assert write_report(RunFolder(tmp_path / "run")) == {}
    assert "report.html is not written: no room" in caplog.text
