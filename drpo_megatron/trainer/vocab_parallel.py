"""The policy loss over a sharded vocabulary, fused with the LM head: hidden states in, loss and gradients out.

Megatron's own way is an output layer that makes logits [N, V/TP], then a cross entropy with three all-reduces. Here
logits exist a tile or a chunk at a time, rows that cannot have a gradient never enter a gradient matmul, and one
all-gather of packed row statistics gives every rank bitwise the same log-probs. Ways of walking the vocabulary are in
`vocab_parallel_chunks`, row-wise arithmetic in `vocab_parallel_rows`; `docs/loss.md` has the measurements.

Megatron is not imported: process groups are arguments, and a Megatron parameter is known by its `main_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from drpo_megatron.metrics import Statistic
from drpo_megatron.objectives.base import Objective
from drpo_megatron.trainer.transfer import to_device
from drpo_megatron.trainer.vocab_parallel_batch import TokenBatch, check_targets
from drpo_megatron.trainer.vocab_parallel_chunks import measure
from drpo_megatron.trainer.vocab_parallel_shards import added_to_main_grad, gather_hidden, head_shard, main_grad_of
from drpo_megatron.trainer.vocab_parallel_task import PolicyLossTask, scatter


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """Everything is full size and equal on every tensor-parallel rank. Rows with weight 0 hold 0."""

    loss: torch.Tensor
    """Scalar: sum of weights * (objective's loss - entropy_coef * entropy). The only output with a gradient."""
    logprobs: torch.Tensor
    """[N] log pi of the targets, at the given temperature."""
    entropy: torch.Tensor
    """[N] nats, of the distribution at the given temperature."""
    coef: torch.Tensor
    """[N] d loss_t / d logprobs_t, before weights. 0 on dropped rows and where the advantage is 0."""
    objective_weight: torch.Tensor
    """[N] the objective's w: 1 for an unregularised policy gradient, 0 where clipped, negative where DRPO corrects."""
    num_bad_behavior: int
    """Rows with weight whose behavior_logprobs is not finite (`bad_behavior="drop"`)."""
    metrics: dict[str, Statistic]
    """Of live rows with a usable behavior_logprobs; equal on every tensor-parallel rank, so reduce over data ranks."""


@dataclass(frozen=True, slots=True)
class LogprobsOutput:
    logprobs: torch.Tensor
    """[N] FP32, 0 on rows that are not live."""
    entropy: torch.Tensor | None
    """[N] FP32 nats, if asked for."""


def vocab_parallel_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    objective: Objective,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    old_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_behavior_logprobs: torch.Tensor | None = None,
    chunk_bytes: int | None = None,
    low_memory: bool = False,
    bad_behavior: Literal["drop", "raise"] = "drop",
    log_ratio_max: float = 20.0,
    main_grad_fusion: bool = False,
) -> PolicyLossOutput:
    """Policy loss of N tokens from their last hidden states and this rank's rows of the LM head.

    Args:
        hidden: [N, H], or this rank's [N/TP, H] rows in rank order with `sequence_parallel`. FP32 or BF16.
        weight: [rows, H], this rank's slice of the LM head: consecutive token ids, in rank order. Shards may differ in
            size and may be empty.
        targets, behavior_logprobs, advantages, weights: [N], the full vectors on every rank. targets are token ids
            (-100 where weights is 0); behavior_logprobs is log mu; weights is the mask over the global normaliser.
            Best on the host, as all vectors: on a GPU they are checked at the price of waiting for it.
        objective: from `drpo_megatron.objectives.build`.
        temperature: of the sampling distribution; pi is softmax(logits / temperature).
        entropy_coef: weight of the entropy bonus.
        vocab_size: token ids from here on are padding, with probability 0 and no gradient. None: no padding.
        tp_group: ranks that share the vocabulary. None: this process holds all of it.
        old_logprobs: [N], log pi_old, for objectives with `anchor: recompute` (else behavior_logprobs is the anchor).
        reference_logprobs: [N], log pi_ref, for objectives with a KL term.
        sequence_ids: [N] int64, for sequence-level objectives.
        topk_ids, topk_behavior_logprobs: [N, K], the engine's top tokens, for objectives with `num_topk`.
        chunk_bytes: upper limit of the FP32 logits held at once, in bytes. None: 32 MiB on a CPU, 1 GiB (and at least
            4096 rows) on a GPU.
        low_memory: keep no logits and no [rows, H] buffer: the backward computes logits again (four matmuls instead
            of three). Sequence-level objectives always work this way.
        bad_behavior: what to do with a live row whose behavior_logprobs is not finite.
        log_ratio_max: upper limit of log r.
        main_grad_fusion: add the weight's gradient to `weight.main_grad` in the backward, as Megatron's
            gradient_accumulation_fusion does, instead of returning it.

    Collectives over tp_group: an all-gather of 3 + P numbers a row (P = 1 + K) for each chunk, all-gather and
    reduce-scatter of hidden [N, H] with sequence_parallel, one all-reduce of its gradient without. None of them grows
    with the vocabulary. The loss is on every rank; multiply it by anything before backward, but run backward once.

    Raises: ValueError for shapes that do not fit, target ids outside the vocabulary, missing inputs of the objective,
        and with bad_behavior="raise" for the first row whose behavior_logprobs is not finite.
    """
    batch = TokenBatch(
        targets=targets,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
        weights=weights,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        sequence_ids=sequence_ids,
        topk_ids=topk_ids if objective.num_topk else None,
        topk_behavior_logprobs=topk_behavior_logprobs if objective.num_topk else None,
    )
    head = head_shard(hidden, weight, vocab_size, temperature, tp_group, chunk_bytes)
    batch.check(objective, hidden.shape[0] * (head.num_ranks if sequence_parallel else 1))
    rows = batch.rows(every_row=entropy_coef != 0 or objective.needs_reference_logprobs, bad_behavior=bad_behavior)
    check_targets(targets, rows.live, head.vocab_size)
    task = PolicyLossTask(
        head=head,
        batch=batch.to(hidden.device),
        rows=rows.to(hidden.device),
        objective=objective,
        entropy_coef=entropy_coef,
        log_ratio_max=log_ratio_max,
        sequence_parallel=sequence_parallel,
        recompute=low_memory or objective.sequence_level,
    )
    loss = _PolicyLoss.apply(hidden, weight, task, main_grad_fusion)
    return PolicyLossOutput(
        loss=loss,
        logprobs=task.softmax.logprobs[0],
        entropy=task.softmax.entropy,
        coef=task.coef,
        objective_weight=task.objective_weight,
        num_bad_behavior=rows.num_bad_behavior,
        metrics=task.metrics,
    )


