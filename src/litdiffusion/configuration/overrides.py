"""Which part of a command line is at fault, when Hydra could not compose a configuration from it.

Hydra stops at its first error. This module reads the command line again, override by override, and compares it with
the configuration, so that the message can suggest what was meant.
"""

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from litdiffusion.configuration.messages import dotted_items, nearest, suggestion
from litdiffusion.configuration.nodes import takes
from litdiffusion.configuration.sweeps import typed
from litdiffusion.errors import UserError

OF_SWEEPS = ("hydra.sweep.", "hydra.sweeper.", "hydra/sweeper", "hydra.launcher.", "hydra/launcher")
_IN_STEPS = "a run's length is counted in steps, or it could not be continued; use trainer.max_steps"
_ENDLESS = "the training images are one endless epoch; use "
TRAINER: dict[str, tuple[list[str], str]] = {
    "max_epochs": (["-1"], _IN_STEPS),
    "max_time": ([], _IN_STEPS),
    "limit_train_batches": (["1.0"], _IN_STEPS),  # 1 is a single batch
    "overfit_batches": (["0", "0.0"], _IN_STEPS),
    "fast_dev_run": (["False", "0"], f"{_IN_STEPS}, or debug=tiny"),
    "min_epochs": (["0"], f"{_ENDLESS}trainer.min_steps"),
    "check_val_every_n_epoch": (["1"], f"{_ENDLESS}trainer.val_check_interval"),
    "reload_dataloaders_every_n_epochs": (["0"], f"{_ENDLESS}null"),
    "limit_test_batches": (["1.0"], "training runs no test; use python -m litdiffusion.evaluate"),
    "limit_predict_batches": (["1.0"], "training predicts nothing; use python -m litdiffusion.sample"),
    "use_distributed_sampler": (
        ["False"],
        "the datamodule divides each batch among the processes; use false",
    ),
    "logger": ([], "use logger=csv, tensorboard, wandb or none"),
    "callbacks": ([], "use +callbacks.NAME._target_=CLASS"),
    "plugins": ([], "the run chooses its own; use trainer.strategy or trainer.precision"),
    "enable_checkpointing": ([], "use callbacks.save_checkpoints, or null in its place for none"),
    "enable_progress_bar": ([], "use callbacks.progress, or null in its place for none"),
    "enable_autolog_hparams": (
        ["True"],
        "loggers always get the configuration; use logger=none to log nothing",
    ),
    "model_registry": ([], "checkpoints stay in run_dir; use callbacks.save_checkpoints"),
    "barebones": (["False"], "use logger=none, and null for each of the callbacks"),
}
"""Arguments of the trainer that a run cannot obey, the values besides null that change nothing, and what to use."""

MAX_COMBINATIONS = 16
"""The most combinations of a sweep's choices to look at: the keys differ from one to the next."""


@dataclass(frozen=True)
class CommandLine:
    """``overrides`` of ``config_name`` in ``config_dir``, with ``extra_dir`` as a second folder to search."""

    config_dir: str
    config_name: str
    overrides: list[str]
    multirun: bool = False
    extra_dir: str | None = None


def require_effect(command: CommandLine) -> None:
    """Check that no override is of a kind that Hydra accepts and nothing here heeds.

    Raises:
        UserError: naming the key to use.
        hydra.errors.OverrideParseException: an override cannot be read.
    """
    folder = "run_dir" if command.config_name == "train" else "out"
    for override in OverridesParser.create().parse_overrides(command.overrides):
        key, line = override.key_or_group, str(override.input_line).lstrip("+")
        value = line.partition("=")[2]
        if key == "hydra.run.dir":
            raise UserError(f"{line}: the folder of a run is {folder}; give {folder}={value}")
        if key in ("hydra.output_subdir", "hydra.job.chdir") and override.value() not in (None, False):
            raise UserError(f"{line}: has no effect here; all files go to {folder}=DIR")
        if not command.multirun and key.startswith(OF_SWEEPS):
            way_out = f", or give {folder}={value}" if key == "hydra.sweep.dir" else ""
            raise UserError(f"{line}: belongs to a sweep; add -m{way_out}")


