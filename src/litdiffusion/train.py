"""python -m litdiffusion.train: compose, build, run, write the summary."""

import litdiffusion.system.startup  # noqa: F401  # isort: skip

import logging
import time
from contextlib import nullcontext

import torch
from lightning import Trainer
from omegaconf import DictConfig

from litdiffusion.configuration.allowlist import require_allowed, trusted_packages
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.nodes import build, refused
from litdiffusion.configuration.resolvers import chosen_experiment
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.errors import UserError
from litdiffusion.inference import MODEL_PARTS
from litdiffusion.reporting.curves import curves
from litdiffusion.reporting.report import paragraph
from litdiffusion.runs.folder import absolute
from litdiffusion.runs.run import Run
from litdiffusion.slurm.cluster import leave
from litdiffusion.system.memory import keep_freed_memory
from litdiffusion.system.parent_death import children_end_with_this
from litdiffusion.system.redaction import SECRET_KEY, without_secrets
from litdiffusion.training.callbacks import Interrupted, Monitor, SampleImages, SaveCheckpoints
from litdiffusion.training.callbacks.attached import get_callback, images_seen
from litdiffusion.training.callbacks.interruption import ending_at_once, stop_child_observer, stopping_at_once
from litdiffusion.training.loggers.base import RunLogger, close_loggers, complete_loggers, open_loggers
from litdiffusion.training.module import LitDiffusion
from litdiffusion.training.trainer import build_loggers, build_trainer, validate_and_sample

log = logging.getLogger("litdiffusion.train")  # run as a script, __name__ is __main__

SUPPLIED = {"trainer": ("logger", "callbacks", "plugins")}
"""Arguments that are not configuration: what is built here and passed on."""


@entry_point("train")
def main(cfg: DictConfig) -> None:
    """Train, or continue to train, the model that the configuration describes."""
    started = time.perf_counter()
    cfg.run_dir = absolute(cfg.run_dir)
    validate(cfg, SUPPLIED)
    run = Run(cfg, MODEL_PARTS)
    with run.lock:
        if run.is_finished:
            report_end(run)
            return
        signum = train(run, started)
    if signum:
        leave(signum)


def train(run: Run, started: float) -> int | None:
    """Train to the end of the run; return the signal that stopped it before, if one did."""
    # Whatever can be refused is refused here, before data is fetched or read.
    run.require_steps_left()
    require_allowed(run.model_config, trust=run.cfg.trust)
    keep_freed_memory()
    datamodule: ImageDataModule = build(run.cfg.datamodule, "datamodule")
    torch.manual_seed(run.cfg.seed)  # every process starts from the same weights
    module: LitDiffusion = build(run.cfg.module, "module")
    with refused("sampler"):
        build(run.cfg.sampler, "sampler").require_support(module.denoiser)
    optimizer = module.configure_optimizers()["optimizer"]
    if run.resumption:
        run.resumption.require_fitting(module.state_dict(), optimizer)
    run.folder.require_usable()
    loggers = build_loggers(run.cfg)
    trainer = build_trainer(run.cfg, loggers)

    datamodule.trainer = trainer  # it knows how many processes hold the images, and whether they go to a GPU
    datamodule.prepare_data()
    datamodule.setup("fit")
    run.begin(datamodule.fingerprint())
    if saving := get_callback(trainer, SaveCheckpoints):
        saving.embed(
            model_config=run.model_config,
            data_config=without_secrets(run.config["data"], SECRET_KEY),
            held_out=datamodule.held_out_fingerprint(),
            class_names=datamodule.source.class_names,
        )
    log.info(
        f"{f'Continuing from step {run.step} of' if run.resumption else 'Training'} {trainer.max_steps:,} steps:"
        f" {num_parameters(module):,} parameters on {trainer.strategy.root_device}, {trainer.precision}."
        f" Run folder: {run.folder.path}"
    )
    try:
        images_per_step = trainer.accumulate_grad_batches * datamodule.batch_size
        open_loggers(loggers, run, run.step, images_per_step)
        with children_end_with_this(), ending_at_once() if trainer.world_size > 1 else nullcontext():
            trainer.fit(module, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
        with stopping_at_once(trainer):
            validate_and_sample(trainer, module, run)
            if trainer.is_global_zero:
                summarize(run, trainer, module, loggers, started)
    except Interrupted as interrupted:
        if run.is_first:
            log.warning("%s: the same command with run_dir=%s continues", interrupted, run.folder.path)
        return interrupted.signum
    finally:
        stop_child_observer()
        close_loggers(loggers)
    return None


def summarize(
    run: Run, trainer: Trainer, module: LitDiffusion, loggers: list[RunLogger], started: float
) -> None:
    """Draw the curves, write and print the summary."""
    monitor, saving = get_callback(trainer, Monitor), get_callback(trainer, SaveCheckpoints)
    if run.folder.metrics.exists():
        curves(run.folder.metrics, run.folder.curves, module.metrics)
    files = run.folder.pictures_of_end(sampled=get_callback(trainer, SampleImages) is not None)
    if saving:
        files = {"checkpoint": saving.last, **files}
    validated = monitor.validated if monitor else {}
    summary = {
        "experiment": chosen_experiment(),
        "seed": run.config["seed"],
        "steps": trainer.global_step,
        "images_seen": images_seen(trainer),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "images_per_second": round(monitor.images_per_second, 1) if monitor else None,
        "train_loss": monitor.loss if monitor else None,
        **{f"val_{name}": validated.get(f"val/{name}") for name in (*module.metrics, *module.sample_metrics)},
        "parameters": num_parameters(module),
        "device": str(trainer.strategy.root_device),
        "precision": trainer.precision,
        "run_dir": str(run.folder.path),
        **({"trust": list(trusted_packages(run.config["trust"]))} if run.config["trust"] else {}),
        **{name: str(path) for name, path in files.items() if path.exists()},
    }
    close_loggers(loggers)  # a run that is killed before its dashboard has everything is not finished
    run.folder.write_summary(summary)
    print(f"\n{paragraph(summary, run.folder.path)}", flush=True)


def report_end(run: Run) -> None:
    """Print how a finished run ended, and send dashboards what they lack."""
    if run.is_first:
        summary = run.folder.read_summary()
        print(f"This run is finished, at step {summary['steps']:,}; a larger trainer.max_steps continues it.")
        print(paragraph(summary, run.folder.path), flush=True)
        try:
            complete_loggers(build_loggers(run.cfg), run)
        except UserError as error:
            log.warning("%s", error)  # the run is finished all the same


def num_parameters(module: LitDiffusion) -> int:
    """Count the parameters of the network that is trained."""
    return sum(p.numel() for p in module.denoiser.core.net.parameters())


if __name__ == "__main__":
    main()
