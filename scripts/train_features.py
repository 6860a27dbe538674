"""Train the network behind ``features=fashion_mnist``: ``python scripts/train_features.py``.

It takes about 20 minutes on two cores, prints the accuracy on the test split, and writes the weights, in float16,
to src/litdiffusion/evaluation/weights/fashion_mnist.pt. ``configs/features/fashion_mnist.yaml`` names the SHA-256
that it prints. The seed fixes everything but the rounding of the machine, so that another machine's weights differ:
numbers measured with other weights do not compare.
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.data.sources.fashion_mnist import FashionMNIST
from litdiffusion.data.stores import to_float
from litdiffusion.nn.classifier import Classifier

EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY, SMOOTHING, SHIFT, SEED = 16, 256, 4e-3, 0.05, 0.1, 2, 0
OUT = Path(__file__).parents[1] / "src/litdiffusion/evaluation/weights/fashion_mnist.pt"


def splits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the images [N, 1, 28, 28], uint8, and labels of the training split and of the test split."""
    data = ImageDataModule(FashionMNIST("data/fashion-mnist"), BATCH, seed=SEED, num_val=10_000)
    data.prepare_data()
    data.setup()
    (train, test) = (data._store(stage) for stage in ("fit", "validate"))
    return (train.images, train.labels), (test.images, test.labels)


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Mirror half of the images, and shift each by up to ``SHIFT`` pixels."""
    count, _, height, width = images.shape
    images = torch.where(
        (torch.rand(count, generator=random) < 0.5)[:, None, None, None], images.flip(-1), images
    )
    padded = nn.functional.pad(images, (SHIFT,) * 4)
    top, left = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=random)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose class is recognized."""
    net.eval()
    hits = [
        net(to_float(x)).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    net.train()
    return float(torch.cat(hits).double().mean())


def main() -> None:
    """Train, measure, write."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    (images, labels), test = splits()
    net = Classifier().to(memory_format=torch.channels_last)
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * steps)
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=random)[: steps * BATCH]
        for index in order.split(BATCH):
            x = to_float(augmented(images[index], random)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)
            loss = nn.functional.cross_entropy(logits.float(), labels[index], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}/{EPOCHS}: loss {loss:.3f}, test {accuracy(net, *test):.4f}, {seconds:.0f} s",
            flush=True,
        )
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()
    }
    net.load_state_dict(weights)
    OUT.parent.mkdir(exist_ok=True)
    torch.save(weights, OUT)
    print(f"test accuracy of the saved weights {accuracy(net, *test):.4f}; {OUT.stat().st_size} bytes")
    print(f"sha256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
