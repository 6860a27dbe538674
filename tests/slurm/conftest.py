import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm_world import Slurm, missing_programs


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A private cluster. Who asks for these tests means them: where Slurm is not installed, they fail."""
    missing = missing_programs()
    if missing:
        pytest.fail(f"no Slurm here (apt install slurm-wlm munge): {', '.join(missing)} not found")
    # Not pytest's own folder, whose name may be too long for a socket's.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Slurm(folder)
    yield cluster
    cluster.close()
    shutil.rmtree(folder)
