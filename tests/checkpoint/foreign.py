"""A checkpoint as Megatron-LM saves one, by Megatron-Core alone: python foreign.py DIR moe|dense

Writes DIR/iter_0000007, DIR/latest_checkpointed_iteration.txt, and the parameters by name in DIR/parameters.pt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

VOCAB = 128
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, moe_grouped_gemm=False)
# Saving asks a GPU, which nothing here needs.
torch.cuda.synchronize = lambda *args: None  # type: ignore[assignment]
torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def main(directory: Path, is_moe: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        ffn_hidden_size=48,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        **(EXPERTS if is_moe else {}),
    )
    spec = get_gpt_layer_local_spec(4 if is_moe else None, False, True, normalization="RMSNorm")
    model = GPTModel(config, spec, VOCAB, 64, position_embedding_type="rope", share_embeddings_and_output_weights=False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16()
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    state = {
        "args": argparse.Namespace(num_layers=3, lr=1e-3, attention_backend=AttnBackend.auto),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model.sharded_state_dict(
            metadata={"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        ),
    }
    iteration = directory / "iter_0000007"
    iteration.mkdir(parents=True)
    dist_checkpointing.save(state, str(iteration))
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    torch.save(parameters, directory / "parameters.pt")


if __name__ == "__main__":  # It starts processes of its own to write.
    main(Path(sys.argv[1]), sys.argv[2] == "moe")
