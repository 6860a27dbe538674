"""Checkpoints: whole or not there, opened without running anything."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import train_tiny, type_command
from litdiffusion import load_model
from litdiffusion.configuration import config_folder
from litdiffusion.diffusion import DDIM
from litdiffusion.errors import UserError
from litdiffusion.runs.checkpoint import read_checkpoint, write_checkpoint
from litdiffusion.system.files import WriteError


@pytest.fixture
def ckpt(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    return copy


def with_config(ckpt: Path, change: Any) -> Path:
    checkpoint = torch.load(ckpt, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, ckpt)
    return ckpt


def test_loads_in_a_bare_process_from_the_file_alone(ckpt: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from litdiffusion import load_model;"
        "print(load_model(sys.argv[1], device='cpu').sample(2, sampler='ddim', num_steps=2).shape);"
        "assert 'lightning' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ckpt)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[2, 1, 8, 8]" in done.stdout


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated(ckpt: Path, keep: int) -> None:
    ckpt.write_bytes(ckpt.read_bytes()[:keep])
    with pytest.raises(UserError, match="cut short or damaged") as caught:
        load_model(ckpt)
    assert str(ckpt) in str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    weights = {"w": torch.arange(40.0), "b": torch.ones(3, 5), "n": torch.arange(7)}
    content = {"state_dict": weights, "model_config": {}, "data_config": {"name": "x"}, "global_step": 3}
    write_checkpoint(content, tmp_path / "small.ckpt")
    return tmp_path / "small.ckpt"


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(small: Path) -> None:
    whole, expected = small.read_bytes(), read_checkpoint(small)
    directory = whole.index(b"PK\x01\x02")  # which no checksum covers, so that each of its bits is tried
    noticed = 0
    for place in range(len(whole)):
        for bit in range(8) if place >= directory else [place % 8]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            small.write_bytes(flipped)
            try:
                found = read_checkpoint(small)
            except UserError:
                noticed += 1
                continue
            weights = found.pop("state_dict")
            for name, weight in expected["state_dict"].items():
                assert torch.equal(weights[name], weight), (place, bit)
            assert found == {key: expected[key] for key in found}, (place, bit)
    assert noticed > 2000


def test_appended_bytes_are_noticed_and_a_comment_is_none_of_them(small: Path) -> None:
    whole = small.read_bytes()
    for more in (b"\0", b"x" * 22, b"y" * 10_000):
        small.write_bytes(whole + more)
        with pytest.raises(UserError, match="cut short or damaged"):
            read_checkpoint(small)
    small.write_bytes(whole)
    with zipfile.ZipFile(small, "a") as archive:  # as the checkpoints of earlier releases have one
        archive.comment = b"litdiffusion sha256 0123"
    assert read_checkpoint(small)["global_step"] == 3


def test_foreign(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a litdiffusion checkpoint"):
        load_model(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "missing.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(UserError):
        load_model(tmp_path / "text.ckpt")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_hostile_pickle_runs_nothing(ckpt: Path, tmp_path: Path) -> None:
    target = tmp_path / "was-here"
    checkpoint = torch.load(ckpt, weights_only=True)
    torch.save({**checkpoint, "extra": Hostile(target)}, ckpt)
    plain = tmp_path / "plain.ckpt"
    plain.write_bytes(pickle.dumps(Hostile(target)))
    for path in (ckpt, plain):
        with pytest.raises(UserError):
            load_model(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "target",
    ["os.mkdir", "litdiffusion.system.files.write_text", "torch.hub.load", "litdiffusion.nn.unet.torch.load"],
)
def test_a_hostile_target_is_refused(ckpt: Path, target: str) -> None:
    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["model_config"]["denoiser"]["inner"]["net"]["_target_"] = target

    with pytest.raises(UserError, match="_target_"):
        load_model(with_config(ckpt, spoil))


def test_weights_that_do_not_fit(ckpt: Path) -> None:
    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["model_config"]["denoiser"]["inner"]["net"]["dim"] = 16

    with pytest.raises(UserError, match="do not fit"):
        load_model(with_config(ckpt, spoil))


def test_a_truncated_last_checkpoint_stops_a_resume_in_one_line(trained: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:500])
    typed = type_command(
        "train", "debug=tiny", "trainer.max_steps=6", "callbacks.sample_images=null", f"run_dir={run_dir}"
    )
    assert typed.code == 2
    assert "cut short or damaged" in typed.err


def drop(*path: str) -> Any:
    def change(checkpoint: dict[str, Any]) -> None:
        node = checkpoint
        for name in path[:-1]:
            node = node[name]
        del node[path[-1]]

    return change


def put(value: Any, *path: str) -> Any:
    def change(checkpoint: dict[str, Any]) -> None:
        node = checkpoint
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put({}, "model_config"), "denoiser"),
        (drop("model_config", "denoiser"), "denoiser"),
        (drop("model_config", "sampler"), "sampler"),
        (drop("model_config", "denoiser", "inner", "schedule"), "denoiser.inner.schedule"),
        (drop("model_config", "denoiser", "inner", "net", "_target_"), "denoiser.inner.net"),
        (
            put(3, "model_config", "denoiser", "inner", "net", "of_the_future"),
            "denoiser.inner.net.of_the_future",
        ),
        (put("wide", "model_config", "denoiser", "inner", "net", "dim"), "denoiser.inner.net.dim"),
        (put(-1, "model_config", "denoiser", "inner", "schedule", "num_steps"), "denoiser.inner.schedule"),
        (put({"_target_": "torch.nn.Identity"}, "model_config", "denoiser"), "denoiser"),
        (put(None, "model_config"), "model_config"),
        (put("three", "global_step"), "global_step"),
        (put([], "state_dict"), "state_dict"),
        (put({1: torch.zeros(1)}, "state_dict"), "do not fit"),
    ],
)
def test_what_no_version_can_build_is_one_line(ckpt: Path, change: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(with_config(ckpt, change), device="cpu")
    assert str(ckpt) in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_samplers_are_those_of_the_configuration(trained: Path) -> None:
    model = load_model(trained / "checkpoints" / "last.ckpt", device="cpu")
    for path in sorted((config_folder() / "sampler").glob("*.yaml")):
        assert model.sample(1, sampler=path.stem, num_steps=2).shape == (1, *model.denoiser.image_shape)
    stochastic, same = (model.sample(1, sampler="ddim", num_steps=3, eta=eta) for eta in (1.0, 0.0))
    assert not torch.equal(stochastic, same)
    by_class = model.sample(1, sampler=DDIM(3))
    assert torch.equal(same, by_class)


def test_the_previous_one_is_kept_until_the_next_is_whole(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    good = {"state_dict": {}, "model_config": {}, "data_config": {}}

    class Unwritable:
        def __reduce__(self) -> Any:
            raise OSError(28, "No space left on device")

    for step in (1, 2):
        write_checkpoint({**good, "global_step": step}, last, previous)
    with pytest.raises(WriteError, match=r"No space left on device.*last\.ckpt"):
        write_checkpoint({**good, "global_step": 3, "extra": Unwritable()}, last, previous)
    assert sorted(tmp_path.iterdir()) == [last, previous]
    assert [read_checkpoint(path)["global_step"] for path in (previous, last)] == [1, 2]
    write_checkpoint({**good, "global_step": 3}, last, previous)
    assert [read_checkpoint(path)["global_step"] for path in (previous, last)] == [2, 3]


def test_a_damaged_last_checkpoint_gives_way_to_the_previous(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = ("callbacks.sample_images=null", "lr_scheduler=constant", "datamodule.num_val=0")
    often = "callbacks.save_checkpoints.every_n_steps=2"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_tiny(whole, *tiny, "trainer.max_steps=6")
    train_tiny(broken, *tiny, often, "trainer.max_steps=4")
    last = broken / "checkpoints" / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    train_tiny(broken, *tiny, often, "trainer.max_steps=6")
    assert "last.ckpt is damaged: continuing from previous.ckpt beside it, at step 2" in caplog.text
    assert (broken / "checkpoints" / "damaged.ckpt").read_bytes() == bytes(data)
    first, second = (
        torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run_dir in (whole, broken)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_checkpoint(broken / "checkpoints" / "previous.ckpt")["global_step"] == 4
