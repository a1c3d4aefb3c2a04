"""The whole RL loop. One driver, and three kinds of processes that wait for it:

         prompts                                    +---------------------------------------------+
            |                                       |               Loop.step                     |
            v          requests                     |                                             |
      +----------+ ----------------> engines        |   groups  = rollouts.take(step)             |
      |          | <---------------- (n processes)  |   rollouts.draw_ahead(step)                 |
      |          |    completions       ^           |   samples = to_samples(groups, advantages)  |
      |  driver  |                      | buckets   |   report  = train(samples)                  |
      |          | -----> rewards       |           |   publish()                                 |
      |          | <----- (n workers)   |           |   log, save, evaluate                       |
      |          |                      |           +---------------------------------------------+
      |          |    samples           |
      +----------+ ----------------> trainer ranks (Megatron; the optimiser steps of one rollout)
            |     <----------------
            v        StepReport
      metrics, checkpoints, dumped rollouts

The engines draw with the weights of version v; the ranks train on that rollout and hold v + 1, which `publish` brings
to the engines. With rollout.max_staleness=0 nothing is drawn ahead, so nothing is ever stale. With k the engines draw
for the next k steps while the ranks train, and a sample is trained on at most k versions after it was drawn. Servers
on the ranks' GPUs (cluster.placement=colocated) give their memory back from `release`, before training, to `publish`.

All draws of the embedded engine come from (seed, step, prompt), it keeps no state of its own, and takes weights only
between rollouts. So a resumed run continues bit by bit, whatever the staleness. SGLang takes weights at any time: a
sequence then has tokens of several versions, each with the mu of the one that drew it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from drpo_megatron.checkpoint.checksums import sealed
from drpo_megatron.config import Config
from drpo_megatron.config.sections import WarmupSection
from drpo_megatron.files import CannotWrite, write_text
from drpo_megatron.orchestration.clock import OVERLAP, Clock
from drpo_megatron.orchestration.early_warning import METRIC, EarlyWarning
from drpo_megatron.orchestration.gauges import Gauges
from drpo_megatron.orchestration.profile import Profiling
from drpo_megatron.orchestration.run_directory import ROLLOUTS_FILE, TRAINER_FILES, Checkpoint, Progress, RunDirectory
from drpo_megatron.orchestration.warmup import WarmupProgress, warm_up
from drpo_megatron.orchestration.workers import Workers
from drpo_megatron.rewards.failures import FailureWatch
from drpo_megatron.rewards.scorer import Scored, metric_means
from drpo_megatron.rollout.evaluation import evaluate
from drpo_megatron.rollout.sampler import to_samples
from drpo_megatron.types import Prompt, RolloutGroup, Sample, StepReport


class MetricsLog(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def amend(self, step: int, metrics: dict[str, float]) -> None: ...


class RolloutSource(Protocol):
    """Where the groups of a step come from: engines (rollouts.py) or the files of an earlier run (replay.py)."""

    num_tokens: int

    def take(self, step: int, policy_version: int) -> tuple[list[RolloutGroup], dict[str, float]]: ...

    def draw_ahead(self, step: int) -> None: ...

    def settle(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """One run from its first step, or from a checkpoint, to its last."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        workers: Workers,
        rollouts: RolloutSource,
        heldout: list[Prompt],
        demonstrations: list[Sample],
        metrics: MetricsLog,
        clock: Clock,
        say: Callable[[str], None],
        watch_rewards: FailureWatch,
    ) -> None:
        self.config, self.run_directory, self.workers, self.rollouts = config, run, workers, rollouts
        self.heldout, self.demonstrations = heldout, demonstrations
        self.metrics, self.clock, self.say = metrics, clock, say
        self.watch_rewards = watch_rewards
        self.early_warning = EarlyWarning(config.precision.monitor.early_warning)
        self.gauges = Gauges(config, workers.ranks)
        self.profiling = Profiling(config.metrics.profile, workers.ranks, run.path / "profile", say)
        self.policy_version = 0
        self.num_trained_tokens = 0
        self.accuracy: dict[int, float] = {}
        """Mean held-out reward by step, where it was measured."""
        self.stop_reason: str | None = None
        """Why the run ends before its last step, if it was asked to."""
        self.warmup: WarmupProgress | None = None
        """Of a warm-up that is not done."""
        self._saved_step: int | None = None
        self._num_tokens_before = 0

    def run(self, checkpoint: Checkpoint | None) -> None:
        """All steps that are left; fewer, with a checkpoint of the last one done, after `request_stop`."""
        if checkpoint is not None:
            self.resume(checkpoint)
        if checkpoint is None or self.warmup is not None:
            self.begin()
        step = checkpoint.progress.step if checkpoint else 0
        self.evaluate_if_due(step)
        while not self.ends_after(step) and step < self.config.run.num_steps:
            step += 1
            self.step(step)

    def ends_after(self, step: int) -> bool:
        """Whether a stop was asked for. Then `step` is saved; an evaluation that is due is left to the resumed run."""
        if self.stop_reason is None:
            return False
        if self._saved_step != step:
            self.save(step)
        done = f"step {self.warmup.num_steps} of the warm-up" if self.warmup else f"step {step}"
        self.say(f"stopped after {done}: {self.stop_reason}")
        return True

    def request_stop(self, reason: str) -> None:
        """End after the present step, with a checkpoint. Only notes the wish: signal handlers and threads may call it."""
        self.stop_reason = reason

    def step(self, step: int) -> None:
        groups, metrics = self.rollouts.take(step, self.policy_version)
        self.rollouts.draw_ahead(step)
        if self.config.rollout.dump:
            self.dump(step, groups)
        samples = to_samples(groups, self.config.advantages.name)
        self.release()
        with self.profiling.of(step):
            report = self.train(samples)
        warning = self.watch(report)
        self.publish()
        self.metrics.log(step, metrics | report.metrics | self.timings(report.num_tokens, len(samples)))
        must_stop = warning is not None and self.config.precision.monitor.early_warning.action == "stop"
        if must_stop or step == self.config.run.num_steps:
            self.save(step)
        elif self.is_due(self.config.checkpoint.every, step) and self.stop_reason is None:
            self.save_if_possible(step)
        self.evaluate_if_due(step)
        self.metrics.amend(step, self.timings_after())
        if must_stop:
            raise ValueError(
                f"stopped after step {step}, as precision.monitor.early_warning.action=stop says: {warning}"
            )

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
        self.num_trained_tokens += report.num_tokens
        return report

    def watch(self, report: StepReport) -> str | None:
        """The early warning, if this step gave rise to it. It may also end low precision in the rollouts."""
        warning = self.early_warning.observe(report.metrics[METRIC])
        report.metrics["mismatch/growth"] = self.early_warning.growth()
        if warning is not None:
            self.say(f"warning: {warning}")
            if self.early_warning.has_fallen_back:
                self.say("rollouts are unquantised from now on: precision.monitor.early_warning.action=bf16-rollout")
        return warning

    def publish(self) -> None:
        """The ranks' weights to the engines. Returns when every engine has verified and published them.

        The embedded engine takes weights between rollouts, so what is being drawn is drawn to its end before. Rollouts
        of SGLang go on across the change.
        """
        if not len(self.workers.engines):
            return
        if self.config.rollout.engine.name == "transformers":
            self.rollouts.settle()
        with self.clock.phase("sync"):
            self.workers.give_memory_to_servers()
            quantized = self.config.precision.rolls_out_quantized and not self.early_warning.has_fallen_back
            if self.early_warning.has_fallen_back:
                self.workers.engines.call("round_activations", False)
            self.workers.ranks.call("publish_weights", self.workers.engines.actors, quantized)

    def release(self) -> None:
        """Where servers stand on the ranks' GPUs, the ranks have their memory from here to the end of `publish`."""
        with self.clock.phase("sync"):
            self.workers.give_memory_to_ranks()

    def evaluate_if_due(self, step: int) -> None:
        """The mean held-out reward, with its interval: of a step that is logged already, and saved if it is due.

        A step whose evaluation was broken off, or left out because the run was asked to stop, is evaluated at a resume.
        """
        is_due = step == 0 or self.is_due(self.config.eval.every, step)
        can = bool(self.heldout) and len(self.workers.engines) > 0
        if not is_due or not can or step in self.accuracy or self.stop_reason is not None:
            return
        metrics: dict[str, float] = {}

        def watch(scored: Scored) -> None:
            self.watch_rewards.observe(f"the evaluation of step {step}", scored)
            metrics.update(metric_means("eval/reward", scored.metrics))

        with self.clock.phase("eval"):
            result = evaluate(self.workers.engines, self.workers.rewards, self.heldout, self.config, watch)
        self.accuracy[step] = result.mean
        self.metrics.amend(step, metrics | result.heldout.as_metrics() | self.timings_after())
        if self._saved_step == step:
            self.run_directory.update_progress(self.progress(step), self.config)

    def dump(self, step: int, groups: list[RolloutGroup]) -> None:
        """Training goes on without it when the disk is full."""
        try:
            self.run_directory.dump(step, groups, self.config)
        except OSError as error:
            self.say(f"warning: the rollouts of step {step} are not kept: {error}")

    # --- where a run begins and where it goes on ----------------------------------------------------------------------

    def begin(self) -> None:
        """Supervised warm-up, if there is one, or the rest of it."""
        warmup, metrics = self.config.warmup, {}
        if warmup is not None:
            done = self.warm_up(warmup)
            if self.warmup is not None:
                return
            metrics = {"warmup/loss/first": done.first_loss, "warmup/loss/last": done.last_loss}
        precision = self.config.precision
        engines_lack_them = precision.rolls_out_quantized or self.workers.take_turns
        if warmup is not None or self.config.model.megatron_path is not None or engines_lack_them:
            self.publish()
        if metrics:
            self.metrics.log(0, metrics)
        if warmup is not None and self.config.checkpoint.every:
            self.save_if_possible(0)
        self._start_clock()

    def warm_up(self, section: WarmupSection) -> WarmupProgress:
        """What is left of it; `self.warmup` says whether it was broken off."""
        with self.clock.phase("warmup"):
            done = warm_up(
                section,
                self.config.run.seed,
                self.demonstrations,
                self.workers.ranks,
                self.say,
                self.warmup,
                must_stop=lambda: self.stop_reason is not None,
            )
            self.warmup = done if done.num_steps < section.num_steps else None
            if self.warmup is None and self.config.objective.kl_ref is not None:
                source = Path(self.config.model.hf_path)
                self.workers.ranks.call("write_hf", self.run_directory.reference, source)
        return done

    def resume(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was saved."""
        progress = checkpoint.progress
        self.warmup = WarmupProgress(**progress.warmup) if progress.warmup else None
        with self.clock.phase("checkpoint"):
            if self.config.warmup is not None and self.config.objective.kl_ref is not None and self.warmup is None:
                self.workers.ranks.call("load_reference", self.run_directory.reference)
            self.workers.ranks.call("load_checkpoint", checkpoint.trainer)
        self.rollouts.load_state_dict(checkpoint.rollouts())
        self.policy_version = progress.policy_version
        if progress.early_warning:
            self.early_warning.load_state_dict(progress.early_warning)
        self.num_trained_tokens = progress.num_trained_tokens
        self.accuracy = {int(step): accuracy for step, accuracy in progress.accuracy.items()}
        self._saved_step = progress.step if self.warmup is None else None
        if self.warmup is None:
            self.publish()
        self._start_clock()

    def save_if_possible(self, step: int) -> None:
        """One of several: the run goes on without it when the disk is full, and tries again at the next."""
        try:
            self.save(step)
        except CannotWrite as error:
            self.say(f"warning: step {step} is not saved, and training goes on: {error}")

    def save(self, step: int) -> None:
        """Raises: CannotWrite, which says why; the checkpoint before stays the newest then."""
        self.rollouts.settle()
        with (
            self.clock.phase("checkpoint"),
            self.run_directory.writing_checkpoint(self.progress(step), self.config) as directory,
        ):
            write_text(directory / ROLLOUTS_FILE, sealed(self.rollouts.state_dict()))
            problem = self.workers.ranks.call("save_checkpoint", directory / TRAINER_FILES)[0]
            if problem is not None:
                raise CannotWrite(None, problem)
        self._saved_step = step

    def progress(self, step: int) -> Progress:
        return Progress(
            step=step,
            policy_version=self.policy_version,
            accuracy={str(step): accuracy for step, accuracy in self.accuracy.items()},
            phase_s=self.clock.totals,
            num_trained_tokens=self.num_trained_tokens,
            wall_s=self.clock.wall_s,
            early_warning=self.early_warning.state_dict(),
            warmup=asdict(self.warmup) if self.warmup else None,
        )

    # --- numbers ------------------------------------------------------------------------------------------------------

    def is_due(self, every: int, step: int) -> bool:
        return step == self.config.run.num_steps or (every > 0 and step % every == 0)

    def timings(self, num_trained: int, num_sequences: int) -> dict[str, float]:
        """Of the step that ends now. Engines are idle when they draw neither for training nor for an evaluation."""
        seconds = self.clock.lap()
        generating, training = seconds.get("generate", 0.0), seconds["train"]
        metrics = {f"time/{activity}_s": value for activity, value in seconds.items()}
        metrics["time/engines_idle_s"] = max(0.0, seconds["step"] - generating - seconds.get("eval", 0.0))
        metrics["throughput/train_tokens_per_s"] = num_trained / training
        metrics |= self.gauges.read(num_trained, num_sequences, training)
        if generating:
            num_generated = self.rollouts.num_tokens - self._num_tokens_before
            metrics["throughput/generate_tokens_per_s"] = num_generated / generating
            metrics["time/overlap_share"] = seconds.get(OVERLAP, 0.0) / min(generating, training)
        self._num_tokens_before = self.rollouts.num_tokens
        return metrics

    def timings_after(self) -> dict[str, float]:
        """Of the checkpoint and the evaluation of a step that is logged already. No step's sums count them."""
        seconds = self.clock.lap()
        self._num_tokens_before = self.rollouts.num_tokens
        return {f"time/{name}_s": seconds[name] for name in ("checkpoint", "eval") if name in seconds}

    def _start_clock(self) -> None:
        self.clock.lap()
        self._num_tokens_before = self.rollouts.num_tokens
