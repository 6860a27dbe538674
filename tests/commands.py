"""The entry points as a test calls them: in this process, or typed at a shell's prompt."""

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from litdiffusion import evaluate, report, sample, train
from litdiffusion.configuration import config_folder

MAINS = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main, "report": report.main}


def run(command: str, *overrides: str) -> None:
    """Run an entry point's task on a composed configuration; errors come as exceptions."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose(command, list(overrides))
    MAINS[command].__wrapped__(cfg)


def train_tiny(run_dir: Path, *overrides: str) -> Path:
    """Train for a few steps with every part in place; return the run folder."""
    run("train", "debug=tiny", "trainer.max_steps=4", f"run_dir={run_dir}", *overrides)
    return run_dir


class Typed(NamedTuple):
    code: int | str | None
    out: str
    err: str


def type_command(command: str, *overrides: str) -> Typed:
    """Type a command, with Hydra's own command line and our exit codes."""
    GlobalHydra.instance().clear()
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        mock.patch.object(sys, "argv", [f"litdiffusion.{command}", *overrides]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            MAINS[command]()
        except SystemExit as leaving:
            code = leaving.code
    return Typed(code, out.getvalue(), err.getvalue())
