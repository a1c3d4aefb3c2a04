"""The padding token's row of the embedding, which is not trained as an input: what transformers' padding_idx does.

transformers makes every embedding of ours with padding_idx = config.pad_token_id, so that the gradient of that row is
without the positions that hold the token, also where it stands in a prompt or was drawn. A checkpoint that is trained
there and here has to move alike. As an output the token is trained as any other: a tied row moves by that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def hold_padding_row(embedding: Any, pad_token_id: int, tp_group: dist.ProcessGroup, sequence_parallel: bool) -> None:
    """No gradient flows from positions of the token into `embedding`, Megatron's LanguageModelEmbedding.

    Its output is [T, 1, H] of input_ids [1, T]; under sequence parallelism this rank's part of T.
    """

    def hold(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        is_padding = (input_ids == pad_token_id).T
        if sequence_parallel:
            is_padding = is_padding.chunk(tp_group.size())[tp_group.rank()]
        output.register_hook(lambda gradient: gradient.masked_fill(is_padding[..., None], 0.0))

    embedding.register_forward_hook(hold, with_kwargs=True)
