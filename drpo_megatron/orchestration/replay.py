"""Train on dumped rollouts: the files of `drpo-megatron rollout`, or of a run with rollout.dump, in place of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from drpo_megatron.config import Config
from drpo_megatron.config.hf_config import read_expert_routing
from drpo_megatron.data.packing import padded_length
from drpo_megatron.orchestration.rollouts import rollout_metrics
from drpo_megatron.rollout.dump import check_numbers, identity, read_rollout, rollout_file
from drpo_megatron.types import RolloutGroup


class DumpedRollouts:
    """A RolloutSource (see loop.py) that reads what a step trains on from `directory`."""

    def __init__(self, directory: Path, config: Config) -> None:
        self.directory, self.config = directory, config
        self.identity = identity(config)
        hf_config = AutoConfig.from_pretrained(config.model.hf_path, local_files_only=True, trust_remote_code=False)
        self.vocab_size: int = hf_config.get_text_config().vocab_size
        self.routing = read_expert_routing(config.model.hf_path)
        self.num_tokens = 0
        """Drawn: none."""

    def check(self) -> None:
        """Reads every file that the run is going to read. Raises ValueError for the first that it can't train on."""
        if not self.directory.is_dir():
            raise ValueError(f"rollout.from_dump: {self.directory} is not a directory; give one with step_000001.jsonl")
        for step in range(1, self.config.run.num_steps + 1):
            if not rollout_file(self.directory, step).is_file():
                raise ValueError(
                    f"rollout.from_dump: {self.directory} has no {rollout_file(self.directory, step).name}, but "
                    f"run.num_steps={self.config.run.num_steps}; use run.num_steps={step - 1}, or dump more"
                )
            self._read(step)

    def take(self, step: int, policy_version: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        groups = self._read(step)
        return groups, rollout_metrics(groups, policy_version)

    def draw_ahead(self, step: int) -> None:
        pass

    def settle(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _read(self, step: int) -> list[RolloutGroup]:
        file = rollout_file(self.directory, step)
        written, groups = read_rollout(file, self.identity, self._check)
        if written != step:
            raise ValueError(f"{file} is of step {written}; its name says {step}")
        return groups

    def _check(self, group: RolloutGroup) -> None:
        """That the samples are of this model, and have what this run's objective and trainer ask for."""
        config, prompt = self.config, group.prompt
        check_numbers(group, self.vocab_size)
        if not prompt.token_ids:
            raise ValueError("the prompt has no tokens; nothing predicts the first of the response")
        num_topk = config.objective.needed_topk
        limit = config.trainer.max_tokens_per_micro_batch
        for completion in group.completions:
            present = len(completion.topk_ids[0]) if completion.topk_ids else 0
            if completion.token_ids and present < num_topk:
                raise ValueError(
                    f"objective={config.objective.name} needs the {num_topk} most probable tokens of every "
                    f"position, and the dump has {present}; draw it with this objective"
                )
            if config.trainer.routing_replay != "off" and completion.routed_experts is None:
                raise ValueError(
                    f"trainer.routing_replay={config.trainer.routing_replay} needs routed experts, and the dump "
                    f"has none; draw it with the same setting, or set it to off"
                )
            if (routed := completion.routed_experts) is not None and self.routing is not None and routed.shape[0]:
                layers, experts = len(self.routing.moe_layers), self.routing.experts_per_token
                highest, ids = self.routing.num_experts, routed.ids()
                if routed.shape[1:] != (layers, experts) or not (ids.min() >= 0 and ids.max() < highest):
                    raise ValueError(
                        f"routed experts of shape {routed.shape} with ids {ids.min()} to {ids.max()}: the model has {layers} "
                        f"layers of {highest} experts and routes a token to {experts}"
                    )
            length = padded_length(len(prompt.token_ids) + len(completion.token_ids), config.parallel.context)
            if length > limit:
                raise ValueError(
                    f"a sequence has {length} tokens, more than trainer.max_tokens_per_micro_batch={limit}; raise it"
                )
