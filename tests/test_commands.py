"""The command line as a whole: what it builds, what it writes, and how it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from commands import run, train_tiny, type_command
from litdiffusion import load_model, train
from litdiffusion.configuration import config_folder
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.nodes import build
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.diffusion import Network
from litdiffusion.errors import UserError
from litdiffusion.nn import DiT
from litdiffusion.reporting.images import to_uint8

CHOICES = [
    ["schedule=linear", "sampler.eta=1", "ema=none", "optimizer=adam", "lr_scheduler=constant"],
    ["schedule=quadratic", "target=x0", "sampler=ddpm", "sampler.num_steps=3", "sampler.variance=beta"],
    ["schedule=sigmoid", "loss=l1", "trainer.accumulate_grad_batches=2", "datamodule.num_val=0"],
    ["schedule=sigmoid_beta", "target=epsilon", "loss=huber", "denoiser.clip=none", "stratified=false"],
    ["schedule=cosine", "schedule.zero_terminal_snr=true", "weighting=min_snr", "data.channels=3"],
    ["net.self_condition=true", "net.dropout=0.1", "net.init_dim=12", "data.image_size=[8,12]"],
    ["net=dit_tiny", "experiment=class_conditional", "sampler=dpmpp_2m", "data.image_size=[6,10]"],
    ["net=dit_tiny", "experiment=learned_variance", "net.self_condition=true", "net.dropout=0.1"],
    [
        "logger=none",
        "callbacks.sample_images=null",
        "callbacks.progress=null",
        "trainer.precision=bf16-mixed",
    ],
    [
        "trainer.precision=64-true",
        "trainer.gradient_clip_val=null",
        "callbacks.sample_images.every_n_steps=2",
    ],
]


@pytest.mark.parametrize("overrides", CHOICES, ids=lambda overrides: ",".join(overrides))
def test_every_choice_trains_and_samples(overrides: list[str], tmp_path: Path) -> None:
    train_tiny(tmp_path, *overrides)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4
    model = load_model(tmp_path / summary["checkpoint"], device="cpu")
    images = model.sample(2)
    assert images.shape == (2, *model.denoiser.image_shape)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.std() > 0


def test_run_folder(trained: Path) -> None:
    expected = {
        *("config.yaml", "overrides.txt", "provenance.json", "metrics.csv", "summary.json", "curves.png"),
        *("data.json", "report.html", ".lock"),
        *("checkpoints/last.ckpt", "samples/grid.png", "samples/denoising.gif", "samples/noised_strip.png"),
        "samples/denoising.npz",
    }
    found = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert found == expected
    summary = json.loads((trained / "summary.json").read_text())
    for name in ("wall_seconds", "images_per_second", "train_loss", "val_loss", "parameters", "images_seen"):
        assert summary[name] > 0, name
    assert summary["images_seen"] == 4 * 16
    assert str(trained.parent) not in (trained / "summary.json").read_text()  # the folder may be moved
    for name in ("checkpoint", "grid", "gif", "curves", "noised_strip"):
        assert (trained / summary[name]).is_file()
    provenance = json.loads((trained / "provenance.json").read_text())
    assert provenance[0]["seed"] == 0
    assert provenance[0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    del provenance[0]["git"]  # its diff is whatever one is working on
    assert "API_KEY" not in json.dumps(provenance)


@pytest.mark.usefixtures("in_float32")
def test_sample_writes_what_load_model_draws(trained: Path, tmp_path: Path) -> None:
    ckpt = trained / "checkpoints" / "last.ckpt"
    overrides = [
        f"ckpt={ckpt}",
        "num_images=5",
        "batch_size=2",
        "sampler=ddim",
        "sampler.num_steps=3",
        "seed=4",
    ]
    run("sample", *overrides, f"out={tmp_path}", "device=cpu")
    with np.load(tmp_path / "samples.npz") as file:
        images = file["images"]
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    drawn = load_model(ckpt, device="cpu").sample(5, sampler="ddim", num_steps=3, seed=4)
    difference = np.abs(images.astype(int) - to_uint8(drawn).permute(0, 2, 3, 1).numpy().astype(int))
    assert difference.max() <= 1  # another batch size: the network's rounding
    report = json.loads((tmp_path / "sample.json").read_text())
    assert report["num_images"] == 5
    assert report["num_steps"] == 3
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == 4
    assert (tmp_path / "grid.png").exists()


def test_raw_and_averaged_weights_differ(trained: Path) -> None:
    ckpt = trained / "checkpoints" / "last.ckpt"
    averaged, raw = (load_model(ckpt, weights=weights, device="cpu") for weights in ("ema", "raw"))
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    assert not torch.equal(averaged.sample(2), raw.sample(2))


def test_evaluate_agrees_with_training(trained: Path, tmp_path: Path) -> None:
    ckpt = trained / "checkpoints" / "last.ckpt"
    run(
        "evaluate",
        f"ckpt={ckpt}",
        f"out={tmp_path}",
        "num_held_out=32",
        "batch_size=5",
        "bits_per_dim_images=0",
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    summary = json.loads((trained / "summary.json").read_text())
    assert metrics["val/loss"] == pytest.approx(summary["val_loss"], rel=1e-4)
    assert metrics["num_held_out"] == 32
    tenths = [metrics[f"val/loss_t{i:02d}"] for i in range(10)]
    assert min(tenths) < metrics["val/loss"] < max(tenths)


def test_last_printed_line_is_the_metrics(trained: Path, tmp_path: Path) -> None:
    measured = ["num_held_out=8", "bits_per_dim_times=2"]
    typed = type_command("evaluate", f"ckpt={trained}/checkpoints/last.ckpt", f"out={tmp_path}", *measured)
    assert typed.code == 0
    assert json.loads(typed.out.splitlines()[-1]) == json.loads((tmp_path / "metrics.json").read_text())


PRESETS = [
    ["experiment=annotated", "schedule=cosine", "loss=huber", "seed=0", "trainer.max_steps=200"],
    *(["experiment=annotated", f"schedule={name}"] for name in ("quadratic", "sigmoid", "sigmoid_beta")),
    *([f"experiment={name}", "ema=none"] for name in ("annotated", "fashion_mnist", "quickstart")),
    *([f"experiment={name}", "sampler=ddpm", "target=x0"] for name in ("fashion_mnist", "quickstart")),
    *(
        ["experiment=quickstart", f"{group}"]
        for group in ("optimizer=adam", "lr_scheduler=constant", "data=digits")
    ),
    *([f"experiment={name}", "net=dit"] for name in ("annotated", "cifar10", "class_conditional")),
    ["net=dit", "debug=tiny"],
]


@pytest.mark.parametrize("overrides", PRESETS, ids=lambda overrides: ",".join(overrides))
def test_every_preset_takes_every_choice(overrides: list[str], tmp_path: Path) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", [*overrides, f"run_dir={tmp_path}", "trainer=cpu"])
    validate(cfg, train.SUPPLIED)
    if "experiment=annotated" in overrides:
        assert cfg.schedule.num_steps == 300
        assert cfg.schedule.get("rescale", False) is False
    module = build(cfg.module, "module")
    assert isinstance(module.denoiser.core.net, Network)
    assert isinstance(module.denoiser.core.net, DiT) == ("net=dit" in overrides)


def test_every_network_of_the_configuration_takes_what_presets_may_set() -> None:
    contract = {"channels", "self_condition", "num_classes", "learned_variance"}
    for name in choices("net"):
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = compose("train", [f"net={name}", "run_dir=x"])
        assert contract <= set(cfg.net), name
        assert cfg.net.channels == cfg.data.channels
    for path in [
        *(config_folder() / "experiment").glob("*.yaml"),
        *(config_folder() / "debug").glob("*.yaml"),
    ]:
        assert set(OmegaConf.load(path).get("net", {})) <= contract, path


# One of each kind, through the whole command; tests/configuration has the rest.
REFUSED = {
    "too many devices": (["trainer=gpu", "trainer.devices=99"], ["trainer."]),
    "a missing folder": (["data=image_folder", "data.path=/nonexistent"], ["/nonexistent"]),
    "a folder not given": (["data=image_folder"], ["data.path"]),
    "a bad value": (["loss=huber", "loss.delta=-1"], ["delta"]),
    "a bad clip": (["denoiser.clip=hard"], ["clip", "hard"]),
    "a missing checkpoint": (["resume=/nonexistent.ckpt"], ["/nonexistent.ckpt"]),
    "nothing to resume": (["resume=must"], ["resume=must"]),
    "validation never": (["trainer.val_check_interval=0"], ["trainer.val_check_interval=0"]),
    "no batch to accumulate": (["trainer.accumulate_grad_batches=0"], ["accumulate_grad_batches=0"]),
    "a logger nobody chose": (["+logger.wandb.project=x"], ["logger.wandb", "logger=wandb"]),
    "a callback that is none": (["+callbacks.foo.bar=1"], ["callbacks.foo", "_target_"]),
    "a number for a callback": (["callbacks.monitor=5"], ["callbacks.monitor"]),
    "a switch for resume": (["resume=true"], ["resume=True", "auto, must, never"]),
    "no word for resume": (["resume=null"], ["resume=", "auto, must, never"]),
    "another word for resume": (["resume=yes"], ["resume=yes", "auto, must or never"]),
    "an empty folder name": (["data=image_folder", "data.path="], ["data.path"]),
    "two losses": (["loss=[l1,l2]"], ["loss=[l1,l2]", "-m loss=l1,l2"]),
    "clipping to less than nothing": (["trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1"]),
    "another root": (["trainer.default_root_dir=/nowhere"], ["default_root_dir", "run_dir"]),
    "a width of nothing": (["net.init_dim=0"], ["error: net.init_dim=0"]),
    "a word for a seed": (["seed=abc"], ["error: seed: 'abc'"]),
    "a float for steps": (["trainer.max_steps=1e3"], ["error: trainer.max_steps: 1000.0"]),
    "epochs": (
        ["trainer.max_epochs=3"],
        ["trainer.max_epochs: a run's length is counted in steps"],
    ),
    "a number for a switch": (["schedule=linear", "rescale_betas=3"], ["error: rescale_betas: 3"]),
    "a sampler's range, which callbacks take too": (
        ["debug=tiny", "sampler.eta=2"],
        ["error: sampler.eta=2"],
    ),
    "an optimizer's range": (["debug=tiny", "optimizer.betas=[0.9,1.5]"], ["error: optimizer: ", "1.5"]),
    "a learning-rate schedule's range": (
        ["debug=tiny", "lr_scheduler.final_factor=2"],
        ["error: lr_scheduler: ", "final_factor=2"],
    ),
    "importance of another T": (
        ["noise_levels=importance", "noise_levels.bins=1001"],
        ["noise_levels.bins=1001", "1000 steps"],
    ),
    "a part from elsewhere": (
        ["target._target_=small_worlds.Mine"],
        ["small_worlds.Mine", "is not allowed in a checkpoint"],
    ),
    "an infinite learning rate": (
        ["debug=tiny", "optimizer.lr=inf"],
        ["optimizer.lr=inf: must be a finite number"],
    ),
    "a goal without a search": (
        ["debug=tiny", "optimized_metric=val_los"],
        ["error: optimized_metric=val_los: no number of summary.json; nearest: val_loss"],
    ),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(
    overrides: list[str], words: list[str], tmp_path: Path
) -> None:
    typed = type_command("train", f"run_dir={tmp_path / 'run'}", *overrides)
    assert typed.code == 2, typed.err
    errors = [line for line in typed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, typed.err
    assert "Traceback" not in typed.err
    for word in words:
        assert word in errors[0]
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_an_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    typed = type_command("train", "debug=tiny", f"run_dir={tmp_path / 'file' / 'run'}")
    assert typed.code == 2
    assert f"run_dir={tmp_path / 'file' / 'run'} cannot be written" in typed.err


def test_a_folder_of_another_configuration(trained: Path) -> None:
    before = (trained / "config.yaml").read_bytes()
    typed = type_command(
        "train", "debug=tiny", "trainer.max_steps=4", f"run_dir={trained}", "schedule=linear"
    )
    assert typed.code == 2
    assert "belongs to another configuration" in typed.err
    assert "schedule" in typed.err
    assert (trained / "config.yaml").read_bytes() == before
    typed = type_command("train", "debug=tiny", "trainer.max_steps=4", f"run_dir={trained}", "resume=never")
    assert typed.code == 2
    assert "resume=never" in typed.err


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.csv"])
def test_a_folder_of_somebody_elses_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    files = {name: "my: own\n", ".notes-abcdefgh.json": "{}"}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    typed = type_command("train", "debug=tiny", f"run_dir={tmp_path}")
    assert typed.code == 2
    assert f"run_dir {tmp_path}" in typed.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != ".lock"} == files


def test_an_empty_run_folder_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = type_command("train", "debug=tiny", "run_dir=")
    assert typed.code == 2
    assert "run_dir" in typed.err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_value_does_not_spoil_the_folder(tmp_path: Path) -> None:
    brief = ("trainer.max_steps=1", "callbacks.sample_images=null", "datamodule.num_val=0")
    run_dir = f"run_dir={tmp_path}"
    assert type_command("train", "debug=tiny", run_dir, "optimizer.lr=-1").code == 2
    train_tiny(tmp_path, *brief)


def test_a_folder_in_use_is_not_overwritten_from_elsewhere(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    resume = f"resume={trained}/checkpoints/last.ckpt"
    typed = type_command(
        "train", "debug=tiny", "trainer.max_steps=6", f"run_dir={tmp_path}", "seed=2", resume
    )
    assert typed.code == 2
    assert "belongs to another configuration" in typed.err
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before


OUT_OF_RANGE = {
    "ema": ["ema.decay=2"],
    "schedule": ["schedule=linear", "schedule.beta_end=2"],
    "net": ["net.dropout=2"],
    "net.groups": ["net.groups=5"],
    "data.image_size": ["net.dim_mults=[1,2,4,8,16]"],
    "data.channels": ["data.channels=2"],
    "optimizer": ["optimizer.lr=-1"],
    "lr_scheduler": ["lr_scheduler.warmup_steps=-5"],
    "callbacks.monitor": ["callbacks.monitor.every_n_steps=0"],
    "datamodule": ["datamodule.num_workers=-1"],
    "run_dir": [f"run_dir={__file__}/run"],
    "net.channels": ["net.channels=3"],
    "net.out_channels": ["+net.out_channels=3"],
    "image_size=8x8": ["net=dit", "net.patch_size=3"],
    "logger.wandb": ["logger=wandb", "logger.wandb.mode=online"],
}


@pytest.mark.parametrize(("word", "overrides"), OUT_OF_RANGE.items(), ids=OUT_OF_RANGE)
def test_what_cannot_be_is_refused_before_data_is_fetched_or_read(
    word: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(*args: object) -> None:
        pytest.fail("the data was asked for")

    for name in ("prepare_data", "setup"):
        monkeypatch.setattr(ImageDataModule, name, untouched)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    typed = type_command("train", "debug=tiny", f"run_dir={tmp_path / 'run'}", *overrides)
    assert typed.code == 2, typed.err
    (line,) = (line for line in typed.err.splitlines() if line.startswith("error: "))
    assert word in line
    assert not (tmp_path / "run").exists()


def test_the_first_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    still = ["optimizer.lr=0", "callbacks.sample_images=null", "datamodule.num_val=0", "seed=3"]
    torch.manual_seed(99)
    train_tiny(tmp_path, "trainer.max_steps=1", *still)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", ["debug=tiny", "seed=3"])
    torch.manual_seed(3)
    expected = build(cfg.module, "module").state_dict()
    found = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)


def test_without_validation_nothing_warns(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    train_tiny(tmp_path, "datamodule.num_val=0", "callbacks.sample_images=null")
    assert [str(warning.message) for warning in recwarn if "zero" in str(warning.message)] == []
    assert json.loads((tmp_path / "summary.json").read_text())["val_loss"] is None
    # All images are trained on, so there are none to measure this checkpoint on.
    ckpt = f"ckpt={tmp_path / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(UserError, match=r"no images of digits were held out .*num_val=0\): .*give data="):
        run("evaluate", ckpt, f"out={tmp_path / 'out'}", "device=cpu")


def test_several_experiments_have_one_name() -> None:
    typed = type_command("train", "experiment=[fashion_mnist,quickstart]", "--cfg", "job", "--resolve")
    assert typed.code == 0, typed.err
    assert "run_dir: logs/fashion_mnist+quickstart/" in typed.out


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def test_the_sweep_over_schedules_and_losses_takes_all_there_are() -> None:
    params = OmegaConf.load(config_folder() / "sweep" / "schedules_and_losses.yaml").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{name}={params[name]}" for name in params])
    swept = {
        override.key_or_group: override.value().filter(choices(override.key_or_group))
        for override in overrides
    }
    assert swept == {name: choices(name) for name in ("schedule", "loss")}
    assert {"linear", "quadratic", "cosine", "sigmoid", "sigmoid_beta"} <= set(swept["schedule"])


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("weights=EMA", "weights=EMA"),
        ("frames=1", "frames=1"),
        ("num_images=null", "num_images"),
        ("num_images=0", "num_images=0: must be a whole number, at least 1"),
        ("device=tpu9", "device"),
        ("labels=3", "labels=3: this network was trained without classes"),
        ("guidance_scale=2", "guidance_scale=2: this network was trained without classes"),
        ("device=null", "device=null"),
        ("device=meta", "device=meta"),
        ("seed=-1", "seed=-1"),
        ("seed=99999999999999999999", "seed=99999999999999999999"),
        ("sampler.num_steps=3", "for example: sampler=ddim sampler.num_steps=3"),
        ("sampler.eta=1", "for example: sampler=ddim sampler.eta=1"),
        ("+sampler.variance=beta", "sampler.variance: an argument of which sampler?"),
        ("sampler.etta=1", "sampler.etta: no such key"),
    ],
)
def test_sample_refuses_in_one_line(override: str, word: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("mine")
    typed = type_command("sample", f"ckpt={trained}/checkpoints/last.ckpt", f"out={tmp_path}", override)
    assert typed.code == 2, typed.err
    assert word in typed.err
    assert (tmp_path / "probe").read_text() == "mine"


def test_this_machines_own_settings_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README words it: a data folder, a W&B project."""
    configs = tmp_path / "configs"
    shutil.copytree(config_folder(), configs)
    (configs / "local" / "default.yaml").write_text("paths:\n  data: /mine\nproject: my-project\n")
    with initialize_config_dir(str(configs), version_base="1.3"):
        cfg = compose("train", ["logger=wandb", "run_dir=x"])
        plain = compose("train", ["run_dir=x", "project=typed"])
    assert (cfg.paths.data, cfg.data.path) == ("/mine", "/mine/fashion-mnist")
    assert cfg.logger.wandb.project == "my-project"
    assert (plain.project, plain.paths.data) == ("typed", "/mine")
