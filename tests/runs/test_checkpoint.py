"""Checkpoints: whole or not there, opened without running anything."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import train_tiny, type_command
from litdiffusion import load_model
from litdiffusion.errors import UserError
from litdiffusion.files import WriteError
from litdiffusion.runs.checkpoint import read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "trained", "callbacks.sample_images=null")


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
    ["os.mkdir", "litdiffusion.files.write_text", "torch.hub.load", "litdiffusion.nn.unet.torch.load"],
)
def test_a_hostile_target_is_refused(ckpt: Path, target: str) -> None:
    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["model_config"]["denoiser"]["net"]["_target_"] = target

    with pytest.raises(UserError, match="_target_"):
        load_model(with_config(ckpt, spoil))


def test_weights_that_do_not_fit(ckpt: Path) -> None:
    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["model_config"]["denoiser"]["net"]["dim"] = 16

    with pytest.raises(UserError, match="do not fit"):
        load_model(with_config(ckpt, spoil))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    good = {"state_dict": {}, "model_config": {}, "data_config": {}, "global_step": 1}
    write_checkpoint(good, path)

    class Unwritable:
        def __reduce__(self) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match=r"No space left on device.*last\.ckpt"):
        write_checkpoint({**good, "extra": Unwritable()}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_truncated_last_checkpoint_stops_a_resume_in_one_line(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_tiny(run_dir, "callbacks.sample_images=null")
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:500])
    typed = type_command(
        "train", "debug=tiny", "trainer.max_steps=6", "callbacks.sample_images=null", f"run_dir={run_dir}"
    )
    assert typed.code == 2
    assert "cut short or damaged" in typed.err
