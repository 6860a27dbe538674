"""Our names for the blog's parameters, so that its weights can be carried over."""

import re

from torch import Tensor, nn

RENAMED = [
    (r"^time_mlp\.", "time_embedding."),
    (r"\bmlp\b", "time_mlp"),
    (r"\bproj\b", "conv"),
    (r"\bres_conv\b", "shortcut"),
    (r"^mid_attn\b", "mid_attention"),
    (r"^final_res_block\b", "final_block"),
    (r"^(downs|ups)\.(\d+)\.0\.", r"\1.\2.block1."),
    (r"^(downs|ups)\.(\d+)\.1\.", r"\1.\2.block2."),
    (r"^(downs|ups)\.(\d+)\.2\.", r"\1.\2.attention."),
    (r"^ups\.(\d+)\.3\.1\.", r"ups.\1.resample."),
    (r"^(downs|ups)\.(\d+)\.3\.", r"\1.\2.resample."),
    (r"\bfn\.fn\b", "layer"),
    (r"\bfn\.norm\b", "norm"),
    (r"\bto_out\.0\b", "to_out"),
    (r"\bto_out\.1\b", "norm"),
]


def our_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def in_our_names(blog: nn.Module, of: str = "parameters") -> dict[str, Tensor]:
    """The blog's parameters, or their gradients, under our names."""
    return {our_name(name): p if of == "parameters" else p.grad for name, p in blog.named_parameters()}


def carry_over(blog: nn.Module, ours: nn.Module) -> None:
    """Give ``ours`` the blog's weights; every name must match on both sides."""
    ours.load_state_dict(in_our_names(blog))
