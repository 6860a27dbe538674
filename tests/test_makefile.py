"""What ``make`` would do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def planned(*arguments: str) -> str:
    """The commands of a target, not run."""
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("target", ["train", "sweep"])
@pytest.mark.parametrize(
    ("overrides", "fetches"),
    [
        ("", True),
        ("seed=1 data=fashion_mnist", True),
        ("data.flip=false", True),
        ("data=digits", False),
        ("seed=1 data=image_folder data.path=photos", False),
        ("data.path=elsewhere", False),
        ("debug=tiny", False),
    ],
)
def test_fashion_mnist_is_fetched_where_it_is_trained_on(target: str, overrides: str, fetches: bool) -> None:
    commands = planned(target, f"ARGS={overrides}").splitlines()
    training = next(i for i, line in enumerate(commands) if "litdiffusion.train" in line)
    assert overrides in commands[training]
    assert any("litdiffusion.data.fetch" in line for line in commands[:training]) == fetches


def test_every_target_is_in_the_help() -> None:
    targets = {
        line.split()[0]
        for line in subprocess.run(
            ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        .stdout.replace("  make ", "")
        .splitlines()
    }
    assert {"train", "test", "data", "sweep", "bench", "lint"} <= targets
