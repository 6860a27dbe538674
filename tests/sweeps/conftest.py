import csv
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.global_hydra import GlobalHydra

from litdiffusion.configuration.entry import entry_point
from litdiffusion.sweeps import sweep

CONFIGS = Path(__file__).parents[2] / "configs"

TRAIN = """
defaults: [_self_, hydra: default, experiment: null, sweep: null]
seed: 0
behaviour: good
loss: l2
weighting: uniform
optimizer: {lr: 1e-3}
trainer: {max_steps: 2, accelerator: cpu, devices: 1}
run_dir: ${new_run_dir:}
optimized_metric: null
metrics:
  loss: {_target_: litdiffusion.evaluation.HeldOutLoss}
  bits_per_dim: {_target_: litdiffusion.evaluation.BitsPerDim, num_images: 1}
"""
"""Of the shape of the real one, as far as a sweep can see."""

SAMPLE = """
defaults: [_self_, hydra: default]
seed: 0
behaviour: good
ckpt: ???
out: ???
"""

JOB = """
import json, os, pathlib, signal, sys, time
given = dict(text.partition("=")[::2] for text in sys.argv[1:])
out = pathlib.Path((given.get("run_dir") or given["out"]).strip("\\"'"))
out.mkdir(parents=True, exist_ok=True)
seed, behaviour = int(given.get("seed", 0)), given.get("behaviour", "good")
max_steps = int(given.get("trainer.max_steps", 2))
settings = {"seed": seed, "behaviour": behaviour, "optimized_metric": None, "run_dir": str(out),
            "metrics": {"loss": {"_target_": "litdiffusion.evaluation.HeldOutLoss"}, "bits_per_dim":
                        {"_target_": "litdiffusion.evaluation.BitsPerDim", "num_images": 1}},
            "loss": given.get("loss", "l2"), "weighting": given.get("weighting", "uniform"),
            "optimizer": {"lr": float(given.get("optimizer.lr", 1e-3))},
            "trainer": {"max_steps": max_steps, "accelerator": "cpu", "devices": 1}}
(out / "config.yaml").write_text(json.dumps(settings))
with (out / "starts").open("a") as file:
    cores = sorted(os.sched_getaffinity(0))
    file.write(json.dumps({"given": sys.argv[1:], "environment": dict(os.environ), "cores": cores}) + "\\n")
def stop(signum, frame):
    print(f"stopped by {signum}", flush=True)
    sys.exit(128 + signum)
def wait():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, stop)
    (out / "met").touch()
    time.sleep(60)
if behaviour == "deaf":
    def stop(signum, frame):
        with (out / "heard").open("a") as file:
            print(int(signum), file=file)
    wait()
if behaviour == "patient" and not (out / "met").exists():
    wait()
if behaviour == "refused":
    sys.exit("a line\\nerror: behaviour=refused: choose another\\na last line")
if behaviour == "bug":
    raise ValueError("a bug\\nof two lines")
if behaviour == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print(f"job of seed {seed}")
lr = float(given.get("optimizer.lr", 1))
summary = {"steps": max_steps, "val_loss": lr / (1 + seed), "val_bits_per_dim": 9 - lr, "wall_seconds": 1.5,
           "device": "cpu", "grid": "x"}
(out / ("summary.json" if "run_dir" in given else "sample.json")).write_text(json.dumps(summary))
if behaviour == "leaving":
    wait()
"""
"""A command that needs no time: it notes how it was started, and ends as ``behaviour`` says."""


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


class Sweeps:
    """A folder in which sweeps are typed, and what lies in it afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, config_name: str = "train") -> Outcome:
        """Type a command, with Hydra's own command line and our exit codes."""

        @entry_point(config_name, self.folder / "configs")
        def main(cfg: object) -> None:
            raise AssertionError("a job has run in the process of the sweep")

        GlobalHydra.instance().clear()
        out, err = io.StringIO(), io.StringIO()
        code: int | str | None = 0
        sys.argv = [f"{config_name}.py", *arguments]
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as leaving:
                code = leaving.code
        return Outcome(code, out.getvalue(), err.getvalue())

    def table(self) -> list[dict[str, str]]:
        """The rows of the only sweep's table."""
        (path,) = self.folder.rglob("sweep.csv")
        with path.open() as file:
            return list(csv.DictReader(file))

    def starts(self) -> dict[str, list[dict]]:
        """How each job was started, and how often, by the names of their folders."""
        return {
            path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(self.folder.rglob("starts"))
        }


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_logging: None) -> Sweeps:
    """Sweeps whose jobs are ``JOB``, with the real configuration of Hydra."""
    configs = tmp_path / "configs"
    for name, text in {"train.yaml": TRAIN, "sample.yaml": SAMPLE}.items():
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text(text)
    for name in ("hydra/default.yaml", "sweep/optuna.yaml"):
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text((CONFIGS / name).read_text())
    for name, seeds in {"seeds": "0,1", "more_seeds": "0,1,2"}.items():
        preset = f"# @package _global_\nhydra: {{mode: MULTIRUN, sweeper: {{params: {{seed: '{seeds}'}}}}}}\n"
        (configs / f"sweep/{name}.yaml").write_text(preset)
    (configs / "experiment").mkdir()
    (configs / "experiment/small.yaml").write_text("# @package _global_\nseed: 7\n")
    script = tmp_path / "job.py"
    script.write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sweep, "program_of", lambda module: [sys.executable, str(script)])
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return Sweeps(tmp_path)
