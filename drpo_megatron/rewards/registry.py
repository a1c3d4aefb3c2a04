"""From a config section to a reward."""

from __future__ import annotations

from drpo_megatron.config import sections
from drpo_megatron.rewards.arithmetic import ArithmeticReward
from drpo_megatron.rewards.base import Reward
from drpo_megatron.rewards.worker import WorkerReward

MATH_PATH = "drpo_megatron.rewards.math:math_reward"


def build(config: sections.RewardConfig) -> Reward:
    """The reward of a `reward:` section. Raises ValueError for a function that cannot be imported."""
    match config:
        case sections.ArithmeticReward():
            return ArithmeticReward()
        case sections.MathReward():
            return WorkerReward(MATH_PATH, config.timeout_s)
        case sections.ImportedReward():
            return WorkerReward(config.path, config.timeout_s)
