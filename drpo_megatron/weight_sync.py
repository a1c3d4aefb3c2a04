"""Bring the trainer's weights to the rollout engines, in buckets, and verify every tensor before publishing.

    export iterator -> encode (low precision) -> buckets of about bucket_bytes
        -> load(bucket) on all engines, one bucket after the other
        -> finish(policy_version, checksums): engines compare and publish

What carries a bucket (Ray's object store, HTTP, a file system) is the caller's: two callables. A version counts as
published only after `finish` returned, that is after every engine held exactly the tensors that were exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from drpo_megatron.checkpoint.hf import tensor_checksum

Bucket = list[tuple[str, torch.Tensor]]
"""HF names and whole tensors on the CPU."""

Encode = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Name and tensor -> names and tensors."""

BUCKET_BYTES = 256 * 2**20
"""Default size of a bucket: large enough for few round trips, small beside a rank's memory."""


@dataclass(frozen=True, slots=True)
class PublishReport:
    policy_version: int
    num_tensors: int
    num_bytes: int
    seconds: float


def publish(
    exported: Iterable[tuple[str, torch.Tensor | None]],
    policy_version: int,
    load: Callable[[Bucket], None],
    finish: Callable[[int, dict[str, str]], None],
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    encode: Encode | None = None,
) -> PublishReport:
    """Send every exported tensor to the engines and publish `policy_version` there.

    Call on every rank that takes part in the export, because it is collective: ranks that are given None instead of
    tensors drain the iterator and send nothing.

    Args:
        exported: (HF name, tensor) pairs, each name once.
        load: hands one bucket to all engines and returns when they have copied it.
        finish: hands them the checksum of every tensor; raises when an engine holds something else.
        dtype: what the engines hold; tensors are cast to it before their checksums are taken. None: as exported.
        bucket_bytes: a bucket is sent as soon as it holds this much.
        encode: makes of a tensor, cast already, what travels in its place: see `precision.rollout`.
    Raises: ValueError for a name exported twice, and what `load` and `finish` raise; nothing is published then.
    """
    started = time.perf_counter()
    checksums: dict[str, str] = {}
    num_bytes = 0
    for bucket in _buckets(exported, dtype, bucket_bytes, encode or _as_it_is):
        for name, tensor in bucket:
            if name in checksums:
                raise ValueError(f"tensor {name} was exported twice")
            checksums[name] = tensor_checksum(tensor)
            num_bytes += tensor.nbytes
        load(bucket)
    if checksums:
        finish(policy_version, checksums)
    return PublishReport(policy_version, len(checksums), num_bytes, time.perf_counter() - started)


def _as_it_is(name: str, tensor: torch.Tensor) -> Bucket:
    return [(name, tensor)]


def _buckets(
    exported: Iterable[tuple[str, torch.Tensor | None]],
    dtype: torch.dtype | None,
    bucket_bytes: int,
    encode: Encode,
) -> Iterator[Bucket]:
    bucket: Bucket = []
    size = 0
    for name, tensor in exported:
        if tensor is None:
            continue
        for encoded in encode(name, tensor.detach().to("cpu", dtype)):
            bucket.append(encoded)
            size += encoded[1].nbytes
        if size >= bucket_bytes:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
