"""A job of a sweep: one command with one folder, and whether it is finished already."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from litdiffusion.configuration.hardware import native_accelerator, num_devices
from litdiffusion.configuration.sweeps import FOLDERS, quoted
from litdiffusion.errors import UserError
from litdiffusion.runs.folder import RunFolder, absolute, read_json
from litdiffusion.runs.resume import differences, read_config
from litdiffusion.system.files import write_text
from litdiffusion.system.redaction import redacted_override, without_secrets

RESULTS = {"sample": "sample.json", "evaluate": "metrics.json"}
"""The result files of commands that write into ``out``."""

OF_THE_SWEEP = re.compile(r"[+~]*hydra(\.(mode|sweep|sweeper|launcher)\b|/(sweeper|launcher)\b)")
"""Overrides that choose and run the jobs, and are not passed on to them."""


@dataclass(frozen=True, eq=False)
class Job:
    """One command of a sweep.

    Args:
        number: within the sweep.
        overrides: as the sweeper has put them together.
        folder: where the job writes.
        result: the file in it that holds the job's results.
        command: the whole command line.
        varied: the keys that the sweep varies, each with the job's value.
        num_processes: how many the job starts on this machine.
        on_gpu: whether it computes on GPUs.
        config: of a training run, its whole configuration; None for other commands, or where it cannot be resolved.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    result: Path
    command: tuple[str, ...]
    varied: dict[str, str] = field(default_factory=dict)
    num_processes: int = 1
    on_gpu: bool = False
    config: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """What is special about the job, as it would be typed."""
        return " ".join(f"{key}={value}" for key, value in self.varied.items())

    def results(self) -> dict[str, Any]:
        """Return the job's results; {} where there are none, or the file is damaged."""
        try:
            return read_json(self.result, dict)
        except UserError:
            return {}

    def is_finished(self) -> bool:
        """Whether the folder holds the end of this very job; False where in doubt, and the job itself decides."""
        return self._is_trained() if self.config else self._is_written()

    def note_start(self) -> None:
        """Write the overrides of a job that does not do so itself, as a training run does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config is None:
            write_text(self._note, self._text)

    def value(self, names: Sequence[str]) -> float | list[float]:
        """Return the numbers that a sweeper asks for; a list, if it asks for several.

        Raises:
            UserError: the results hold no such number.
        """
        results = self.results()
        for name in names:
            if not _is_number(results.get(name)):
                numbers = ", ".join(key for key, value in results.items() if _is_number(value))
                raise UserError(
                    f"optimized_metric={name}: {self.result} has no such number; it has: {numbers}"
                )
        values = [float(results[name]) for name in names]
        return values[0] if len(values) == 1 else values

    def _is_trained(self) -> bool:
        run, config = RunFolder(self.folder), self.config or {}
        try:
            if not run.has_ended_at(config["trainer"]["max_steps"]):
                return False
            return not differences(read_config(run.config), without_secrets(config))
        except Exception:  # damaged, or of another run: the job itself reports it
            return False

    def _is_written(self) -> bool:
        """A result counts that is younger than the job's start and the checkpoint it was made from."""
        checkpoint = choices(self.overrides).get("ckpt", "")
        try:
            sources = [self._note, *([Path(absolute(checkpoint.strip("'\""), "ckpt"))] if checkpoint else [])]
            newest = max(source.stat().st_mtime_ns for source in sources)
            return (
                self._note.read_text(encoding="utf-8") == self._text
                and self.result.stat().st_mtime_ns > newest
            )
        except OSError:
            return False

    @property
    def _note(self) -> Path:
        return self.folder / "overrides.txt"

    @property
    def _text(self) -> str:
        return "".join(f"{redacted_override(override)}\n" for override in self.overrides)


def make_job(
    number: int, overrides: Sequence[str], master: DictConfig, loader: ConfigLoader, program: Sequence[str]
) -> Job:
    """Return a job of a sweep.

    Args:
        number: within the sweep.
        overrides: as the sweeper has put them together.
        master: the configuration of the sweep.
        loader: Hydra's.
        program: the command that runs one job, without overrides.
    """
    overrides = list(overrides)
    cfg = loader.load_sweep_config(master, overrides)
    with open_dict(cfg):
        cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        key = next((key for key in FOLDERS if key in list(cfg)), FOLDERS[0])
        folder = _folder(cfg, key)
        cfg[key] = str(folder)
        config = _plain(cfg) if key == "run_dir" else None
    finally:
        HydraConfig.instance().cfg = before
    hydra_overrides: Any = OmegaConf.to_container(master.hydra.overrides.hydra)
    kept = [text for text in hydra_overrides if not OF_THE_SWEEP.match(text)]
    # A preset of the group "sweep" may set anything, hydra.mode as well: our own values come last.
    task = [text for text in overrides if text.partition("=")[0].lstrip("+") != key]
    ours = [f"{key}={quoted(str(folder))}", f"hydra.job.num={number}", "hydra.mode=RUN"]
    typed: Any = OmegaConf.to_container(master.hydra.overrides.task)
    parsed = OverridesParser.create().parse_overrides(typed)
    fixed = {override.key_or_group for override in parsed if not override.is_sweep_override()}
    name = "summary.json" if key == "run_dir" else RESULTS.get(cfg.hydra.job.config_name, "result.json")
    num_processes, on_gpu = _devices(cfg)
    return Job(
        number=number,
        overrides=tuple(overrides),
        folder=folder,
        result=folder / name,
        command=(*program, *kept, *task, *ours),
        varied={name: value for name, value in choices(overrides).items() if name not in {key, *fixed}},
        num_processes=num_processes,
        on_gpu=on_gpu,
        config=config,
    )


def choices(overrides: Iterable[str]) -> dict[str, str]:
    """Return what overrides say, by key, without secrets."""
    parts = [redacted_override(text).partition("=") for text in overrides]
    return {key.lstrip("+"): value for key, _, value in parts}


def program_of(module: str) -> list[str]:
    """Return the command that runs the entry point that was defined in ``module``."""
    main = sys.modules["__main__"]
    if module != "__main__":
        return [sys.executable, "-m", module]
    if main.__spec__ is not None:
        return [sys.executable, "-m", main.__spec__.name.removesuffix(".__main__")]
    return [sys.executable, str(Path(str(main.__file__)).absolute())]


def _folder(cfg: DictConfig, key: str) -> Path:
    if OmegaConf.is_missing(cfg, key) or cfg.get(key) is None:
        return Path(absolute(f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}"))
    return Path(absolute(cfg[key]))


def _plain(cfg: DictConfig) -> dict[str, Any] | None:
    """Return a configuration with every interpolation resolved; None where that fails: the job itself reports it."""
    task = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    task._set_parent(cfg)
    try:
        return OmegaConf.to_container(task, resolve=True)  # type: ignore[return-value]
    except (OmegaConfBaseException, UserError):
        return None


def _devices(cfg: DictConfig) -> tuple[int, bool]:
    """Return how many processes a job starts on this machine, and whether they compute on GPUs."""
    trainer = cfg.get("trainer")
    if not isinstance(trainer, DictConfig):
        device = str(cfg.get("device", "cpu"))
        return 1, device.startswith("cuda") or (device == "auto" and native_accelerator() == "gpu")
    try:
        accelerator = str(trainer.get("accelerator", "auto"))
        accelerator = native_accelerator() if accelerator == "auto" else accelerator
        return num_devices(trainer.get("devices", 1), accelerator), accelerator in ("gpu", "cuda")
    except (OmegaConfBaseException, UserError):  # the job itself reports it
        return 1, False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
