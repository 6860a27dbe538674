"""python -m litdiffusion.report: one HTML page that shows a run, compares runs, or ranks a sweep."""

import litdiffusion.system.startup  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.sweeps import quoted
from litdiffusion.errors import UserError
from litdiffusion.runs.folder import absolute

if TYPE_CHECKING:
    from litdiffusion.reporting.found import Found, Ranking


@entry_point("report")
def report(cfg: DictConfig) -> None:
    """Read the runs, and write the page."""
    given = [cfg.runs] if isinstance(cfg.runs, str) else list(cfg.runs or ())
    if not given:
        raise UserError(
            "give a run folder, a sweep, or a folder of runs: python -m litdiffusion.report logs/..."
        )
    paths = [Path(absolute(path, "runs")) for path in given]
    out = Path(absolute(cfg.out, "out")) if cfg.out else paths[0] / "report.html"
    # Here, since they import torch, which takes seconds.
    from litdiffusion.reporting.found import find_runs
    from litdiffusion.reporting.gather import gather
    from litdiffusion.reporting.page import write_page

    runs = find_runs(paths)
    if not out.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.parent}")
    title = "/".join(paths[0].parts[-2:]) if len(paths) == 1 else f"{len(runs)} runs"
    write_page(out, title, gather(runs, rank))
    print(f"A report of {len(runs)} run{'s' * (len(runs) != 1)}: {out}")


def rank(runs: "Sequence[Found]") -> "Ranking | None":
    """Return the number that compares the runs, as the table of a sweep does."""
    from litdiffusion.configuration.resolvers import direction
    from litdiffusion.reporting.found import Ranking
    from litdiffusion.reporting.gather import own_metrics
    from litdiffusion.sweeps.jobs import Job
    from litdiffusion.sweeps.ranking import ranking

    read = [run for run in runs if run.config]
    if len(runs) < 2 or not read:
        return None
    jobs = [
        Job(i, (), run.folder, run.folder / "summary.json", (), run.varied, config=run.config)
        for i, run in enumerate(read)
    ]
    wanted = read[0].config.get("optimized_metric")
    config = DictConfig({"metrics": own_metrics(read[0].config), "optimized_metric": wanted})
    metric, line = ranking(config, jobs, {name for run in runs for name in run.numbers})
    return Ranking(metric, line, direction(metric, _root_=config) == "maximize")


def main() -> None:
    """Take what is no ``key=value`` as the path of a run, then run as any other command."""
    arguments, _ = get_args_parser().parse_known_intermixed_args()
    paths = [text for text in arguments.overrides if "=" not in text or Path(text).exists()]
    if paths:
        for path in paths:
            sys.argv.remove(path)
        sys.argv.append(f"runs=[{','.join(map(quoted, paths))}]")
    report()


if __name__ == "__main__":
    main()
