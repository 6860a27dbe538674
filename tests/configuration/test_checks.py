"""Combinations that cannot work, and what the machine decides."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from litdiffusion.configuration.checks import require_compatible, validate
from litdiffusion.configuration.hardware import (
    native_accelerator,
    native_precision,
    num_devices,
    resolve_hardware,
    torch_device,
)
from litdiffusion.configuration.nodes import build, refused, require_values
from litdiffusion.errors import UserError

SOUND: dict[str, Any] = {
    "seed": 0,
    "data": {
        "_target_": "litdiffusion.data.sources.FashionMNIST",
        "path": "somewhere",
        "image_size": 28,
        "channels": 1,
    },
    "datamodule": {
        "_target_": "litdiffusion.data.datamodule.ImageDataModule",
        "source": "${data}",
        "batch_size": 128,
        "seed": 0,
    },
    "net": {"_target_": "litdiffusion.nn.UNet", "dim": 28, "channels": 1},
    "schedule": {"_target_": "litdiffusion.diffusion.schedules.linear", "num_steps": 300},
    "target": {"_target_": "litdiffusion.diffusion.Epsilon"},
    "denoiser": {
        "_target_": "litdiffusion.diffusion.Clipped",
        "inner": {
            "_target_": "litdiffusion.diffusion.Preconditioned",
            **{name: f"${{{name}}}" for name in ("net", "schedule", "target")},
            **{name: f"${{data.{name}}}" for name in ("channels", "image_size")},
        },
    },
    "sampler": {"_target_": "litdiffusion.diffusion.DDIM", "num_steps": 50},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3},
    "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "max_steps": 10},
}


def config(**changes: Any) -> DictConfig:
    cfg = OmegaConf.create(SOUND)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def assemble(cfg: DictConfig) -> None:
    """Do what a command does before it reads data."""
    validate(cfg)
    build(cfg.datamodule, "datamodule")
    with refused("sampler"):
        build(cfg.sampler, "sampler").require_support(build(cfg.denoiser, "denoiser"))


def test_sound_configuration_passes() -> None:
    cfg = config(trainer__precision="auto", trainer__accelerator="auto", copy="${seed}")
    assemble(cfg)
    assert cfg.trainer.accelerator == native_accelerator()
    assert cfg.trainer.precision in ("32-true", "bf16-mixed")
    assert cfg["copy"] == 0


def test_interpolation_that_leads_nowhere_is_not_its_own_remedy() -> None:
    with pytest.raises(UserError) as caught:
        require_values(OmegaConf.create({"denoiser": {"net": "${net}"}}))
    assert str(caught.value) == "denoiser.net: Interpolation key 'net' not found"


def test_all_held_out_images_may_be_asked_for() -> None:
    require_compatible(OmegaConf.create({"ckpt": "a", "num_images": 10**13, "data": None}))


def test_keys_may_be_absent() -> None:
    validate(OmegaConf.create({}))
    validate(OmegaConf.create({"ckpt": "a", "num_images": 3, "sampler": None, "data": None}))


@pytest.mark.parametrize(("processes", "fits"), [(1, False), (2, True), (4, False)])
def test_torchruns_processes_are_those_of_the_run(
    processes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not each a run of its own, in one folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "id")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for changes in ({"trainer__devices": 2}, {"trainer__num_nodes": 2}):
        if fits:
            require_compatible(config(**changes))
        else:
            with pytest.raises(UserError, match=f"torchrun has started {processes} processes, but .* is 2"):
                require_compatible(config(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"net__dim_mults": [1, 2, 4, 8]},
            ["image_size=28x28", "multiples of 8", "data.image_size=24 or 32", "net.dim_mults"],
        ),
        ({"data__image_size": [28, 30]}, ["image_size=28x30", "28 or 32"]),
        ({"data__image_size": 2}, ["image_size=2x2", "use data.image_size=4,"]),
        ({"data__image_size": 0}, ["data.image_size=0"]),
        ({"net__groups": 8}, ["net.groups=8", "28 channels", "1, 2, 4, 7, 14, 28"]),
        ({"net__init_dim": 30}, ["net.groups=4", "30 channels", "these do: 1, 2"]),
        ({"net__groups": 0}, ["net.groups=0"]),
        ({"net__dim_mults": []}, ["net.dim_mults=[]"]),
        ({"net__channels": 3}, ["net.channels=3", "data.channels=1", "set data.channels"]),
        ({"net__out_channels": 3}, ["net.out_channels=3", "data.channels=1"]),
        ({"data__channels": 3}, ["net.channels=1", "data.channels=3"]),
        ({"denoiser__inner__channels": 3}, ["denoiser.inner.channels=3", "data.channels=1"]),
        (
            {"denoiser__inner__image_size": [28, 32]},
            ["denoiser.inner.image_size=[28, 32]", "data.image_size=28"],
        ),
        ({"net__dim": 27, "net__groups": 1}, ["net.dim=27", "even"]),
        ({"schedule__zero_terminal_snr": True}, ["target=epsilon", "schedule.zero_terminal_snr", "target=v"]),
        (
            {
                "sampler": {
                    "_target_": "litdiffusion.diffusion.DDPM",
                    "num_steps": 50,
                    "variance": "learned",
                }
            },
            ["sampler.variance=learned", "net.learned_variance=true"],
        ),
        ({"trainer__strategy": "fsdp"}, ["trainer.strategy=fsdp", "trainer=ddp_cpu"]),
        ({"sampler__num_steps": 301}, ["sampler.num_steps=301", "schedule.num_steps=300"]),
        ({"sampler__num_steps": 0}, ["sampler.num_steps=0"]),
        ({"schedule__num_steps": 0}, ["schedule.num_steps=0"]),
        ({"trainer__max_epochs": 6}, ["trainer.max_epochs=6", "trainer.max_steps", "128"]),
        ({"trainer__max_steps": -1}, ["trainer.max_steps=-1", "end"]),
        ({"trainer__max_steps": None}, ["trainer.max_steps=null", "end"]),
        ({"trainer__max_steps": 2.5}, ["trainer.max_steps=2.5"]),
        ({"trainer__devices": 3}, ["datamodule.batch_size=128", "3 processes", "datamodule.batch_size=129"]),
        ({"trainer__num_nodes": 2}, ["trainer.num_nodes=2", "torchrun or srun"]),
        ({"trainer__num_nodes": 0}, ["trainer.num_nodes=0"]),
        ({"trainer__max_time": "00:01:00:00"}, ["trainer.max_time=00:01:00:00", "trainer.max_steps"]),
        ({"trainer__limit_train_batches": 0}, ["trainer.limit_train_batches=0", "trainer.max_steps"]),
        ({"trainer__limit_train_batches": 1}, ["trainer.limit_train_batches=1", "trainer.max_steps"]),
        ({"trainer__fast_dev_run": True}, ["trainer.fast_dev_run=True", "trainer.max_steps"]),
        ({"trainer__min_epochs": 2}, ["trainer.min_epochs=2", "trainer.min_steps"]),
        (
            {"trainer__check_val_every_n_epoch": 2},
            ["check_val_every_n_epoch=2", "trainer.val_check_interval"],
        ),
        ({"trainer__reload_dataloaders_every_n_epochs": 1}, ["endless epoch"]),
        ({"trainer__limit_test_batches": 2}, ["litdiffusion.evaluate"]),
        ({"trainer__limit_predict_batches": 2}, ["litdiffusion.sample"]),
        ({"trainer__use_distributed_sampler": True}, ["use_distributed_sampler=True", "use false"]),
        ({"trainer__logger": False}, ["trainer.logger=False: use logger=csv"]),
        ({"trainer__callbacks": []}, ["trainer.callbacks=[]: use +callbacks.NAME._target_"]),
        ({"trainer__plugins": []}, ["trainer.plugins=[]", "trainer.strategy"]),
        ({"trainer__enable_checkpointing": False}, ["callbacks.save_checkpoints"]),
        ({"trainer__enable_progress_bar": False}, ["callbacks.progress"]),
        ({"trainer__enable_autolog_hparams": False}, ["logger=none"]),
        ({"trainer__model_registry": "mine"}, ["trainer.model_registry=mine", "run_dir"]),
        ({"trainer__barebones": True}, ["trainer.barebones=True", "logger=none"]),
        ({"trainer__strategy": "ddp_notebook"}, ["trainer.strategy=ddp_notebook", "use ddp"]),
        (
            {"trainer__devices": 2, "datamodule__num_val": 1},
            ["datamodule.num_val=1: each of 2 processes", "datamodule.num_val=2, or 0"],
        ),
        ({"trainer__devices": 0}, ["trainer.devices=0"]),
        ({"trainer__devices": "many"}, ["trainer.devices='many'", "auto"]),
        ({"datamodule__batch_size": 0}, ["datamodule.batch_size=0"]),
        (
            {"datamodule__batch_size": 10**12},
            [f"datamodule.batch_size={10**12}", "2,920,628 GiB", "use fewer"],
        ),
        ({"batch_size": 10**10}, [f"batch_size={10**10}", "GiB"]),
        ({"num_images": 10**13}, [f"num_images={10**13}", "GiB"]),
        ({"optimizer__lr": float("nan")}, ["optimizer.lr=nan: must be a number"]),
        ({"trainer__gradient_clip_val": float("nan")}, ["trainer.gradient_clip_val=nan: must be a number"]),
        ({"optimizer__betas": [0.9, float("nan")], "copy": "${optimizer}"}, ["optimizer.betas.1=nan"]),
        ({"trainer__accelerator": "tpu"}, ["trainer.accelerator=tpu", "trainer=cpu"]),
        ({"datamodule__batch_size": "big"}, ["datamodule.batch_size: 'big' is not an int"]),
        ({"trainer__precision": "16-mixed"}, ["trainer.precision=16-mixed", "GPU"]),
        ({"trainer__precision": 16}, ["trainer.precision=16", "GPU"]),
        ({"trainer__precision": "bf16-mix"}, ["trainer.precision=bf16-mix", "nearest: bf16-mixed"]),
        ({"trainer__precision": "bf16-true"}, ["trainer.precision=bf16-true", "32-true, 64, 64-true, auto"]),
        ({"trainer__precision": "16-true"}, ["trainer.precision=16-true", "bf16-mixed"]),
        ({"trainer__precision": "transformer-engine"}, ["trainer.precision=transformer-engine"]),
        ({"seed": "abc"}, ["seed=abc", "whole number"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": True}, ["seed=True"]),
        ({"seed": None}, ["seed=null"]),
        ({"seed": 2**63}, [f"seed={2**63}", f"from 0 to {2**63 - 1}"]),
        ({"seed": -(10**20)}, [f"seed=-{10**20}"]),
        ({"data__path": "???"}, ["data.path: needs a value", "data.path=VALUE"]),
        ({"extra": [{"deep": "???"}]}, ["extra.0.deep: needs a value"]),
        ({"a": "${data.image_siz}"}, ["a:", "data.image_siz", "nearest: data.image_size"]),
        ({"a": "${new_run_dirr:}"}, ["a:", "new_run_dirr"]),
    ],
    ids=str,
)
def test_impossible_combinations(changes: dict[str, Any], words: list[str]) -> None:
    """Refused before data is read: by the checks, or by the constructors of what is then built."""
    with pytest.raises(UserError) as caught:
        assemble(config(**changes))
    line = str(caught.value)
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"ema___target_": "litdiffusion.training.ema.EMA"}, "ema=none"),
        ({"trainer__gradient_clip_val": 1.0}, "trainer.gradient_clip_val=null"),
        ({"callbacks": {"sample_images": {"_target_": "builtins.dict"}}}, "callbacks.sample_images=null"),
    ],
)
def test_fsdp_refuses_what_needs_all_the_weights(changes: dict[str, Any], way_out: str) -> None:
    cfg = config(trainer__strategy="fsdp", trainer__accelerator="gpu", **changes)
    with pytest.raises(UserError, match=way_out):
        require_compatible(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu() -> None:
    with pytest.raises(UserError, match=r"trainer\.accelerator=gpu: .* trainer=cpu"):
        validate(config(trainer__accelerator="gpu"))


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert num_devices("auto", "gpu") == num_devices(-1, "gpu") == num_devices(2, "gpu") == 2
    assert num_devices([1], "gpu") == num_devices("1,", "gpu") == num_devices("1", "gpu") == 1
    assert num_devices(OmegaConf.create([0, 1]), "gpu") == 2
    assert num_devices(5, "cpu") == 5  # processes
    with pytest.raises(UserError, match=r"trainer\.devices=4: this machine has 2; use trainer\.devices=2"):
        num_devices(4, "gpu")
    with pytest.raises(UserError, match="0 to 1"):
        num_devices("0,2", "gpu")


def test_precision_follows_the_processor() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "flags" not in flags.read_text():
        pytest.skip("no /proc/cpuinfo of an x86 processor to compare with")
    words = flags.read_text().split()
    expected = "bf16-mixed" if {"avx512_bf16", "amx_bf16"} & set(words) else "32-true"
    assert native_precision("cpu") == expected
    assert native_precision("mps") == "32-true"


def test_what_was_chosen_is_kept() -> None:
    cfg = config(trainer__precision="bf16-mixed")
    resolve_hardware(cfg)
    assert (cfg.trainer.precision, cfg.trainer.accelerator) == ("bf16-mixed", "cpu")


def test_the_same_size_may_be_written_twice() -> None:
    size = {
        "denoiser": {"_target_": "litdiffusion.diffusion.Denoiser", "image_size": [28, 28], "channels": 1}
    }
    require_compatible(config(**size, seed=2**63 - 1, net__out_channels=1))


@pytest.mark.parametrize("name", [None, "meta", "tpu", "cuda:99", "cpu:x", 99, "", "mps:7"])
def test_devices_that_cannot_compute(name: Any) -> None:
    with pytest.raises(UserError, match=r"device=.*: this machine has no such device; use device=auto"):
        torch_device(name)


def test_devices_that_can() -> None:
    assert torch_device("cpu") == torch.device("cpu")
    assert torch_device("auto").type == {"gpu": "cuda"}.get(native_accelerator(), native_accelerator())


def test_epochs_are_no_ones_business_without_training() -> None:
    cfg = config(trainer__max_epochs=6)
    del cfg.optimizer
    require_compatible(cfg)


def test_default_run_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All interpolations of one configuration agree; two configurations differ."""
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "LITDIFFUSION_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)

    def composed() -> DictConfig:
        with initialize_config_dir(str(tree), version_base="1.3"):
            return compose("train", ["+again=${run_dir}", "+samples=${new_run_dir:}/samples"])

    first, second = composed(), composed()
    assert first.run_dir == first.again
    assert first.samples == f"{first.run_dir}/samples"
    assert first.run_dir != second.run_dir

    # A process that Lightning started for another device takes its parent's folder.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert composed().run_dir == second.run_dir

    # torchrun's processes have no parent that chose.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match=r"run_dir.*run_dir=DIR"):
        require_values(composed())
