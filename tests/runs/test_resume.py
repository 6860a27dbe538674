"""Whether a checkpoint fits what it is asked to continue."""

import json
from pathlib import Path

import pytest
import torch

from commands import run, train_tiny, type_command
from litdiffusion.errors import UserError
from litdiffusion.runs.metrics import read_rows
from litdiffusion.runs.resume import differences

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("callbacks.sample_images=null", "datamodule.num_val=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "trained", *QUICK)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("net.dim=16", "net.dim was 8 and is 16"),
        ("net.dim_mults=[1,2,2]", "net.dim_mults was [1, 2] and is [1, 2, 2]"),
        ("net.self_condition=true", "net.self_condition was False and is True"),
        ("denoiser.clip=none", "denoiser.clip was 'static' and is 'none'"),
        ("target=epsilon", "target._target_ was 'litdiffusion.diffusion.parametrizations.V'"),
        ("ema=none", "ema_net."),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    override: str, told: str, trained: Path, tmp_path: Path
) -> None:
    resume = f"resume={trained}/checkpoints/last.ckpt"
    typed = type_command("train", "debug=tiny", f"run_dir={tmp_path / 'run'}", *QUICK, override, resume)
    assert typed.code == 2, typed.err
    (line,) = (line for line in typed.err.splitlines() if line.startswith("error: "))
    assert told in line
    assert f"checkpoint {trained}/checkpoints/last.ckpt" in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_same_model_is_continued_elsewhere(trained: Path, tmp_path: Path) -> None:
    resume = f"resume={trained}/checkpoints/last.ckpt"
    run(
        "train",
        "debug=tiny",
        "trainer.max_steps=6",
        f"run_dir={tmp_path}",
        *QUICK,
        resume,
        "optimizer.lr=0.1",
    )
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6


def test_a_folder_whose_configuration_is_lost_is_still_checked(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(UserError, match=r"net\.dim was 8 and is 16"):
        train_tiny(tmp_path, *QUICK, "net.dim=16")


def test_another_sampler_is_free(trained: Path) -> None:
    train_tiny(trained, *QUICK, "trainer.max_steps=5", "sampler=ddpm", "sampler.num_steps=2")
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert checkpoint["model_config"]["sampler"]["num_steps"] == 2


def test_a_value_that_others_repeat_is_told_once(trained: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_tiny(trained, *QUICK, "net.dim=16", "optimizer.lr=0.1")
    assert "net.dim was 8 and is 16, optimizer.lr was 0.001 and is 0.1;" in str(caught.value)


def test_differences_are_those_that_decide_what_is_trained() -> None:
    old = {"seed": 0, "net": {"dim": 8, "dim_mults": [1, 2]}, "sampler": {"num_steps": 5}, "logger": {}}
    new = {"seed": 0, "net": {"dim": 8, "dim_mults": [1, 4]}, "sampler": {"num_steps": 9}, "ema": None}
    assert differences(old, new) == {"net.dim_mults": ([1, 2], [1, 4]), "ema": ("(absent)", None)}
    assert differences(old, old) == {}


def test_another_runs_checkpoint_goes_on_with_this_commands_optimizer(trained: Path, tmp_path: Path) -> None:
    every = ("callbacks.monitor.every_n_steps=1", "trainer.max_steps=7", "lr_scheduler=constant")
    resume = f"resume={trained}/checkpoints/last.ckpt"
    new = ("optimizer.lr=0.02", "optimizer.betas=[0.8,0.9]", "optimizer.weight_decay=0.3")
    train_tiny(tmp_path, *QUICK, *every, *new, resume)
    rates = {float(row["train/lr"]) for row in read_rows(tmp_path / "metrics.csv")}
    assert list(rates) == [pytest.approx(0.02)]
    (group,) = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.02, (0.8, 0.9), 0.3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.weight_decay"], "optimizer"),
        (["trainer.max_steps=4"], r"step \d already; give a larger trainer.max_steps"),
    ],
)
def test_what_another_runs_checkpoint_cannot_do_is_refused(
    overrides: list[str], words: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train_tiny(
            tmp_path / "run",
            *QUICK,
            "trainer.max_steps=9",
            *overrides,
            f"resume={trained}/checkpoints/last.ckpt",
        )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_where_a_checkpoint_was_asked_for_leads_to_it(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"that is a run folder, whose newest is {trained}/checkpoints/last.ckpt"
    ):
        train_tiny(tmp_path / "run", *QUICK, f"resume={trained}")
