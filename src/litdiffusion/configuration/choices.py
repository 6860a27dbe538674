"""What was typed, before it is asked whether it goes together: words where words belong, one choice of each group."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from litdiffusion.configuration.messages import needs_value
from litdiffusion.configuration.targets import trusted_packages
from litdiffusion.errors import UserError


def check_words(cfg: DictConfig) -> None:
    """Check values that are words.

    An empty path would mean the folder one happens to be in; what ``resume`` may be, its type cannot say.

    Raises:
        UserError: naming the key.
    """
    for key in ("ckpt", "out", "paths.data", "data.path", "data.name"):
        if OmegaConf.select(cfg, key) == "":
            raise UserError(needs_value(key))
    if "resume" in cfg and not (isinstance(cfg.resume, str) and cfg.resume):
        raise UserError(f"resume={cfg.resume}: choose auto, must, never, or the path of a checkpoint")
    if "trust" in cfg:
        trusted_packages(cfg.trust)
    root = OmegaConf.select(cfg, "trainer.default_root_dir")
    if root is not None and root != cfg.get("run_dir"):
        raise UserError(
            f"trainer.default_root_dir={root}: everything of a run lies in its run_dir; set that instead"
        )


def check_choices(cfg: DictConfig) -> None:
    """Check that each group builds what it is for: one object, or of loggers, callbacks and metrics any number.

    Raises:
        UserError: several choices would be mixed into one object, or one of these names no class.
    """
    if HydraConfig.initialized():
        for override in OverridesParser.create().parse_overrides(HydraConfig.get().overrides.task):
            group, choice = str(override.key_or_group), override.value()
            if isinstance(choice, list) and _is_node(cfg.get(group)):
                names = ",".join(map(str, choice))
                raise UserError(f"{group}=[{names}]: choose one; to try each in turn: -m {group}={names}")
    for group in ("logger", "callbacks", "metrics"):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None and not _is_node(node):
                way_out = "null leaves one out"
                if group == "logger":
                    way_out = f"logger={name} chooses one that comes with it"
                raise UserError(f"{group}.{name}: needs a _target_, the class to build; {way_out}")


def _is_node(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value
