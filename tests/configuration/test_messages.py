"""Other libraries' exceptions as one line."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch._utils import ExceptionWrapper

from litdiffusion.configuration.messages import nearest, one_line, suggestion, user_error
from litdiffusion.errors import UserError


def test_user_error_out_of_a_loader_process() -> None:
    """DataLoader's worker processes send exceptions in this wrapper."""
    try:
        raise UserError("photo.png: cannot be read as an image")
    except UserError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError) as caught:
        sent.reraise()
    assert "Traceback" in str(caught.value)
    assert user_error(caught.value) == "photo.png: cannot be read as an image"


def test_user_error_as_a_cause() -> None:
    error = RuntimeError("that")
    error.__cause__ = UserError("this")
    assert user_error(error) == "this"


def test_bugs_are_no_user_errors() -> None:
    cfg = OmegaConf.create({"net": {}})
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(AttributeError) as caught:
        _ = cfg.nt
    assert user_error(caught.value) is None
    assert user_error(ValueError("x")) is None


def test_missing_value_behind_an_interpolation_is_named() -> None:
    cfg = OmegaConf.create({"data": {"path": "???"}, "copy": "${data.path}"})
    with pytest.raises(Exception, match="Missing") as caught:
        _ = cfg["copy"]
    assert user_error(caught.value) == "data.path: needs a value; give it as data.path=VALUE"


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(Exception, match="expected") as caught:
        OmegaConf.load(path)
    line = one_line(caught.value)
    assert line.startswith(f"{path}, line 3: ")
    assert "\n" not in line


def test_nearest_words() -> None:
    keys = ["datamodule.batch_size", "trainer.max_steps", "sampler.num_steps", "net.dim", "net.dim_mults"]
    assert nearest("batch_size", keys) == ["datamodule.batch_size"]
    assert nearest("net.dmi", keys) == ["net.dim"]
    assert nearest("optimizer.lr", keys) == []
    assert suggestion("liner", ["linear", "cosine"]) == "; nearest: linear; there are: cosine, linear"
    assert suggestion("x", []) == ""


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:12682: Connection"
            " reset by peer. This is typically caused by a remote worker hanging",
            "connection reset",
        ),
        (
            "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711",
            "connection closed",
        ),
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv", "timed out"),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error",
            "remote process exited",
        ),
    ],
)
def test_a_lost_process_is_one_line(text: str, what: str) -> None:
    line = user_error(RuntimeError(text))
    assert line is not None
    assert line.startswith(f"another process of this run was lost ({what})")


def test_other_runtime_errors_are_bugs() -> None:
    assert user_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
