"""From a packed micro-batch to hidden states, in the form that Megatron's pipeline schedules call.

Import only after `platform.activate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from drpo_megatron.trainer.layers import PackedSequences
from drpo_megatron.trainer.routing_replay import RoutingReplay
from drpo_megatron.trainer.transfer import to_device
from drpo_megatron.types import PackedBatch

LossFunction = Callable[[PackedBatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]
"""(batch, hidden [T, H] or [T/TP, H], head weight [V/TP, H]) -> (loss, whatever the caller collects)."""


class PolicyModel(GPTModel):
    """Megatron's GPTModel whose last stage returns hidden states: the loss kernel owns the LM head."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """[V/TP, H]: this rank's rows of the LM head, which a tied model shares with its embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def unwrap(model: Any) -> Any:
    """The PolicyModel inside DDP."""
    while hasattr(model, "module"):
        model = model.module
    return model


def hidden_states(model: Any, batch: PackedBatch, device: torch.device) -> torch.Tensor:
    """The forward pass of one model chunk over a packed micro-batch: hidden states [T, 1, H] from the last one."""
    cu_seqlens = to_device(batch.cu_seqlens, device)
    return model(
        input_ids=to_device(batch.input_ids, device)[None],
        position_ids=to_device(batch.position_ids, device)[None],
        attention_mask=None,
        packed_seq_params=PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            num_rows=int(batch.cu_seqlens[-1]),
        ),
    )


def run_micro_batches(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
    *,
    routing: RoutingReplay | None = None,
    length: int,
    forward_only: bool,
    device: torch.device,
) -> list[Any]:
    """One forward(-backward) over all micro-batches by Megatron's schedule; what the loss function collected.

    Args:
        routing: of a model with experts; told of every forward pass.
        length: T of every micro-batch before context parallel slicing; pipeline stages agree on it beforehand.

    Returns:
        A list in micro-batch order on the last pipeline stage, empty on the others. Gradients are summed and reduced
        over data and context parallel ranks when not `forward_only`.
    """

    def forward_step(batches: Iterator[PackedBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        with routing.during_forward(model, batch) if routing else nullcontext():
            hidden = hidden_states(model, batch, device)
        return hidden, partial(finish, batch, unwrap(model))

    def finish(batch: PackedBatch, model: PolicyModel, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        loss, collected = loss_function(batch, hidden.squeeze(1), model.head_weight())
        # The count is Megatron's divisor, which our finalize ignores.
        return loss, torch.zeros((), dtype=torch.int, device=device), collected

    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
