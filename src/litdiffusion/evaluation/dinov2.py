"""DINOv2's network from a file of its weights: torch-fidelity can only have torch.hub fetch its code from GitHub."""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIDE, PATCH, HEAD = 224, 14, 64
"""Pixels along an image and a patch, and channels of an attention head."""
NAMES = {
    r"^cls_token": "class_token",
    r"^pos_embed": "encoder.pos_embedding",
    r"^patch_embed\.proj": "conv_proj",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
    r"norm(\d)": r"ln_\1",
    r"attn\.qkv\.": "self_attention.in_proj_",
    r"attn\.proj": "self_attention.out_proj",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.3",
}
"""DINOv2's names of the weights, and torchvision's."""


def vision_transformer(weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the network, from images [N, 3, 224, 224] to features of the class token [N, D].

    It is torchvision's, but for the scale of each residual branch, which goes into the branch's last layer, and for
    the positions, which are interpolated here once and for all.

    Args:
        weights: what the file of ``dinov2_vits14``, ``dinov2_vitb14`` or ``dinov2_vitl14`` holds.

    Raises:
        KeyError, RuntimeError: it is another file.
    """
    from torchvision.models import VisionTransformer

    state = {name: value for name, value in weights.items() if name != "mask_token"}
    state["pos_embed"] = _positions(state["pos_embed"])
    for branch, last in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in state if name.endswith(f".{branch}.gamma")]:
            scale = state.pop(name)
            for kind in ("weight", "bias"):
                layer = name.replace(f"{branch}.gamma", f"{last}.{kind}")
                state[layer] = torch.einsum("o, o... -> o...", scale, state[layer])
    depth = sum(name.endswith("norm1.weight") for name in state)
    width = state["cls_token"].shape[-1]
    with torch.device("meta"):
        net: nn.Module = VisionTransformer(SIDE, PATCH, depth, width // HEAD, width, 4 * width)
        net.heads = nn.Identity()
    for pattern, name in NAMES.items():
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    net.load_state_dict(state, assign=True)
    return net


def _positions(learned: Float[Tensor, "1 _ d"]) -> Float[Tensor, "1 tokens d"]:
    """Interpolate the embeddings of a grid of patches to the size of these images, as DINOv2 does at each call."""
    old, new = math.isqrt(learned.shape[1] - 1), SIDE // PATCH
    grid = learned[:, 1:].reshape(1, old, old, -1).movedim(-1, 1)
    grid = F.interpolate(grid, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")  # 0.1 is DINOv2's own
    return torch.cat((learned[:, :1], grid.flatten(2).mT), dim=1)
