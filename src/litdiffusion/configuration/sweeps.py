"""Every job of a sweep needs a run folder of its own."""

from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser

from litdiffusion.errors import UserError


def check_sweep(overrides: Iterable[str], params: Iterable[str] = ()) -> None:
    """Check a sweep's overrides, and the keys ``params`` that the sweeper's own configuration varies.

    Raises:
        UserError: one ``run_dir`` for several jobs.
        hydra.errors.OverrideParseException: an override cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    varied = {override.key_or_group for override in parsed if override.is_sweep_override()} | set(params)
    # A choice of the group "sweep" brings its own parameters.
    varied |= {override.key_or_group for override in parsed if override.key_or_group == "sweep"}
    for override in parsed:
        text = str(override.input_line)
        if override.key_or_group == "run_dir" and varied - {"run_dir"} and "$" not in text:
            raise UserError(
                f"{text}: jobs that vary {', '.join(sorted(varied - {'run_dir'}))} cannot share a run folder; "
                "leave run_dir out, or write 'run_dir=DIR/${hydra:job.num}'"
            )
