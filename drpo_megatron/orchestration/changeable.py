"""What may change when a run is resumed, and why it can't make it another run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drpo_megatron.config import Config

CHANGEABLE = {
    "run.num_steps": "a longer or shorter run (a schedule that decays over the run follows it)",
    "run.name": "a label",
    "run.output_dir": "where new runs are made",
    "run.run_dir": "where the run lies",
    "metrics": "what is shown, and where",
    "eval": "measures, and trains on nothing",
    "checkpoint": "what is kept",
    "cluster": "where processes stand, and how long they are waited for",
    "parallel": "the layout; equal to rounding",
    "trainer.backend": "the processor; equal to rounding",
    "trainer.max_tokens_per_micro_batch": "memory; equal to rounding",
    "trainer.loss_chunk_mb": "memory; equal to rounding",
    "trainer.loss_low_memory": "memory; equal to rounding",
    "trainer.optimizer.overlap_grad_reduce": "speed",
    "model.recompute": "memory for time",
    "model.moe_token_dispatcher": "how tokens travel; equal to rounding",
    "precision.monitor.layers_every": "measures",
    "precision.monitor.gradient_every": "measures",
    "rollout.dump": "what is kept",
    "rollout.engine.num_engines": "the layout of the engines; equal to rounding",
    "rollout.engine.num_threads": "speed",
    "rollout.engine.max_batch_tokens": "memory; equal to rounding",
    "rollout.engine.servers": "where servers are",
    "rollout.engine.api_key_file": "where servers are",
    "rollout.engine.python": "where SGLang is installed",
    "rollout.engine.tensor_parallel": "the layout of the engines; equal to rounding",
    "rollout.engine.data_parallel": "the layout of the engines; equal to rounding",
    "rollout.engine.flags.mem-fraction-static": "memory",
    "rollout.engine.flags.max-running-requests": "memory",
    "rollout.engine.flags.max-total-tokens": "memory",
    "rollout.engine.flags.chunked-prefill-size": "memory",
    "rollout.engine.max_concurrent_requests": "speed",
    "rollout.engine.request_timeout_s": "a time-out",
    "rollout.engine.max_attempts": "a time-out",
    "rollout.engine.health_interval_s": "a time-out",
    "rollout.engine.hang_timeout_s": "a time-out",
    "rollout.engine.max_restarts": "a time-out",
    "rollout.engine.sync": "how weights travel",
    "rollout.engine.broadcast": "how weights travel",
    "rollout.engine.sync_dir": "how weights travel",
    "rollout.engine.sync_timeout_s": "a time-out",
    "reward.timeout_s": "a time-out",
    "reward.num_workers": "speed",
    "reward.concurrency": "speed",
}
"""Keys, or whole sections, by what they do. Everything else is refused by name."""

_MISSING = object()


def settings(config: Config) -> dict[str, Any]:
    """What makes the run the run that it is: every key that may not change, with its value."""
    return {key: value for key, value in _flat(config.model_dump(mode="json")) if not is_changeable(key)}


def refused(before: dict[str, Any], config: Config) -> list[str]:
    """`KEY=VALUE (the run has VALUE)` for every difference between `settings` of a run and `config`."""
    now, before = settings(config), _completed(before, config)
    keys = [key for key in now | before if before.get(key, _MISSING) != now.get(key, _MISSING)]
    return [f"{key}={now.get(key)} (the run has {before.get(key)})" for key in keys]


def _completed(before: dict[str, Any], config: Config) -> dict[str, Any]:
    """With the default of every key that the version lacked which the run was started with."""
    tree: dict[str, Any] = {}
    others = {key: value for key, value in _flat(config.model_dump(mode="json")) if is_changeable(key)}
    known = settings(config).keys()  # What this version has no more is told as a difference.
    for key, value in (others | {key: value for key, value in before.items() if key in known}).items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    try:
        return before | {
            key: value for key, value in settings(Config.model_validate(tree)).items() if key not in before
        }
    except (ValueError, AttributeError, TypeError):  # Of another form: every difference is told.
        return before


def is_changeable(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
