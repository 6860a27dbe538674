"""The values of a configuration, each where it is written: that it is there, leads somewhere, and is a number."""

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from litdiffusion.configuration.messages import needs_value, one_line
from litdiffusion.configuration.nearest import dotted_keys, suggestion
from litdiffusion.errors import UserError


def check_values(cfg: DictConfig) -> None:
    """Check that every mandatory value is there, no number is NaN, and every interpolation leads somewhere.

    NaN is refused for all: comparisons with a bound let it through.

    Raises:
        UserError: one is missing, is NaN, or leads nowhere.
    """
    for key, value in written(cfg):
        if value == MISSING:
            raise UserError(needs_value(key))
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{key}=nan: must be a number")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        sought = str(error).partition("'")[2].partition("'")[0]
        keys = set(dotted_keys(OmegaConf.to_container(cfg, resolve=False))) - {error.full_key}
        raise UserError(f"{one_line(error)}{suggestion(sought, keys, listed=0)}") from error
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error


def written(cfg: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value by its dotted key, outer before inner; a mandatory one that is not there is ``MISSING``.

    What an interpolation brings is passed over: it is written elsewhere.
    """
    for name in range(len(cfg)) if isinstance(cfg, ListConfig) else list(cfg):
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(cfg, name):
            yield key, MISSING
        elif not OmegaConf.is_interpolation(cfg, name):
            yield key, cfg[name]
            if isinstance(cfg[name], DictConfig | ListConfig):
                yield from written(cfg[name], f"{key}.")
