"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`. To a GPU by page-locked memory, so that the host goes on at once.

    The caller's tensor may be changed or freed afterwards: the page-locked copy belongs to torch's caching allocator,
    which keeps it until the GPU has read it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
