"""The contenders of ``train_step.py``; run as a program, it measures one of them in this process.

    python benchmarks/contenders.py KEY [--batch-size 128] [--warmup 2] [--steps 4]

prints one line of JSON: seconds of each training step and of each sampling step, or, where KEY is ``input``, of
each batch of our input pipeline. Peers train on a batch that lies ready in memory; ours is a run of the real
trainer, so its steps include the input pipeline.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import Tensor

from peers import blog, libraries
from peers.libraries import SIZES, Setting, Steps

SIZE = 28


@dataclass(frozen=True)
class Plan:
    """What is measured: ``steps`` steps of a batch after ``warmup`` steps that do not count."""

    batch_size: int
    warmup: int
    steps: int

    @property
    def total(self) -> int:
        return self.warmup + self.steps

    def batch(self) -> Tensor:
        return torch.rand(self.batch_size, 1, SIZE, SIZE) * 2 - 1


@dataclass(frozen=True)
class Seconds:
    """The time of each step that counts."""

    train: list[float]
    sample: list[float]


@dataclass(frozen=True)
class Contender:
    title: str
    measure: Callable[[Plan], Seconds]
    absent: Callable[[], str | None] = lambda: None
    """Why it cannot run here, or None."""


def timed(step: Callable[[], object], plan: Plan) -> list[float]:
    """Seconds of each call that counts."""
    return between_ticks((step() for _ in range(plan.total)), plan)


def between_ticks(ticks: Iterable[object], plan: Plan) -> list[float]:
    """Seconds that each item took to come, the first ``warmup`` not counted."""
    stamps = [time.perf_counter()]
    stamps += [time.perf_counter() for _ in ticks]
    return [stop - start for start, stop in pairwise(stamps)][plan.warmup :]


def the_blog(plan: Plan) -> Seconds:
    model = blog.Unet(dim=28, channels=1, dim_mults=(1, 2, 4))
    training = blog.Diffusion(blog.linear_betas(300))
    train = between_ticks(blog.train(model, training, [plan.batch()] * plan.total), plan)
    t = torch.full((plan.batch_size,), 150)
    x = plan.batch()
    return Seconds(train, timed(lambda: training.p_sample(model, x, t, 150), plan))


def the_blog_with_our_allocator(plan: Plan) -> Seconds:
    from litdiffusion.system.memory import keep_freed_memory

    keep_freed_memory()
    return the_blog(plan)


def ours(precision: str, preset: str = "cpu") -> Callable[[Plan], Seconds]:
    """The blog's network and the step of ``experiment=fashion_mnist``, by the modules and the trainer of ``train``.

    Where ``trainer=preset`` has several processes, Lightning starts this program once more for each of the
    others. All train, and sample, on their share of the batch; a step is over when it is over in each of them.
    """

    def measure(plan: Plan) -> Seconds:
        from hydra import compose, initialize_config_dir
        from lightning import Callback

        from litdiffusion.configuration import config_folder
        from litdiffusion.configuration.nodes import build
        from litdiffusion.diffusion import DDIM, Draws
        from litdiffusion.system.memory import keep_freed_memory
        from litdiffusion.system.processes import gathered, share_of

        class Stopwatch(Callback):
            def __init__(self) -> None:
                self.stamps: list[float] = []

            def on_train_start(self, trainer: object, pl_module: object) -> None:
                self.stamps.append(time.perf_counter())

            def on_train_batch_end(self, *args: object) -> None:
                self.stamps.append(time.perf_counter())

        keep_freed_memory()
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                *("experiment=fashion_mnist", "net=unet", "optimizer=adamw", "data=digits"),
                *(f"data.image_size={SIZE}", "data.flip=true"),
                *(f"datamodule.batch_size={plan.batch_size}", f"run_dir={folder}"),
                *(f"trainer={preset}", f"trainer.precision={precision}", f"trainer.max_steps={plan.total}"),
                "lr_scheduler.warmup_steps=1",
            ]
            with initialize_config_dir(str(config_folder()), version_base="1.3"):
                cfg = compose("train", overrides)
            datamodule = build(cfg.datamodule, "datamodule")
            module = build(cfg.module, "module")
            watch = Stopwatch()
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = build(cfg.trainer, "trainer", callbacks=[watch], **quiet)
            trainer.fit(module, datamodule=datamodule)
        stamps = watch.stamps
        train = [stop - start for start, stop in pairwise(stamps)][plan.warmup :]
        denoiser = module.ema_denoiser.eval()
        # The first output comes before the image has moved, the last without a call of the network: between
        # them, each is one whole step.
        mine = share_of(plan.batch_size)
        draws = Draws.at(0, "sample", start=mine.start, stop=mine.stop)
        with trainer.precision_plugin.forward_context():  # as the samples of a training are made
            outputs = DDIM(num_steps=plan.total + 1).steps(denoiser, plan.batch()[mine], draws)
            next(outputs)
            ends = (gathered(None) for _ in islice(outputs, plan.total))
            return Seconds(train, between_ticks(ends, plan))

    return measure


def library(steps: Callable[[Setting], Steps]) -> Callable[[Plan], Seconds]:
    """Another library, in float32 on this processor."""

    def measure(plan: Plan) -> Seconds:
        theirs = steps(Setting(SIZES["blog"], plan.batch_size))
        train = timed(theirs.train, plan)
        theirs.sampled.eval()
        return Seconds(train, timed(theirs.sample, plan))

    return measure


def input_pipeline(plan: Plan) -> list[float]:
    """Seconds of each batch of ours, flipped and scaled, with nothing else to do."""
    from litdiffusion.data.datamodule import ImageDataModule
    from litdiffusion.data.sources import Digits

    source = Digits(image_size=SIZE, channels=1, flip=True)
    datamodule = ImageDataModule(source, plan.batch_size, seed=0)
    datamodule.setup("fit")
    batches = iter(datamodule.train_dataloader())
    return timed(lambda: datamodule.finish(next(batches), training=True), plan)


def without(module: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(module) else f"{module} is not installed"


def without_bfloat16() -> str | None:
    from litdiffusion.configuration.hardware import native_precision

    return None if native_precision("cpu") == "bf16-mixed" else "this processor has no bfloat16 of its own"


CONTENDERS = {
    "blog": Contender("the blog's code, float32", the_blog),
    "blog_allocator": Contender(
        "the blog's code, float32, with our allocator setting", the_blog_with_our_allocator
    ),
    "ours": Contender("litdiffusion, float32", ours("32-true")),
    "ours_ddp": Contender(
        "litdiffusion, float32, the batch shared by two processes (`trainer=ddp_cpu`)",
        ours("32-true", "ddp_cpu"),
    ),
    "ours_bf16": Contender("litdiffusion, bf16-mixed", ours("bf16-mixed"), without_bfloat16),
    "ddpm_pytorch": Contender(
        "denoising-diffusion-pytorch, float32",
        library(libraries.ddpm_pytorch),
        without("denoising_diffusion_pytorch"),
    ),
    "diffusers": Contender(
        "diffusers UNet2DModel (4.02M), float32", library(libraries.diffusers), without("diffusers")
    ),
}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("key", choices=[*CONTENDERS, "input"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    plan = Plan(arguments.batch_size, arguments.warmup, arguments.steps)
    if arguments.key == "input":
        print(json.dumps({"batch": input_pipeline(plan)}))
    else:
        seconds = CONTENDERS[arguments.key].measure(plan)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(json.dumps(asdict(seconds)))


if __name__ == "__main__":
    # Where the package is not installed, the checkout that this file lies in is what is measured.
    sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))
    main()
