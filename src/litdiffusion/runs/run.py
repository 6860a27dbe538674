"""A run: one configuration and the folder it is trained in, from the beginning or from a checkpoint."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from litdiffusion.data.fingerprint import Fingerprint
from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder
from litdiffusion.runs.lock import RunLock
from litdiffusion.runs.provenance import provenance
from litdiffusion.runs.resume import Resumption, find_resumption, require_same_data, set_damaged_aside
from litdiffusion.system.launch import process_rank
from litdiffusion.system.redaction import SECRET_KEY, without_secrets


class Run:
    """Configuration, folder, lock and resumption of one training command.

    Args:
        cfg: the configuration, checked, with an absolute ``run_dir``.
        parts: the nodes of it that a checkpoint carries as ``model_config``.

    Attributes:
        config: the same, resolved, as plain values.
        typed: the overrides of the command.
        folder: the run folder.
        model_config: the nodes ``parts`` as plain values, without secrets.
        is_first: whether this is the first process of the run: the one that writes and prints.
        lock: of the folder. As a context it is held from where the folder exists.
    """

    def __init__(self, cfg: DictConfig, parts: Iterable[str]) -> None:
        self.cfg = cfg
        self.config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        self.typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        self.folder = RunFolder(Path(cfg.run_dir))
        self.model_config = without_secrets({name: self.config[name] for name in parts}, SECRET_KEY)
        self.is_first = process_rank() == 0
        self.lock = RunLock(self.folder.path, first=self.is_first)

    @cached_property
    def resumption(self) -> Resumption | None:
        """Where the run continues; None for one that begins.

        Raises:
            UserError: the folder belongs to another configuration or model, or ``resume`` asks for what is not there.
        """
        found = self._find_resumption()
        if found:
            found.require_same_model(self.model_config)
        return found

    @property
    def step(self) -> int:
        """The optimizer step at which this command begins."""
        return self.resumption.step if self.resumption else 0

    @property
    def checkpoint(self) -> Path | None:
        """The file that this command continues from."""
        return self.resumption.checkpoint if self.resumption else None

    @property
    def is_finished(self) -> bool:
        """Whether ``trainer.max_steps`` are trained or a callback stopped the run, and its end is written down."""
        max_steps = self.cfg.trainer.max_steps
        if self.resumption is None or not self.folder.has_ended_at(max_steps):
            return False
        return self.step >= min(max_steps, self.folder.read_summary()["steps"])

    def require_steps_left(self) -> None:
        """Refuse a checkpoint that is past ``trainer.max_steps``.

        One of the run itself at just that step is accepted: the command was interrupted before the run's end was
        written down.

        Raises:
            UserError: there is nothing left to train.
        """
        if self.resumption is None or self.step < self.cfg.trainer.max_steps:
            return
        elsewhere = self.resumption.checkpoint.parent != self.folder.checkpoints
        if elsewhere or self.step > self.cfg.trainer.max_steps:
            which = f"resume={self.cfg.resume}: that" if elsewhere else f"run_dir {self.folder.path}: this"
            raise UserError(
                f"{which} run has come to step {self.step} already; give a larger trainer.max_steps than"
                f" {self.cfg.trainer.max_steps}"
            )

    def begin(self, fingerprint: Fingerprint) -> None:
        """Lock the folder, and write down what is about to run.

        Args:
            fingerprint: of the training images.

        Raises:
            UserError: the images have changed, the folder cannot be written, or another job has begun in it since.
        """
        if self.resumption:
            require_same_data(self.folder, fingerprint)
        self.folder.prepare()
        if self.lock.take() and self._find_resumption() != self.resumption:
            raise UserError(
                f"run_dir {self.folder.path} was begun by another job meanwhile: the same command continues it"
            )
        if self.is_first:
            self.folder.tidy()
            self.folder.describe(self.config, self.typed, provenance(self.cfg.seed))
            self.folder.remember_data(fingerprint)
            if self.resumption:
                set_damaged_aside(self.resumption)

    def _find_resumption(self) -> Resumption | None:
        return find_resumption(self.folder, self.config, self.cfg.resume)
