"""Rewards: what a completion is worth. One file a reward; `registry.build` makes one from its config section.

reward: {name: arithmetic}
reward: {name: math, timeout_s: 5}
reward: {name: import, path: "my_package.my_module:my_reward", timeout_s: 10}

    scorer.py   a rollout's rewards, in order, with what failed
    pool.py     user code runs in worker processes (process.py, worker.py; guardian.py ends them, channel.py is between)

Imports nothing here: workers start with it.
"""
