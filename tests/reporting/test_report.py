import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from litdiffusion.reporting.report import duration, paragraph

RUN = Path("logs/quickstart/one")
SUMMARY = {
    "experiment": "quickstart",
    "steps": 2340,
    "images_seen": 149_760,
    "wall_seconds": 553.2,
    "images_per_second": 270.7,
    "train_loss": 0.031234,
    "val_loss": 0.0345,
    "parameters": 2_020_257,
    "device": "cpu",
    "precision": "bf16-mixed",
    "checkpoint": "checkpoints/last.ckpt",
    "grid": "samples/grid.png",
    "gif": "samples/denoising.gif",
}


def test_paragraph_describes_the_run_on_one_line():
    assert paragraph(SUMMARY, RUN) == (
        "Trained experiment quickstart (2,020,257 parameters) for 2,340 steps (149,760 images) in 9 min 13 s "
        "on cpu at precision bf16-mixed (271 images/s). "
        "The loss ended at 0.03123 in training and 0.0345 on held-out images. "
        "Run folder: logs/quickstart/one, with a grid of samples (samples/grid.png), the reverse process as a GIF "
        "(samples/denoising.gif) and the checkpoint (checkpoints/last.ckpt). "
        "Sample from it with: "
        "python -m litdiffusion.sample ckpt=logs/quickstart/one/checkpoints/last.ckpt num_images=64"
    )


@pytest.mark.parametrize("missing", list(SUMMARY))
def test_missing_values_are_left_out(missing):
    text = paragraph({key: value for key, value in SUMMARY.items() if key != missing}, RUN)
    assert "None" not in text
    assert "  " not in text
    assert "()" not in text


def test_an_empty_summary_still_names_the_folder():
    assert paragraph({}, RUN) == "Trained a model. Run folder: logs/quickstart/one."


@pytest.mark.parametrize(
    "path",
    [
        *("a b/last.ckpt", "it's/last.ckpt", "lr=0.1,x/last.ckpt", "plain-1/last.ckpt", 'say "x"/last.ckpt'),
        *(
            "größe/🎉 last.ckpt",
            "$HOME/`ls`",
            "${x}/a",
            r"\${x}/a",
            "end\\",
            r"\"" "\\'",
            "~[x]{y}(z)#!;&|",
            " a\tb ",
        ),
    ],
)
def test_the_command_survives_the_shell_and_hydra(path):
    command = paragraph({"checkpoint": path, "trust": ["a", "b"]}, RUN).split("Sample from it with: ")[1]
    words = shlex.split(command)
    override = OverridesParser.create().parse_override(words[3])
    assert OmegaConf.create({"ckpt": override.value()}).ckpt == str(RUN / path)
    assert words[-1] == "trust=[a,b]"
    assert "'trust=[a,b]'" in command  # zsh would look for a file


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (59.4, "59 s"), (553.2, "9 min 13 s"), (7265.0, "2 h 1 min"), (90_000.0, "1 d 1 h")],
)
def test_duration_in_two_units(seconds, said):
    assert duration(seconds) == said
