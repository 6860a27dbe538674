"""python -m litdiffusion.train: compose, build, run, write the summary."""

import litdiffusion.preflight  # noqa: F401  # isort: skip

import logging
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf

from litdiffusion.configuration.allowlist import require_allowed, trusted_packages
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point, process_rank
from litdiffusion.configuration.nodes import build
from litdiffusion.configuration.resolvers import chosen_experiment
from litdiffusion.errors import UserError
from litdiffusion.inference import MODEL_PARTS
from litdiffusion.orphans import children_end_with_this
from litdiffusion.redaction import SECRET_KEY, without_secrets
from litdiffusion.reporting.curves import curves
from litdiffusion.reporting.report import paragraph
from litdiffusion.runs.folder import RunFolder, absolute
from litdiffusion.runs.lock import RunLock
from litdiffusion.runs.provenance import provenance
from litdiffusion.runs.resume import Resumption, check_same_data, find_resumption, set_damaged_aside
from litdiffusion.training.callbacks import Interrupted, Monitor, SampleImages, SaveCheckpoints
from litdiffusion.training.callbacks.attached import datamodule_of, find, images_seen
from litdiffusion.training.callbacks.interruption import ending_at_once, stopping_at_once
from litdiffusion.training.checkpoint_io import WholeCheckpointIO
from litdiffusion.training.cluster import cluster_environment, leave, leave_in_peace
from litdiffusion.training.loggers import ForeignLogger, RunLogger, described
from litdiffusion.training.memory import keep_freed_memory
from litdiffusion.training.module import LitDiffusion

log = logging.getLogger("litdiffusion.train")  # run as a script, __name__ is __main__

SUPPLIED = {
    "trainer": ("logger", "callbacks", "plugins"),
}
"""Arguments that are not configuration: what is built here and passed on."""


@entry_point("train")
def main(cfg: DictConfig) -> None:
    """Train, or go on training, the model that the configuration describes."""
    started = time.perf_counter()
    cfg.run_dir = absolute(cfg.run_dir)
    validate(cfg, SUPPLIED)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    run = RunFolder(Path(cfg.run_dir))
    with RunLock(run.path, first=process_rank() == 0) as lock:
        stopped_by = train(cfg, config, run, lock, started)
    if stopped_by:
        leave(stopped_by)


def train(
    cfg: DictConfig, config: dict[str, Any], run: RunFolder, lock: RunLock, started: float
) -> int | None:
    """Do it; return the signal that stopped it before its end, if one did."""
    model_config = without_secrets({name: config[name] for name in MODEL_PARTS}, SECRET_KEY)
    resumption = find_resumption(run, config, cfg.resume)
    if resumption:
        resumption.check_model(model_config)
    if resumption and resumption.step >= cfg.trainer.max_steps:
        if run.has_ended_at(cfg.trainer.max_steps):
            summary = run.read_summary()
            say(
                f"This run is finished, at step {summary['steps']:,}; a larger trainer.max_steps continues it."
            )
            say(paragraph(summary, run.path))
            if process_rank() == 0:
                complete(cfg, config, run)
            return None
        elsewhere = resumption.checkpoint.parent != run.checkpoints
        if elsewhere or resumption.step > cfg.trainer.max_steps:
            which = f"resume={cfg.resume}: that run" if elsewhere else f"run_dir {run.path}: this run"
            raise UserError(
                f"{which} has come to step {resumption.step} already; give a larger trainer.max_steps than"
                f" {cfg.trainer.max_steps}"
            )

    # Whatever can be refused is refused here, before data is fetched or read.
    require_allowed(model_config, trust=cfg.trust)
    keep_freed_memory()
    datamodule = build(cfg.datamodule, "datamodule")
    torch.manual_seed(cfg.seed)  # every process starts from the same weights
    module: LitDiffusion = build(cfg.module, "module")
    optimizer = module.configure_optimizers()["optimizer"]
    if resumption:
        resumption.check_weights(module.state_dict())
        resumption.check_optimizer(optimizer)
    run.check()
    loggers = build_loggers(cfg)
    trainer = build_trainer(cfg, loggers)

    datamodule.prepare_data()
    datamodule.setup("fit")
    if resumption:
        check_same_data(run, datamodule.fingerprint())
    run.prepare()
    if lock.take() and find_resumption(run, config, cfg.resume) != resumption:
        raise UserError(
            f"run_dir {run.path} was begun by another job meanwhile: the same command continues it"
        )
    if process_rank() == 0:
        run.tidy()
        run.describe(config, overrides(), provenance(cfg.seed))
        run.remember_data(datamodule.fingerprint())
        if resumption:
            set_damaged_aside(resumption)
    if saving := find(trainer, SaveCheckpoints):
        saving.embed(
            model_config=model_config,
            data_config=without_secrets(config["data"], SECRET_KEY),
            held_out=datamodule.held_out_fingerprint(),
        )
    announce(trainer, module, run, resumption)

    stopped_by = None
    try:
        images_per_step = trainer.accumulate_grad_batches * datamodule.batch_size
        for logger in loggers:
            logger.resume_at(resumption.step if resumption else 0, images_per_step)
        shown = described(config, overrides())
        for logger in loggers:
            logger.describe(shown)
        checkpoint = resumption.checkpoint if resumption else None
        with children_end_with_this(), ending_at_once() if trainer.world_size > 1 else nullcontext():
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        with stopping_at_once(trainer):
            finish(trainer, module, run, config, loggers, started)
    except Interrupted as interrupted:
        if process_rank() == 0:
            log.warning("%s: the same command with run_dir=%s continues", interrupted, run.path)
        stopped_by = interrupted.signum
    finally:
        leave_in_peace()
        close(loggers)
    return stopped_by


