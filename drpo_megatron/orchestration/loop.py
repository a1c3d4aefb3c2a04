"""The whole RL loop. One driver, and three kinds of processes that wait for it:

         prompts                                    +---------------------------------------------+
            |                                       |               Loop.step                     |
            v          requests                     |                                             |
      +----------+ ----------------> engines        |   groups  = collect(step)                   |
      |          | <---------------- (n processes)  |   samples = to_samples(groups, advantages)  |
      |          |    completions       ^           |   report  = train(samples)                  |
      |  driver  |                      | buckets   |   publish()                                 |
      |          | -----> rewards       |           |   evaluate, save, log                       |
      |          | <----- (1 process)   |           +---------------------------------------------+
      |          |                      |
      |          |    samples           |
      +----------+ ----------------> trainer ranks (Megatron; the optimiser steps of one rollout)
            |     <----------------
            v        StepReport
      metrics, checkpoints

The engines draw with the weights of version v; the ranks train on that rollout and hold v + 1; `publish` brings v + 1
to the engines before the next rollout, so nothing is ever stale. All draws come from (seed, step, prompt), the engines
keep no state of their own, and a resumed run therefore continues bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from drpo_megatron.config import Config
from drpo_megatron.data.prompts import PromptStream
from drpo_megatron.objectives.advantages import is_equal_group
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.run_directory import Progress, RunDirectory
from drpo_megatron.orchestration.warmup import warm_up
from drpo_megatron.orchestration.workers import Workers
from drpo_megatron.rollout.engine import SamplingParams
from drpo_megatron.rollout.evaluation import evaluate
from drpo_megatron.rollout.sampler import make_requests, to_samples
from drpo_megatron.types import Prompt, RolloutGroup, Sample, StepReport

TRAINER_FILES = "trainer"
"""The trainer's part of a checkpoint directory."""


