"""What checksums cost: of saving a checkpoint with flush to the disk, and of verifying it before it is loaded.

    python tools/benchmark_checkpoint.py [--directory DIR] [--repeats 3]

Writes tensors as Megatron does (torch.save of each, two files at a time, fsync), then hashes the files, which are still
in the page cache, as every rank does with its own. Prints medians for two sizes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from drpo_megatron.checkpoint.checksums import damaged, sums_of

NUM_FILES = 2
TENSOR_BYTES = 64 * 2**20


def save(path: Path, tensor: torch.Tensor, num_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(num_bytes // TENSOR_BYTES):
            torch.save(tensor, file)
        os.fsync(file.fileno())


def measure(directory: Path, num_bytes: int) -> tuple[float, float, float]:
    """Seconds of saving, of hashing what was saved, and of verifying it."""
    names = [f"__0_{index}.distcp" for index in range(NUM_FILES)]
    tensor = torch.randn(TENSOR_BYTES // 4)
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_FILES) as pool:
        list(pool.map(lambda name: save(directory / name, tensor, num_bytes // NUM_FILES), names))
    saved = time.perf_counter()
    sums = sums_of(directory, names)
    hashed = time.perf_counter()
    assert damaged(directory, sums) == []
    return saved - started, hashed - saved, time.perf_counter() - hashed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the disk that checkpoints go to")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| bytes | save and flush | hash | share | verify |\n|---|---|---|---|---|")
    for num_bytes in (256 * 2**20, 2 * 2**30):
        times = []
        for _ in range(args.repeats):
            scratch = Path(tempfile.mkdtemp(prefix="benchmark-checkpoint-", dir=args.directory))
            try:
                times.append(measure(scratch, num_bytes))
            finally:
                shutil.rmtree(scratch)
        saving, hashing, verifying = (statistics.median(column) for column in zip(*times, strict=True))
        share = statistics.median(h / s for s, h, _ in times)
        print(f"| {num_bytes:,} | {saving:.2f} s | {hashing:.3f} s | {share:.1%} | {verifying:.3f} s |")


if __name__ == "__main__":
    main()
