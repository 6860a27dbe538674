"""The trainings of other people's code, by their own recipes, which go on after an interruption.

    python benchmarks/recordkit/peers.py KEY FOLDER --images 120000 --seconds 2400 --times 60 180 600 1800

A peer gets its batches ready, from our input pipeline: what is measured is its network and its step.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]

from litdiffusion.data.datamodule import ImageDataModule  # noqa: E402
from litdiffusion.data.sources import FashionMNIST  # noqa: E402
from litdiffusion.system.files import whole_file  # noqa: E402
from peers import blog  # noqa: E402
from recordkit.snapshots import Stopwatch  # noqa: E402

SAVE_EVERY = 120.0
"""Seconds between two states to go on from."""


class Training(NamedTuple):
    """A peer's training.

    Fields:
        state: what it consists of: everything with a state_dict.
        step: takes a batch [N, 1, 28, 28] in [-1, 1].
        batch_size: images of a step.
        learned: the network to sample from.
    """

    state: dict[str, Any]
    step: Callable[[Tensor], None]
    batch_size: int
    learned: nn.Module


def the_blog() -> Training:
    """The blog: Adam at 1e-3, Huber loss, batches of 128, T = 300 with linear betas."""
    net = blog.Unet(dim=28, channels=1, dim_mults=(1, 2, 4))
    diffusion = blog.Diffusion(blog.linear_betas(300))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        t = torch.randint(0, diffusion.timesteps, (len(batch),))
        diffusion.p_losses(net, batch, t, loss_type="huber").backward()
        optimizer.step()

    return Training({"net": net, "optimizer": optimizer}, step, 128, net)


def ddpm_pytorch() -> Training:
    """denoising-diffusion-pytorch as its README trains, in the blog's size.

    T = 1000, sigmoid schedule, v target; two batches of 32 for each step of Adam at 8e-5, clipping, an average of the
    weights every ten steps.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model = GaussianDiffusion(Unet(dim=28, dim_mults=(1, 2, 4), channels=1), image_size=28, timesteps=1000)
    average = EMA(model, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-5, betas=(0.9, 0.99))

    def step(batch: Tensor) -> None:
        for part in batch.chunk(2):
            (model(part / 2 + 0.5) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    state = {"model": model, "average": average, "optimizer": optimizer}
    return Training(state, step, 64, average.ema_model.model)


TRAININGS = {"blog": the_blog, "ddpm_pytorch": ddpm_pytorch}


def batches(batch_size: int, first: int, data: Path) -> Iterator[Tensor]:
    """Mirrored Fashion-MNIST from batch ``first`` on."""
    datamodule = ImageDataModule(FashionMNIST(data), batch_size, seed=0)
    datamodule._first_step = lambda: first
    datamodule.setup("fit")
    for batch in datamodule.train_dataloader():
        yield datamodule.finish(batch, training=True).images


def train(
    training: Training, folder: Path, images: int, seconds: float, times: list[float], data: Path
) -> None:
    """Train until ``images`` or ``seconds`` are reached."""
    saved, done, start = folder / "state.pt", 0, 0.0
    if saved.exists():
        found = torch.load(saved, weights_only=True)
        for name, each in training.state.items():
            each.load_state_dict(found[name])
        torch.set_rng_state(found["rng"])
        done, start = found["done"], found["seconds"]
    watch = Stopwatch(folder / "snapshots", times, start)
    last_save = time.perf_counter()

    def save() -> None:
        nonlocal last_save
        with watch.stopped(), whole_file(saved) as path:
            state = {name: each.state_dict() for name, each in training.state.items()}
            torch.save(state | {"rng": torch.get_rng_state(), "done": done, "seconds": watch.seconds}, path)
        last_save = time.perf_counter()

    stream = batches(training.batch_size, done, data)
    watch.start()
    while (seen := done * training.batch_size) < images and watch.seconds < seconds:
        training.step(next(stream))
        done += 1
        watch.step(done * training.batch_size, training.learned)
        if time.perf_counter() - last_save > SAVE_EVERY:
            save()
            print(f"{seen:,} images in {watch.seconds:.0f} s", file=sys.stderr, flush=True)
    watch.keep(seen, training.learned)
    save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("key", choices=TRAININGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--times", type=float, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rest = arguments.folder, arguments.images, arguments.seconds, arguments.times, arguments.data
    train(TRAININGS[arguments.key](), *rest)


if __name__ == "__main__":
    main()
