"""A network and an objective from somebody's own package: trained, continued, opened where the package is trusted."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from commands import Typed, type_command
from litdiffusion import load_model
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.errors import UserError

PACKAGE = '''
import torch
from torch import nn
from litdiffusion.diffusion import Denoising
from litdiffusion.data.sources import Digits

class Plain(nn.Module):
    """Declares nothing: takes images and a clock."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x, t):
        clock = (t / 1000)[:, None, None, None].expand_as(x)
        return self.layers(torch.cat((x, clock), dim=1))

class Doubled(Denoising):
    def losses(self, *args, **kwargs):
        return 2 * super().losses(*args, **kwargs)

class MyDigits(Digits):
    pass
'''
CONFIGS = {
    "net/plain.yaml": "{_target_: ownpackage.parts.Plain, width: 4}",
    "objective/doubled.yaml": """
_target_: ownpackage.parts.Doubled
loss: ${loss}
weighting: ${weighting}
noise_levels: ${noise_levels}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a user works: a package, its configuration, and a run."""
    folder = tmp_path_factory.mktemp("work")
    files = {f"configs/{name}": text for name, text in CONFIGS.items()}
    files |= {"ownpackage/__init__.py": "", "ownpackage/parts.py": PACKAGE}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.startswith("ownpackage")]:
        del sys.modules[name]


def train(folder: Path, *overrides: str, run: str = "run") -> Typed:
    chosen = ["net=plain", "objective=doubled", "data._target_=ownpackage.parts.MyDigits"]
    tiny = ["debug=tiny", "callbacks.sample_images=null", f"run_dir={folder / run}"]
    return type_command("train", "--config-dir", str(folder / "configs"), *tiny, *chosen, *overrides)


@pytest.fixture(scope="module")
def ckpt(folder: Path) -> Path:
    """Trained in two commands: the second continues the first, and needs the key as the first did."""
    for steps in (2, 4):
        typed = train(folder, f"trainer.max_steps={steps}", "trust=ownpackage")
        assert typed.code == 0, typed.err
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 4
    assert typed.out.rstrip().endswith("num_images=64 'trust=[ownpackage]'")
    return folder / "run" / "checkpoints" / "last.ckpt"


REFUSAL = (
    "'ownpackage.parts.Plain' is not allowed in a checkpoint, which may build only what litdiffusion.diffusion,"
    " litdiffusion.nn, torch.nn define; if you trust all code of ownpackage, add trust=[ownpackage]"
)


@pytest.mark.parametrize("run", ["new", "run"])
def test_without_the_key_training_is_refused_before_data_is_read(
    run: str, folder: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageDataModule, "prepare_data", lambda *_: pytest.fail("the data was asked for"))
    typed = train(folder, "trainer.max_steps=6", run=run)
    assert typed.code == 2
    assert typed.err.splitlines()[-1] == f"error: denoiser.inner.net._target_: {REFUSAL}"
    assert not (folder / "new").exists()


def test_load_model_opens_it_where_the_package_is_trusted(ckpt: Path) -> None:
    model = load_model(ckpt, device="cpu", trust=("ownpackage",))
    assert type(model.denoiser.core.net).__module__ == type(model.objective).__module__ == "ownpackage.parts"
    images = model.sample(2, sampler="dpmpp_2m", num_steps=3)
    assert images.shape == (2, 1, 8, 8)
    for trust in ((), ["own"], ["ownpackage.nets"]):
        with pytest.raises(UserError) as caught:
            load_model(ckpt, device="cpu", trust=trust)
        assert "denoiser.inner.net._target_: 'ownpackage.parts.Plain' is not allowed" in str(caught.value)
        assert str(caught.value).endswith("add trust=[ownpackage]")


def test_commands_open_it_where_the_package_is_trusted(ckpt: Path, tmp_path: Path) -> None:
    commands = {
        "sample": ["num_images=2", "sampler=ddim", "sampler.num_steps=2"],
        "evaluate": ["num_held_out=4", "bits_per_dim_images=0"],
    }
    for command, options in commands.items():
        options = [f"ckpt={ckpt}", f"out={tmp_path}", *options]
        typed = type_command(command, *options)
        assert (typed.code, typed.err) == (2, f"error: denoiser.inner.net._target_: {REFUSAL}\n")
        typed = type_command(command, *options, "trust=[ownpackage]")
        assert typed.code == 0, typed.err
    assert {"grid.png", "samples.npz", "metrics.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "target", ["os.mkdir", "ownpackage.parts.torch.hub.load", "ownpackage.parts.nn.Linear"]
)
def test_a_hostile_checkpoint_gains_nothing_from_trust(target: str, ckpt: Path, tmp_path: Path) -> None:
    hostile = torch.load(ckpt, weights_only=True)
    hostile["model_config"]["denoiser"]["inner"]["net"] = {
        "_target_": target,
        "path": str(tmp_path / "was-here"),
    }
    torch.save(hostile, tmp_path / "hostile.ckpt")
    typed = type_command(
        "sample", f"ckpt={tmp_path}/hostile.ckpt", f"out={tmp_path}/out", "trust=[ownpackage]"
    )
    assert typed.code == 2
    assert f"denoiser.inner.net._target_: '{target}' is not allowed in a checkpoint" in typed.err
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.ckpt"]


@pytest.mark.parametrize(
    ("command", "value"), [("train", "null"), ("sample", "[torch.hub]"), ("evaluate", "os")]
)
def test_what_cannot_be_trusted_is_one_line(command: str, value: str, tmp_path: Path) -> None:
    where = (
        [f"run_dir={tmp_path}/run"] if command == "train" else [f"ckpt={tmp_path}/x", f"out={tmp_path}/out"]
    )
    typed = type_command(command, *where, f"trust={value}")
    assert typed.code == 2
    assert typed.err.startswith("error: trust: ")
    assert typed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
