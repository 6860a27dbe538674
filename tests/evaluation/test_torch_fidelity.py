"""Feature networks of torch-fidelity with weights from a local file; nothing is downloaded."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litdiffusion.evaluation.features import TorchFidelityFeatures, extract, module_hash

pytest.importorskip("torch_fidelity", reason="the extra [features] is not installed")

WIDTH, DEPTH, OLD_SIDE = 128, 2, 37
PIXELS = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def dinov2_weights() -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of DINOv2's files."""
    layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    layers |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + OLD_SIDE**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.{name}.gamma": (WIDTH,) for name in ("ls1", "ls2")}
    norms = [*(f"blocks.{i}.{name}" for i in range(DEPTH) for name in ("norm1", "norm2")), "norm"]
    shapes |= {f"{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def dinov2(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network of the repository facebookresearch/dinov2, word for word but for its options."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attention(x: Tensor, name: str) -> Tensor:
        B, N, C = x.shape
        qkv = linear(x, f"{name}.qkv").reshape(B, N, 3, C // 64, 64).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 64**-0.5, qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return linear((attn @ v).transpose(1, 2).reshape(B, N, C), f"{name}.proj")

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
    patches = w["pos_embed"][:, 1:].reshape(1, OLD_SIDE, OLD_SIDE, WIDTH).permute(0, 3, 1, 2)
    scale = (16 + 0.1) / OLD_SIDE
    patches = F.interpolate(patches, mode="bicubic", scale_factor=(scale, scale))
    x = x + torch.cat((w["pos_embed"][:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)), dim=1)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        x = x + attention(norm(x, f"{block}.norm1"), f"{block}.attn") * w[f"{block}.ls1.gamma"]
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") * w[f"{block}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


def test_dinov2_from_a_file_is_dinov2(tmp_path: Path) -> None:
    weights = dinov2_weights()
    torch.save(weights, tmp_path / "dinov2.pth")
    network = TorchFidelityFeatures("dinov2-vit-b-14", "dinov2", weights=str(tmp_path / "dinov2.pth"))
    seen: list[Tensor] = []
    network.network.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = extract(network, [PIXELS])
    assert found.logits is None
    assert seen[0].shape == (2, 3, 224, 224)
    assert torch.allclose(found.features, dinov2(weights, seen[0]).double(), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    weights["norm.bias"] += 1
    torch.save(weights, tmp_path / "other.pth")
    other = TorchFidelityFeatures("dinov2-vit-b-14", "dinov2", weights=str(tmp_path / "other.pth"))
    assert module_hash(other) != module_hash(network)


def test_inception_from_a_file(tmp_path: Path) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    kind = inception.FeatureExtractorInceptionV3
    with patch.object(inception, "load_state_dict_from_url"), patch.object(kind, "load_state_dict"):
        made = kind("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(made.state_dict(), tmp_path / "inception.pth")
    path = str(tmp_path / "inception.pth")
    network = TorchFidelityFeatures("inception-v3-compat", "2048", "logits_unbiased", path)
    found = extract(network, [PIXELS[:1]])
    expected = made(PIXELS[:1].expand(-1, 3, -1, -1))
    assert found.logits is not None
    assert torch.equal(found.features, expected[0].double())
    assert torch.equal(found.logits, expected[1].double())


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (None, "No such file"),
        (b"nothing", "Weights only load failed"),
        ({"a": torch.zeros(1)}, "pos_embed"),
    ],
)
def test_files_that_hold_no_weights(held: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if isinstance(held, bytes):
        path.write_bytes(held)
    elif held is not None:
        torch.save(held, path)
    with pytest.raises(ValueError, match=f"weights={path}: they make no dinov2-vit-b-14 .*{reason}"):
        TorchFidelityFeatures("dinov2-vit-b-14", "dinov2", weights=str(path))
