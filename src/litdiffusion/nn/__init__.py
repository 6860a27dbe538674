"""The network: tensors in, tensors out. Knows nothing of diffusion beyond a batch of times."""

from litdiffusion.nn.unet import UNet

__all__ = ["UNet"]
