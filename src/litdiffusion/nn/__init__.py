"""Networks: tensors in, tensors out. They know nothing of diffusion beyond a batch of times."""

from litdiffusion.nn.dit import DiT
from litdiffusion.nn.unet import UNet

__all__ = ["DiT", "UNet"]
