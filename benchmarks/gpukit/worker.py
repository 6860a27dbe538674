"""One contender of the kit's speed part, in a process of its own that waits for its turns.

    python benchmarks/gpukit/worker.py '{"contender": "ours", "network": "blog", "batch_size": 128, ...}'

It builds and compiles, takes some steps that do not count, and prints a line of JSON. From then on it answers each
line on its standard input, ``time`` or ``profile``, with a line of JSON; at the end of the input it leaves. Between
its turns it holds little of the GPU's memory and none of its time.
"""

import copy
import fcntl
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from gpukit.speed import ABSENT
from peers import libraries
from peers.libraries import SIZES, Setting

WARMUP = 3
TURN_SECONDS = 1.0
FEWEST, MOST = 5, 100
"""Steps of a turn."""
PROFILED_STEPS = 3
LARGE_BATCH = 512
"""From here on, contenders that do not compile warm up one after the other: together they would fill the card."""
LOCKS: list[int] = []
TRIES = 6
"""While the others warm up beside it, a contender may find the memory taken."""
MEMORY_IS_TAKEN = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED", "CUDNN_STATUS")
IMAGES = 2048

Turns = Iterator[None]
"""Yields whenever one more training step is wanted."""


def main() -> None:
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os.nice(5)  # while it compiles, the tests run
    if task["contender"] == "matmul":
        matrix_product(task["device"], answers)
        return
    size = SIZES[task["network"]]
    setting = Setting(size, task["batch_size"], task["device"], bfloat16=True, compiled=task["compiled"])
    if task["batch_size"] >= LARGE_BATCH and not task["compiled"]:
        LOCKS.append(os.open(__file__, os.O_RDONLY))
        fcntl.flock(LOCKS[0], fcntl.LOCK_EX)
    for left in reversed(range(TRIES)):
        torch.manual_seed(0)
        try:
            CONTENDERS[task["contender"]](setting, answers)
            return
        except ImportError as error:
            sys.exit(f"{ABSENT} {error.name} is not installed")
        except RuntimeError as error:
            if not left or not any(word in str(error) for word in MEMORY_IS_TAKEN):
                raise
        gc.collect()
        torch.cuda.empty_cache()
        time.sleep(3 + 4 * random.random())


# -------------------------------------------------------------------------------------------------- contenders


def ours(setting: Setting, answers: TextIO) -> None:
    """The step of ``experiment=fashion_mnist net=unet optimizer=adamw`` by the trainer of ``train``.

    It samples as ``load_model`` does.
    """
    from hydra import compose, initialize_config_dir
    from lightning import Callback

    from litdiffusion.configuration import config_folder
    from litdiffusion.configuration.nodes import build
    from litdiffusion.data.datamodule import ImageDataModule
    from litdiffusion.diffusion import DDIM, Draws
    from litdiffusion.nn.blocks import fold_weight_standardization

    size, on_gpu = setting.size, setting.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *("experiment=fashion_mnist", "net=unet", "optimizer=adamw", f"run_dir={folder}", *size.ours),
            *(f"data.image_size={size.image_size}", f"data.channels={size.channels}"),
            *(f"trainer={'gpu' if on_gpu else 'cpu'}", "trainer.precision=bf16-mixed"),
        ]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = compose("train", overrides)
        module = build(cfg.module, "module")

        class TakeTurns(Callback):
            turns: Turns

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                net = module.denoiser.core.net
                sampled = copy.deepcopy(module.ema_net)
                denoiser = module.denoiser.with_net(fold_weight_standardization(sampled)).eval()
                x = setting.batch()
                draws = Draws.at(0, "sample", start=0, stop=len(x), device=x.device)
                with setting.autocast():
                    flops = forward_flops(lambda: net(x[:2], torch.zeros(2, device=x.device)))
                setting.compile(net)
                setting.compile(denoiser.core.net)

                def sample(steps: int) -> None:
                    with setting.autocast():
                        for _ in islice(DDIM(num_steps=steps + 1).steps(denoiser, x, draws), steps):
                            pass

                self.turns = take_turns(net, flops, sample, setting, answers)
                next(self.turns)

            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if next(self.turns, "over") == "over":
                    trainer.should_stop = True

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        free = {"max_steps": -1, "limit_val_batches": 0}
        trainer = build(cfg.trainer, "trainer", callbacks=[TakeTurns()], **quiet, **free)
        trainer.fit(
            module, datamodule=ImageDataModule(random_images(setting), setting.batch_size, seed=0, num_val=0)
        )


def random_images(setting: Setting) -> Any:
    """A source of random images, so that ours is measured with its input pipeline and its flips."""
    import numpy as np

    from litdiffusion.data.decoding import array_dataset
    from litdiffusion.data.sources import Source

    size = setting.size
    shape = (max(IMAGES, setting.batch_size), size.channels, size.image_size, size.image_size)

    class RandomImages(Source):
        name = "random images"

        def load(self, split: str) -> Any:
            pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            return array_dataset(pixels, np.zeros(len(pixels), dtype=np.uint8), ["any"])

    return RandomImages(size.image_size, size.channels, flip=True)


