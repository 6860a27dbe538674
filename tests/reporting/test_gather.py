"""What reports know of runs: made by hand, since a training takes seconds."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from litdiffusion.errors import UserError
from litdiffusion.reporting.embedded import FEW
from litdiffusion.reporting.found import Found, Ranking, find_runs
from litdiffusion.reporting.gather import gather
from litdiffusion.runs.lock import RunLock

FID = {"_target_": "litdiffusion.evaluation.FID"}
COVERAGE = {"_target_": "litdiffusion.evaluation.Coverage", "neighbours": 5}


def make_run(folder: Path, rows: int = 3, end: bool = True, typed: str = "", **config: Any) -> Path:
    """A run folder of which every picture is a gray square and every loss 1 / (row + 1)."""
    (folder / "samples").mkdir(parents=True)
    config = {"run_dir": str(folder), "metrics": {"fid": FID}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.txt").write_text("".join(f"{text}\n" for text in typed.split()))
    lines = [f"{i},{i * 16},{1 / (i + 1)},{i},{2.5},{0.5}" for i in range(rows)]
    head = "step,images_seen,train/loss,train/loss_t03,val/fid,val/fid_floor"
    (folder / "metrics.csv").write_text("\n".join([head, *lines, ""]))
    (folder / "provenance.json").write_text(json.dumps([{"started": "today", "git": {"commit": "abc"}}]))
    for name in ("step-0000001", "grid", "noised_strip"):
        Image.new("L", (58, 58), 128).save(folder / "samples" / f"{name}.png")
    summary = {
        "steps": rows - 1,
        "images_seen": 16 * (rows - 1),
        "train_loss": 0.25,
        "val_fid": 2.5,
        "images_per_second": 90.0,
    }
    if end:
        ends = {"grid": "samples/grid.png", "experiment": "quickstart"}
        (folder / "summary.json").write_text(json.dumps(summary | ends))
    return folder


def test_runs_are_found_in_their_order_wherever_they_lie(tmp_path: Path) -> None:
    made = [make_run(tmp_path / name) for name in ("a", "sweep/2", "sweep/10")]
    (tmp_path / "sweep/2/wandb/x").mkdir(parents=True)
    table = "job,status,loss,run_dir,reason\n0,finished,l1,2,\n1,failed,l2,7,no such file\n"
    (tmp_path / "sweep/sweep.csv").write_text(table)
    found = find_runs([tmp_path, tmp_path / "a"])
    assert [run.folder for run in found] == [made[0], made[1], tmp_path / "sweep/7", made[2]]
    assert found[2].row["reason"] == "no such file"
    assert [run.folder for run in find_runs([made[0]])] == [made[0]]


@pytest.mark.parametrize(("name", "said"), [("missing", "does not exist"), (".", "holds no run")])
def test_a_path_without_runs_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_runs([tmp_path / name])


def test_a_run_is_shown_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", typed="schedule=cosine run_dir=run")
    (run / "evaluated").mkdir()
    measured = {"val/fid": 2.0, "val/fid_floor": 0.4, "num_images": 5000, "sampler": "DDIM", "biased": False}
    (run / "evaluated/metrics.json").write_text(json.dumps(measured))
    data = gather([Found(run)])
    (shown,) = data["runs"]
    assert (shown["name"], shown["status"], shown["typed"]) == ("run", "finished", ["schedule=cosine"])
    assert shown["curves"]["train/loss"] == [[0, 16, 32], [1, 0.5, 0.33333]]
    assert shown["levels"] == {"train/loss": [None] * 3 + [2] + [None] * 6}
    assert shown["images_per_step"] == 16
    assert [(each["source"], each["value"], each["floor"]) for each in shown["quality"]] == [
        ("during training", 2.5, 0.5),
        ("evaluate", 2.0, 0.4),
    ]
    assert shown["quality"][1]["note"] == "num_images 5000, sampler DDIM"
    assert [each["step"] for each in shown["samples"]] == [1, 2]
    assert shown["forward"].startswith("data:image/png;base64,")
    assert shown["facts"] == {"experiment": "quickstart"}
    assert data["code"] == [{"commit": "abc", "diff": "", "cut": False}]


def test_what_differs_is_named_once_and_what_follows_from_the_folder_not_at_all(tmp_path: Path) -> None:
    runs = []
    for name, rate in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        shared = {"optimizer": {"lr": rate}, "module": {"optimizer": {"lr": rate}}, "seed": 0}
        runs.append(make_run(folder, typed=f"optimizer.lr={rate}", samples=f"{folder}/samples", **shared))
    data = gather([Found(run) for run in runs])
    assert data["differing"] == {"optimizer.lr": [("1", [0]), ("2", [1])]}
    assert data["common"] == {"seed": "0", "metrics.fid._target_": FID["_target_"]}
    assert data["axes"] == ["optimizer.lr"]
    assert [run["varied"] for run in data["runs"]] == [{"optimizer.lr": "1"}, {"optimizer.lr": "2"}]
    assert [run["name"] for run in data["runs"]] == ["a", "b"]


def test_a_default_stands_beside_what_others_typed(tmp_path: Path) -> None:
    typed = ("optimizer.lr=1e-3 net=dit seed=0", "net.dims=[1,2] seed=0", "optimizer.lr=0.1 seed=0")
    values = ((1e-3, [1]), (0.1, [1, 2]), (0.1, [1]))
    runs = [
        Found(make_run(tmp_path / str(i), typed=words, optimizer={"lr": rate}, net={"dims": dims}))
        for i, (words, (rate, dims)) in enumerate(zip(typed, values, strict=True))
    ]
    failed = Found(tmp_path / "3", {"status": "failed", "optimizer.lr": "1e-3", "net": "dit", "seed": "0"})
    data = gather([*runs, failed])
    assert data["axes"] == ["optimizer.lr", "net", "net.dims"]
    assert [run["varied"] for run in data["runs"]] == [
        {"optimizer.lr": "0.001", "net.dims": "[1]", "net": "dit"},
        {"optimizer.lr": "0.1", "net.dims": "[1, 2]"},
        {"optimizer.lr": "0.1", "net.dims": "[1]"},
        {"optimizer.lr": "0.001", "net": "dit"},
    ]


def test_each_run_says_how_it_stands(tmp_path: Path) -> None:
    names = ("finished", "continued", "running", "unfinished", "damaged", "unreadable")
    runs = {name: make_run(tmp_path / name, end=name not in ("running", "unfinished")) for name in names}
    with (runs["continued"] / "metrics.csv").open("a") as file:
        file.write("9,144,0.1,,,\n")
    (runs["damaged"] / "metrics.csv").write_text("no table\n1\n")
    (runs["unreadable"] / "config.yaml").write_text("a: [1\n")
    (runs["unfinished"] / "samples/step-0000001.png").write_bytes(b"no picture")
    lost = Found(tmp_path / "lost", {"status": "failed", "reason": "no GPU", "loss": "l1", "val_loss": "0.5"})
    evaluated = Found(tmp_path / "evaluated", {"status": "finished", "val_fid": "3"})
    with RunLock(runs["running"]) as lock:
        lock.take()
        found = gather([*map(Found, runs.values()), evaluated, lost])["runs"]
    status = {run["name"]: run["status"] for run in found}
    expected = {name: name for name in names} | {
        "continued": "unfinished",
        "unreadable": "damaged",
        "lost": "failed",
        "evaluated": "finished",
    }
    assert status == expected
    reasons = {run["name"]: run["reason"] for run in found}
    assert "metrics.csv is damaged" in reasons["damaged"]
    assert "config.yaml cannot be read" in reasons["unreadable"]
    assert (reasons["lost"], reasons["unfinished"]) == ("no GPU", "32 images seen so far")
    assert found[-1]["numbers"] == {"val_loss": 0.5}


def test_curves_are_thinned_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litdiffusion.reporting.gather.MAX_POINTS_OF_ONE", 100)
    monkeypatch.setattr("litdiffusion.reporting.gather.MAX_POINTS", 1000)
    run = make_run(tmp_path / "0", rows=250)
    (shown,) = gather([Found(run)])["runs"]
    assert len(shown["curves"]["train/loss"][0]) == 100
    for i in range(1, 4):
        shutil.copytree(run, tmp_path / str(i))
    data = gather(find_runs([tmp_path]))
    lengths = [len(curve[0]) for shown in data["runs"] for curve in shown["curves"].values()]
    assert sum(lengths) <= 1000
    assert data["thinned"] == max(lengths) == 50


def test_of_many_runs_the_best_are_shown_with_all_their_pictures(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(i)) for i in range(FEW + 3)]
    for i, run in enumerate(runs):
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"val_fid": float(abs(i - 5))}))
    data = gather(list(map(Found, runs)), lambda runs: Ranking("val_fid", "Sorted.", higher=False))
    assert [i for i, run in enumerate(data["runs"]) if "forward" in run] == [2, 3, 4, 5, 6, 7]
    assert all(run["samples"] for run in data["runs"])
    assert (data["ranked_by"], data["ranking"]) == ("val_fid", "Sorted.")


def test_a_metric_says_whether_higher_is_better_and_no_foreign_one_is_imported(tmp_path: Path) -> None:
    metrics = {"fid": FID, "coverage": COVERAGE, "own": {"_target_": "this.Sharpness"}, "kid": None}
    data = gather([Found(make_run(tmp_path / "run", metrics=metrics))])
    assert data["metrics"] == {"fid": False, "coverage": True, "own": False}
    assert "this" not in sys.modules
