"""``make gpu``: every part of it in small on the CPU, and what holds it together."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gpu
from gpukit import report, wheels
from gpukit.speed import last_words
from gpukit.worker import union_length
from litdiffusion.data.fetch import default_folder
from litdiffusion.data.sources.fashion_mnist import find_folder

ROOT = Path(__file__).parents[1]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    if find_folder(ROOT / default_folder()) is None:
        pytest.skip("no Fashion-MNIST on this machine: `make data` fetches it")
    earlier = ("gpu.json", "gpu.md", "gpu-tests.log", "gpu.py", "gpu-notes.txt")
    for name in earlier:
        (tmp_path / name).write_text(name)
    done = call("--dry-run", OUT=str(tmp_path))
    results = json.loads((tmp_path / "gpu.json").read_text())
    states = {name: part["state"] for name, part in results["parts"].items()}
    assert states == {"tests": "held", "speed": "held", "quality": "held"}, done.stdout + done.stderr
    assert done.returncode == 0

    outcomes = results["parts"]["tests"]["details"]["outcomes"]
    assert {name.partition("::")[0] for name in outcomes} == {
        f"tests/gpu/test_gpu_{room}.py" for room in ("training", "sampling", "waits")
    }
    assert set(outcomes.values()) == {"passed", "skipped"}
    for measured in results["parts"]["speed"]["details"]["measurements"]:
        for what in ("train", "sample"):
            assert measured[f"{what}_images_per_second"] > 0
            assert measured[f"{what}_tflops"] > 0
    profile = results["parts"]["speed"]["details"]["measurements"][0]["profile"]
    assert len(profile["longest"]) == 10
    assert profile["busy_ms"] > 0
    losses = results["parts"]["quality"]["details"]["val_losses"]
    assert losses[-1] < losses[0]

    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# A dry run of the GPU kit, on the CPU")
    for word in ("no GPU", "denoising-diffusion-pytorch", "convolution_backward", "gpu-samples.png"):
        assert word in page
    assert {"gpu-samples.png", "gpu-denoising.gif", "gpu-curves.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    for name, kept in {"gpu.previous.json": "gpu.json", "gpu.previous.md": "gpu.md"}.items():
        assert (tmp_path / name).read_text() == kept
    assert "test session starts" in (tmp_path / "gpu-tests.log").read_text()
    for somebody_elses in ("gpu.py", "gpu-notes.txt"):
        assert (tmp_path / somebody_elses).read_text() == somebody_elses


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("of an earlier run")
    done = call(OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of an earlier run"]
    assert done.stderr.strip() == (
        "error: torch sees no CUDA GPU here; `make gpu ARGS=--dry-run` goes through the kit on the CPU"
    )


# ------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def kit(tmp_path: Path) -> gpu.Kit:
    names = ("one", "two", "three")
    parts = {name: {"state": "not reached", "summary": "", "seconds": 0.0} for name in names}
    machine: dict[str, Any] = dict.fromkeys(("card", "memory_gib", "torch", "cuda", "python"))
    results = {"machine": machine, "date": "", "commit": None, "dry_run": False, "parts": parts}
    results["parts"] |= {name: dict(parts["one"]) for name in ("tests", "speed", "quality")}
    # By default the time counts from the import, which in a whole suite is minutes ago.
    return gpu.Kit(tmp_path, False, dict(os.environ), results, deadline=time.monotonic() + 600)


def test_a_part_that_breaks_leaves_the_others_and_is_written_down(kit: gpu.Kit) -> None:
    def breaks(*_: object) -> tuple[bool, str]:
        raise ZeroDivisionError("by | zero")

    gpu.run(kit, gpu.Part("one", 60, breaks))
    gpu.run(kit, gpu.Part("two", 60, lambda *_: (True, "all well")))
    kit.deadline = time.monotonic() + 5
    gpu.run(kit, gpu.Part("three", 60, lambda *_: (True, "too late")))
    written = json.loads((kit.out / "gpu.json").read_text())["parts"]
    assert [written[name]["state"] for name in ("one", "two", "three")] == ["failed", "held", "not reached"]
    assert written["one"]["summary"] == "ZeroDivisionError: by | zero"
    assert "| one | **failed** | 0 | ZeroDivisionError: by / zero |" in (kit.out / "gpu.md").read_text()


def test_a_child_that_takes_too_long_ends_with_all_that_it_has_started(kit: gpu.Kit) -> None:
    """Also where that is a session of its own, as the tests' runs are."""
    endless = """
import subprocess, time
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
time.sleep(600)
"""
    assert kit.call("-c", endless, log="log", seconds=2.0) is None
    grandchild = int((kit.out / "log").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{grandchild}").exists() and "Z" not in state_of(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_outcomes_are_read_with_one_process_or_several() -> None:
    text = """
tests/gpu/test_a.py::test_x PASSED                                       [ 50%]
tests/gpu/test_a.py::test_y[a b] SKIPPED (reason)                        [ 50%]
[gw1] [ 75%] FAILED tests/gpu/test_b.py::test_z[c d]
[gw0] [100%] PASSED tests/gpu/test_b.py::test_w
FAILED tests/gpu/test_b.py::test_z[c d] - assert 1 == 2
"""
    assert gpu.read_outcomes(text) == {
        "tests/gpu/test_a.py::test_x": "passed",
        "tests/gpu/test_a.py::test_y[a b]": "skipped",
        "tests/gpu/test_b.py::test_z[c d]": "failed",
        "tests/gpu/test_b.py::test_w": "passed",
    }


def test_the_line_that_says_why_is_the_error_and_not_the_advice_below_it() -> None:
    said = [
        "Traceback ...",
        "  File x",
        "torch._inductor.exc.InductorError: no ptxas",
        "",
        "Set TORCH_LOGS for more",
    ]
    assert last_words(said) == "torch._inductor.exc.InductorError: no ptxas"
    assert last_words(["a", "absent: scipy is not installed", "b"]) == "absent: scipy is not installed"
    assert last_words(["a", "b", ""]) == "b"
    assert last_words([""]) is None


def test_overlapping_kernels_count_once() -> None:
    assert union_length([(0, 4), (10, 12), (1, 2), (3, 6), (12, 13)]) == 9
    assert union_length([]) == 0


# ------------------------------------------------------------------------------------------------------ wheels


def test_the_wheels_are_what_such_an_interpreter_lacks() -> None:
    needed = wheels.closure(wheels.NEEDED, "3.12", stop=wheels.LEFT_OUT)
    present = wheels.closure(wheels.PRESENT, "3.12")
    assert {"torch", "lightning", "torchmetrics", "numpy", "pillow", "pyyaml", "pluggy"} <= present
    assert {"hydra-core", "omegaconf", "antlr4-python3-runtime", "datasets", "einops"} <= needed - present
    assert needed & set(wheels.LEFT_OUT) == set()


def make_wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    stem = f"{name}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        archive.writestr(
            f"{stem}.dist-info/METADATA",
            "\n".join([*metadata, *(f"Requires-Dist: {each}" for each in needs), ""]),
        )
        archive.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def test_wheels_are_installed_where_they_are_missing_or_too_old(tmp_path: Path) -> None:
    folder, target = tmp_path / "wheels", tmp_path / "target"
    folder.mkdir()
    make_wheel(folder, "nobodyhasthis", "1.0", "einops>=999", 'tqdm>=999; extra == "all"', "numpy>=1")
    make_wheel(folder, "einops", "999.0")
    make_wheel(folder, "tqdm", "999.0")
    make_wheel(folder, "numpy", "999.0")
    assert wheels.install_missing(folder, target) == ["einops", "nobodyhasthis"]
    assert {path.name for path in target.glob("*.py")} == {"einops.py", "nobodyhasthis.py"}
    with pytest.raises(OSError, match="holds no wheels; `make gpu-wheels` downloads them"):
        wheels.install_missing(tmp_path, target)


def test_every_measurement_has_a_name() -> None:
    from gpukit.speed import tasks

    titles = [report.title(vars(task)) for dry_run in (False, True) for task in tasks(dry_run)]
    assert len(set(titles)) == len(titles) == 23
    assert "litdiffusion, compiled, CIFAR-10 network, batch 512" in titles
