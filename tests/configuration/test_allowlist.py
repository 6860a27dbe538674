"""What a checkpoint from elsewhere may make this process build."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from litdiffusion.configuration.allowlist import require_allowed, trusted_packages
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
    require_allowed({"net": {"_target_": target, "dim": 3, "parts": [HARMLESS]}})
    require_allowed(OmegaConf.create({"_target_": target}))


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
        "litdiffusion.system.files.whole_file",
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
        require_allowed(cfg)
    assert "_target_" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interpolations_are_refused_everywhere() -> None:
    with pytest.raises(UserError, match=r"net\.name"):
        require_allowed({"net": HARMLESS | {"name": "${oc.env:SECRET}"}})


def test_other_packages_can_be_let_in() -> None:
    require_allowed({"_target_": "litdiffusion.system.files.whole_file"}, ours=["litdiffusion.system.files"])


# -------------------------------------------------------------------------------------------- what is trusted

MODULE = """
import os, subprocess, torch
from os import popen, system
from pathlib import Path
from subprocess import Popen
from torch.hub import load
from torch.nn import Linear
from litdiffusion.system.files import write_text
from litdiffusion.nn import UNet

(Path(__file__).parent / "imported").touch()

class Net(torch.nn.Module):
    class Inner: ...
    @classmethod
    def build(cls): ...

def build(): ...

net = Net()
shell = os.system
evaluate = eval
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, found by Python, with the package ``zoo``, and another whose name begins alike."""
    for name in ("zoo", "zoology"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("zoo")]:
        del sys.modules[name]


TRUSTED = ["zoo.nets.Net", "zoo.nets.build", "zoo.nets.UNet", "zoo.nets.Linear", "litdiffusion.nn.UNet"]


@pytest.mark.parametrize("target", TRUSTED)
@pytest.mark.parametrize(
    "trust", ["zoo", ["zoo"], ("zoo.nets", "zoology"), OmegaConf.create(["zoo"])], ids=str
)
@pytest.mark.usefixtures("package")
def test_what_a_trusted_package_defines_is_allowed(target: str, trust: Any) -> None:
    require_allowed({"net": {"_target_": target}}, trust=trust)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "subprocess.Popen", "builtins.eval", "torch.hub.load", "torch.load"),
        *("zoo.nets.system", "zoo.nets.popen", "zoo.nets.Popen", "zoo.nets.load", "zoo.nets.shell"),
        *("zoo.nets.os.system", "zoo.nets.subprocess.run", "zoo.nets.torch.hub.load", "zoo.nets.evaluate"),
        *("zoo.nets.write_text", "zoo.nets.Path", "zoo.nets.net", "zoo.nets.Net.build", "zoo.nets.Net.Inner"),
        *("zoo.nets.__builtins__", "zoo.nets.__loader__", "zoo.nets", "zoo", "zoology.nets.Net", "other.Net"),
        *("zoo.nets..Net", " zoo.nets.Net", ".zoo.nets.Net", "zoo.nets.NoSuch", "zoo.no_such.Net"),
    ],
)
@pytest.mark.usefixtures("package")
def test_trust_lets_nothing_else_in(target: str) -> None:
    with pytest.raises(UserError, match="_target_") as caught:
        require_allowed({"net": {"_target_": target}}, trust=["zoo"])
    assert "\n" not in str(caught.value)


def test_without_trust_nothing_is_imported_and_the_key_is_named(package: Path) -> None:
    with pytest.raises(UserError, match=r"if you trust all code of zoo, add trust=\[zoo\]$"):
        require_allowed({"_target_": "zoo.nets.Net"}, trust=["zoology"])
    assert not list(package.glob("*/imported"))


@pytest.mark.parametrize(
    "target", ["os.system", "torch.hub.load", "litdiffusion.system.files.write_text", "eval", "a b.c"]
)
def test_no_key_is_offered_for_what_it_would_not_let_in(target: str) -> None:
    with pytest.raises(UserError) as caught:
        require_allowed({"_target_": target})
    assert "trust" not in str(caught.value)


@pytest.mark.usefixtures("package")
def test_a_trusted_package_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^_target_: absent\.nets\.Net; absent\.nets cannot be imported \(No"
    ):
        require_allowed({"_target_": "absent.nets.Net"}, trust=["absent"])


@pytest.mark.parametrize(
    "trust",
    [
        *(
            "os",
            "subprocess",
            "builtins",
            "torch",
            "torch.hub",
            "torch.nn",
            "litdiffusion",
            "litdiffusion.system.files",
        ),
        *(
            "numpy",
            "hydra.utils",
            "importlib",
            "",
            "zoo/nets",
            "zoo.",
            "__main__",
            "zoo.__init__",
            "*",
            "a b",
        ),
    ],
)
def test_names_that_cannot_be_trusted(trust: str) -> None:
    for value in (trust, ["zoo", trust]):
        with pytest.raises(UserError, match=r"^trust: "):
            require_allowed({"_target_": "litdiffusion.nn.UNet"}, trust=value)


@pytest.mark.parametrize("trust", [3, None, [3], [["zoo"]], {"zoo": 1}.values()], ids=str)
def test_trust_is_a_list_of_names(trust: Any) -> None:
    with pytest.raises(
        UserError, match=r"is no package's name; give a list of them, as in trust=\[mypackage\]"
    ):
        trusted_packages(trust)
