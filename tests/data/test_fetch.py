import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from image_worlds import FILES, small_copy

from litdiffusion.configuration import config_folder
from litdiffusion.data.fetch import default_folder, main
from litdiffusion.data.sources import FashionMNIST

GZIPPED = [f"{name}.gz" for name in FILES]


def make_package(folder: Path) -> Path:
    """Debian's package in small, built by dpkg-deb itself."""
    data = folder / "build" / "usr" / "share" / "datasets" / "fashion-mnist"
    data.mkdir(parents=True)
    small_copy(data, ".gz")
    control = folder / "build" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    subprocess.run(["dpkg-deb", "-b", "build", "small.deb"], cwd=folder, check=True, capture_output=True)
    return folder / "small.deb"


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """A PATH that has only these tools, each a shell script."""
    folder.mkdir()
    for name, script in scripts.items():
        tool = folder / name.replace("_", "-")
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb: not a Debian system")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror out of reach: apt-get hands over a package built here, the real dpkg-deb unpacks it."""
    package, dpkg = make_package(tmp_path), shutil.which("dpkg-deb")
    path = "PATH=/usr/bin:/bin"
    tools(
        tmp_path / "bin",
        monkeypatch,
        apt_get=f"{path} cp {package} .",
        dpkg_deb=f'{path} exec {dpkg} "$@"',
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@needs_dpkg
@pytest.mark.usefixtures("no_debian", "no_hub", "debian")
def test_the_package_is_unpacked_without_installing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "deep" / "data"
    assert main([str(target)]) == 0
    assert names(target) == sorted(GZIPPED)
    assert len(FashionMNIST(target).load("train")) == 20
    output = capsys.readouterr()
    assert "downloading Debian's package" in output.out
    assert str(target) in output.out
    assert output.err == ""
    assert main([str(target)]) == 0
    assert "already in" in capsys.readouterr().out


@needs_dpkg
@pytest.mark.usefixtures("no_debian", "no_hub", "debian")
def test_damaged_files_are_fetched_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "data"
    small_copy(target, ".gz")
    damaged = target / GZIPPED[0]
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert main([str(target)]) == 0
    assert "fetching it anew" in capsys.readouterr().out
    assert len(FashionMNIST(target).load("train")) == 20
    (target / GZIPPED[1]).unlink()
    assert main([str(target)]) == 0
    assert names(target) == sorted(GZIPPED)


def test_debian_s_folder_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_copy(tmp_path / "debian", ".gz")
    monkeypatch.setattr("litdiffusion.data.sources.fashion_mnist.DEBIAN_FOLDER", tmp_path / "debian")
    assert main([str(tmp_path / "data")]) == 0
    assert f"already in {tmp_path / 'debian'}" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("no_debian", "no_hub")
@pytest.mark.parametrize(
    ("scripts", "told"),
    [
        ({}, "has no apt-get"),
        (
            {"apt_get": "echo 'E: Unable to locate package' >&2; exit 100", "dpkg_deb": ""},
            "Unable to locate package",
        ),
        ({"apt_get": "exec /bin/sleep 60", "dpkg_deb": ""}, "timed out after 0.2 seconds"),
        ({"apt_get": "", "dpkg_deb": ""}, "Hub cannot be reached"),
    ],
)
def test_when_nothing_works_one_line_names_the_three_ways(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scripts: dict[str, str],
    told: str,
) -> None:
    monkeypatch.setattr("litdiffusion.data.fetch.DEBIAN_SECONDS", 0.2)
    tools(tmp_path / "bin", monkeypatch, **scripts)
    assert main([str(tmp_path / "data")]) == 2
    output = capsys.readouterr()
    assert told in output.out
    assert output.err.count("\n") == 1
    for way in ("make data", "apt install dataset-fashion-mnist", "data.path=DIR", "Hub"):
        assert way in output.err
    assert names(tmp_path / "data") == []


@pytest.mark.usefixtures("no_debian", "no_hub")
@pytest.mark.parametrize("user", [0, 1000])
def test_only_root_updates_the_list_of_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], user: int
) -> None:
    log = tmp_path / "log"
    tools(tmp_path / "bin", monkeypatch, apt_get=f'echo "$1" >> {log}; [ "$1" = update ]', dpkg_deb="")
    monkeypatch.setattr("os.geteuid", lambda: user)
    assert main([str(tmp_path / "data")]) == 2
    assert log.read_text().split() == (["download", "update", "download"] if user == 0 else ["download"])
    assert ("sudo apt-get update" in capsys.readouterr().out) == (user != 0)


@pytest.mark.usefixtures("no_debian", "no_hub")
def test_a_file_or_an_unwritable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([str(target)]) == 2
        output = capsys.readouterr().err
        assert str(tmp_path / "file") in output
        assert output.count("\n") == 1


@pytest.mark.usefixtures("no_debian", "no_hub")
@pytest.mark.parametrize("place", [None, "elsewhere", "~/data"])
def test_it_fetches_to_where_training_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LITDIFFUSION_DATA", raising=False)
    if place is not None:
        monkeypatch.setenv("LITDIFFUSION_DATA", place)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        path = compose("train").data.path
    assert path == str(default_folder())
    folder = Path(path).expanduser()
    folder.mkdir(parents=True)
    small_copy(folder)
    assert main([]) == 0
    assert f"already in {folder}" in capsys.readouterr().out
    assert len(FashionMNIST(path).load("test")) == 5


def test_it_runs_as_a_command_on_the_real_data(fashion_mnist_folder: Path) -> None:
    command = [sys.executable, "-m", "litdiffusion.data.fetch", str(fashion_mnist_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"already in {fashion_mnist_folder}" in done.stdout