def find_fault(command: CommandLine) -> str | None:
    """Return one line about the first override that cannot work, or None where each of them could."""
    with initialize_config_dir(config_dir=command.config_dir, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for before, text in itertools.pairwise(["", *command.overrides]):
            fault = _syntax_fault(text, before)
            if fault is not None:
                return fault
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(command.overrides)
        repository = _Repository(loader, command)
        try:
            base = repository.compose([])
        except (HydraException, OmegaConfBaseException):
            return None  # the error is in the configuration, not in the overrides
        faults = itertools.chain(
            (_choice_fault(override, repository, base) for override in overrides),
            (_sweep_fault(override, command.multirun) for override in overrides),
            _key_faults(overrides, repository, base),
        )
        return next((fault for fault in faults if fault is not None), None)


class _Repository:
    """The tree of config groups."""

    def __init__(self, loader: ConfigLoader, command: CommandLine) -> None:
        self._loader, self._config_name, extra = loader, command.config_name, command.extra_dir
        self._search = [f"hydra.searchpath=[file://{extra}]"] if extra else []
        self._folders = [Path(folder) for folder in (command.config_dir, extra) if folder]

    def choices(self, group: str) -> list[str]:
        """Return the names in a group; none where there is no such group."""
        found: list[str] = self._loader.get_group_options(
            group, config_name=self._config_name, overrides=self._search
        )
        return found

    def compose(self, overrides: list[str]) -> DictConfig:
        """Return the configuration, Hydra's own part included."""
        return compose(self._config_name, [*self._search, *overrides], return_hydra_config=True)

    def keys_of_choices(self, groups: list[str]) -> dict[str, str]:
        """Return the ``group=choice`` that would bring a key, for each key, and for the names of the choices."""
        found: dict[str, str] = {}
        for folder, group in itertools.product(self._folders, groups):
            for path in sorted(folder.glob(f"{group}/*.yaml")):
                text = path.read_text(encoding="utf-8").lstrip()
                with suppress(Exception):  # what is no YAML is reported where it is chosen
                    plain = "" if text.startswith("# @package") else text
                    node = OmegaConf.to_container(OmegaConf.create(plain))
                    keys = [key for key, _ in dotted_items(node, f"{group}.") if ".defaults" not in key]
                    found = dict.fromkeys([path.stem, *keys], f"{group}={path.stem}") | found
        return found


def _syntax_fault(text: str, before: str) -> str | None:
    try:
        OverridesParser.create().parse_overrides([text])
    except HydraException:
        if "=" not in text:
            line = f"{text}: overrides are written key=value"
            whole = f"{before} {text}".replace("=", "='", 1) + "'"
            return f'{line}; or, with the one before, {whole}, in make ARGS="{whole}"' if before else line
        key, _, value = text.partition("=")
        return f"{text}: cannot be read; quote a value that holds spaces or signs: {typed(key, value)}"
    return None


def _choice_fault(override: Override, repository: _Repository, base: DictConfig) -> str | None:
    """A config group's choice that does not exist, or a group that this configuration does not use."""
    group = override.key_or_group
    choices = repository.choices(group)
    if not choices or override.is_delete():
        return None
    if not override.is_add() and override.get_key_element() not in base.hydra.runtime.choices:
        line = f"{override.get_key_element()}: not a part of this configuration"
        if "@" in override.get_key_element():
            return f"{line}; add it with +{override.input_line}"
        return f"{line}; {base.hydra.job.config_name} has no use for it"
    if not override.is_sweep_override():
        value = override.value()
        if isinstance(value, dict):
            return None
        if value is None:
            unchosen = "" if base.hydra.runtime.choices.get(group) else f"; without {group}=... there is none"
            way_out = f"; {group}=none leaves it out" if "none" in choices else unchosen
            return f"{group}=null: no such choice{way_out}{suggestion('null', choices)}"
    for choice in _asked(override):
        if choice not in choices:
            return f"{group}={choice}: no such choice{suggestion(choice, choices, listed=40)}"
    return None


def _sweep_fault(override: Override, multirun: bool) -> str | None:
    if override.is_sweep_override() and not multirun:
        return f"{override.input_line}: to sweep over several values add -m; a list is written [a,b]"
    return None


def _key_faults(overrides: list[Override], repository: _Repository, base: DictConfig) -> Iterator[str | None]:
    """Keys that do not exist, given the choices of groups."""
    groups = [override for override in overrides if repository.choices(override.key_or_group)]
    lines = [
        [_with_choice(group, choice) for choice in _asked(group)] or [str(group.input_line)]
        for group in groups
    ]
    for combination in itertools.islice(itertools.product(*lines), MAX_COMBINATIONS):
        try:
            cfg = repository.compose(list(combination)) if combination else base
        except (HydraException, OmegaConfBaseException):
            continue
        used = [group for group in cfg.hydra.runtime.choices if group.isidentifier() and group != "hydra"]
        others = repository.keys_of_choices(used)
        for override in overrides:
            if override not in groups:
                yield _key_fault(override, cfg, used, others)


def _key_fault(override: Override, cfg: DictConfig, groups: list[str], others: dict[str, str]) -> str | None:
    """A key that does not exist; ``others`` come with other choices of the ``groups``."""
    key, line = re.sub(r"\[(\w+)\]", r".\1", override.key_or_group), str(override.input_line)
    values = dict(dotted_items(OmegaConf.to_container(cfg, resolve=False)))
    if override.is_force_add() or (key in values) != override.is_add():
        return None
    if override.is_add():
        return f"{key}: exists already; write {line[1:]} to change it"
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_resolution_failure=False) if parent else None
    if parent == "trainer" and name in TRAINER:
        return f"{key}: {TRAINER[name][1]}"
    if isinstance(node, DictConfig) and takes(node, name):
        return f"{key}: not in the configuration, but {node._target_} takes it; add it with +{line}"
    if key in others and not override.is_delete():
        if not parent:  # a choice's name
            return f"{key}: no such key; nearest: {others[key]}"
        return f"{key}: comes with another choice, for example: {others[key]} {line}"
    if node is None and parent.startswith("hydra.") and parent in values:
        return f"{key}: {parent} is null; add it with +{line}"
    # Suggest no items of lists, no _target_, no parents of the key, and no key that follows another.
    own = [
        other
        for other, value in (
            dict.fromkeys([*groups, *(key for key in others if "." in key)]) | values
        ).items()
        if other.startswith("hydra.") == key.startswith("hydra.") and other[-1] not in "_0123456789"
        if not key.startswith(f"{other}.") and not ("." in other and str(value).startswith("${"))
    ]
    close = [
        f"{other} (with {others[other]})" if other not in values and other in others else other
        for other in nearest(key, own)
    ]
    if close:
        return f"{key}: no such key; nearest: {', '.join(close)}"
    siblings = [other.rpartition(".")[2] for other in own if other.rpartition(".")[0] == parent]
    where = f"{parent} has: {', '.join(siblings)}" if parent and siblings else "--cfg job shows them all"
    return f"{key}: no such key; {where}"


def _asked(override: Override) -> list[str]:
    """Return the choices that an override of a group names."""
    if override.is_sweep_override():
        choices = override.sweep_string_iterator() if override.is_discrete_sweep() else iter(())
        return [str(choice) for choice in choices]
    value = override.value()
    if value is None or isinstance(value, dict):
        return []
    return [str(choice) for choice in value] if isinstance(value, list) else [str(value)]


def _with_choice(override: Override, choice: str) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={choice}"
