"""The hash by which SGLang's /weights_checker knows a parameter: one for servers on a CPU, one for those on a GPU.

On a GPU it is that of sglang/kernels/ops/memory/gpu_tensor_hash.py (0.5.23): MurmurHash3's finaliser of every 32-bit
word and its position, summed over tiles of 8192 words, and SplitMix64's finaliser of the sum over tiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]

_TILE = 8192
_WORDS_AT_ONCE = 512 * _TILE
"""Bounds the temporary arrays to some 100 MB."""
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
    """Of the tensors' bytes end to end, zeros behind them up to a whole word."""
    data = np.concatenate([_bytes(part) for part in parts])
    words = np.pad(data, (0, -len(data) % 4)).view(np.uint32)
    total = 0
    for start in range(0, len(words), _WORDS_AT_ONCE):
        upper, lower = (_tile_hashes(words, start, *lane) for lane in _LANES)
        total += (int(upper.sum(dtype=np.uint64)) << 32) + int(lower.sum(dtype=np.uint64))
    return f"{_splitmix64(total % 2**64) if len(words) else 0:016x}"


def _tile_hashes(words: Words, start: int, seed: int, factor: int, rotation: int) -> Words:
    chunk = words[start : start + _WORDS_AT_ONCE]
    position = np.arange(start, start + len(chunk), dtype=np.uint32)
    rotated = (position << np.uint32(rotation)) | (position >> np.uint32(32 - rotation))
    mixed = _fmix32(chunk ^ ((position * np.uint32(factor) + np.uint32(seed)) ^ rotated))
    sums = np.add.reduceat(mixed, np.arange(0, len(mixed), _TILE), dtype=np.uint32)
    return _fmix32(sums ^ np.uint32(4 * len(words) % 2**32))


def _fmix32(x: Words) -> Words:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _splitmix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