def build_trainer(cfg: DictConfig, loggers: list[RunLogger]) -> Trainer:
    """Build the callbacks and the trainer that runs them."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.* is deprecated"
    )  # Lightning's own, with this torch
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # and need not be used
    # DDP compares strides of 1x1 convolutions, where channels last and first are the same order in memory.
    strides = r"(?s)Grad strides do not match.*grad\.sizes\(\) = \[\d+, \d+, 1, 1\]"
    warnings.filterwarnings("ignore", message=strides)
    # Of a batch's fields it takes the first, the images, whose number is the right one.
    warnings.filterwarnings("ignore", message="Trying to infer the `batch_size`")
    callbacks = [build(node, f"callbacks.{name}") for name, node in cfg.callbacks.items() if node]
    plugins = [plugin for plugin in (WholeCheckpointIO(), cluster_environment()) if plugin]
    supplied: dict[str, Any] = {"logger": loggers, "callbacks": callbacks, "plugins": plugins}
    if not cfg.datamodule.num_val:
        supplied["limit_val_batches"] = 0  # or Lightning warns that there is nothing to validate on
    trainer: Trainer = build(cfg.trainer, "trainer", **supplied)
    return trainer


def build_loggers(cfg: DictConfig) -> list[RunLogger]:
    """Build them; none is opened yet."""
    loggers = [build(node, f"logger.{name}") for name, node in cfg.logger.items() if node]
    return [logger if isinstance(logger, RunLogger) else ForeignLogger(logger) for logger in loggers]


def close(loggers: list[RunLogger]) -> None:
    """Finish what each keeps open; closed once more, they do nothing."""
    for logger in loggers:
        logger.close()


def announce(trainer: Trainer, module: LitDiffusion, run: RunFolder, resumption: Resumption | None) -> None:
    """Say what is about to happen, in one line."""
    if process_rank() > 0:
        return
    start = f"Continuing from step {resumption.step} of" if resumption else "Training"
    log.info(
        "%s %s steps: %s parameters on %s, %s. Run folder: %s",
        start,
        f"{trainer.max_steps:,}",
        f"{num_parameters(module):,}",
        trainer.strategy.root_device,
        trainer.precision,
        run.path,
    )


def finish(
    trainer: Trainer,
    module: LitDiffusion,
    run: RunFolder,
    config: dict[str, Any],
    loggers: list[RunLogger],
    started: float,
) -> None:
    """Validate and sample the trained model, draw the curves, write and print the summary."""
    monitor, saving = find(trainer, Monitor), find(trainer, SaveCheckpoints)
    if monitor and monitor.validated_step != trainer.global_step and datamodule_of(trainer).num_val:
        trainer.validate(module, datamodule=datamodule_of(trainer), verbose=False)
        if saving:
            saving.save(trainer, again=True)  # a run that is stopped from here on has validated its end
    if trainer.is_global_zero:
        run.forget_summary()
    sampling = find(trainer, SampleImages)
    if sampling:
        sampling.finish(trainer, module)
    if not trainer.is_global_zero:
        return
    if run.metrics.exists():
        curves(run.metrics, run.curves, module.metrics)
    files = {
        "checkpoint": saving.last if saving else None,
        # Without sampling, the pictures that lie there are of an earlier end of this run.
        "grid": run.samples / "grid.png" if sampling else None,
        "gif": run.samples / "denoising.gif" if sampling else None,
        "noised_strip": run.samples / "noised_strip.png",
        "curves": run.curves,
    }
    validated = monitor.validated if monitor else {}
    summary = {
        "experiment": chosen_experiment(),
        "seed": config["seed"],
        "steps": trainer.global_step,
        "images_seen": images_seen(trainer),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "images_per_second": round(monitor.images_per_second, 1) if monitor else None,
        "train_loss": monitor.loss if monitor else None,
        **{f"val_{name}": validated.get(f"val/{name}") for name in module.metrics},
        "parameters": num_parameters(module),
        "device": str(trainer.strategy.root_device),
        "precision": trainer.precision,
        "run_dir": str(run.path),
        **({"trust": list(trusted_packages(config["trust"]))} if config["trust"] else {}),
        **{name: str(path) for name, path in files.items() if path and path.exists()},
    }
    close(loggers)  # a run that is killed before its dashboard has been told all is not finished
    run.write_summary(summary)
    say(f"\n{paragraph(summary, run.path)}")


def say(text: str) -> None:
    """Print, from the first process alone."""
    if process_rank() == 0:
        print(text, flush=True)


def complete(cfg: DictConfig, config: dict[str, Any], run: RunFolder) -> None:
    """Tell the dashboards of a finished run what they lack; whatever hinders that, the run is finished."""
    summary = run.read_summary()
    steps = summary["steps"]
    try:
        for logger in build_loggers(cfg):
            if logger.is_behind:
                run.prepare()
                logger.resume_at(steps, summary.get("images_seen", 0) // max(steps, 1))
                logger.describe(described(config, overrides()))
                logger.close()
    except UserError as error:
        log.warning("%s", error)


def num_parameters(module: LitDiffusion) -> int:
    """Count the network's parameters, once."""
    return sum(p.numel() for p in module.denoiser.core.net.parameters())


def overrides() -> list[str]:
    """What was typed."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


if __name__ == "__main__":
    main()
