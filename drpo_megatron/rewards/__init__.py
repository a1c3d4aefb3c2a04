"""Rewards: what a completion is worth. One file a reward; `registry.build` makes one from its config section.

reward: {name: arithmetic}
reward: {name: math, timeout_s: 5}
reward: {name: import, path: "my_package.my_module:my_reward", timeout_s: 10}
"""

from drpo_megatron.rewards.registry import build
from drpo_megatron.rewards.scorer import RewardScorer

__all__ = ["RewardScorer", "build"]
