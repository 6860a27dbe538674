"""Nodes against the signatures of real constructors: ours, torch's and Lightning's."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pytest
from beartype.vale import Is
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins import FSDPPrecision
from omegaconf import OmegaConf
from torch import nn, optim

from litdiffusion.configuration import config_folder
from litdiffusion.configuration.annotations import accepts, could_accept, spelled
from litdiffusion.configuration.nodes import build, require_arguments
from litdiffusion.diffusion import V
from litdiffusion.errors import UserError
from litdiffusion.nn import UNet

NET = {"_target_": "litdiffusion.nn.UNet", "dim": 8, "channels": 1}
SCHEDULE = {"_target_": "litdiffusion.diffusion.schedules.linear", "num_steps": 10}
V_TARGET = {"_target_": "litdiffusion.diffusion.V"}
DENOISER = {
    "_target_": "litdiffusion.diffusion.Preconditioned",
    "net": NET,
    "schedule": SCHEDULE,
    "target": V_TARGET,
    "channels": 1,
    "image_size": 8,
}
ADAM = {"_target_": "torch.optim.AdamW", "_partial_": True}
TRAINER = {"_target_": "lightning.Trainer", "accelerator": "cpu"}
CALLBACK = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor", "logging_interval": "step"}


def fault(**nodes: Any) -> str:
    with pytest.raises(UserError) as caught:
        require_arguments(OmegaConf.create(nodes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "node",
    [
        NET,
        DENOISER,
        NET | {"dim_mults": [1, 2]},  # a list for a sequence
        NET | {"dropout": 0},  # an int for a float
        NET | {"init_dim": None},
        ADAM | {"lr": 1, "betas": [0.9, 0.99]},  # a list for a tuple; params come later
        TRAINER | {"max_steps": 3, "precision": "bf16-mixed", "limit_val_batches": 1.0, "max_epochs": None},
        TRAINER | {"callbacks": [CALLBACK]},
        TRAINER | {"callbacks": CALLBACK, "logger": False},
        {"_target_": "litdiffusion.diffusion.Preconditioned", "_args_": [1, 2, 3]},
        NET | {"dim": "???"},  # missing values are another check's to report
    ],
    ids=str,
)
def test_sound_nodes_pass(node: dict[str, Any]) -> None:
    require_arguments(OmegaConf.create({"node": node}))


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (NET | {"dim": "abc"}, "node.dim: 'abc' is not an int (UNet.dim)"),
        (NET | {"dim": 8.0}, "node.dim: 8.0 is not an int (UNet.dim)"),
        (NET | {"dim": True}, "node.dim: True is not an int (UNet.dim)"),
        (NET | {"dim": None}, "node.dim: null is not an int (UNet.dim)"),
        (NET | {"self_condition": "yes"}, "node.self_condition: 'yes' is not a bool (UNet.self_condition)"),
        (NET | {"dropout": False}, "node.dropout: False is not a float (UNet.dropout)"),
        (NET | {"dim_mults": 4}, "node.dim_mults: 4 is not a Sequence[int] (UNet.dim_mults)"),
        (NET | {"dim_mults": [1, "x"]}, "node.dim_mults: [1, 'x'] is not a Sequence[int] (UNet.dim_mults)"),
        (NET | {"dim": {"x": 1}}, "node.dim: {'x': 1} is not an int (UNet.dim)"),
        (NET | {"dim": NET}, "node.dim: litdiffusion.nn.UNet is not an int (UNet.dim)"),
        (ADAM | {"lr": "fast"}, "node.lr: 'fast' is not a float or a Tensor (AdamW.lr)"),
        (TRAINER | {"max_steps": "ten"}, "node.max_steps: 'ten' is not an int (Trainer.max_steps)"),
        (DENOISER | {"net": "unet"}, "node.net: 'unet' is not a Module (Preconditioned.net)"),
        (
            DENOISER | {"schedule": V_TARGET},
            "node.schedule: litdiffusion.diffusion.V is not a Schedule (Preconditioned.schedule)",
        ),
        (
            DENOISER | {"target": SCHEDULE},
            "node.target: litdiffusion.diffusion.schedules.linear is not a Parametrization (Preconditioned.target)",
        ),
        (
            {"_target_": "litdiffusion.diffusion.Clipped", "inner": DENOISER, "clip": "statik"},
            "node.clip: 'statik' is not one of 'static', 'dynamic', 'none'; nearest: static (Clipped.clip)",
        ),
        (DENOISER | {"net": NET | {"dim": "x"}}, "node.net.dim: 'x' is not an int (UNet.dim)"),
        ({"a": [{"b": NET | {"dim": "x"}}]}, "node.a.0.b.dim: 'x' is not an int (UNet.dim)"),
        ({"_target_": "torch.optim.AdamW"}, "node.params: AdamW needs it; give it as +node.params=VALUE"),
        (
            {"_target_": "litdiffusion.nn.UNt"},
            "node._target_: cannot import litdiffusion.nn.UNt; nearest: UNet",
        ),
        ({"_target_": "nosuch.Thing"}, "node._target_: cannot import nosuch.Thing"),
        ({"_target_": "litdiffusion.nn"}, "node._target_: litdiffusion.nn is neither a class nor a function"),
        ({"_target_": 3}, "node._target_: 3 is neither a class nor a function"),
    ],
    ids=str,
)
def test_unsound_nodes_are_named(node: dict[str, Any], line: str) -> None:
    assert fault(node=node) == line


def test_unknown_argument_names_the_nearest() -> None:
    line = fault(net=NET | {"dim_mult": [1]})
    assert line.startswith("net.dim_mult: UNet takes no such argument; nearest: dim_mults")
    assert "nearest: max_steps" in fault(trainer=TRAINER | {"max_step": 3})


def test_callback_in_a_list_is_checked() -> None:
    line = fault(trainer=TRAINER | {"callbacks": [CALLBACK | {"logging_interval": "stepp"}]})
    assert line.startswith("trainer.callbacks.0.logging_interval: 'stepp' is not")
    assert "nearest: step" in line


def test_node_reached_by_interpolation_is_reported_where_it_is_written() -> None:
    line = fault(denoiser=DENOISER | {"net": "${net}"}, net=NET | {"dim": "x"})
    assert line.startswith("net.dim:")
    assert "is not a Schedule" in fault(denoiser=DENOISER | {"schedule": "${net}"}, net=NET)


def test_arguments_that_code_supplies_are_not_missed() -> None:
    cfg = OmegaConf.create({"optimizer": {"_target_": "torch.optim.AdamW"}})
    require_arguments(cfg, {"optimizer": ["params"]})


class Colour(Enum):
    RED = "red"


class Runs(Protocol):
    def run(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, float, True),
        (True, float, False),
        (True, int | bool, True),
        (True, Any, True),
        (1, Literal[True], False),
        (16, Literal[16, "16"], True),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ([], tuple[int, ...], True),
        ([1, True], list[int], False),
        ([[1], [2]], list[list[int]], True),
        ("abc", list[str], False),
        ([1], tuple, True),
        ({"a": 1}, dict[str, int], True),
        ({"a": 1}, str, False),
        ({}, int, False),
        ("red", Colour, True),
        ("RED", Colour, True),
        ("blue", Colour, False),
        ("a/b", Path, False),
        (3, Annotated[int, Is[lambda n: n > 0]], True),
        (-3, Annotated[int, Is[lambda n: n > 0]], False),
        (True, Annotated[int, Is[lambda n: n > 0]], False),
    ],
    ids=str,
)
def test_values_and_annotations(value: Any, hint: Any, fits: bool) -> None:
    assert accepts(value, hint) is fits


def test_only_what_is_impossible_is_ruled_out() -> None:
    assert could_accept(UNet, nn.Module)
    assert could_accept(nn.Module, UNet)  # a base class's factory may return the derived one
    assert could_accept(UNet, Runs)
    assert could_accept(lambda: None, int)
    assert could_accept(V, V | None)
    assert not could_accept(UNet, int | None)
    assert not could_accept(UNet, list[int])


def test_annotations_in_words() -> None:
    assert spelled(int) == "an int"
    assert spelled(float | None) == "a float or null"
    assert spelled(Literal["a", "b"] | int, "bb") == "an int or one of 'a', 'b'; nearest: b"
    assert spelled(tuple[int, ...]) == "a tuple[int, ...]"
    assert "n > 0" in spelled(Annotated[int, Is[lambda n: n > 0]])


def test_build_passes_objects_as_they_are() -> None:
    cfg = OmegaConf.create({"denoiser": DENOISER | {"net": None}, "optimizer": ADAM | {"lr": 0.1}})
    net = nn.Identity()
    denoiser = build(cfg.denoiser, "denoiser", net=net)
    assert denoiser.net is net
    optimizer = build(cfg.optimizer, "optimizer")(nn.Linear(1, 1).parameters())
    assert isinstance(optimizer, optim.AdamW)


def test_build_converts_containers() -> None:
    cfg = OmegaConf.create({"thing": {"_target_": "builtins.dict", "sizes": [1, 2], "more": {"a": [3]}}})
    built = build(cfg.thing, "thing")
    assert type(built["sizes"]) is list
    assert type(built["more"]["a"]) is list


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (NET | {"groups": 3}, "node.groups=3 does not divide a width of 8 channels"),
        (SCHEDULE | {"num_steps": 0}, "node.num_steps=0: a schedule needs at least 1 step"),
        (DENOISER | {"net": NET | {"groups": 3}}, "node.net.groups=3 does not divide a width of 8 channels"),
        (TRAINER | {"accelerator": "nonsense"}, "node: "),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, "node: "),
        ({"_target_": "nosuch.Thing"}, "node: Error loading 'nosuch.Thing': "),
    ],
    ids=str,
)
def test_build_says_which_node_was_refused(node: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        build(OmegaConf.create({"node": node}).node, "node")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_build_says_where_a_refused_value_is_written() -> None:
    cfg = OmegaConf.create(
        {
            "width": "${groups}",
            "groups": 3,
            "net": NET | {"groups": "${width}"},
            "denoiser": DENOISER | {"net": "${net}"},
        }
    )
    with pytest.raises(UserError, match=r"^groups=3 does not divide"):
        build(cfg.denoiser, "denoiser")
    cfg.merge_with({"net": {"groups": 3}, "denoiser": {"net": "${net}"}})
    with pytest.raises(UserError, match=r"^net\.groups=3 does not divide"):
        build(cfg.denoiser, "denoiser")


def test_build_leaves_bugs_alone() -> None:
    cfg = OmegaConf.create({"node": {"_target_": "operator.truediv", "_args_": [1, 0]}})
    with pytest.raises(Exception, match="ZeroDivisionError") as caught:
        build(cfg.node, "node")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_fsdp_rounds_neither_images_nor_the_schedule() -> None:
    """Lightning's own choice for bf16-mixed casts inputs and buffers to bfloat16: then alpha is 1 at small t."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", ["trainer=fsdp", "run_dir=/nowhere"])
    strategy = build(cfg.trainer.strategy, "trainer.strategy")
    strategy.precision_plugin = FSDPPrecision("bf16-mixed")
    chosen = strategy.mixed_precision_config
    assert (chosen.param_dtype, chosen.reduce_dtype, chosen.buffer_dtype) == (None, None, None)