@torch.no_grad()
def vocab_parallel_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    live: torch.Tensor | None = None,
    with_entropy: bool = False,
) -> LogprobsOutput:
    """Log-probs of `targets` without gradients: evaluation, recomputed anchors. One matmul, one all-gather.

    Arguments as in `vocab_parallel_policy_loss`. `live` [N] bool says which rows are read; None: those
    with targets >= 0.
    """
    head = head_shard(hidden, weight, vocab_size, temperature, tp_group, chunk_bytes)
    size = hidden.shape[0] * (head.num_ranks if sequence_parallel else 1)
    if targets.shape != (size,):
        raise ValueError(f"targets has shape {tuple(targets.shape)}; hidden has {size} rows, so give [{size}]")
    rows = (targets >= 0 if live is None else live).nonzero().squeeze(1)
    check_targets(targets, rows, head.vocab_size)
    rows, targets = to_device(rows, hidden.device), to_device(targets, hidden.device)
    gathered = gather_hidden(hidden, head.group, sequence_parallel)
    softmax = measure(head, gathered[rows].to(head.operand_dtype), targets[rows, None])
    entropy = scatter(softmax.entropy, rows, size) if with_entropy else None
    return LogprobsOutput(scatter(softmax.logprobs[0], rows, size), entropy)


class _PolicyLoss(torch.autograd.Function):
    """Forward communicates hidden (all-gather, sequence parallel only), row statistics (all-gathers), and the gradient
    of hidden (reduction). Backward: nothing; in low-memory mode the reduction of the gradient moves here."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, task: PolicyLossTask, main_grad_fusion: bool
    ) -> torch.Tensor:
        ctx.task, ctx.weight = task, weight
        ctx.main_grad = main_grad_of(weight) if main_grad_fusion else None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        return task.forward(hidden.detach(), weight.detach(), (needs_hidden, needs_weight))

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        main_grad = ctx.main_grad if ctx.needs_input_grad[1] else None
        grad_hidden, grad_weight = ctx.task.backward(grad_loss, main_grad)
        if main_grad is not None:
            grad_weight = added_to_main_grad(ctx.weight)
        return grad_hidden, grad_weight, None, None
