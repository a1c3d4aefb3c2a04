"""Peak memory and speed of conversions against `cp` of the same files, in the same run.

    python tools/benchmark_convert.py [--gigabytes 6.5] [--repeats 3] [--scratch DIR] [--json FILE]
    python tools/benchmark_convert.py --checksums [--gigabytes 2.4]       what the checksums of Megatron's side cost

Makes a checkpoint of random weights in shards of 1 GB, as wide as Qwen3-30B-A3B and as deep as the size allows, and
then, each time with the source out of the page cache and the target on the disk at the end (`sync`):

    cp -r         the checkpoint                 one copy before each conversion
    hf-to-megatron, megatron-to-hf               the command, as a process, from its start to its exit

The whole is repeated, and medians are shown: a disk that others share is not equally fast twice.

Peak memory is the kernel's word on the process (ru_maxrss), its libraries included. What comes back has to be the
source, byte for byte. DIR needs three times the size; everything is removed from it again.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from drpo_megatron.models import get_family

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
from drpo_megatron.cli import main
from drpo_megatron.conversion import to_megatron

to_megatron.sum_of_new = lambda path: None
to_megatron.write_checksums_of_all = lambda directory, known: None
sys.exit(main(["convert", *sys.argv[1:]]))
"""
"""`hf-to-megatron` as it would be without checksums."""
CONFIG = ROOT / "examples" / "models" / "Qwen3-30B-A3B-Base" / "config.json"
TOOL = ROOT / "tools" / "convert_checkpoint.py"
SHARD_BYTES = 10**9
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""A process's peak begins at what its parent held when it was started: this parent holds little."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.5, help="least size of the checkpoint (default 6.5)")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is measured (default 3)")
    parser.add_argument("--scratch", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--checksums", action="store_true", help="what checksums cost, and nothing else")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-convert-", dir=args.scratch) as scratch:
        needed, free = int(args.gigabytes * 1.3e9) * 3, shutil.disk_usage(scratch).free
        if free < needed:
            parser.error(f"{scratch} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; use --scratch")
        if args.checksums:
            print(measure_checksums(Path(scratch), args.gigabytes * 1e9, args.repeats))
            return
        figures = measure(Path(scratch), args.gigabytes * 1e9, args.repeats)
    print(report(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(scratch: Path, least_bytes: float, repeats: int) -> dict[str, Any]:
    """Seconds, bytes and peak memory by name, a list of all repeats each."""
    source, megatron, back, copy = (scratch / name for name in ("source", "megatron", "back", "copy"))
    num_bytes = make_checkpoint(source, least_bytes)
    conversions = {
        "hf-to-megatron": (("--hf", source), megatron),
        "megatron-to-hf": (("--megatron", megatron), back),
    }
    found: dict[str, Any] = {name: {"copy_s": [], "seconds": [], "peak_bytes": []} for name in conversions}
    for _ in range(repeats):
        for out in (megatron, back):
            shutil.rmtree(out, ignore_errors=True)
        for action, (given, out) in conversions.items():
            copy_s, _ = timed(["cp", "-r", source, copy], source, copy)
            shutil.rmtree(copy)
            seconds, peak_bytes = timed([sys.executable, TOOL, action, *given, "--out", out], Path(given[1]), out)
            for name, value in (("copy_s", copy_s), ("seconds", seconds), ("peak_bytes", peak_bytes)):
                found[action][name].append(value)
        require_equal(source, back)
    return {"num_bytes": num_bytes, "num_files": len(list(source.iterdir())), "conversions": found}


def measure_checksums(scratch: Path, least_bytes: float, repeats: int) -> str:
    """Both conversions with and without checksums by turns, the order swapped each time; medians of the pairs' ratios."""
    source, megatron, back = (scratch / name for name in ("source", "megatron", "back"))
    num_bytes, lines = make_checkpoint(source, least_bytes), []
    to_megatron = ("hf-to-megatron", "--hf", source, "--out", megatron)
    to_hf = ("megatron-to-hf", "--megatron", megatron, "--out", back)
    kinds = {
        "hf-to-megatron": ((TOOL, *to_megatron), ("-c", WITHOUT, *to_megatron), source, megatron),
        "megatron-to-hf": ((TOOL, *to_hf), (TOOL, *to_hf, "--skip-checksums"), megatron, back),
    }
    for action, (with_, without, given, out) in kinds.items():
        pairs = []
        for number in range(repeats):
            seconds = {}
            for command in (with_, without) if number % 2 else (without, with_):
                shutil.rmtree(out, ignore_errors=True)
                seconds[command], _ = timed([sys.executable, *command], given, out)
            pairs.append((seconds[with_], seconds[without]))
        if action == "hf-to-megatron":  # The way back begins with what carries checksums.
            shutil.rmtree(out)
            timed([sys.executable, *with_], given, out)
        ratios = sorted(one / other for one, other in pairs)
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        lines.append(
            f"{action:15} with {medians[0]:.1f} s, without {medians[1]:.1f} s, ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    return "\n".join([f"checkpoint of {num_bytes / 1e9:.2f} GB", *lines])


def require_equal(source: Path, back: Path) -> None:
    names = sorted(path.name for path in source.iterdir())
    if (
        names != sorted(path.name for path in back.iterdir())
        or filecmp.cmpfiles(source, back, names, False)[0] != names
    ):
        raise SystemExit(f"{back} differs from {source}")


def make_checkpoint(directory: Path, least_bytes: float) -> int:
    """Random BF16 weights; bytes of all tensors. A layer is 1.2 GB."""
    config = json.loads(CONFIG.read_text())
    for num_layers in range(1, config["num_hidden_layers"] + 1):
        config["num_hidden_layers"] = num_layers
        rules = get_family(config).rules(config)
        shapes = {hf.name: hf.shape for rule in rules for hf in rule.hf}
        num_bytes = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
        if num_bytes >= least_bytes:
            break
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * s.numel() for s in shards[-1].values()) >= SHARD_BYTES:
            shards.append({})
        shards[-1][name] = torch.Size(shape)
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.int16).random_() for name, shape in shard.items()}
        save_file({n: t.view(torch.bfloat16) for n, t in tensors.items()}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    metadata = {"total_size": num_bytes}
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    (directory / "model.safetensors.index.json").write_text(text + "\n")
    return num_bytes


def timed(command: Sequence[Any], source: Path, target: Path) -> tuple[float, int]:
    """Seconds until the target is on the disk, and peak bytes of the process. The source is read from the disk."""
    for path in source.rglob("*"):
        if path.is_file():
            forget(path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *map(str, command)], env=environment, capture_output=True, text=True
    )
    if launched.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{launched.stderr}")
    subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)
    return time.perf_counter() - started, int(launched.stdout) * 1024


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # What isn't on the disk yet would stay.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(figures: dict[str, Any]) -> str:
    num_bytes = figures["num_bytes"]
    lines = [f"checkpoint of {num_bytes / 1e9:.2f} GB in {figures['num_files']} files"]
    for action, found in figures["conversions"].items():
        copy_s, seconds = statistics.median(found["copy_s"]), statistics.median(found["seconds"])
        shares = sorted(c / s for c, s in zip(found["copy_s"], found["seconds"], strict=True))
        lines.append(
            f"  {action:15} {seconds:6.1f} s {num_bytes / seconds / 1e6:6.0f} MB/s    cp {copy_s:6.1f} s "
            f"{num_bytes / copy_s / 1e6:6.0f} MB/s    {statistics.median(shares):.2f} of cp ({shares[0]:.2f} to "
            f"{shares[-1]:.2f})    peak {max(found['peak_bytes']) / 1e9:.2f} GB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
