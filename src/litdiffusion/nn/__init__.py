"""Networks, as plain ``nn.Module`` classes."""

from litdiffusion.nn.dit import DiT
from litdiffusion.nn.unet import UNet

__all__ = ["DiT", "UNet"]
