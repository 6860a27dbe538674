import json
import os
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from litdiffusion.errors import UserError
from litdiffusion.sweeps.jobs import Job

CONFIG = {"seed": 1, "trainer": {"max_steps": 10}, "logger": {"csv": {"path": "here"}}}


def training(folder: Path, **changes: object) -> Job:
    return Job(0, (), folder, folder / "summary.json", (), config=CONFIG | changes)


def sampling(folder: Path, *overrides: str) -> Job:
    return Job(0, overrides, folder, folder / "sample.json", ())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 10, "val_loss": 0.5, "seed": True}))
    return tmp_path


def test_a_training_run_is_finished_by_its_last_step_and_its_configuration(trained: Path) -> None:
    assert training(trained).is_finished()
    assert training(trained, logger={}).is_finished(), "that decides nothing"
    assert training(trained, trainer={"max_steps": 9}).is_finished()
    assert not training(trained, trainer={"max_steps": 11}).is_finished()
    assert not training(trained, seed=2).is_finished()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"steps": "10"}', "{}"])
def test_a_run_with_a_damaged_summary_is_not_finished(trained: Path, damage: str) -> None:
    (trained / "summary.json").write_text(damage)
    assert not training(trained).is_finished()


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
"""Some lines that mean gigabytes."""


@pytest.mark.parametrize("damage", ["", "seed: [", "- 1", BOMB])
def test_a_run_with_a_damaged_configuration_is_not_finished(trained: Path, damage: str) -> None:
    (trained / "config.yaml").write_text(damage)
    assert not training(trained).is_finished()


def test_samples_are_finished_where_they_are_younger_than_their_checkpoint(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "a.ckpt", tmp_path / "out"
    checkpoint.touch()
    job = sampling(out, f"ckpt='{checkpoint}'", "seed=0")
    assert not job.is_finished()
    job.note_start()
    assert not job.is_finished()
    after = time.time_ns() + 10**9
    job.result.write_text("{}")
    os.utime(job.result, ns=(after, after))
    assert job.is_finished()
    assert not sampling(out, f"ckpt={checkpoint}", "seed=1").is_finished()
    os.utime(checkpoint, ns=(after + 1, after + 1))
    assert not job.is_finished()


def test_samples_of_an_earlier_job_are_not_those_of_a_crashed_one(tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text("{}")
    long_ago = time.time() - 1
    os.utime(tmp_path / "sample.json", (long_ago, long_ago))
    job = sampling(tmp_path, "seed=0")
    job.note_start()
    assert not job.is_finished()


def test_a_note_holds_no_secret(tmp_path: Path) -> None:
    sampling(tmp_path, "+api_key=abc123456").note_start()
    assert (tmp_path / "overrides.txt").read_text() == "+api_key=***\n"


def test_the_value_is_the_number_that_was_asked_for(trained: Path) -> None:
    job = training(trained)
    assert job.value(["val_loss"]) == 0.5
    assert job.value(["steps", "val_loss"]) == [10.0, 0.5]
    with pytest.raises(UserError, match=r"optimized_metric=seed: .* it has: steps, val_loss"):
        job.value(["seed"])
