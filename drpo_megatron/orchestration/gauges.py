"""What a step took of the hardware: model FLOP/s of the trainer, its share of the GPUs' peak, memory of every rank."""

from __future__ import annotations

from drpo_megatron.config import Config
from drpo_megatron.orchestration.workers import ActorGroup
from drpo_megatron.planner.hardware import peak_flops
from drpo_megatron.planner.model import read_model
from drpo_megatron.planner.step_time import model_flops

_MAX_LISTED = 64
"""Ranks of which each has a metric of its own. Of more only the extremes are logged."""


class Gauges:
    def __init__(self, config: Config, ranks: ActorGroup) -> None:
        self.ranks = ranks
        self.model = read_model(config.model.hf_path)
        self.peak = peak_flops(ranks.call("device_name")[0])
        """FLOP/s of a rank's GPU. None on a CPU, and on a GPU that is not in the table."""

    def read(self, num_tokens: int, num_sequences: int, train_s: float) -> dict[str, float]:
        """Of a step that trained on so many tokens of so many sequences in `train_s` seconds.

        FLOPs are the model's own, forward and backward, as the planner counts them: recomputation, padding and
        `anchor: recompute` are not work, so they lower the numbers. The peak is that of dense BF16, in FP8, too.
        """
        flops = model_flops(self.model, num_tokens / num_sequences) * num_tokens
        a_rank = flops / train_s / len(self.ranks)
        metrics = {"throughput/train_tflops_per_s_per_rank": a_rank / 1e12}
        if self.peak is not None:
            metrics["throughput/mfu"] = a_rank / self.peak
        return metrics | memory_metrics(self.ranks.call("peak_memory_mb"))


def memory_metrics(megabytes: list[float]) -> dict[str, float]:
    """Of all ranks, in order."""
    fullest = max(range(len(megabytes)), key=megabytes.__getitem__)
    metrics = {"memory/trainer_mb/max": megabytes[fullest], "memory/trainer_mb/min": min(megabytes)}
    metrics["memory/trainer_mb/fullest_rank"] = fullest
    if len(megabytes) <= _MAX_LISTED:
        metrics |= {f"memory/trainer_mb/rank{rank}": value for rank, value in enumerate(megabytes)}
    return metrics
