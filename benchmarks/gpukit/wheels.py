"""The packages that the GPU kit needs on a machine without a network, as a folder of wheels.

    make gpu-wheels                  # here: downloads them into benchmarks/results/wheels
    WHEELS=DIR make gpu              # there: installs those that are missing, into a temporary folder

What is downloaded is what the kit needs, in the versions of this environment, less what an interpreter with torch,
lightning, torchvision, pandas and pytest has already, and less ``LEFT_OUT``.
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

PRESENT = ("torch", "torchvision", "lightning", "pandas", "pytest")
"""What the interpreter of the GPU machine is taken to have, with all that these need."""

NEEDED = ("litdiffusion[benchmarks]", "hypothesis", "pytest-timeout", "pytest-xdist")

LEFT_OUT = {
    "pyarrow": "55 MB; without it nothing of litdiffusion can read images: the machine must have it",
    "scipy": "35 MB; without it denoising-diffusion-pytorch is not measured",
    "scikit-learn": "9 MB, and needs scipy; only data=digits reads it, which the kit does not use",
    "hf-xet": "4 MB; only downloads from the Hub use it",
    "wandb": "20 MB; only logger=wandb imports it, which the kit does not use",
}

PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("benchmarks/results/wheels"))
    parser.add_argument("--python", default=PYTHON, help="of the GPU machine (default: %(default)s)")
    parser.add_argument("--present", nargs="+", default=[], metavar="NAME", help="what else that machine has")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    download(folder, arguments.python, [*PRESENT, *arguments.present])
    wheels = sorted(folder.glob("*.whl"))
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{len(wheels)} wheels for Python {arguments.python}, {megabytes:.1f} MiB, in {folder}. Left out:")
    for name, cost in LEFT_OUT.items():
        print(f"  {name}: {cost}")


def download(folder: Path, python: str, present: list[str]) -> None:
    """Fill ``folder`` with one wheel of each package; pip says what fails, and the program ends with its code."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    names = closure(NEEDED, python, stop=LEFT_OUT) - closure(present, python) - {"litdiffusion"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    for name in sorted(names):
        pinned = f"{name}=={version(name)}"
        if name == "antlr4-python3-runtime":  # published as source alone, and pure Python
            command = [*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", pinned]
        else:
            command = [*pip, "download", "--no-deps", f"--dest={folder}", *target, pinned]
        code = subprocess.run(command, timeout=3600).returncode
        if code:
            sys.exit(code)


def closure(names: Iterable[str], python: str, stop: Iterable[str] = ()) -> set[str]:
    """Return the packages of ``names`` and all that they need on Linux, as this environment knows them."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen or name in stop:
            continue
        seen.add(str(requirement))
        try:
            needs = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue  # nothing that this platform needs, or an option that is not installed
        found.add(name)
        extras = requirement.extras or {""}
        waiting += [
            each
            for each in needs
            if each.marker is None or any(each.marker.evaluate({**there, "extra": extra}) for extra in extras)
        ]
    return found


def install_missing(wheels: Path, target: Path) -> list[str]:
    """Install into ``target`` the wheels that this interpreter lacks, or has too old for the others; return names.

    Raises:
        OSError: there are no wheels in the folder.
        subprocess.SubprocessError: pip refuses one, or takes ten minutes.
    """
    files = {parse_wheel_filename(path.name)[0]: path for path in sorted(wheels.glob("*.whl"))}
    if not files:
        raise OSError(f"{wheels} holds no wheels; `make gpu-wheels` downloads them")
    missing = {name for name in files if _installed(name) is None}
    for name in list(missing):
        for requirement in _requirements(files[name]):
            needed = canonicalize_name(requirement.name)
            has = _installed(needed)
            if needed in files and has is not None and has not in requirement.specifier:
                missing.add(needed)
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(target)]
        subprocess.run([*command, *(str(files[name]) for name in sorted(missing))], check=True, timeout=600)
    return sorted(missing)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements(wheel: Path) -> list[Requirement]:
    """What a wheel needs, without its options."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(archive.read(path).decode()).get_all("Requires-Dist") or []
    every = [Requirement(line) for line in lines]
    return [each for each in every if each.marker is None or each.marker.evaluate({"extra": ""})]


if __name__ == "__main__":
    main()
