"""One trainer rank: it turns samples into optimiser steps, log-probs, exported weights and checkpoints.

SPMD: every method is called on all ranks at once with the same arguments.

    samples -> shares (one an optimiser step) -> micro-batches of this data-parallel rank -> forward, loss kernel,
    backward by Megatron's schedule -> gradient reduction -> clipped AdamW step -> StepReport, equal on all ranks
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config.hf_config import read_expert_routing
from drpo_megatron.config.sections import Config, OptimizerSection
from drpo_megatron.data.packing import split_optimizer_steps, unpack_token_values
from drpo_megatron.data.traces import check_traces
from drpo_megatron.metrics import PackedStatistics, Statistic, merge_all
from drpo_megatron.models import get_family
from drpo_megatron.objectives import build as build_objective
from drpo_megatron.objectives.aggregation import token_weights
from drpo_megatron.precision.recipes import find_hardware, resolve
from drpo_megatron.precision.rollout import RolloutPrecision
from drpo_megatron.trainer import setup
from drpo_megatron.trainer.platform import activate, optimizer_scope
from drpo_megatron.trainer.reference import ReferenceWeights
from drpo_megatron.trainer.vocab_parallel import vocab_parallel_logprobs, vocab_parallel_policy_loss
from drpo_megatron.trainer.vocab_parallel_chunks import loss_chunk_bytes
from drpo_megatron.trainer.work import Work, gather_context_parallel, share_out
from drpo_megatron.types import PackedBatch, Sample, StepReport

if TYPE_CHECKING:
    from drpo_megatron.trainer.routing_replay import RoutingReplay


class Trainer:
    """A Megatron policy on this rank. The default process group must be up (`setup.initialize_distributed`)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.precision = resolve(config.precision, find_hardware(config.trainer.backend))
        self.platform = activate(config.trainer.backend)
        if self.precision is not None and self.precision.emulated:
            self.platform = replace(self.platform, transformer_engine=False)  # Its layers are Megatron's own.
        runs_for_real = self.precision is not None and not self.precision.emulated
        engine = self.precision.recipe.engine if self.precision is not None and runs_for_real else None
        self.layout = setup.build_layout(
            config.parallel,
            config.run.seed,
            config.cluster.step_timeout_s,
            engine.token_multiple if engine is not None else 1,
        )
        self.hf_config = AutoConfig.from_pretrained(
            config.model.hf_path, local_files_only=True, trust_remote_code=False
        )
        self.family = get_family(self.hf_config, f"{config.model.hf_path}/config.json")
        tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path, local_files_only=True, trust_remote_code=False)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.chunks = setup.build_model(config, self.family, self.hf_config, self.layout, self.platform)
        from drpo_megatron.trainer.low_precision import LowPrecision
        from drpo_megatron.trainer.monitors import Monitors

        self.low_precision = LowPrecision.of(self.chunks, config.precision, self.precision)
        self.monitors = Monitors(config.precision.monitor, self.chunks, self.low_precision, self.layout)
        self._load_initial_weights()
        self.routing = self._build_routing()
        self.objective = build_objective(config.objective)
        self.supervised_objective = build_objective({"name": "sft"})
        self.rollout_precision = RolloutPrecision.of_checkpoint(config.precision, self.hf_config, self.hf_names)
        self.policy_version = 0
        self.num_rollouts = 0
        self.is_warming_up = config.warmup is not None
        self.reference: ReferenceWeights | None = None
        """The policy at the start of RL, if the objective has a KL term to it. A warm-up comes before."""
        if not self.is_warming_up:
            self._freeze_reference()
        self._build_optimizer()

    # --- training ---------------------------------------------------------------------------------------------------

    def supervised_step(self, samples: Sequence[Sample]) -> StepReport:
        """One optimiser step of maximum likelihood on the response tokens (warm-up). Does not bump policy_version."""
        return self._report([self._optimizer_step(samples, self.supervised_objective, "token-mean")])

    def start_rl(self) -> None:
        """After the warm-up: a fresh optimizer state and the RL schedule. The policy as it is becomes the reference."""
        self.is_warming_up = False
        self._freeze_reference()
        self._build_optimizer()

    def train_step(self, samples: Sequence[Sample]) -> StepReport:
        """All optimiser steps of one rollout, each on its share of the sequences. mu stays what the engine reported.

        `mismatch/...` is measured in the first optimiser step, before any update: what lies between engine and trainer.
        `shift/...` is the same over all steps, the policy's own movement included.
        """
        self._check_traces(samples)
        shares = split_optimizer_steps(
            samples, self.config.trainer.optimizer_steps_per_rollout, seed=self.config.run.seed + self.num_rollouts
        )
        aggregation, watched = self.config.trainer.aggregation, [self.num_rollouts, *[None] * (len(shares) - 1)]
        steps = [
            self._optimizer_step(share, self.objective, aggregation, rollout)
            for share, rollout in zip(shares, watched, strict=True)
        ]
        self.num_rollouts += 1
        self.policy_version += 1
        return self._report(steps)

    def compute_logprobs(self, samples: Sequence[Sample]) -> dict[str, tuple[float, ...]]:
        """log pi of every response token under the present weights, by sample id, complete on every rank.

        With routing replay tokens go to the engine's experts here, too.
        """
        self._check_traces(samples)
        return self._logprobs(samples)

    def _logprobs(self, samples: Sequence[Sample]) -> dict[str, tuple[float, ...]]:
        work = self._work(samples, [1.0] * len(samples))

        def collect(batch: PackedBatch, hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, Any]:
            out = vocab_parallel_logprobs(
                hidden,
                head,
                batch.targets,
                live=batch.weights != 0,
                **self._kernel_options(),
            )
            return hidden.new_zeros(()), out.logprobs

        with torch.no_grad():
            collected, _ = self._run(work, collect, forward_only=True)
        mine: dict[str, list[float]] = {}
        wholes = work.whole_batches if self.layout.is_last_stage else []
        for whole, values in zip(
            wholes, gather_context_parallel(wholes, collected, self.layout.groups.cp), strict=True
        ):
            mine |= unpack_token_values(whole, values)
        everyone: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        merged = {name: tuple(values) for part in everyone for name, values in part.items() if values}
        return {sample.sample_id: merged[sample.sample_id] for sample in samples}

    def compute_reference_logprobs(self, samples: Sequence[Sample]) -> dict[str, tuple[float, ...]]:
        """`compute_logprobs` under the reference weights. ValueError when there are none (no kl_ref, or warming up).

        The reference is a policy of its own: its routers choose for themselves, replay or not.
        """
        if self.reference is None:
            raise ValueError("there is no reference policy: it needs objective.kl_ref, and the warm-up to be over")
        with self.reference.in_place():
            return self._logprobs([replace(sample, routed_experts=None) for sample in samples])

    def _optimizer_step(
        self, samples: Sequence[Sample], objective: Any, aggregation: str, watched_rollout: int | None = None
    ) -> dict[str, Statistic]:
        """`watched_rollout`: its number, if the monitors look at this step."""
        trainer = self.config.trainer
        horizon = trainer.horizon or self.config.rollout.max_response_tokens
        weights = token_weights([len(s.response_ids) for s in samples], aggregation, horizon)
        work = self._work(samples, weights)
        self._scale_aux_loss(work.num_padded_tokens)

        def policy_loss(batch: PackedBatch, hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, Any]:
            out = vocab_parallel_policy_loss(
                hidden,
                head,
                batch.targets,
                batch.behavior_logprobs,
                batch.advantages,
                batch.weights,
                objective=objective,
                old_logprobs=batch.old_logprobs,
                reference_logprobs=batch.reference_logprobs,
                sequence_ids=batch.sequence_ids,
                topk_ids=batch.topk_ids,
                topk_behavior_logprobs=batch.topk_behavior_logprobs,
                low_memory=trainer.loss_low_memory,
                entropy_coef=0.0 if objective is self.supervised_objective else trainer.entropy_coef,
                bad_behavior=trainer.bad_behavior,
                log_ratio_max=trainer.log_ratio_max,
                main_grad_fusion=hasattr(head, "main_grad"),
                **self._kernel_options(),
            )
            statistics = dict(out.metrics)
            statistics["objective/loss"] = Statistic.sum(out.loss)
            bad = torch.full((), float(out.num_bad_behavior), device=hidden.device)
            statistics["objective/num_bad_behavior"] = Statistic.sum(bad)
            return out.loss, PackedStatistics.of(statistics)

        def backward(work: Work) -> tuple[list[Any], dict[str, Statistic]]:
            return self._run(work, policy_loss, forward_only=False)

        for chunk in self.chunks:
            chunk.train()
        observed = self.monitors.before_backward(watched_rollout, work, backward, self.optimizer)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.monitors.during_backward(watched_rollout):
            collected, routing_statistics = backward(work)
        self.low_precision.audit_once()
        observed |= self.monitors.after_backward(watched_rollout, self.optimizer)
        with optimizer_scope():
            updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise ValueError(f"the optimizer skipped a step: gradient norm {grad_norm} is not finite")
        lr = self.optimizer.param_groups[0]["lr"]
        self.schedule.step(increment=1)
        statistics = self._reduce(collected) | routing_statistics | observed
        statistics["objective/loss"] = Statistic.ratio(statistics["objective/loss"].value(), 1.0)
        statistics["optim/grad_norm"] = Statistic.ratio(float(grad_norm), 1.0)
        statistics["optim/lr"] = Statistic.ratio(float(lr), 1.0)
        statistics["train/num_tokens"] = Statistic.sum(float(sum(s.num_tokens for s in samples)))
        statistics["train/padding_share"] = Statistic.ratio(
            float(work.num_padded_tokens - sum(s.num_tokens for s in samples)), float(work.num_padded_tokens)
        )
        return statistics

    # --- weights and checkpoints --------------------------------------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter under its HF name, whole, gathered one at a time. Tensors on rank 0, None elsewhere."""
        from drpo_megatron.trainer.weights import export_hf_weights

        yield from export_hf_weights(self.chunks, self.hf_config, self.layout.groups, names=self.hf_names)

    def load_reference(self, directory: Path) -> None:
        """Take the reference weights from a Hugging Face checkpoint: for a run that resumes after its warm-up.

        Leaves the model with them, so `load_checkpoint` comes after it.
        """
        self._load_weights(directory)
        self._freeze_reference()

    def save_checkpoint(self, directory: Path) -> str | None:
        """Model, optimizer, schedule and counters, distributed over all ranks. The caller renames when all returned.

        Returns: why it could not be written, such as a full disk, equal on all ranks, which can go on; None when it was.
        """
        from drpo_megatron.checkpoint.megatron import save_checkpoint

        counters = {
            "policy_version": self.policy_version,
            "num_rollouts": self.num_rollouts,
            "is_warming_up": self.is_warming_up,
        }
        with optimizer_scope():
            return save_checkpoint(
                directory,
                self.chunks,
                self.optimizer,
                self.schedule,
                counters,
                self.config.model.hf_path,
                self.low_precision.amax_history(),
            )

    def verify_checkpoint(self, directory: Path) -> list[str]:
        """A sentence for each file that is not what was saved, equal on all ranks, each of which reads its share."""
        from drpo_megatron.checkpoint.megatron import find_damage

        return find_damage(directory)

    def load_checkpoint(self, directory: Path) -> None:
        """Continue exactly where `save_checkpoint` was called. Raises ValueError naming what is missing."""
        from drpo_megatron.checkpoint.megatron import load_checkpoint, read_amax_history, read_counters

        counters = read_counters(directory)
        if counters["is_warming_up"] != self.is_warming_up:
            self.is_warming_up = counters["is_warming_up"]
            self._build_optimizer()
        with optimizer_scope():
            load_checkpoint(directory, self.chunks, self.optimizer, self.schedule)
        self.low_precision.load_amax_history(read_amax_history(directory, self.chunks))
        self.policy_version = counters["policy_version"]
        self.num_rollouts = counters["num_rollouts"]

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _load_initial_weights(self) -> None:
        model = self.config.model
        if model.megatron_path is None:
            self._load_weights(Path(model.hf_path))
            return
        from drpo_megatron.checkpoint.megatron import load_weights

        self.hf_names = HFCheckpoint(model.hf_path).names()
        load_weights(model.megatron_path, self.chunks)

    def _load_weights(self, hf_path: Path) -> None:
        from drpo_megatron.trainer.weights import load_hf_weights

        checkpoint = HFCheckpoint(hf_path)
        self.hf_names = checkpoint.names()
        load_hf_weights(self.chunks, self.hf_config, checkpoint.get, self.layout.groups, names=self.hf_names)

    def _freeze_reference(self) -> None:
        if self.objective.needs_reference_logprobs:
            self.reference = ReferenceWeights(self.chunks)

    def _build_optimizer(self) -> None:
        config = self.config
        section: OptimizerSection
        if self.is_warming_up and config.warmup is not None:
            section, total_steps = config.warmup.optimizer, config.warmup.num_steps
        else:
            section = config.trainer.optimizer
            total_steps = config.run.num_steps * config.trainer.optimizer_steps_per_rollout
        self.optimizer = setup.build_optimizer(section, self.chunks, self.layout, config.trainer.dtype == "bf16")
        self.schedule = setup.build_schedule(section, self.optimizer, total_steps)

    def _kernel_options(self) -> dict[str, Any]:
        chunk_bytes = loss_chunk_bytes(self.config.trainer.loss_chunk_mb, self.platform.name == "gpu")
        return {
            "temperature": self.config.rollout.temperature,
            "vocab_size": self.hf_config.get_text_config().vocab_size,
            "tp_group": self.layout.tp,
            "sequence_parallel": self.config.parallel.sequence,
            "chunk_bytes": chunk_bytes,
        }

    def _work(self, samples: Sequence[Sample], weights: Sequence[float]) -> Work:
        max_tokens = self.config.trainer.max_tokens_per_micro_batch
        return share_out(samples, weights, self.layout, max_tokens=max_tokens, pad_id=self.pad_id)

    def _build_routing(self) -> RoutingReplay | None:
        from drpo_megatron.trainer.routing_replay import RoutingReplay

        self.expert_routing = read_expert_routing(self.config.model.hf_path)
        if self.expert_routing is None:
            return None
        return RoutingReplay(
            self.chunks,
            self.layout,
            self.expert_routing,
            replays=self.config.trainer.routing_replay == "rollout",
            recomputes=self.config.model.recompute == "full",
        )

    def _check_traces(self, samples: Sequence[Sample]) -> None:
        if self.expert_routing is not None:
            check_traces(samples, self.expert_routing, required=self.config.trainer.routing_replay != "off")

    def _run(self, work: Work, loss_function: Any, *, forward_only: bool) -> tuple[list[Any], dict[str, Statistic]]:
        """What the loss function collected of every micro-batch, and how the routers' choices compare with the engine's."""
        from drpo_megatron.trainer.forward import run_micro_batches

        collected = run_micro_batches(
            self.chunks,
            work.batches,
            loss_function,
            routing=self.routing,
            length=work.length,
            forward_only=forward_only,
            device=self.platform.device,
        )
        return collected, self.routing.finish() if self.routing else {}

    def _scale_aux_loss(self, num_tokens: int) -> None:
        """Megatron multiplies the load-balancing loss of a micro-batch by this rank's tokens of it, and divides by all
        tokens at the end. Our finalize doesn't divide, so the coefficient carries the division, and the factor by which
        a micro-batch has more tokens than each of the ranks that share it (whose gradients are summed)."""
        if self.config.model.moe_aux_loss_coeff:
            scale = self.config.parallel.tensor * self.config.parallel.context / num_tokens
            self.chunks[0].config.moe_aux_loss_coeff = self.config.model.moe_aux_loss_coeff * scale

    def _reduce(self, collected: Sequence[PackedStatistics]) -> dict[str, Statistic]:
        """Statistics of the last stage's micro-batches, over data and context parallel ranks, known to every stage."""
        merged: dict[str, Statistic] = {}
        if self.layout.is_last_stage:
            packed = functools.reduce(PackedStatistics.merge, collected)
            merged = packed.reduce_over(self.layout.groups.dp_cp).unpack()
        pp = self.layout.groups.pp
        if pp.size() > 1:
            box = [merged]
            dist.broadcast_object_list(box, group=pp, group_src=pp.size() - 1)
            merged = box[0]
        return merged

    def _report(self, steps: list[dict[str, Statistic]]) -> StepReport:
        merged = merge_all(steps)
        for name in [n for n in merged if n.startswith("mismatch/")]:
            merged[name.replace("mismatch/", "shift/", 1)] = merged[name]
            merged[name] = steps[0][name]
        metrics = {name: statistic.value() for name, statistic in sorted(merged.items())}
        return StepReport(self.policy_version, metrics, int(metrics.pop("train/num_tokens")))
