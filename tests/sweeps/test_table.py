import csv
import json
from pathlib import Path

import pytest

from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.process import Outcome
from litdiffusion.sweeps.table import Results

METRICS = {"loss": {}, "bits_per_dim": {}, "accuracy": None, "fid": {}}
LOSSES = {0: 0.5, 1: None, 2: 0.25, 3: float("nan"), 4: 0.125}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Five jobs: 0 to 4 with falling losses, but 1 has failed and 3 has come to nothing."""
    results = Results(tmp_path / "sweep.csv")
    for number, loss in LOSSES.items():
        folder = tmp_path / str(number)
        folder.mkdir()
        overrides = ("schedule=linear", f"seed={number}", f"+net.dim={8 * (number % 2 + 1)}")
        job = Job(
            number,
            overrides,
            folder,
            folder / "summary.json",
            (),
            config={"seed": number, "metrics": METRICS},
            varied={"seed": str(number), "net.dim": str(8 * (number % 2 + 1))},
        )
        summary = {
            "val_loss": loss,
            "train_loss": 2.0,
            "val/bits_per_dim": 3.5,
            "parameters": 9,
            "device": "cpu",
        }
        job.result.write_text(json.dumps(summary))
        failed = number == 1
        results.note({job: Outcome("failed", "it, too,\nis one") if failed else Outcome("finished")})
    return results


def test_the_file_holds_what_differs_and_what_has_come_of_it(results: Results) -> None:
    with results.path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert list(rows[0]) == [
        *(
            "job",
            "status",
            "seed",
            "net.dim",
            "val_loss",
            "val_bits_per_dim",
            "train_loss",
            "run_dir",
            "reason",
        ),
    ]
    assert rows[2] == {
        "job": "2",
        "status": "finished",
        "seed": "2",
        "net.dim": "8",
        "val_loss": "0.25",
        "train_loss": "2.0",
        "val_bits_per_dim": "3.5",
        "run_dir": "2",
        "reason": "",
    }
    assert (rows[1]["val_loss"], rows[1]["reason"]) == ("", "it, too,\nis one")
    assert results.failed()


def test_the_best_comes_first_and_what_has_no_number_last(results: Results) -> None:
    lines = results.table("val_loss").splitlines()
    assert [line.split()[0] for line in lines[1:] if line[0].isdigit()] == ["4", "2", "0", "1", "3"]
    highest = results.table("val_loss", higher_is_better=True).splitlines()
    assert [line.split()[0] for line in highest[1:] if line[0].isdigit()] == ["0", "2", "4", "1", "3"]
    header, best = lines[:2]
    assert best[header.index("val_loss") :].split()[0] == "0.125"
    by_nothing = results.table(None).splitlines()
    assert [line.split()[0] for line in by_nothing[1:] if line[0].isdigit()] == ["0", "1", "2", "3", "4"]
    by_another = results.table("train_loss").splitlines()
    assert [line.split()[0] for line in by_another[1:] if line[0].isdigit()] == ["0", "2", "3", "4", "1"]


def test_paths_are_shown_from_here(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results.path.parent.parent)
    table = results.table("val_loss")
    assert str(results.path.parent) not in table
    assert f"{results.path.parent.name}/4" in table


def test_columns_without_a_word_are_left_out(tmp_path: Path) -> None:
    results = Results(tmp_path / "sweep.csv")
    results.note({Job(0, ("seed=1",), tmp_path, tmp_path / "summary.json", ()): Outcome("waiting")})
    assert results.table("val_loss").splitlines()[0].split() == ["job", "status", "run_dir"]
    assert not results.failed()
