"""Known bad releases end every command before they are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from litdiffusion.errors import UserError
from litdiffusion.system import version_check

ENTRY_POINTS = ("train", "sample", "evaluate", "report")


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(version_check, "installed_version", found.get)


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_upload_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, lightning=version)
    with pytest.raises(UserError, match=f"lightning {version} is a malicious upload.*lightning>=2.6.6"):
        version_check.require_sound_versions()


@pytest.mark.parametrize(
    ("hydra", "omegaconf"), [("1.3.2", "2.4.0"), ("1.3.4", "2.4.0.dev3"), ("1.2", "3.0")]
)
def test_two_that_do_not_work_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, hydra: str, omegaconf: str
) -> None:
    installed(monkeypatch, hydra_core=hydra, omegaconf=omegaconf)
    with pytest.raises(UserError, match=f"hydra-core {hydra} does not work with omegaconf {omegaconf}"):
        version_check.require_sound_versions()


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"lightning": "2.6.1"},
        {"lightning": "2.6.6"},
        {"hydra_core": "1.3.2", "omegaconf": "2.3.0"},
        {"hydra_core": "1.4.0", "omegaconf": "2.4.0"},
    ],
)
def test_others_pass(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    installed(monkeypatch, **versions)
    version_check.require_sound_versions()


def test_what_is_installed_here_passes() -> None:
    version_check.require_sound_versions()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_command_ends_before_the_bad_release_is_imported(tmp_path: Path, name: str) -> None:
    """A malicious package runs its code when it is imported; this one would write a file."""
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text(
        f"open({str(tmp_path / 'was imported')!r}, 'w').close()\n"
    )
    metadata = tmp_path / "lightning-2.6.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 2.6.2\n")
    program = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
    program += f"runpy.run_module('litdiffusion.{name}', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: lightning 2.6.2 is a malicious upload")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "was imported").exists()
