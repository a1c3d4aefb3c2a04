"""The hash by which SGLang's /weights_checker knows a parameter: one for servers on a CPU, one for those on a GPU.

On a GPU it is that of sglang/kernels/ops/memory/gpu_tensor_hash.py (0.5.23): MurmurHash3's finaliser of every 32-bit
word and its position, summed over tiles of 8192 words, and SplitMix64's finaliser of the sum over tiles.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]

_TILE = 8192
_WORDS_AT_ONCE = 8 * _TILE
"""A few temporary arrays of so many words stay in a core's cache."""
_WORDS_A_THREAD = 256 * _TILE
_MAX_THREADS = 16
_SEED = 0x243F6A88
_LANES = (
    (_SEED, 0x27D4EB2D, 15),
    ((_SEED * 0x9E3779B1 ^ 0xDEADBEEF) % 2**32, 0x165667B1, 13),
)
"""(seed, factor of the position, rotation of the position) of the upper and the lower 32 bits."""


def cpu_hash(parts: Iterable[torch.Tensor]) -> str:
    """Of the tensors' bytes end to end: the first 64 bits of SHA-256, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_bytes(part).data)
    return digest.digest()[:8].hex()


def gpu_hash(parts: Iterable[torch.Tensor]) -> str:
    """Of the tensors' bytes end to end, zeros behind them up to a whole word. Large ones by several threads."""
    data = np.concatenate([_bytes(part) for part in parts])
    words = np.pad(data, (0, -len(data) % 4)).view(np.uint32)
    starts = range(0, len(words), _WORDS_A_THREAD)
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1, len(starts))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:  # NumPy releases Python's lock.
            total = sum(pool.map(lambda start: _sum_of_tiles(words, start), starts))
    else:
        total = sum(_sum_of_tiles(words, start) for start in starts)
    return f"{_splitmix64(total % 2**64) if len(words) else 0:016x}"


def _sum_of_tiles(words: Words, start: int) -> int:
    """The hashes of a thread's tiles, summed, in place: fresh arrays would take five times as long."""
    end, total = min(start + _WORDS_A_THREAD, len(words)), 0
    rotated, mixed, spare = (np.empty(_WORDS_AT_ONCE, np.uint32) for _ in range(3))
    for first in range(start, end, _WORDS_AT_ONCE):
        chunk = words[first : min(first + _WORDS_AT_ONCE, end)]
        position = np.arange(first, first + len(chunk), dtype=np.uint32)
        buffers = [buffer[: len(chunk)] for buffer in (rotated, mixed, spare)]
        upper, lower = (_tile_hashes(chunk, position, 4 * len(words), *lane, *buffers) for lane in _LANES)
        total += (int(upper.sum(dtype=np.uint64)) << 32) + int(lower.sum(dtype=np.uint64))
    return total


def _tile_hashes(
    chunk: Words,
    position: Words,
    num_bytes: int,
    seed: int,
    factor: int,
    rotation: int,
    rotated: Words,
    mixed: Words,
    spare: Words,
) -> Words:
    np.left_shift(position, np.uint32(rotation), out=rotated)
    rotated |= np.right_shift(position, np.uint32(32 - rotation), out=spare)
    np.multiply(position, np.uint32(factor), out=mixed)
    mixed += np.uint32(seed)
    mixed ^= rotated
    mixed ^= chunk
    _fmix32(mixed, spare)
    sums = np.add.reduceat(mixed, np.arange(0, len(mixed), _TILE), dtype=np.uint32)
    sums ^= np.uint32(num_bytes % 2**32)
    _fmix32(sums, np.empty_like(sums))
    return sums


def _fmix32(x: Words, spare: Words) -> None:
    """In place; `spare` is as large."""
    x ^= np.right_shift(x, np.uint32(16), out=spare)
    x *= np.uint32(0x85EBCA6B)
    x ^= np.right_shift(x, np.uint32(13), out=spare)
    x *= np.uint32(0xC2B2AE35)
    x ^= np.right_shift(x, np.uint32(16), out=spare)


def _splitmix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
