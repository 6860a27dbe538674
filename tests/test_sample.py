"""What ``sample`` offers beyond ckpt images: classes, guidance and edits, typed as a user types them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from commands import run, train_tiny, type_command
from litdiffusion import load_model
from litdiffusion.configuration import config_folder
from litdiffusion.data.pictures import read_image, read_mask
from litdiffusion.diffusion import DDIM, DDPM, DPMSolverPP2M, Heun
from litdiffusion.errors import UserError
from litdiffusion.inference import TrainedModel
from litdiffusion.reporting.images import to_uint8
from small_worlds import images

SHAPE = (1, 8, 8)
FEW = ["num_images=3", "sampler=ddim", "sampler.num_steps=5", "batch_size=2", "device=cpu"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a class-conditional network, hardly trained."""
    brief = ["trainer.max_steps=1", "callbacks.sample_images=null", "metrics.bits_per_dim=null"]
    run_dir = train_tiny(tmp_path_factory.mktemp("runs") / "run", "net.num_classes=10", *brief)
    return run_dir / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def weaker(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that might guide: one of the same kind with other weights, and ones of other kinds."""
    folder = tmp_path_factory.mktemp("weaker")
    checkpoint = torch.load(ckpt, weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if name.startswith(("ema_net.", "denoiser.inner.net.")) and value.is_floating_point():
            checkpoint["state_dict"][name] = value + 0.05
    torch.save(checkpoint, folder / "same.ckpt")
    checkpoint["model_config"]["denoiser"]["inner"]["schedule"]["num_steps"] = 77
    torch.save(checkpoint, folder / "schedule.ckpt")
    checkpoint["model_config"]["denoiser"]["inner"]["schedule"]["num_steps"] = 1000
    checkpoint["model_config"]["denoiser"]["inner"]["image_size"] = 16
    torch.save(checkpoint, folder / "size.ckpt")
    return {name: folder / f"{name}.ckpt" for name in ("same", "schedule", "size")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("cat", "dog")):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    Image.fromarray((np.arange(64).reshape(8, 8) % 8 >= 4).astype(np.uint8) * 255).save(folder / "mask.png")
    (folder / "text.png").write_text("no picture")
    return folder


def sampled(ckpt: Path, out: Path, *overrides: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The images in uint8 [N, H, W, C], and sample.json."""
    run("sample", f"ckpt={ckpt}", f"out={out}", *FEW, *overrides)
    with np.load(out / "samples.npz") as file:
        images = file["images"]
    with Image.open(out / "denoising.gif") as gif, Image.open(out / "grid.png") as grid:
        assert gif.size
        assert grid.size
    return images, json.loads((out / "sample.json").read_text())


def shown(images: torch.Tensor) -> np.ndarray:
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def test_weights_that_are_no_numbers_draw_no_pictures(ckpt, tmp_path):
    checkpoint = torch.load(ckpt, weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if value.is_floating_point():
            checkpoint["state_dict"][name] = torch.full_like(value, torch.nan)
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    typed = type_command("sample", f"ckpt={tmp_path / 'nan.ckpt'}", f"out={tmp_path / 'out'}", *FEW)
    assert typed.code == 2
    assert "nan.ckpt: the images came out infinite or NaN" in typed.err
    assert "Traceback" not in typed.err
    assert not list((tmp_path / "out").iterdir())


def test_a_part_of_an_image_is_drawn_anew(ckpt, pictures, tmp_path):
    image, mask = pictures / "cat.png", pictures / "mask.png"
    drawn, report = sampled(ckpt, tmp_path, "edit=inpaint", f"image={image}", f"mask={mask}", "repeats=2")
    given = shown(read_image("image", image, SHAPE)[None])[0]
    assert drawn.shape == (3, 8, 8, 1)
    assert np.array_equal(drawn[:, :, :4], np.stack([given[:, :4]] * 3))
    assert len(np.unique(drawn[:, :, 4:], axis=0)) == 3
    expected = {"edit": "inpaint", "image": str(image), "mask": str(mask), "repeats": 2, "num_steps": 5}
    assert report.items() >= expected.items()
    assert "strength" not in report


def test_an_image_is_varied(ckpt, pictures, tmp_path):
    image = pictures / "cat.png"
    drawn, report = sampled(ckpt, tmp_path, "edit=variation", f"image={image}", "strength=0.4")
    assert len(np.unique(drawn, axis=0)) == 3
    model = load_model(ckpt, device="cpu")
    start = DDIM(5).times(model.denoiser.schedule)[3]
    for key, value in {"edit": "variation", "strength": 0.4, "num_steps": 2, "start": start}.items():
        assert report[key] == value
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == 3
    given = read_image("image", image, SHAPE)
    expected = model.vary(given, 0.4, num_images=3, sampler="ddim", num_steps=5)
    assert np.abs(drawn.astype(int) - shown(expected).astype(int)).max() <= 1
    known = json.loads((ckpt.parents[1] / "data.json").read_text())
    assert (
        model.class_names
        == tuple("0123456789")
        == tuple(report["class_names"])
        == tuple(known["class_names"])
    )
    # An edit is of no class in particular, unless one is named.
    assert report["labels"] is None
    firmly = model.vary(given, 0.4, 3, labels=7, guidance_scale=40, sampler="ddim", num_steps=5)
    assert not torch.allclose(firmly, expected, atol=0.01)
    weaker = model.vary(given, 0.2, num_images=3, sampler="ddim", num_steps=5)
    assert (weaker - given).abs().mean() < (expected - given).abs().mean()


def test_several_images_are_varied_in_turn(ckpt, pictures, tmp_path):
    images = f"image=[{pictures}/cat.png,{pictures}/dog.png]"
    drawn, report = sampled(
        ckpt, tmp_path, "edit=variation", images, "strength=0.2", "num_images=4", "labels=7"
    )
    given = [shown(read_image("image", pictures / f"{name}.png", SHAPE)[None])[0] for name in ("cat", "dog")]
    distances = np.abs(drawn[:, None].astype(int) - np.stack(given).astype(int)).mean((2, 3, 4))
    assert distances.argmin(1).tolist() == [0, 1, 0, 1]
    assert report["labels"] == [7]
    assert report["image"] == [f"{pictures}/cat.png", f"{pictures}/dog.png"]


@pytest.mark.parametrize(
    ("edit", "options"),
    [
        ("interpolate", ["strength=0.01", "sampler.num_steps=100"]),
        ("slerp", ["edit.iterations=1", "sampler.num_steps=4"]),
    ],
    ids=["interpolate", "slerp"],
)
def test_a_path_leads_from_one_image_to_another(edit, options, ckpt, pictures, tmp_path):
    ends = [pictures / "cat.png", pictures / "dog.png"]
    named = [f"edit={edit}", f"image={ends[0]}", f"image2={ends[1]}"]
    drawn, report = sampled(ckpt, tmp_path, *named, *options)
    given = [shown(read_image("image", end, SHAPE)[None])[0].astype(int) for end in ends]
    apart = np.abs(given[0] - given[1]).mean()
    assert np.abs(drawn[0] - given[0]).mean() < apart / 3
    assert np.abs(drawn[2] - given[1]).mean() < apart / 3
    assert report.items() >= {"edit": edit, "image2": str(ends[1])}.items()


@pytest.mark.usefixtures("in_float32")
def test_classes_are_drawn_in_turn_or_as_named(ckpt, tmp_path):
    model = load_model(ckpt, device="cpu")

    def differ(drawn: np.ndarray, **asked: Any) -> int:
        again = shown(model.sample(3, sampler="ddim", num_steps=2, **asked))
        return int(np.abs(drawn.astype(int) - again.astype(int)).max())

    drawn, report = sampled(ckpt, tmp_path, "sampler.num_steps=2")
    assert report["labels"] == list(range(10))
    assert differ(drawn, labels=[0, 1, 2]) <= 1
    firmly = {"labels": 1, "guidance_scale": 40, "guidance_interval": [0.2, 1]}
    typed = ["labels=1", "guidance_scale=40", "guidance_interval=[0.2,1]", "sampler.num_steps=2"]
    drawn, report = sampled(ckpt, tmp_path, *typed)
    assert report.items() >= {**firmly, "labels": [1]}.items()
    assert differ(drawn, **firmly) <= 1
    assert differ(drawn, labels=1) > 1


@pytest.mark.usefixtures("in_float32")
def test_an_earlier_checkpoint_guides(ckpt, weaker, tmp_path):
    typed = ["labels=1", f"guide_ckpt={weaker['same']}", "guidance_scale=2"]
    drawn, report = sampled(ckpt, tmp_path / "guided", *typed)
    assert report.items() >= {"guide_ckpt": str(weaker["same"]), "guidance_scale": 2}.items()
    model, guide = (load_model(path, device="cpu") for path in (ckpt, weaker["same"]))
    asked = {"sampler": "ddim", "num_steps": 5, "labels": 1}
    expected = shown(model.sample(3, guidance_scale=2, guide=guide, **asked))
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1
    for other in ({}, {"guidance_scale": 2}):  # neither plain, nor guided by the model itself without a class
        assert np.abs(drawn.astype(int) - shown(model.sample(3, **asked, **other)).astype(int)).max() > 1
    # A class is not needed: the guide is another model.
    assert sampled(ckpt, tmp_path / "any", "labels=null", *typed[1:])[1]["labels"] is None


@pytest.mark.parametrize(
    ("sampler", "spacing"), [("dpmpp_2m", "quadratic"), ("heun", "log_snr"), ("heun", "karras")]
)
def test_further_samplers_and_spacings_go_by_their_names(sampler, spacing, ckpt, tmp_path):
    overrides = [f"sampler={sampler}", "sampler.num_steps=3", f"sampler.spacing={spacing}", "num_images=1"]
    run("sample", f"ckpt={ckpt}", f"out={tmp_path}", "device=cpu", *overrides)
    assert json.loads((tmp_path / "sample.json").read_text())["num_steps"] == 3


def test_results_lie_in_the_run_folder_and_replace_nothing_without_a_word(ckpt):
    run_dir = ckpt.parents[1]
    words = [type_command("sample", f"ckpt={ckpt}", *FEW).out.count("they are replaced") for _ in range(2)]
    assert words == [0, 1]
    assert (run_dir / "sampled" / "sample.json").exists()
    mine = run_dir / "samples" / "grid.png"
    mine.write_text("of the run")
    typed = type_command("sample", f"ckpt={ckpt}", f"out={mine.parent}", *FEW)
    line = f"error: out={mine.parent} holds a grid.png that is not of this command: choose another folder\n"
    assert (typed.code, typed.err) == (2, line)
    assert [path.name for path in mine.parent.iterdir()] == ["grid.png"]
    assert mine.read_text() == "of the run"


@pytest.mark.parametrize(
    ("ckpt", "out"), [("a/checkpoints/last.ckpt", "a/evaluated"), ("b/c.ckpt", "b/evaluated")]
)
def test_measurements_lie_beside_the_checkpoint(ckpt, out):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        assert compose("evaluate", [f"ckpt={ckpt}"]).out == str(Path(out).absolute())


EQUAL: list[dict[str, Any]] = [
    {"seed": np.int64(3), "num_images": np.uint8(2), "batch_size": np.int32(1)},
    {"seed": torch.tensor(3), "num_images": torch.tensor(2), "batch_size": torch.tensor(1)},
    {"num_steps": np.int64(3), "eta": np.float32(0.3)},
    {"sampler": "heun", "churn": torch.tensor(2.0), "churn_interval": np.array([0.1, 50.0])},
    {
        "labels": np.array([3, 1]),
        "guidance_scale": np.float32(2.5),
        "guidance_interval": np.array([0.2, 1.0]),
    },
    {
        "labels": np.int64(3),
        "guidance_scale": torch.tensor(2.5),
        "guidance_interval": torch.tensor([0.25, 1]),
    },
    {
        "labels": [torch.tensor(3), np.int64(1)],
        "guidance_scale": 2.5,
        "guidance_interval": (torch.tensor(0.25), np.float32(1)),
    },
]
IMAGE, MASK = images(2, size=8), torch.ones(8, 8)
MISTYPED: dict[str, tuple[dict[str, Any], str]] = {
    "a fraction": ({"seed": 3.5}, "seed=3.5: must be a whole number"),
    "a float": ({"seed": 3.0}, "seed=3.0: must be a whole number"),
    "no number": ({"seed": float("nan")}, "seed=nan: must be a whole number"),
    "a text": ({"seed": "3"}, "seed=3: must be a whole number"),
    "a bool": ({"seed": True}, "seed=True: must be a whole number"),
    "nothing": ({"seed": None}, "seed=null: must be a whole number"),
    "a negative seed": ({"seed": -1}, "seed=-1: must be a whole number, from 0"),
    "a huge seed": ({"seed": 2**63}, f"seed={2**63}: must be a whole number, from 0 to {2**63 - 1}"),
    "no image": ({"num_images": 0}, "num_images=0: must be a whole number, at least 1"),
    "half an image": ({"num_images": 1.5}, "num_images=1.5: must be a whole number, at least 1"),
    "no batch": ({"batch_size": 0}, "batch_size=0: must be a whole number, at least 1"),
    "steps in words": ({"sampler": "ddim", "num_steps": "5"}, "sampler.num_steps: '5' is not an int"),
    "no steps": ({"sampler": "ddim", "num_steps": 0}, "sampler.num_steps=0: a sampler needs"),
    "true steps": ({"sampler": "ddim", "num_steps": True}, "sampler.num_steps: True is not an int"),
    "an object": ({"sampler": "ddim", "eta": object()}, "sampler.eta: "),
    "labels as floats": ({"labels": np.array([1.0])}, "labels=[1.0]: give all"),
    "an edit by name": ({"edit": "inpaint"}, "edit=inpaint: must be an Edit"),
    "gray levels": (
        {"images": IMAGE.byte(), "masks": MASK},
        "images: must be floats in [-1, 1], not uint8 from 0",
    ),
    "beyond white": (
        {"images": 255 * IMAGE, "masks": MASK},
        "images: must be floats in [-1, 1], not float32 from -",
    ),
    "a path": (
        {"images": "cat.png", "masks": MASK},
        "images: must be a tensor or an array of numbers, not a str",
    ),
    "a mask of gray": ({"images": IMAGE, "masks": MASK / 2}, "masks: must hold true or 1"),
    "masks for others": ({"images": IMAGE, "masks": MASK.expand(3, 8, 8)}, "mask: 3 masks for 2 images"),
}


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


STATES = [float64_by_default, lambda: torch.device("meta"), torch.inference_mode, torch.no_grad]


class TestTrainedModel:
    """Editing in Python."""

    @pytest.fixture
    def model(self, ckpt: Path) -> TrainedModel:
        return load_model(ckpt, device="cpu")

    def test_inpaint_draws_one_for_each_image(self, model, pictures):
        given = torch.stack([read_image("image", pictures / f"{name}.png", SHAPE) for name in ("cat", "dog")])
        mask = read_mask("mask", pictures / "mask.png", pictures / "cat.png", SHAPE)
        drawn = model.inpaint(given, mask, repeats=2, sampler="ddpm", num_steps=4, seed=3)
        assert drawn.shape == given.shape
        assert torch.equal(drawn[..., :4], given[..., :4])
        assert not torch.equal(drawn[..., 4:], given[..., 4:])
        more = model.inpaint(given, mask, 4, repeats=2, sampler="ddpm", num_steps=4, seed=3, batch_size=3)
        assert torch.allclose(more[:2], drawn, atol=1e-4)

    def test_interpolate_by_noise_or_by_inversion(self, model, pictures):
        cat, dog = (read_image("image", pictures / f"{name}.png", SHAPE) for name in ("cat", "dog"))
        paths = [
            model.interpolate(cat, dog, 3, strength, sampler="ddim", num_steps=3) for strength in (0.3, None)
        ]
        assert paths[0].shape == (3, 1, 8, 8)
        assert not torch.allclose(*paths)
        assert (paths[1][0] - cat).abs().mean() < (paths[1][0] - dog).abs().mean()

    @pytest.mark.parametrize("asked", EQUAL)
    def test_equal_values_draw_equal_images_whatever_their_types(self, model, asked):
        plain = {name: np.asarray(value).tolist() for name, value in asked.items()}
        few = {"num_images": 2, "sampler": "ddim", "num_steps": 3}
        assert torch.equal(model.sample(**few | asked), model.sample(**few | plain))

    @pytest.mark.parametrize("given", [np.asarray, torch.Tensor.double, lambda x: x.mT.contiguous().mT])
    def test_equal_images_and_masks_are_edited_alike(self, model, given):
        image, mask = images(2, size=8), torch.ones(8, 8, dtype=torch.bool).tril()
        few = {"sampler": "ddim", "num_steps": 3}
        filled = model.inpaint(image, mask, repeats=2, **few)
        assert torch.equal(model.inpaint(given(image), given(mask), repeats=np.int64(2), **few), filled)
        # Between two of the sampler's times: of less precision, 0.5 would be nearer to the other.
        varied = model.vary(image, 0.5, **few)
        assert torch.equal(model.vary(given(image), np.float32(0.5), **few), varied)

    @pytest.mark.parametrize(("asked", "words"), MISTYPED.values(), ids=MISTYPED)
    def test_what_is_not_of_the_type_is_one_line(self, model, asked, words, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
        call = model.inpaint if "images" in asked else model.sample
        with pytest.raises(UserError) as caught:
            call(**{"num_images": 2} | asked)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("state", STATES)
    def test_no_setting_of_torch_changes_the_images(self, model, ckpt, state):
        def drawn(model: TrainedModel) -> Iterator[torch.Tensor]:
            few = {"labels": [1, 2], "guidance_scale": 2.5, "num_steps": 3}
            yield from (model.sample(2, sampler, **few) for sampler in ("ddpm", "heun", "dpmpp_2m"))
            for strength in (0.5, None):
                yield model.interpolate(pair[0], pair[1], 3, strength, sampler="ddim", **few)

        pair = images(2, size=8)
        expected = list(drawn(model))
        with state():
            here = list(drawn(load_model(ckpt, device="cpu")))
        assert all(map(torch.equal, here, expected))
        assert {(each.dtype, each.device.type) for each in here} == {(torch.float32, "cpu")}

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "heun"])
    def test_samplers_go_by_the_names_of_their_files(self, model, sampler):
        drawn = model.sample(2, sampler, num_steps=2, spacing="quadratic", labels=3, seed=1)
        kind = {"ddpm": DDPM, "ddim": DDIM, "dpmpp_2m": DPMSolverPP2M, "heun": Heun}[sampler]
        assert torch.equal(drawn, model.sample(2, kind(2, spacing="quadratic"), labels=3, seed=1))

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"sampler": "heum"}, "there is no sampler 'heum'; nearest: heun"),
            ({"sampler": "../sampler/ddim"}, "there is no sampler"),
            ({"sampler": "ddim", "eta": 2}, "eta=2"),
            ({"sampler": "ddim", "etaa": 1}, "etaa"),
            ({"sampler": "ddim", "num_steps": 1001}, "num_steps=1001"),
            ({"num_steps": 5}, "num_steps: give a sampler by name"),
            ({"sampler": DDIM(2), "eta": 1.0}, "eta: give a sampler by name"),
            ({"labels": [10]}, r"labels=\[10\]"),
            ({"labels": None, "guidance_scale": 2.0}, "guidance_scale=2.0"),
        ],
    )
    def test_what_cannot_be_drawn_is_the_users_to_mend(self, model, asked, words):
        with pytest.raises(UserError, match=words):
            model.sample(2, **asked)


