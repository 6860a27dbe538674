"""How good the weights of a snapshot are: images drawn with few evaluations of the network, and their metrics."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from litdiffusion.configuration import config_folder
from litdiffusion.configuration.hardware import native_autocast
from litdiffusion.configuration.nodes import build
from litdiffusion.diffusion import DPMSolverPP2M, Sampler
from litdiffusion.diffusion.denoiser import Clipped, Denoiser, Preconditioned
from litdiffusion.diffusion.parametrizations import Epsilon, V
from litdiffusion.diffusion.schedules import Discrete, linear
from litdiffusion.evaluation.generated import drawn
from litdiffusion.nn import UNet
from litdiffusion.nn.blocks import fold_weight_standardization
from litdiffusion.system.memory import keep_freed_memory
from peers import blog
from peers.blog_weights import carry_over

EVALUATIONS = 20
SHAPE = {"channels": 1, "image_size": [28, 28]}

Weights = Mapping[str, Tensor]
Drawn = tuple[Denoiser, Sampler]


def of_preset(experiment: str, net: Weights, overrides: Sequence[str]) -> Drawn:
    """A preset with these weights, and its sampler, or DPM-Solver++(2M) where that takes more evaluations."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}", "run_dir=unused", *overrides])
    denoiser: Denoiser = build(cfg.denoiser, "denoiser")
    denoiser.core.net.load_state_dict(net)
    own: Sampler = build(cfg.sampler, "sampler")
    is_quick = isinstance(own, DPMSolverPP2M) and len(own.times(denoiser.schedule)) <= EVALUATIONS + 1
    return denoiser, own if is_quick else DPMSolverPP2M(EVALUATIONS)


def of_the_blog(net: Weights) -> Drawn:
    """The blog's weights in our network, which computes the same (tests/nn/test_unet.py) in half the time."""
    theirs = blog.Unet(dim=28, channels=1, dim_mults=(1, 2, 4))
    theirs.load_state_dict(net)
    ours = UNet(dim=28, channels=1, dim_mults=(1, 2, 4))
    carry_over(theirs, ours)
    schedule = linear(300, rescale=False)
    return Preconditioned(ours, schedule, Epsilon(), **SHAPE), DPMSolverPP2M(EVALUATIONS)


def of_ddpm_pytorch(net: Weights) -> Drawn:
    """denoising-diffusion-pytorch's network and schedule, clipped as its own samplers clip."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    model = GaussianDiffusion(Unet(dim=28, dim_mults=(1, 2, 4), channels=1), image_size=28, timesteps=1000)
    model.model.load_state_dict(net)
    schedule = Discrete(model.alphas_cumprod.double())
    return Clipped(Preconditioned(TheirNetwork(model.model), schedule, V(), **SHAPE)), DPMSolverPP2M(
        EVALUATIONS
    )


class TheirNetwork(nn.Module):
    """What our denoisers ask of a network."""

    num_classes = None
    self_condition = False
    learned_variance = False
    size_multiple = 4
    channels = 1

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, self_cond: None = None, labels: None = None) -> Tensor:
        output: Tensor = self.net(x, t)
        return output


PEERS: dict[str, Callable[[Weights], Drawn]] = {"blog": of_the_blog, "ddpm_pytorch": of_ddpm_pytorch}


def score(
    load: Callable[[Weights], Drawn], snapshot: Path, folder: Path, num_images: int, data: Path
) -> dict[str, Any]:
    """Draw images of a snapshot, and measure them; what is there already is not done again."""
    found = torch.load(snapshot, weights_only=True, map_location="cpu")
    metrics = folder / "metrics.json"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        keep_freed_memory()
        denoiser, sampler = load(found["net"])
        fold_weight_standardization(denoiser.eval().requires_grad_(False))
        request = {"snapshot": snapshot.name, "num_images": num_images}
        with native_autocast(torch.device("cpu")):
            drawn(denoiser, sampler, num_images, 0, 64, folder, request)
        images = [f"images={folder / 'samples.npz'}", f"out={folder}", f"paths.data={data.parent}"]
        subprocess.run(
            [sys.executable, "-m", "litdiffusion.evaluate", *images], check=True, stdout=sys.stderr
        )
    numbers = json.loads(metrics.read_text(encoding="utf-8"))
    return numbers | {"seconds": found["seconds"], "images": found["images"], "fid": numbers["val/fid"]}
