"""A run on one machine can be reached from that machine alone, and its temporary files by its user alone."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from drpo_megatron.orchestration.actors import _stay_on_the_network_of
from drpo_megatron.orchestration.scratch import ray_directory, remove_abandoned
from drpo_megatron.slurm.ray_node import ADDRESS_FILE
from tests.orchestration import command


def listening(processes: list[psutil.Process]) -> dict[str, str]:
    """Who listens where."""
    return {
        f"{place.laddr.ip} {place.laddr.port}": " ".join(process.cmdline())[:200]
        for process in processes
        for place in process.net_connections(kind="inet")
        if place.status == psutil.CONN_LISTEN or (place.type.name == "SOCK_DGRAM" and not place.raddr)
    }


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_a_run_listens_on_loopback_only_and_its_scratch_is_closed(tmp_path: Path) -> None:
    command.prepare(tmp_path, run={"run_dir": "run", "num_steps": 100_000}, parallel={"num_ranks": 2})
    process = command.start(tmp_path, "train", "run.yaml", "warmup=null")
    try:
        command.wait_for_step(process, tmp_path, 1)
        family = [psutil.Process(process.pid), *command.descendants(process)]
        found = listening(family)
        names = {p.name() for p in family}
        [scratch] = Path("/tmp").glob(f"drpo-{process.pid}-*")
        mode, inside = stat.S_IMODE(scratch.stat().st_mode), [path.name for path in scratch.iterdir()]
    finally:
        process.send_signal(signal.SIGINT)
        command.finish(process, tmp_path)
    # The driver, Ray's GCS and raylet, ranks, engine and rewards all listen.
    assert len(found) >= 8 and {"gcs_server", "raylet"} <= names
    assert {place: who for place, who in found.items() if not is_loopback(place.split()[0])} == {}
    assert (mode, inside) == (0o700, ["r"])
    assert not scratch.exists()


def test_ranks_on_several_machines_take_the_interface_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "to be removed")  # So that it is restored.
        monkeypatch.delenv(name)
    _stay_on_the_network_of("203.0.113.7")  # No interface has it.
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    _stay_on_the_network_of("127.0.0.1")
    assert [os.environ[name] for name in names] == ["lo", "ib0"]


_HOLD = """
import os, sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from drpo_megatron.orchestration import scratch
scratch._MAX_LENGTH = 1000
with scratch.ray_directory() as directory:
    (directory / "session").mkdir()
    print(directory, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_owner_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    owners = [
        subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        killed, living = [Path(owner.stdout.readline().strip()).parent for owner in owners if owner.stdout]
        other = tmp_path / "drpo-notes"
        other.mkdir()
        (tmp_path / f"drpo-{owners[0].pid}-link").symlink_to(other)
        owners[0].kill()
        owners[0].wait()
        (killed / "r" / "session" / "file").write_text("left")
        remove_abandoned(tmp_path)
        assert not killed.exists()
        assert living.exists() and other.exists()
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()


def test_the_directory_is_gone_after_the_block_and_its_paths_are_short() -> None:
    with ray_directory() as directory:
        # Ray adds session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store; Linux allows 107 characters.
        socket = directory / "session_2026-12-31_23-59-59_999999_4194304" / "sockets" / "plasma_store"
        assert len(str(socket).replace(str(os.getpid()), "4194304")) <= 107
        assert directory.is_dir()
    assert not directory.parent.exists()


def test_of_ray_in_a_job_only_its_own_servers_listen_everywhere(tmp_path: Path) -> None:
    """The others take the address of the node; the dashboard's page isn't served."""
    addresses = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    outside = next((address for address in addresses if not is_loopback(address)), None)
    if outside is None:
        pytest.skip("this machine has no address but loopback")
    (tmp_path / "nodes").write_text(f"NodeName=here NodeAddr={outside}\n")
    program = (
        "import sys; from pathlib import Path; from drpo_megatron.slurm.ray_node import run_node\n"
        "sys.exit(run_node(Path(sys.argv[1]), 'here', is_head=True, num_cpus=1, timeout_s=300))"
    )
    environment = os.environ | {"PYTHONPATH": str(command.ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / ADDRESS_FILE).is_file():
            assert process.poll() is None and time.monotonic() < deadline, "Ray did not start"
            time.sleep(0.2)
        time.sleep(2)  # What comes up after the head.
        family = command.descendants(process)
        found = listening(family)
    finally:
        process.send_signal(signal.SIGUSR2)
        code = process.wait(120)
    assert code == 0
    assert not any(place.endswith(" 8265") for place in found)
    everywhere = [who for place, who in found.items() if ipaddress.ip_address(place.split()[0]).is_unspecified]
    known = ("gcs/gcs_server", "raylet/raylet", "ray::DashboardAgent", "_private/monitor.py", "dashboard/dashboard.py")
    assert [who for who in everywhere if not any(name in who for name in known)] == []
    (address,) = (tmp_path / ADDRESS_FILE).read_text().split()
    assert address.startswith(f"{outside}:")
