"""A private, real Slurm on this machine: munged, slurmctld, and a slurmd for each of two nodes, in one folder.

It needs Debian's ``slurm-wlm`` and ``munge``, nothing of their configuration, and no right but to run them: as root
(in a container) or as anybody else, who then is the cluster's only user. Nothing of it outlives ``close``.
"""

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PATIENCE_SECONDS = 300
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")

CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired: two minutes, if one does not shorten it.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
# No cgroups, no binding to cores, no database: what a container can have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE OverSubscribe=FORCE:8 PriorityTier=1
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE OverSubscribe=EXCLUSIVE PriorityTier=2 PreemptMode=OFF
"""
# More CPUs and GPUs than there may be: the batch files ask for them, and the jobs are small.
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:4 State=UNKNOWN"
NODES = ("node0", "node1")
GPUS = "Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random\n"  # any devices that there are


def missing_programs() -> list[str]:
    """What would have to be installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)


class Slurm:
    """A running cluster of two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "PATH": _search_path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            # For hold.py.
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names are none that could be looked up
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def submit(self, script: str, overrides: Iterable[str], output: Path, options: Iterable[str] = ()) -> str:
        """Submit one of the project's own batch files, as a user would from the project's folder."""
        return self.run(
            *("sbatch", "--parsable", f"--output={output}", *options, f"scripts/slurm/{script}", *overrides)
        ).strip()

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def describe(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job: ``JobState``, ``ExitCode``, ``Restarts``, and more."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def seconds_run(self, job: str) -> int:
        """How long a job has been running since it was last started; Slurm writes [days-]hours:minutes:seconds."""
        days, _, clock = self.describe(job)["RunTime"].rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    def set_time_limit(self, job: str, minutes: int) -> None:
        """Change the limit of a job, be it running or waiting."""
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def preempt(self, grace_seconds: int) -> None:
        """Submit a short job that needs both nodes at once, with ``grace_seconds`` for others to leave."""
        self.run("scontrol", "update", "PartitionName=all", f"GraceTime={grace_seconds}")
        urgent = ("--partition=urgent", f"--nodes={len(NODES)}", "--output=/dev/null", "--wrap=sleep 1")
        self.run("sbatch", *urgent)

    def has_ended(self, job: str) -> bool:
        """Whether a job has ended, well or badly."""
        return self.describe(job)["JobState"] in ENDED

    def wait_for_end(self, job: str, output: Path) -> dict[str, str]:
        """Wait until a job has completed, through whatever requeues; return its description."""
        wait_until(lambda: self.has_ended(job), f"the end of job {job}")
        description = self.describe(job)
        assert description["JobState"] == "COMPLETED", f"{description}\n{output.read_text()}\n{self.logs()}"
        return description

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def close(self) -> None:
        """End every job, then every daemon."""
        if len(self._daemons) > 1:
            for option in ("--full", "--signal=KILL"):
                command = ["scancel", f"--user={getpass.getuser()}", option]
                subprocess.run(command, env=self.environment, capture_output=True, timeout=60)
            deadline = time.monotonic() + 20
            while self._jobs() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _jobs(self) -> str:
        command = ["squeue", "--noheader"]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        ).stdout

    def _start(self) -> None:
        self.folder.chmod(0o755)  # munged insists that its socket can be reached
        for name in ("munge", "state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(NODES))
        nodes = [
            NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, host=host, port=ports[0], user=getpass.getuser(), nodes="\n".join(nodes)
            )
        )
        (self.folder / "gres.conf").write_text(GPUS)
        files = {"key": "key", "socket": "socket", "pid": "pid", "seed": "seed"}
        options = [
            f"--{name}-file={self.folder}/munge/{file}" for name, file in files.items() if name != "socket"
        ]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge/socket", *options)
        wait_until((self.folder / "munge" / "socket").exists, "munged", 20)
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        # -D writes to stderr beside the log; the nodes register within a second or two.
        idle = ["sinfo", "--noheader", "--format=%T"]
        wait_until(
            lambda: (
                subprocess.run(idle, env=self.environment, capture_output=True, text=True).stdout.split()
                == ["idle"]
            ),
            f"the nodes\n{self.logs()}",
            40,
        )

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{'-'.join(command)[:24].replace('/', '')}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=_end_with_parent,
                )
            )


def _end_with_parent() -> None:
    """Have the kernel end a daemon when the tests are killed."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _search_path() -> str:
    """Debian keeps daemons where only root's PATH looks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()