ON_WINDOWS = """
import os, runpy, signal, sys
import datasets, lightning, matplotlib.figure, torch, wandb  # what others do without is not the matter here

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "grp", "posix", "pwd", "resource", "termios"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for module, names in {
    os: "fork getuid killpg pread pwrite register_at_fork sched_getaffinity setsid sysconf O_NOFOLLOW O_CLOEXEC",
    signal: "SIGALRM SIGHUP SIGKILL SIGUSR1 SIGUSR2 alarm pthread_sigmask setitimer",
}.items():
    for name in names.split():
        delattr(module, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)

from litdiffusion import load_model
assert "litdiffusion.configuration.entry" not in sys.modules
print(tuple(load_model(sys.argv[1], device="cpu").sample(2, sampler="ddim", num_steps=2).shape))
for command, *overrides in (
    ("sample", f"ckpt={sys.argv[1]}", f"out={sys.argv[2]}", "num_images=1", "sampler.num_steps=2", "sampler=ddim"),
    ("evaluate", f"ckpt={sys.argv[1]}", f"out={sys.argv[2]}", "num_held_out=2", "bits_per_dim_images=0"),
    ("train", "debug=tiny"),
):
    sys.modules.pop("litdiffusion.system.startup", None)  # it looks at the command that is typed
    words, sys.argv = sys.argv, [command, *overrides]
    runpy.run_module(f"litdiffusion.{command}", run_name="__main__", alter_sys=True)
    sys.argv = words
"""


