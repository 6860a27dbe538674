import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from omegaconf import DictConfig

from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point
from litdiffusion.configuration.nodes import build
from litdiffusion.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"

FILES = {
    "train.yaml": """
# python -m litdiffusion.train schedule=cosine
defaults:
  - _self_
  - net: unet
  - schedule: linear  # how fast it falls
  - sampler: ddim
  - hydra: default
  - experiment: null
  - sweep: null
seed: 0
run_dir: ${new_run_dir:}
data: {name: null}
datamodule: {batch_size: 128}
optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 1e-3}
""",
    "net/unet.yaml": "{_target_: litdiffusion.nn.UNet, dim: 8, channels: 1, dim_mults: [1, 2]}",
    "schedule/linear.yaml": "{_target_: litdiffusion.diffusion.schedules.linear, num_steps: 300, beta_start: 1e-4}",
    "schedule/cosine.yaml": "{_target_: litdiffusion.diffusion.schedules.cosine, num_steps: 300}",
    "schedule/quadratic.yaml": "{_target_: litdiffusion.diffusion.schedules.quadratic, num_steps: 300}",
    "sampler/ddim.yaml": "{_target_: litdiffusion.diffusion.DDIM, num_steps: 50, eta: 0.0}",
    "sampler/ddpm.yaml": "{_target_: litdiffusion.diffusion.DDPM, num_steps: null}",
    "experiment/small.yaml": """
# @package _global_
defaults: [override /schedule: cosine]
seed: 7
""",
    "experiment/wrong_choice.yaml": """
# @package _global_
defaults: [override /schedule: liner]
""",
    "experiment/not_yaml.yaml": "seed: [1, 2",
    "experiment/half_open.yaml": "seed: ${net.dim",
    "sweep/seeds.yaml": """
# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}
""",
}


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree of the same shape as the real one, with the real ``hydra/default.yaml``."""
    folder = tmp_path / "configs"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "hydra").mkdir()
    (folder / "hydra/default.yaml").write_text((CONFIGS / "hydra/default.yaml").read_text())
    return folder


@pytest.fixture
def command(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet_logging: None,
) -> Callable[..., Outcome]:
    """A command that builds a network and prints what it was given; seeds above 1000 ask for trouble."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    @entry_point("train", tree)
    def main(cfg: DictConfig) -> None:
        validate(cfg)
        net = build(cfg.net, "net")
        if cfg.seed == 1001:
            raise RuntimeError("a bug")
        if cfg.seed == 1002:
            raise KeyboardInterrupt
        if cfg.seed == 1003:
            raise UserError("seed: 1003 is unlucky;\n    take another")
        if cfg.seed == 1004:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        print(cfg.run_dir, cfg.seed, cfg.schedule._target_.rpartition(".")[2], type(net).__name__)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        return Outcome(code, *capsys.readouterr())

    return run
