"""Which part of a command line is at fault, when Hydra could not compose a configuration from it.

Hydra stops at its first error. This module reads the command line again, override by override, and compares it with
the configuration, so that the message can suggest what was meant.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

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


def find_fault(command: CommandLine) -> str | None:
    """Return one line about the first override that cannot work, or None where each of them could."""
    with initialize_config_dir(config_dir=command.config_dir, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for text in command.overrides:
            fault = _syntax_fault(text)
            if fault is not None:
                return fault
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(command.overrides)
        search = [f"hydra.searchpath=[file://{command.extra_dir}]"] if command.extra_dir else []
        repository = _Repository(loader, command.config_name, search)
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

    def __init__(self, loader: ConfigLoader, config_name: str, search: list[str]) -> None:
        self._loader, self._config_name, self._search = loader, config_name, search

    def choices(self, group: str) -> list[str]:
        """Return the names in a group; none where there is no such group."""
        found: list[str] = self._loader.get_group_options(
            group, config_name=self._config_name, overrides=self._search
        )
        return found

    def groups(self) -> list[str]:
        """Return the groups at the top."""
        return [group for group in self._loader.list_groups("") if group != "hydra"]

    def compose(self, overrides: list[str]) -> DictConfig:
        """Return the configuration, Hydra's own part included."""
        return compose(self._config_name, [*self._search, *overrides], return_hydra_config=True)


def _syntax_fault(text: str) -> str | None:
    try:
        OverridesParser.create().parse_overrides([text])
    except HydraException:
        if "=" not in text:
            return f"{text}: overrides are written key=value"
        key, _, value = text.partition("=")
        return f"{text}: cannot be read; quote a value that holds spaces or signs: '{key}=\"{value}\"'"
    return None


def _choice_fault(override: Override, repository: _Repository, base: DictConfig) -> str | None:
    """A config group's choice that does not exist, or a group that this configuration does not use."""
    group = override.key_or_group
    choices = repository.choices(group)
    if not choices or override.is_delete():
        return None
    if not override.is_sweep_override():
        value = override.value()
        if isinstance(value, dict):
            return None
        if value is None:
            chosen = base.hydra.runtime.choices.get(group)
            way_out = f"~{group} leaves the group out" if chosen else f"without {group}=... there is none"
            return f"{group}=null: no such choice; {way_out}{suggestion('null', choices)}"
    for choice in _asked(override):
        if choice not in choices:
            return f"{group}={choice}: no such choice{suggestion(choice, choices, listed=40)}"
    if not override.is_add() and override.get_key_element() not in base.hydra.runtime.choices:
        command = base.hydra.job.config_name
        way_out = (
            f"add it with +{override.input_line}" if command == "train" else f"{command} has no use for it"
        )
        return f"{override.get_key_element()}: not a part of this configuration; {way_out}"
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
        for override in overrides:
            if override not in groups:
                yield _group_fault(override, cfg, repository) or _key_fault(
                    override, cfg, repository.groups()
                )


def _group_fault(override: Override, cfg: DictConfig, repository: _Repository) -> str | None:
    """A key of a group that has no choice yet."""
    group, _, name = override.key_or_group.partition(".")
    if not name or override.is_delete() or cfg.hydra.runtime.choices.get(group, "") is not None:
        return None
    for choice in repository.choices(group):
        try:
            node = repository.compose([f"{group}={choice}"]).get(group)
        except (HydraException, OmegaConfBaseException):
            continue
        if isinstance(node, DictConfig) and name in dict(dotted_items(OmegaConf.to_container(node))):
            line = str(override.input_line).lstrip("+")
            return f"{override.key_or_group}: choose a {group} with it, for example: {group}={choice} {line}"
    return None


def _key_fault(override: Override, cfg: DictConfig, groups: list[str]) -> str | None:
    key = re.sub(r"\[(\w+)\]", r".\1", override.key_or_group)
    keys = list(dict(dotted_items(OmegaConf.to_container(cfg, resolve=False))))
    if override.is_force_add():
        return None
    if override.is_add():
        line = str(override.input_line)
        return f"{key}: exists already; write {line[1:]} to change it" if key in keys else None
    if key in keys:
        return None
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_resolution_failure=False) if parent else None
    if isinstance(node, DictConfig) and takes(node, name):
        return f"{key}: not in the configuration, but {node._target_} takes it; add it with +{override.input_line}"
    own = [other for other in keys if other.startswith("hydra.") == key.startswith("hydra.")]
    # Suggest no items of lists, no _target_, and no parents of the key.
    own = [other for other in own if other[-1] not in "_0123456789" and not key.startswith(f"{other}.")]
    close = nearest(key, [*own, *(group for group in groups if not key.startswith(f"{group}."))])
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