def test_models_sample_where_unix_is_not_and_training_says_what_it_needs(ckpt, tmp_path):
    typed = [sys.executable, "-c", ON_WINDOWS, str(ckpt), str(tmp_path)]
    run = subprocess.run(typed, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert run.stdout.startswith("(2, 1, 8, 8)\nDrew 1 images")
    assert json.loads(run.stdout.splitlines()[-1])["num_held_out"] == 2
    assert run.stderr.splitlines()[-1] == (
        "error: training runs on Linux and macOS (on Windows, in WSL); load_model, sample and evaluate run anywhere"
    )


REFUSED = {
    "no image": (["edit=inpaint", "image=null", "mask=MASK"], ["image: needs a value"]),
    "an image that is not there": (["edit=variation", "image=/nonexistent.png"], ["image=/nonexistent.png"]),
    "an unreadable mask": (["edit=inpaint", "image=CAT", "mask=TEXT"], ["mask=", "text.png"]),
    "too long a way back": (
        ["edit=interpolate", "image=CAT", "image2=CAT", "strength=1.5"],
        ["strength=1.5"],
    ),
    "too few steps for it": (
        ["edit=variation", "image=CAT", "strength=0.1", "sampler=ddim", "sampler.num_steps=1"],
        ["strength=0.1", "take more steps"],
    ),
    "an image without an edit": (["image=CAT"], ["image=", "edit=inpaint"]),
    "a mask for a variation": (["edit=variation", "image=CAT", "mask=MASK"], ["mask="]),
    "a word for a scale": (["guidance_scale=big"], ["guidance_scale=big"]),
    "a number for an interval": (["guidance_interval=0.5"], ["guidance_interval=0.5"]),
    "a label out of range": (["labels=10"], ["labels=10", "0..9"]),
    "a guide of another schedule": (
        ["guide_ckpt=SCHEDULE", "guidance_scale=2"],
        ["guide_ckpt", "same", "schedule"],
    ),
    "a guide of another size": (["guide_ckpt=SIZE", "guidance_scale=2"], ["guide_ckpt", "same image size"]),
    "a guide without a scale": (["guide_ckpt=SAME"], ["guidance_scale=1", "guide"]),
    "a guide that is not there": (["guide_ckpt=/none.ckpt", "guidance_scale=2"], ["/none.ckpt"]),
    "guidance towards nothing": (["labels=null", "guidance_scale=2"], ["guidance_scale=2", "labels"]),
}


@pytest.mark.parametrize(("overrides", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_before_anything_is_drawn(overrides, words, ckpt, weaker, pictures, tmp_path):
    names = {name.upper(): pictures / f"{name}.png" for name in ("cat", "mask", "text")}
    names |= {name.upper(): path for name, path in weaker.items()}
    for short, path in names.items():
        overrides = [override.replace(f"={short}", f"={path}") for override in overrides]
    typed = type_command("sample", f"ckpt={ckpt}", f"out={tmp_path / 'out'}", *overrides)
    assert typed.code == 2, typed.err
    assert typed.err.startswith("error: "), typed.err
    assert len(typed.err.splitlines()) == 1, typed.err
    for word in words:
        assert word in typed.err
    assert not (tmp_path / "out").exists()
