"""An optimiser step as a bare Megatron-Core loop does it, on a Trainer's own model: what the trainer's speed is compared with.

Megatron's schedule, gradient reduction and optimizer; no packing, no metrics, no monitors. Import only after
`platform.activate`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

from drpo_megatron.trainer.forward import LossFunction, unwrap
from drpo_megatron.trainer.loss_methods import drpo_formula, plain_logprobs
from drpo_megatron.trainer.platform import optimizer_scope
from drpo_megatron.trainer.trainer import Trainer
from drpo_megatron.trainer.work import Work
from drpo_megatron.types import PackedBatch


def bare_step(trainer: Trainer, work: Work, loss: LossFunction) -> None:
    """Forward, backward and update over what `trainer._work` packed beforehand."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    trainer._run(work, loss, forward_only=False)
    with optimizer_scope():
        trainer.optimizer.step()


def plain_loss(trainer: Trainer) -> LossFunction:
    """Logits of Megatron's output layer, log-softmax, DRPO by its formula."""
    model, group = unwrap(trainer.chunks[-1]), trainer.layout.tp

    def loss(batch: PackedBatch, hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = _logits(model, hidden, head).squeeze(1).float()
        there = [values.to(hidden.device) for values in (batch.behavior_logprobs, batch.advantages, batch.weights)]
        start = group.rank() * logits.shape[-1]
        logprobs = plain_logprobs(logits, batch.targets.to(hidden.device).clamp(min=0), start, group)
        return (drpo_formula(logprobs, there[0], there[1]) * there[2]).sum(), None

    return loss


def cross_entropy_loss(trainer: Trainer) -> LossFunction:
    """Megatron's output layer and loss, as GPTModel with labels computes them."""
    model = unwrap(trainer.chunks[-1])

    def loss(batch: PackedBatch, hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = _logits(model, hidden, head)
        targets = batch.targets.to(hidden.device).clamp(min=0).unsqueeze(1)
        losses = vocab_parallel_cross_entropy(logits.float(), targets)
        return (losses.squeeze(1) * batch.weights.to(hidden.device)).sum(), None

    return loss


def _logits(model: Any, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[T, 1, V/TP]. A tied model's output layer has no weight of its own."""
    tied = model.share_embeddings_and_output_weights
    logits, _ = model.output_layer(hidden.unsqueeze(1), weight=head if tied else None)
    return logits
