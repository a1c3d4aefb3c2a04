"""From a config section to a reward."""

from __future__ import annotations

from drpo_megatron.config import sections
from drpo_megatron.rewards.arithmetic import arithmetic_reward
from drpo_megatron.rewards.base import InProcess, Reward
from drpo_megatron.rewards.pool import PoolOptions, WorkerPool

MATH_PATH = "drpo_megatron.rewards.math:math_reward"


def build(config: sections.RewardConfig) -> Reward:
    """The reward of a `reward:` section. Raises ValueError for a function that cannot be imported."""
    match config:
        case sections.ArithmeticReward():
            return InProcess(arithmetic_reward)
        case sections.MathReward():
            return WorkerPool(PoolOptions(MATH_PATH, config.timeout_s, config.num_workers))
        case sections.ImportedReward():
            return WorkerPool(
                PoolOptions(config.path, config.timeout_s, config.num_workers, config.concurrency, config.batch_size)
            )
