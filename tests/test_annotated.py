"""``experiment=annotated`` is the blog's system: it takes the blog's own code through the same training."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from commands import run
from litdiffusion.configuration import config_folder
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.nodes import build
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.fetch import default_folder
from litdiffusion.data.sources.fashion_mnist import FashionMNIST, find_folder
from litdiffusion.runs.metrics import read_rows
from litdiffusion.training.module import LitDiffusion
from peers import blog
from peers.blog_weights import carry_over

FASHION_MNIST = Path(__file__).parents[1] / default_folder()


@pytest.fixture
def module(tmp_path: Path) -> LitDiffusion:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", ["experiment=annotated", "trainer=cpu", f"run_dir={tmp_path}"])
    validate(cfg, {"trainer": ("logger", "callbacks", "plugins")})
    built: LitDiffusion = build(cfg.module, "module")
    return built


@pytest.fixture
def batches() -> ImageDataModule:
    folder = find_folder(FASHION_MNIST)
    if folder is None:
        pytest.skip("no Fashion-MNIST on this machine: `make data` fetches it")
    datamodule = ImageDataModule(FashionMNIST(folder), batch_size=8, seed=0, num_val=0)
    datamodule.setup("fit")
    return datamodule


def test_the_same_training_step_by_step(module: LitDiffusion, batches: ImageDataModule) -> None:
    """Same weights, pictures, t and noise: the same loss after every step, Adam's included."""
    peer = blog.Unet(dim=28, channels=1, dim_mults=(1, 2, 4))
    ours = module.denoiser
    assert sum(p.numel() for p in ours.core.net.parameters()) == 2_020_257
    carry_over(peer, ours.core.net)
    theirs = blog.Diffusion(blog.linear_betas(300))
    optimizers = (torch.optim.Adam(peer.parameters(), lr=1e-3), module.configure_optimizers()["optimizer"])
    generator = torch.Generator().manual_seed(0)
    for _, batch in zip(range(4), batches.train_dataloader(), strict=False):
        x0 = batches.finish(batch, training=True).images
        t = torch.randint(0, 300, (len(x0),), generator=generator)  # the blog counts from 0
        eps = torch.randn(x0.shape, generator=generator)
        ours_of_each = module.objective.losses(ours, x0, (t + 1) / 300, eps)
        losses = (theirs.p_losses(peer, x0, t, eps, "huber"), ours_of_each.mean())
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_loss_follows_the_blogs_code_for_100_steps(tmp_path: Path, batches: ImageDataModule) -> None:
    """Other weights, other noise, the same curve: means over 20 steps lie within 20% of each other."""
    off = ["datamodule.num_val=0", "callbacks.sample_images=null"]
    length = ["trainer.max_steps=100", "callbacks.monitor.every_n_steps=20"]
    run("train", "experiment=annotated", *length, *off, f"data.path={FASHION_MNIST}", f"run_dir={tmp_path}")
    ours = [row["train/loss"] for row in read_rows(tmp_path / "metrics.csv") if "train/loss" in row]

    datamodule = ImageDataModule(batches.source, batch_size=128, seed=1, num_val=0)
    datamodule.setup("fit")
    pictures = (datamodule.finish(batch, training=True).images for batch in datamodule.train_dataloader())
    peer = blog.Unet(dim=28, channels=1, dim_mults=(1, 2, 4))
    training = blog.train(peer, blog.Diffusion(blog.linear_betas(300)), pictures)
    losses = torch.tensor([loss for _, loss in zip(range(100), training, strict=False)])
    theirs = losses.view(5, 20).mean(1).tolist()
    print(json.dumps({"ours": ours, "theirs": theirs}))
    assert ours[1:] == pytest.approx(theirs[1:], rel=0.2)
