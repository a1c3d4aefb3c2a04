"""What autograd really saves in one forward pass on CPU ranks, beside the planner's estimate of it.

    python tools/measure_activations.py examples/quickstart.yaml
    python tools/measure_activations.py examples/quickstart.yaml trainer.dtype=bf16 model.recompute=selective

The planner's tensor lists (drpo_megatron/planner/activations.py) stand or fall with these figures. Reads config.json of
the model, makes random weights, and runs one micro-batch of random tokens in sequences of one length on one process;
tests/planner starts several.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from drpo_megatron.config import Config, load_config
from drpo_megatron.models import get_family
from drpo_megatron.planner.activations import micro_batch_bytes
from drpo_megatron.planner.model import read_model
from drpo_megatron.trainer import setup
from drpo_megatron.trainer.platform import activate


def saved_bytes(config: Config, num_sequences: int = 4) -> int:
    """Storage that the graph of one forward pass of this rank's model keeps, weights not counted.

    The default process group must be up. A micro-batch of trainer.max_tokens_per_micro_batch tokens; stages of a
    pipeline are run with random hidden states in place of what they would receive.
    """
    platform = activate("cpu")
    layout = setup.build_layout(config.parallel, seed=0)
    hf_config = AutoConfig.from_pretrained(config.model.hf_path, local_files_only=True, trust_remote_code=False)
    [chunk] = setup.build_model(config, get_family(hf_config), hf_config, layout, platform)
    torch.manual_seed(0)
    for name, parameter in chunk.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return _saved_by(lambda: _forward(chunk, config, hf_config, num_sequences), chunk)


def _forward(chunk: Any, config: Config, hf_config: Any, num_sequences: int) -> torch.Tensor:
    from drpo_megatron.trainer.forward import unwrap
    from drpo_megatron.trainer.layers import PackedSequences

    parallel, model = config.parallel, unwrap(chunk)
    num_tokens = config.trainer.max_tokens_per_micro_batch
    longest = num_tokens // num_sequences
    local = num_tokens // parallel.context
    bounds = torch.arange(0, num_tokens + 1, longest, dtype=torch.int32)
    if not model.pre_process:
        rows = local // (parallel.tensor if parallel.sequence else 1)
        dtype = torch.bfloat16 if config.trainer.dtype == "bf16" else torch.float32
        model.set_input_tensor(torch.randn(rows, 1, hf_config.hidden_size, dtype=dtype, requires_grad=True))
    return chunk(
        input_ids=torch.randint(hf_config.vocab_size, (1, local)),
        position_ids=(torch.arange(local) % longest)[None],
        attention_mask=None,
        packed_seq_params=PackedSequences(
            qkv_format="thd",
            num_rows=int(bounds[-1]),
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    )


def _saved_by(forward: Any, chunk: Any) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages: dict[int, Any] = {}  # Held, so that no address is used twice.

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    one_process = ["parallel={num_ranks: 1}", "trainer.backend=cpu"]
    config = load_config(arguments[0], [*arguments[1:], *one_process])
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    planned = micro_batch_bytes(read_model(config.model.hf_path), config, stage=0)
    measured = saved_bytes(config)
    dist.destroy_process_group()
    print(json.dumps({"planned_bytes": planned, "measured_bytes": measured, "ratio": planned / measured}))


if __name__ == "__main__":
    main(sys.argv[1:])
