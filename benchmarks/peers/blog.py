"""The Annotated Diffusion Model's own system, written as the blog writes it: the yardstick.

It shares no line with ``src/``. The benchmarks measure it, and the tests compare loss curves with it, so it
keeps the blog's choices and its slowness: NCHW, attention by einsum, weights standardized with ``torch.var``
and an eps that follows the activation's dtype, ``extract`` by way of the CPU, plain Adam. Completed is only
what the extraction of the text mangled: the convolution of ``upsample`` and of each last level, arguments,
``[0]``, ``zero_grad``.

With ``Unet(dim=28, channels=1, dim_mults=(1, 2, 4))`` it has 2,020,257 parameters.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from peers.blog_unet import Unet

__all__ = [
    "Unet",
    "Diffusion",
    "linear_betas",
    "quadratic_betas",
    "cosine_betas",
    "sigmoid_betas",
    "extract",
    "train",
]


def linear_betas(timesteps: int) -> Tensor:
    return torch.linspace(0.0001, 0.02, timesteps)


def quadratic_betas(timesteps: int) -> Tensor:
    return torch.linspace(0.0001**0.5, 0.02**0.5, timesteps) ** 2


def sigmoid_betas(timesteps: int) -> Tensor:
    return torch.sigmoid(torch.linspace(-6, 6, timesteps)) * (0.02 - 0.0001) + 0.0001


def cosine_betas(timesteps: int, s: float = 0.008) -> Tensor:
    x = torch.linspace(0, timesteps, timesteps + 1)
    alphas_cumprod = torch.cos(((x / timesteps) + s) / (1 + s) * torch.pi * 0.5) ** 2
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0]
    betas = 1 - (alphas_cumprod[1:] / alphas_cumprod[:-1])
    return torch.clip(betas, 0.0001, 0.9999)


class Diffusion:
    """The blog's module-level tables and the functions that read them; t runs over 0..T-1."""

    def __init__(self, betas: Tensor) -> None:
        alphas = 1.0 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = functional.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        self.timesteps = len(betas)
        self.betas = betas
        self.sqrt_recip_alphas = torch.sqrt(1.0 / alphas)
        self.sqrt_alphas_cumprod = torch.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = torch.sqrt(1.0 - alphas_cumprod)
        self.posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        scale = extract(self.sqrt_alphas_cumprod, t, x_start.shape)
        spread = extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
        return scale * x_start + spread * noise

    def p_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        loss_type: str = "l1",
    ) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        predicted_noise = model(self.q_sample(x_start, t, noise), t)
        losses = {"l1": functional.l1_loss, "l2": functional.mse_loss, "huber": functional.smooth_l1_loss}
        return losses[loss_type](noise, predicted_noise)

    @torch.no_grad()
    def p_sample(
        self, model: nn.Module, x: Tensor, t: Tensor, t_index: int, generator: torch.Generator | None = None
    ) -> Tensor:
        betas_t = extract(self.betas, t, x.shape)
        spread_t = extract(self.sqrt_one_minus_alphas_cumprod, t, x.shape)
        sqrt_recip_alphas_t = extract(self.sqrt_recip_alphas, t, x.shape)
        model_mean = sqrt_recip_alphas_t * (x - betas_t * model(x, t) / spread_t)
        if t_index == 0:
            return model_mean
        posterior_variance_t = extract(self.posterior_variance, t, x.shape)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return model_mean + torch.sqrt(posterior_variance_t) * noise

    def p_sample_loop(
        self, model: nn.Module, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """All images from the first denoised to the last, each of ``shape`` and on the CPU."""
        device = next(model.parameters()).device
        image = torch.randn(shape, generator=generator, device=device)
        images = []
        for index in reversed(range(self.timesteps)):
            t = torch.full((shape[0],), index, device=device, dtype=torch.long)
            image = self.p_sample(model, image, t, index, generator)
            images.append(image.cpu())
        return images


def extract(table: Tensor, t: Tensor, x_shape: torch.Size) -> Tensor:
    out = table.gather(-1, t.cpu())
    return out.reshape(t.shape[0], *((1,) * (len(x_shape) - 1))).to(t.device)


def train(
    model: nn.Module,
    diffusion: Diffusion,
    batches: Iterable[Tensor],
    lr: float = 1e-3,
    loss_type: str = "huber",
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """Take one Adam step for each batch [batch, channels, height, width] in [-1, 1]; yield the losses."""
    optimizer = Adam(model.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        t = torch.randint(0, diffusion.timesteps, (len(batch),), generator=generator)
        noise = torch.randn(batch.shape, generator=generator)
        loss = diffusion.p_losses(
            model, batch, t.to(batch.device), noise.to(batch.device), loss_type=loss_type
        )
        loss.backward()
        optimizer.step()
        yield loss.item()