def library(steps: Callable[[Setting], libraries.Steps]) -> Callable[[Setting, TextIO], None]:
    """Another library: its batch lies ready on the device."""

    def measure(setting: Setting, answers: TextIO) -> None:
        theirs = steps(setting)
        x = setting.batch()[:2]
        with setting.autocast():  # forward itself, for a call would compile it
            flops = forward_flops(lambda: theirs.net.forward(x, torch.zeros(2, device=x.device)))

        def sample(steps: int) -> None:
            theirs.sampled.eval()
            for _ in range(steps):
                theirs.sample()
            theirs.net.train()

        for _ in take_turns(theirs.net, flops, sample, setting, answers):
            theirs.train()

    return measure


CONTENDERS: dict[str, Callable[[Setting, TextIO], None]] = {
    "ours": ours,
    "ddpm_pytorch": library(libraries.ddpm_pytorch),
    "diffusers": library(libraries.diffusers),
}


def matrix_product(device: str, answers: TextIO) -> None:
    """The rate of a bfloat16 matrix product of random numbers: the peak that the others are held against."""
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    a @ b
    say(answers, {"ready": True})
    for _ in sys.stdin:
        for _ in range(WARMUP):
            a @ b
        start = now(device)
        for _ in range(20):
            a @ b
        say(answers, {"tflops": 20 * 2 * n**3 / (now(device) - start) / 1e12})


# ------------------------------------------------------------------------------------------------------- turns


def take_turns(
    net: nn.Module, flops: float, sample: Callable[[int], None], setting: Setting, answers: TextIO
) -> Turns:
    """Warm up, then measure whenever a turn is given; each yield asks for one training step."""
    device = setting.device

    def train(steps: int) -> Iterator[None]:
        for _ in range(steps):
            yield

    yield from train(WARMUP)
    sample(WARMUP)
    parameters = sum(p.numel() for p in net.parameters())
    say(answers, {"ready": True, "parameters": parameters, "forward_gflop_per_image": flops / 1e9})
    rest(device)
    while LOCKS:
        os.close(LOCKS.pop())

    for line in sys.stdin:
        answer: dict[str, Any] = {}
        yield from train(WARMUP)
        if line.strip() == "profile":
            with profiler(device) as trace:
                yield from train(PROFILED_STEPS)
                now(device)
            answer = read_profile(trace, device)
        else:
            start = now(device)
            yield from train(FEWEST)
            steps = steps_of_a_turn((now(device) - start) / FEWEST, device)
            reset_peak(device)
            start = now(device)
            yield from train(steps)
            answer["train_seconds"] = (now(device) - start) / steps
            answer["train_peak_gib"] = peak_gib(device)
            sample(WARMUP)
            start = now(device)
            sample(FEWEST)
            steps = steps_of_a_turn((now(device) - start) / FEWEST, device)
            reset_peak(device)
            start = now(device)
            sample(steps)
            answer["sample_seconds"] = (now(device) - start) / steps
            answer["sample_peak_gib"] = peak_gib(device)
        say(answers, answer)
        rest(device)


def steps_of_a_turn(seconds: float, device: str) -> int:
    """As many as fill the time of a turn; in a dry run, few."""
    if device != "cuda":
        return FEWEST
    return max(FEWEST, min(MOST, round(TURN_SECONDS / seconds)))


def forward_flops(forward: Callable[[], object]) -> float:
    """Floating-point operations of a forward pass, of each of two images."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 2


def profiler(device: str) -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU])


def read_profile(trace: Any, device: str) -> dict[str, Any]:
    """The kernels that took the most time, and how long the device was busy, for each step.

    A dry run on the CPU reads its operators in the place of kernels.
    """
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [
        event
        for event in trace.events()
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    microseconds: dict[str, float] = {}
    for event in events:
        spent = event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
        microseconds[event.name] = microseconds.get(event.name, 0.0) + spent
    total = sum(microseconds.values())
    longest = sorted(microseconds.items(), key=lambda item: -item[1])[:10]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    return {
        "busy_ms": union_length(spans) / 1e3 / PROFILED_STEPS if spans else None,
        "kernels": len(events) // PROFILED_STEPS,
        "longest": [
            {"name": name, "ms": spent / 1e3 / PROFILED_STEPS, "share": spent / total}
            for name, spent in longest
        ],
    }


def union_length(spans: list[tuple[float, float]]) -> float:
    """The length of what the spans cover together: where two overlap, once."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def now(device: str) -> float:
    """The time when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rest(device: str) -> None:
    """Give back the memory that only a step needs."""
    if device == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def say(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
