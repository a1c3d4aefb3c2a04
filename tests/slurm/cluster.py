"""A real Slurm on this machine: munged, slurmctld and one slurmd a node, in directories and on ports of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # Where Debian keeps daemons, and not every PATH leads.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 2 minutes by default.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool.%n
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
MpiDefault=none
# More CPUs than this machine has, one a process of a run.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=20
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str:
    """What this machine lacks, in words; empty when tests can run."""
    programs = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if programs:
        return f"needs Slurm (Debian: slurm-wlm and munge); not found: {', '.join(programs)}"
    return "" if os.geteuid() == 0 else "needs root, as which Slurm's daemons run"


class Slurm:
    """`with Slurm(3) as slurm:` nodes n1, n2 and n3. Everything it started ends with the block, jobs included."""

    def __init__(self, num_nodes: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # Socket paths have to be short.
        self.nodes = [f"n{i + 1}" for i in range(num_nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": _PATH}

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.directory.chmod(0o755)  # munged insists.
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.directory / name).mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        lines = [  # Addresses of their own, as machines have.
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.{2 + i} Port={port} CPUs=4 RealMemory=1000"
            for i, (node, port) in enumerate(zip(self.nodes, ports, strict=True))
        ]
        values = {"host": host, "directory": self.directory, "controller_port": controller_port}
        (self.directory / "slurm.conf").write_text(_CONF.format(**values, nodes="\n".join(lines)))
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        self._daemon("munged", *(f"--{option}={self.directory}/munge.{name}" for option, name in files.items()))
        self._daemon("slurmctld")
        for node in self.nodes:
            self._daemon("slurmd", "-N", node)
        wait_until(lambda: self.output("sinfo", "--noheader", "--format=%T").split() == ["idle"], "all nodes are idle")

    def _daemon(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=60, stdout=subprocess.DEVNULL)

    def kill_node(self, node: str) -> None:
        """What a power cut leaves of a node: none of its processes."""
        slurmd = psutil.Process(int((self.directory / f"slurmd.{node}.pid").read_text()))
        tasks = _processes_with(f"SLURMD_NODENAME={node}", self._mark)
        parents = {parent for task in tasks if (parent := task.parent()) and parent.name() == "slurmstepd"}
        _kill([slurmd, *parents, *tasks])  # The daemons first, so that they report nothing.

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        words = self.output("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
        return done.stdout

    @property
    def _mark(self) -> str:
        """In the environment of every process that a daemon started."""
        return f"SLURM_CONF={self.directory}/slurm.conf"

    def __exit__(self, *error: object) -> None:
        _kill(_processes_with(self._mark))
        shutil.rmtree(self.directory, ignore_errors=True)


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.5)


def _processes_with(*variables: str) -> list[psutil.Process]:
    """Those whose environment has all of these."""
    found = []
    for process in psutil.process_iter():
        try:
            text = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
        except OSError:
            continue  # It has ended.
        if set(variables) <= set(text.split("\0")) and process.pid != os.getpid():
            found.append(process)
    return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
