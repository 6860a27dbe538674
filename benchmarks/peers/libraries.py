"""Other libraries' networks and training steps, as they themselves train, in the sizes of the benchmarks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """A network and the images it is for.

    Attributes:
        image_size, channels: of the images.
        ours: overrides of ``experiment=fashion_mnist net=unet`` that give our network this size.
        ddpm_pytorch, diffusers: arguments of the other libraries' networks.
    """

    image_size: int
    channels: int
    ours: tuple[str, ...]
    ddpm_pytorch: dict[str, Any]
    diffusers: dict[str, Any]


def _diffusers(widths: tuple[int, ...], attention: tuple[bool, ...], **further: Any) -> dict[str, Any]:
    down = [f"{'Attn' if each else ''}DownBlock2D" for each in attention]
    up = [f"{'Attn' if each else ''}UpBlock2D" for each in reversed(attention)]
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, **further}


SIZES = {
    "blog": Size(
        image_size=28,
        channels=1,
        ours=(),
        ddpm_pytorch={"dim": 28, "dim_mults": (1, 2, 4)},
        diffusers=_diffusers((32, 64, 128), (False, True, True)),
    ),
    # DDPM's network for CIFAR-10 is diffusers' with these arguments. The others have no third block on the way up,
    # and get there by 144 channels in the place of 128.
    "cifar10": Size(
        image_size=32,
        channels=3,
        ours=(
            "net.dim=144",
            "net.dim_mults=[1,2,2,2]",
            "net.groups=24",
            "net.dropout=0.1",
            "net.attention=[none,full,none,none]",
        ),
        ddpm_pytorch={
            "dim": 144,
            "dim_mults": (1, 2, 2, 2),
            "full_attn": (False, True, False, False),
            "dropout": 0.1,
        },
        diffusers=_diffusers(
            (128, 256, 256, 256), (False, True, False, False), attention_head_dim=None, dropout=0.1
        ),
    ),
    "tiny": Size(
        image_size=16,
        channels=1,
        ours=("net.dim=8", "net.dim_mults=[1,2]"),
        ddpm_pytorch={"dim": 8, "dim_mults": (1, 2)},
        diffusers=_diffusers((32, 32), (False, True)),
    ),
}
"""``blog``: 2.0M parameters (diffusers 4.0M); ``cifar10``: 35.7M (ours 35.2M); ``tiny`` is for dry runs."""


@dataclass(frozen=True)
class Setting:
    """How a network is run: on which batch, where, and as what."""

    size: Size
    batch_size: int
    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False

    def batch(self) -> Tensor:
        """Random images in [-1, 1]."""
        side = self.size.image_size
        return torch.rand(self.batch_size, self.size.channels, side, side, device=self.device) * 2 - 1

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)

    def compile(self, net: nn.Module) -> None:
        """In place, where that is wanted; a dry run on the CPU only traces.

        Without a search for the best shape of each elementwise kernel, which takes half of the time of compiling.
        """
        if self.compiled and self.device == "cuda":
            import torch._inductor.config as inductor

            inductor.triton.autotune_pointwise = False
            net.compile()
        elif self.compiled:
            net.compile(backend="eager")


@dataclass(frozen=True)
class Steps:
    """One training step and one sampling step (one evaluation of the network), ready to be called."""

    net: nn.Module
    sampled: nn.Module
    """The network that is sampled from; it may be the same."""
    train: Callable[[], object]
    sample: Callable[[], object]


def ddpm_pytorch(setting: Setting) -> Steps:
    """denoising-diffusion-pytorch: its ``Trainer``'s step: Adam, clipping, and an average every ten steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    size, on_gpu = setting.size, setting.device == "cuda"
    net = Unet(**size.ddpm_pytorch, channels=size.channels, flash_attn=on_gpu)
    model = GaussianDiffusion(net, image_size=size.image_size, timesteps=300).to(setting.device)
    average = EMA(model, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-5, betas=(0.9, 0.99), fused=on_gpu)
    batch, x = setting.batch() / 2 + 0.5, setting.batch()
    setting.compile(net)
    setting.compile(average.ema_model.model)

    def train() -> None:
        with setting.autocast():
            loss = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    @torch.inference_mode()
    def sample() -> None:
        with setting.autocast():
            average.ema_model.p_sample(x, 150)

    return Steps(net, average.ema_model, train, sample)


def diffusers(setting: Setting) -> Steps:
    """diffusers: the step of its unconditional training example, whose average of the weights is off by default."""
    from diffusers import DDPMScheduler, UNet2DModel

    size, on_gpu = setting.size, setting.device == "cuda"
    net = UNet2DModel(
        sample_size=size.image_size,
        in_channels=size.channels,
        out_channels=size.channels,
        **size.diffusers,
    )
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    net = net.to(setting.device, memory_format=memory_format)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=on_gpu)
    batch = setting.batch().contiguous(memory_format=memory_format)
    setting.compile(net)

    def train() -> None:
        noise = torch.randn_like(batch)
        t = torch.randint(0, 1000, (setting.batch_size,), device=setting.device)
        with setting.autocast():
            output = net(scheduler.add_noise(batch, noise, t), t).sample
            loss = nn.functional.mse_loss(output, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def sample() -> None:
        with setting.autocast():
            output = net(batch, 500).sample
        scheduler.step(output, 500, batch)

    return Steps(net, net, train, sample)
