"""Whether a checkpoint fits what it is asked to continue."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from omegaconf import OmegaConf

from commands import run, train_tiny, type_command
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.errors import UserError
from litdiffusion.runs import resume as resumption
from litdiffusion.runs.checkpoint import read_checkpoint
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.metrics import read_rows
from litdiffusion.runs.resume import differences, find_resumption

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


def test_a_configuration_cut_short_is_not_another_one(trained: Path, tmp_path: Path) -> None:
    text = (trained / "config.yaml").read_text()
    folder = RunFolder(tmp_path)
    folder.metrics.touch()
    config = OmegaConf.to_container(OmegaConf.create(text))
    for length in range(0, text.rindex("\npaths:"), 41):
        folder.config.write_text(text[:length])
        with pytest.raises(UserError, match="put back a copy, or choose another run_dir"):
            find_resumption(folder, config, "auto")
    folder.config.write_text(text)
    assert find_resumption(folder, config, "auto") is None
    with pytest.raises(UserError, match="belongs to another configuration: seed was 0 and is 1"):
        find_resumption(folder, {**config, "seed": 1}, "auto")


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


def test_a_checkpoint_of_another_release_of_torch_is_continued_as_one_of_this(
    trained: Path, tmp_path: Path
) -> None:
    """What its optimizer and its schedule lack is as in this release, and what they have besides is left out."""
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    (group,), (schedule,) = checkpoint["optimizer_states"][0]["param_groups"], checkpoint["lr_schedulers"]
    for settings, name in ((group, "decoupled_weight_decay"), (schedule, "_is_initial")):
        del settings[name]
        settings["of_a_later_release"] = True
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for name, path in (("old", tmp_path / "old.ckpt"), ("new", trained / "checkpoints" / "last.ckpt")):
        train_tiny(tmp_path / name, *QUICK, "trainer.max_steps=8", f"resume={path}")
    old, new = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("old", "new")
    )
    assert old["optimizer_states"][0]["param_groups"] == new["optimizer_states"][0]["param_groups"]
    assert old["lr_schedulers"] == new["lr_schedulers"]
    assert all(torch.equal(old["state_dict"][name], value) for name, value in new["state_dict"].items())


def test_a_checkpoint_with_a_weight_that_is_no_number_is_refused_before_data_is_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    monkeypatch.setattr(ImageDataModule, "prepare_data", lambda self: pytest.fail("data was read"))
    with pytest.raises(UserError, match=r"nan\.ckpt holds a weight that is infinite or NaN"):
        train_tiny(tmp_path / "run", *QUICK, "trainer.max_steps=9", f"resume={tmp_path / 'nan.ckpt'}")


@pytest.mark.parametrize("resume", ["auto", "last.ckpt", "previous.ckpt"])
def test_a_checkpoint_of_the_run_itself_is_read_once(
    resume: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = RunFolder(tmp_path)
    run_folder.checkpoints.mkdir()
    for name in ("last.ckpt", "previous.ckpt"):
        shutil.copyfile(trained / "checkpoints" / "last.ckpt", run_folder.checkpoints / name)
    read = Mock(side_effect=read_checkpoint)
    monkeypatch.setattr(resumption, "read_checkpoint", read)
    path = resume if resume == "auto" else str(run_folder.checkpoints / resume)
    found = find_resumption(run_folder, {}, path)
    assert found is not None
    assert [call.args[0].name for call in read.mock_calls] == [found.checkpoint.name]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.weight_decay"],
            r"state of AdamW, and optimizer\._target_ is SGD",
        ),
        (["optimizer=adam"], r"state of AdamW, and optimizer\._target_ is Adam:"),
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
