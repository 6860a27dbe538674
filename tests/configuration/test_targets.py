"""What a checkpoint from elsewhere may make this process build."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from litdiffusion.configuration import check_targets
from litdiffusion.errors import UserError

HARMLESS = {"_target_": "litdiffusion.diffusion.V"}


@pytest.mark.parametrize(
    "target",
    [
        "litdiffusion.nn.UNet",
        "litdiffusion.nn.unet.UNet",
        "litdiffusion.diffusion.Denoiser",
        "litdiffusion.diffusion.schedules.cosine",
        "litdiffusion.diffusion.samplers.DDIM",
        "torch.nn.Linear",
        "torch.nn.modules.activation.SiLU",
    ],
)
def test_networks_and_mathematics_are_allowed(target: str) -> None:
    check_targets({"net": {"_target_": target, "dim": 3, "parts": [HARMLESS]}})
    check_targets(OmegaConf.create({"_target_": target}))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.serialization.os.system",
        "torch.nn.functional.relu",
        "torch.nn.Module.load_state_dict",
        "torch.nn.init.normal_",
        "torch.nn.parallel.torch.load",
        "torch.nn.Linear.torch.load",
        "litdiffusion.nn.unet.torch.hub.load",
        "litdiffusion.nn.unet.torch",
        "litdiffusion.nn.unet.nn.Linear",
        "litdiffusion.nn.unet.pairwise",
        "litdiffusion.nn.unet.UNet.forward",
        "litdiffusion.diffusion.schedules.math.cos",
        "litdiffusion.diffusion.schedules.DDPM_STEPS",
        "litdiffusion.diffusion.schedules.torch.nn.Linear",
        "litdiffusion.files.whole_file",
        "litdiffusion.nnx.UNet",
        "litdiffusion.nn",
        "litdiffusion.nn..UNet",
        "litdiffusion.nn.NoSuch",
        " litdiffusion.nn.UNet",
        "",
        3,
        None,
        ["litdiffusion.nn.UNet"],
        {"_target_": "litdiffusion.nn.UNet"},
        "${oc.env:HOME}",
        "litdiffusion.nn.${oc.env:HOME}",
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_everything_else_is_refused_at_any_depth(target: Any, depth: int) -> None:
    cfg: Any = {"_target_": target}
    if depth >= 1:
        cfg = {"net": HARMLESS | {"layers": [1, [cfg]]}}
    if depth == 2:
        cfg = OmegaConf.create(cfg)
    with pytest.raises(UserError) as caught:
        check_targets(cfg)
    assert "_target_" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interpolations_are_refused_everywhere() -> None:
    with pytest.raises(UserError, match=r"net\.name"):
        check_targets({"net": HARMLESS | {"name": "${oc.env:SECRET}"}})


def test_other_packages_can_be_let_in() -> None:
    check_targets({"_target_": "litdiffusion.files.whole_file"}, ours=["litdiffusion.files"])
