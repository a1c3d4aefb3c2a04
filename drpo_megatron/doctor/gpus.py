"""GPUs, the links between them, and the network between nodes, from what the driver and the kernel say."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from drpo_megatron.doctor.finding import Finding, fail, ok, warn

_QUERY = (
    "name",
    "memory.total",
    "memory.used",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
)
_BUSY_MIB = 1024
_INFINIBAND = Path("/sys/class/infiniband")


def has_gpus() -> bool:
    """Whether the driver lists any, whatever torch can make of them."""
    return bool((_ask("nvidia-smi", "--list-gpus") or "").strip())


def check_gpus() -> Iterator[Finding]:
    table = _ask("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    if table is None:
        yield ok("gpus", "none", "nvidia-smi is missing or finds no device: the CPU platform")
        return
    yield from read_gpus(table)
    topology = _ask("nvidia-smi", "topo", "-m")
    if topology is not None:
        yield from read_topology(topology)


def check_network() -> Iterator[Finding]:
    """InfiniBand or RoCE, which NCCL uses between nodes."""
    ports = {}
    for state in sorted(_INFINIBAND.glob("*/ports/*/state")):
        rate = (state.parent / "rate").read_text().strip()
        ports[f"{state.parts[-4]}/{state.parts[-2]}"] = (state.read_text().strip(), rate)
    if not ports:
        yield ok("network", "no InfiniBand", "several nodes would talk over TCP")
        return
    yield from read_ports(ports)


def read_gpus(table: str) -> Iterator[Finding]:
    """Of nvidia-smi's CSV, a line a GPU with the columns of the query."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.strip().splitlines()]
    kinds = Counter(f"{row[0]} {int(row[1]) / 1024:.0f} GiB" for row in rows)
    found = ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    if len(kinds) > 1:
        yield warn("gpus", found, "ranks wait for the slowest kind; give the job one kind of GPU")
    else:
        yield ok("gpus", found)
    yield ok("driver", ", ".join(sorted({row[3] for row in rows})))
    if busy := [f"GPU {i} ({row[2]} MiB)" for i, row in enumerate(rows) if int(row[2]) > _BUSY_MIB]:
        yield warn(
            "gpu memory", f"in use on {', '.join(busy)}", "another process holds it: nvidia-smi shows which; end it"
        )
    if broken := [f"GPU {i} ({row[4]})" for i, row in enumerate(rows) if row[4].isdigit() and int(row[4])]:
        yield fail("gpu ecc", f"uncorrected errors on {', '.join(broken)}", "take the node out and have the GPU reset")
    if split := [f"GPU {i}" for i, row in enumerate(rows) if row[5] == "Enabled"]:
        yield warn("mig", f"enabled on {', '.join(split)}", "a rank wants a whole GPU; ask for nodes without MIG")


def read_topology(matrix: str) -> Iterator[Finding]:
    """Of `nvidia-smi topo -m`: how every two GPUs are linked. NV18 is 18 NVLinks; SYS, NODE, PHB, PXB, PIX are PCIe."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    links = {cell for row in rows for cell in row[1 : 1 + len(rows)]} - {"X"}  # Columns of network cards follow.
    if not links:
        return
    found = ", ".join(sorted(links))
    if all(kind.startswith("NV") for kind in links):
        yield ok("gpu links", found)
    else:
        yield warn(
            "gpu links", found, "some GPUs talk over PCIe: keep parallel.tensor and parallel.expert inside NVLink"
        )


def read_ports(ports: dict[str, tuple[str, str]]) -> Iterator[Finding]:
    """By port: state and rate as in /sys, such as `4: ACTIVE` and `400 Gb/sec (4X NDR)`."""
    down = [
        f"{name} ({state.partition(': ')[2]})" for name, (state, _) in ports.items() if not state.endswith("ACTIVE")
    ]
    rates = Counter(rate for state, rate in ports.values() if state.endswith("ACTIVE"))
    found = ", ".join(f"{number} x {rate}" for rate, number in sorted(rates.items())) or "no active port"
    if down:
        yield warn(
            "network",
            found,
            "ports are down: have the cables looked at, or leave them out with NCCL_IB_HCA",
            ", ".join(down),
        )
    else:
        yield ok("network", found)


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
