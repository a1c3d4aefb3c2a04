"""torch's profiler around the work of a rank, and its trace on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profiler:
    """Between `start` and `stop`: operators of the CPU and, where there is one, kernels of the GPU."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(activities=activities)

    def start(self) -> None:
        self._profile.start()

    def stop(self, file: Path) -> None:
        """Chrome's trace format, which Perfetto opens."""
        self._profile.stop()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(file))
