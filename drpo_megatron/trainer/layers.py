"""The two layers that Megatron-Core's local spec lacks where Transformer Engine is not installed: a norm that knows
sequence parallelism, and attention over packed sequences (THD) with context parallelism. Parameter names are those of
the local spec. Import only after `platform.activate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight is marked for the gradient all-reduce of sequence parallelism.

    transformer/torch_norm.py refuses sequence parallelism because torch's norm carries no such mark. Zero-centred norms
    scale by 1 + weight, in FP32, as Qwen3.5's do.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


@dataclass
class PackedSequences(PackedSeqParams):
    """PackedSeqParams that remembers, for all layers of a micro-batch, how its rows lie in a padded rectangle."""

    num_rows: int = 0
    """T before context parallel slicing, the last of `cu_seqlens_q`: known on the host, so that no GPU is asked."""

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[S] int64, whole sequences (before context parallel slicing)."""
        return (self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]).long()

    @cached_property
    def rectangle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequence, position) of every whole row, both [T] int64."""
        device = self.cu_seqlens_q.device
        numbers = torch.arange(len(self.lengths), device=device)
        sequence = torch.repeat_interleave(numbers, self.lengths, output_size=self.num_rows)
        position = torch.arange(len(sequence), device=device) - self.cu_seqlens_q[:-1].long()[sequence]
        return sequence, position

    def zigzag_rows(self, cp_size: int) -> torch.Tensor:
        """[T] int64: `gathered[rows]` puts rows that were gathered in rank order back in sequence order.

        Rank c holds chunks c and 2 cp - 1 - c of every sequence.
        """
        cached = self.__dict__.get("_zigzag_rows")
        if cached is None:
            sequence, position = self.rectangle
            chunk = self.lengths[sequence] // (2 * cp_size)
            index = position // chunk.clamp(min=1)
            late = index >= cp_size
            rank = torch.where(late, 2 * cp_size - 1 - index, index)
            local_start = self.cu_seqlens_q[:-1].long()[sequence] // cp_size
            cached = rank * (len(sequence) // cp_size) + local_start + position % chunk.clamp(min=1) + late * chunk
            self.__dict__["_zigzag_rows"] = cached
        return cached


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences: one scaled_dot_product_attention over a padded rectangle.

    Context parallel: keys and values are gathered over the group (reduce-scattered in the backward pass); queries stay.
    Departs from transformer/dot_product_attention.py, which refuses packed sequences and CP > 1.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *unused: Any, pg_collection: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.scale = kwargs.get("softmax_scale") or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """query [T/CP, heads, D], key and value [T/CP, groups, D] -> [T/CP, heads * D]."""
        assert packed_seq_params is not None, "PackedAttention takes packed sequences (THD) only"
        packed, cp_size = packed_seq_params, self.cp_group.size()
        sequence, position = packed.rectangle
        shape = (len(packed.lengths), int(packed.max_seqlen_q))
        if cp_size == 1:
            inside = (sequence, position)
            context = F.scaled_dot_product_attention(
                *(_by_head(x, inside, shape) for x in (query, key, value)),
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            )
        else:
            rows = packed.zigzag_rows(cp_size)
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group)[rows] for x in (key, value))
            num_mine, rank = query.shape[0], self.cp_group.rank()
            mine = torch.empty_like(rows)
            mine[rows] = torch.arange(len(rows), device=rows.device)
            mine = mine[rank * num_mine : (rank + 1) * num_mine]
            keys = _by_head(key, (sequence, position), shape), _by_head(value, (sequence, position), shape)
            # A query sits at the place of its local row; its true position is in the mask.
            local_start = (packed.cu_seqlens_q[:-1].long() // cp_size)[sequence[mine]]
            inside = (sequence[mine], torch.arange(num_mine, device=rows.device) - local_start)
            width = shape[1] // cp_size
            true_position = position.new_zeros(shape[0], width).index_put(inside, position[mine])
            mask = (true_position[:, :, None] >= torch.arange(shape[1], device=rows.device)).unsqueeze(1)
            context = F.scaled_dot_product_attention(
                _by_head(query, inside, (shape[0], width)), *keys, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
        return context.transpose(1, 2)[inside].flatten(1)


def rectangle(rows: torch.Tensor, inside: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """[T, ...] -> [S, L, ...], zeros where a sequence is shorter than L."""
    return rows.new_zeros(*shape, *rows.shape[1:]).index_put(inside, rows)


def _by_head(rows: torch.Tensor, inside: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """[T, heads, D] -> [S, heads, L, D]."""
    return rectangle(rows, inside, shape).transpose(1, 2)


def use_torch_layers(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The local block spec with its norms and core attention replaced by the ones above."""
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if attention.q_layernorm is not None and "Identity" not in attention.q_layernorm.__name__:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
