"""python -m litdiffusion.train: compose, build, run, write the summary."""

import litdiffusion.system.startup  # isort: skip
import litdiffusion.configuration.questions  # noqa: F401  # isort: skip

import logging
import os
import signal
import time

import torch
from lightning import Trainer
from omegaconf import DictConfig

from litdiffusion.configuration.allowlist import require_allowed, trusted_packages
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.nodes import build, refused
from litdiffusion.configuration.resolvers import chosen_experiment
from litdiffusion.configuration.sweeps import typed
from litdiffusion.data.datamodule import ImageDataModule
from litdiffusion.errors import UserError, short_text
from litdiffusion.inference import MODEL_PARTS
from litdiffusion.reporting.curves import curves
from litdiffusion.reporting.page import write_run_page
from litdiffusion.reporting.report import paragraph
from litdiffusion.runs.folder import RunFolder, absolute
from litdiffusion.runs.run import Run
from litdiffusion.slurm.cluster import leave
from litdiffusion.sweeps.machine import SWEEP
from litdiffusion.sweeps.ranking import goals
from litdiffusion.system.memory import keep_freed_memory
from litdiffusion.system.parent_death import children_end_with_this
from litdiffusion.system.redaction import SECRET_KEY, without_secrets
from litdiffusion.system.signals import handling
from litdiffusion.training.callbacks import Interrupted, Monitor, SampleImages, SaveCheckpoints
from litdiffusion.training.callbacks.attached import get_callback, images_seen
from litdiffusion.training.callbacks.interruption import stop_child_observer, stopping_at_once
from litdiffusion.training.loggers.base import RunLogger, close_loggers, complete_loggers, open_loggers
from litdiffusion.training.module import LitDiffusion
from litdiffusion.training.trainer import build_loggers, build_trainer, reason_to_stop, validate_and_sample

log = logging.getLogger("litdiffusion.train")  # run as a script, __name__ is __main__

LARGEST_INPUT = 10.0
"""From where on a network should not be given x_t as it is (Karras et al., 2206.00364, section 5)."""
SUPPLIED = {"trainer": ("logger", "callbacks", "plugins")}
"""Arguments that are not configuration: what is built here and passed on."""


@entry_point("train")
def main(cfg: DictConfig) -> None:
    """Train, or continue to train, the model that the configuration describes."""
    started = time.perf_counter()
    cfg.run_dir = absolute(cfg.run_dir)
    validate(cfg, SUPPLIED)
    goals(cfg)
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
    if run.is_first and (size := module.denoiser.core.largest_input) > LARGEST_INPUT:
        log.warning(
            "The network's input has a standard deviation of up to %.0f, with which it hardly learns:"
            " target=edm scales it to 1",
            size,
        )
    with refused("sampler"):
        build(run.cfg.sampler, "sampler").require_support(module.denoiser)
    optimizer = module.configure_optimizers()["optimizer"]
    if run.resumption:
        run.resumption.require_fitting(module, optimizer)
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
    exit_code = 1
    try:
        images_per_step = trainer.accumulate_grad_batches * datamodule.batch_size
        open_loggers(loggers, run, run.step, images_per_step)
        # Processes wait for each other in C++, where Python's own handler of a Ctrl-C would not run.
        at_once = [signal.SIGINT] if trainer.world_size > 1 else []
        with children_end_with_this(), handling(at_once, signal.SIG_DFL):
            trainer.fit(module, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
        if reason := reason_to_stop(trainer):
            log.info("Stopped at step %d of %d: %s", trainer.global_step, trainer.max_steps, reason)
        with stopping_at_once(trainer):
            validate_and_sample(trainer, module, run)
            if trainer.is_global_zero:
                summarize(run, trainer, module, loggers, started)
        exit_code = 0
    except Interrupted as interrupted:
        exit_code = 128 + interrupted.signum
        if run.is_first:
            again = "" if SWEEP in os.environ else f" with {typed('run_dir', run.folder.path)}"
            log.warning("%s: the same command%s continues", interrupted, again)
        return interrupted.signum
    finally:
        stop_child_observer()
        close_loggers(loggers, exit_code)
    return None


def summarize(
    run: Run, trainer: Trainer, module: LitDiffusion, loggers: list[RunLogger], started: float
) -> None:
    """Draw the curves, write and print the summary."""
    reason = reason_to_stop(trainer)
    monitor, saving = get_callback(trainer, Monitor), get_callback(trainer, SaveCheckpoints)
    if run.folder.metrics.exists():
        curves(run.folder.metrics, run.folder.curves, module.metrics, module.sample_metrics)
    files = run.folder.pictures_of_end(sampled=get_callback(trainer, SampleImages) is not None)
    if saving:
        files = {"checkpoint": saving.last, **files}
    validated = monitor.validated if monitor else {}
    summary = {
        "experiment": chosen_experiment(),
        "seed": run.config["seed"],
        "steps": trainer.global_step,
        **({"stopped": reason, "max_steps": trainer.max_steps} if reason else {}),
        "images_seen": images_seen(trainer),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "images_per_second": round(monitor.images_per_second, 1) if monitor else None,
        "train_loss": monitor.loss if monitor else None,
        **{f"val_{name}": validated.get(f"val/{name}") for name in module.all_metrics},
        "parameters": num_parameters(module),
        "device": str(trainer.strategy.root_device),
        "precision": trainer.precision,
        **({"trust": list(trusted_packages(run.config["trust"]))} if run.config["trust"] else {}),
        **{name: str(path.relative_to(run.folder.path)) for name, path in files.items() if path.exists()},
    }
    close_loggers(loggers)  # a run that is killed before its dashboard has everything is not finished
    run.folder.write_summary(summary)
    print(f"\n{paragraph(summary | write_report(run.folder), run.folder.path)}", flush=True)


def write_report(folder: RunFolder) -> dict[str, str]:
    """Write a finished run's report, unless it is there; return its name. The run does not fail for it."""
    try:
        if not folder.report.exists() or folder.report.stat().st_mtime_ns < folder.summary.stat().st_mtime_ns:
            write_run_page(folder)
    except Exception as error:
        log.warning("%s is not written: %s", folder.report, short_text(error))
    return {"report": folder.report.name} if folder.report.exists() else {}


def report_end(run: Run) -> None:
    """Print how a finished run ended, and send dashboards what they lack."""
    if run.is_first:
        summary = run.folder.read_summary()
        reason = f" ({summary['stopped']})" if "stopped" in summary else ""
        print(
            f"This run is finished, at step {summary['steps']:,}{reason}; a larger trainer.max_steps continues it."
        )
        print(paragraph(summary | write_report(run.folder), run.folder.path), flush=True)
        try:
            complete_loggers(build_loggers(run.cfg), run)
        except UserError as error:
            log.warning("%s", error)  # the run is finished all the same


def num_parameters(module: LitDiffusion) -> int:
    """Count the parameters of the network that is trained."""
    return sum(p.numel() for p in module.denoiser.core.net.parameters())


if __name__ == "__main__":
    main()