class MetricsLog(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...


class Loop:
    """One run from its first step, or from a checkpoint, to its last."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        workers: Workers,
        prompts: PromptStream,
        heldout: list[Prompt],
        demonstrations: list[Sample],
        metrics: MetricsLog,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.run_directory, self.workers = config, run, workers
        self.prompts, self.heldout, self.demonstrations = prompts, heldout, demonstrations
        self.metrics, self.clock, self.say = metrics, clock, say
        self.params = SamplingParams(
            config.rollout.max_response_tokens, config.rollout.temperature, num_topk=config.objective.needed_topk
        )
        self.policy_version = 0
        self.num_tokens = {"generate": 0, "train": 0}
        self.reward_failures = 0
        """Rewards that timed out or raised so far, and counted as 0."""
        self.accuracy: dict[int, float] = {}
        """Held-out accuracy by step, where it was measured."""
        self.stop_reason: str | None = None
        """Why the run ends before its last step, if it was asked to."""
        self._saved_step: int | None = None

    def run(self, checkpoint: tuple[Path, Progress] | None) -> None:
        """All steps that are left; fewer, with a checkpoint of the last one done, after `request_stop`."""
        first = self.resume(*checkpoint) if checkpoint else self.begin()
        for step in range(first, self.config.run.num_steps + 1):
            self.step(step)
            if self.stop_reason is not None and self._saved_step == step < self.config.run.num_steps:
                self.say(f"stopped after step {step}: {self.stop_reason}")
                return
        self.stop_reason = None

    def request_stop(self, reason: str) -> None:
        """End after the present step, with a checkpoint. Only notes the wish: signal handlers and threads may call it."""
        self.stop_reason = reason

    def step(self, step: int) -> None:
        groups, metrics = self.collect(step)
        samples = to_samples(groups, self.config.advantages.name)
        report = self.train(samples)
        self.publish()
        if self.is_due(self.config.eval.every, step):
            metrics |= self.evaluate(step)
        metrics |= report.metrics | {"reward/failures/sum": self.reward_failures}
        self.metrics.log(step, metrics | self.timings(metrics["rollout/num_tokens"], report.num_tokens))
        if self.is_due(self.config.checkpoint.every, step) or self.stop_reason is not None:
            self.save(step)

    def collect(self, step: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        """A rollout of `prompts_per_step` groups, and the metrics of all that was drawn for it.

        Groups without a gradient (equal rewards) are replaced in up to `resample_equal_groups` further rounds.
        """
        wanted, rounds = self.config.rollout.prompts_per_step, 1 + self.config.rollout.resample_equal_groups
        drawn: list[RolloutGroup] = []
        useful: list[RolloutGroup] = []
        while rounds and len(useful) < wanted:
            seen = {group.prompt.prompt_id for group in drawn}
            drawn += self.roll_out(step, self.prompts.take(wanted - len(useful), exclude=seen))
            useful = [group for group in drawn if not is_equal_group(group.rewards)]
            rounds -= 1
        chosen = sorted(drawn, key=lambda group: is_equal_group(group.rewards))[:wanted]
        return chosen, rollout_metrics(drawn, self.policy_version)

    def roll_out(self, step: int, prompts: list[Prompt]) -> list[RolloutGroup]:
        size = self.config.rollout.samples_per_prompt
        with self.clock.phase("generate"):
            requests = make_requests(prompts, size, seed=self.config.run.seed, step=step)
            completions = self.workers.engines.generate(requests, self.params)
        with self.clock.phase("reward"):
            pairs = [(prompts[i // size], completion) for i, completion in enumerate(completions)]
            rewards, failures = self.workers.rewards.score(pairs)
        self.reward_failures += sum(failures.values())
        self.num_tokens["generate"] += sum(len(completion.token_ids) for completion in completions)
        spans = [slice(start, start + size) for start in range(0, len(completions), size)]
        return [
            RolloutGroup(prompt, tuple(completions[span]), tuple(rewards[span]))
            for prompt, span in zip(prompts, spans, strict=True)
        ]

    def train(self, samples: list[Sample]) -> StepReport:
        with self.clock.phase("train"):
            if self.config.objective.anchor == "recompute":
                old = self.workers.ranks.call("compute_logprobs", samples)[0]
                samples = [replace(sample, old_logprobs=old[sample.sample_id]) for sample in samples]
            if self.config.objective.kl_ref is not None:
                ref = self.workers.ranks.call("compute_reference_logprobs", samples)[0]
                samples = [replace(sample, reference_logprobs=ref[sample.sample_id]) for sample in samples]
            report = self.workers.ranks.call("train_step", samples)[0]
        self.policy_version = report.policy_version
        self.num_tokens["train"] += report.num_tokens
        return report

    def publish(self) -> None:
        """The ranks' weights to the engines. Returns when every engine has verified and published them."""
        with self.clock.phase("sync"):
            self.workers.ranks.call("publish_weights", self.workers.engines.actors)

    def evaluate(self, step: int) -> dict[str, float]:
        """Share of correct answers on the held-out prompts."""
        if not self.heldout:
            return {}
        with self.clock.phase("eval"):
            result = evaluate(self.workers.engines, self.workers.rewards, self.heldout, self.config)
        self.accuracy[step] = result.accuracy
        return {"eval/accuracy": result.accuracy}

    # --- where a run begins and where it goes on ----------------------------------------------------------------------

    def begin(self) -> int:
        """Supervised warm-up, if there is one, and the accuracy before RL. Returns the first step."""
        metrics: dict[str, float] = {}
        warmup = self.config.warmup
        if warmup is not None:
            with self.clock.phase("warmup"):
                metrics |= warm_up(warmup, self.config.run.seed, self.demonstrations, self.workers.ranks, self.say)
                if self.config.objective.kl_ref is not None:
                    source = Path(self.config.model.hf_path)
                    self.workers.ranks.call("write_hf", self.run_directory.reference, source)
        if warmup is not None or self.config.model.megatron_path is not None:
            self.publish()
        metrics |= self.evaluate(0)
        if metrics:
            self.metrics.log(0, metrics)
        if warmup is not None and self.config.checkpoint.every:
            self.save(0)
        self.clock.lap()
        return 1

    def resume(self, checkpoint: Path, progress: Progress) -> int:
        """Everything as it was when the checkpoint was saved. Returns the first step to do."""
        with self.clock.phase("checkpoint"):
            if self.config.warmup is not None and self.config.objective.kl_ref is not None:
                self.workers.ranks.call("load_reference", self.run_directory.reference)
            self.workers.ranks.call("load_checkpoint", checkpoint / TRAINER_FILES)
        self.prompts.load_state_dict(progress.prompt_stream)
        self.policy_version = progress.policy_version
        self.num_tokens = dict(progress.num_tokens)
        self.accuracy = {int(step): accuracy for step, accuracy in progress.accuracy.items()}
        self.publish()
        self.clock.lap()
        return progress.step + 1

    def save(self, step: int) -> None:
        with self.clock.phase("checkpoint"):
            progress = Progress(
                step=step,
                policy_version=self.policy_version,
                prompt_stream=self.prompts.state_dict(),
                accuracy={str(step): accuracy for step, accuracy in self.accuracy.items()},
                phase_s=self.clock.totals,
                num_tokens=self.num_tokens,
                wall_s=self.clock.wall_s,
            )
            with self.run_directory.writing_checkpoint(progress, self.config) as directory:
                self.workers.ranks.call("save_checkpoint", directory / TRAINER_FILES)
        self._saved_step = step

    # --- numbers ------------------------------------------------------------------------------------------------------

    def is_due(self, every: int, step: int) -> bool:
        return step == self.config.run.num_steps or (every > 0 and step % every == 0)

    def timings(self, num_generated: float, num_trained: int) -> dict[str, float]:
        seconds = self.clock.lap()
        return {f"time/{phase}_s": value for phase, value in seconds.items()} | {
            "throughput/generate_tokens_per_s": num_generated / seconds["generate"],
            "throughput/train_tokens_per_s": num_trained / seconds["train"],
        }


def rollout_metrics(groups: list[RolloutGroup], policy_version: int) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "reward/mean": sum(rewards) / len(rewards),
        "rollout/num_tokens": num_tokens,
        "rollout/response_length/mean": num_tokens / len(completions),
        "rollout/equal_group_share": sum(is_equal_group(group.rewards) for group in groups) / len(groups),
        "rollout/truncated_share": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "rollout/staleness/max": max(policy_version - c.policy_version for c in completions),
    }
