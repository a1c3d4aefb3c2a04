"""The counts of the model that Megatron really builds, at any world size, without a single byte of weights.

The trainer's own `build_layout`, `build_model` and `build_optimizer` run on torch's meta device over its fake process
group, one rank after another. They fill global state, so they do it in a process of their own:

    [counts] = built_stages([config])        # {stage: BuiltStage}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.parameters import stage_parameters

TIMEOUT_S = 300
_PADDING_SHARE = 1e-6
"""Of a rank's optimizer states. Megatron's buffer pads each tensor to 64 elements, and whose share the padding falls into
is its own affair: a gated delta net's few numbers a head make such tensors."""


@dataclass(frozen=True, slots=True)
class BuiltStage:
    """Numbers of elements on the first rank of a stage."""

    parameters: int
    gradients: int
    """Of the gradient buffers, without their padding."""
    optimizer: int
    """FP32 masters; there are as many of each of the two moments."""


def built_stages(configs: Sequence[Config]) -> list[dict[int, BuiltStage]]:
    """Of every config, the counts of its first, second and last stage (those between are like the second).

    Raises: ValueError with Megatron's own message where it refuses to build a model.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "drpo_megatron.planner.built"],
        input="\n".join(config.model_dump_json() for config in configs),
        capture_output=True,
        text=True,
        env=environment,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise ValueError(f"Megatron can't build this layout: {done.stderr.strip().splitlines()[-1]}")
    lines = done.stdout.splitlines()[-len(configs) :]
    return [{int(stage): BuiltStage(**counts) for stage, counts in json.loads(line).items()} for line in lines]


def differences(model: Model, config: Config, built: dict[int, BuiltStage]) -> list[str]:
    """Where the planner's counts are not those of the built model; [] where all are equal (less padding)."""
    found = []
    for stage, counts in built.items():
        planned = stage_parameters(model, config, stage)
        expected = BuiltStage(planned.total, planned.trained, planned.optimizer)
        for name, number in asdict(counts).items():
            wanted = getattr(expected, name)
            allowed = _PADDING_SHARE * wanted if name == "optimizer" else 0
            if abs(number - wanted) > allowed:
                found.append(f"stage {stage}: {wanted:,} {name} planned, {number:,} built")
    return found


def _build(config: Config) -> dict[int, BuiltStage]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoConfig

    from drpo_megatron.models import get_family
    from drpo_megatron.trainer import platform as platforms
    from drpo_megatron.trainer import setup

    platform, parallel = platforms.activate_meta(), config.parallel
    hf_config = AutoConfig.from_pretrained(config.model.hf_path, local_files_only=True, trust_remote_code=False)
    family = get_family(hf_config, f"{config.model.hf_path}/config.json")
    stages = sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1})
    built = {}
    for stage in stages:
        rank = stage * parallel.num_ranks // parallel.pipeline  # Stages are Megatron's outermost dimension.
        dist.init_process_group("fake", rank=rank, world_size=parallel.num_ranks, store=FakeStore())
        layout = setup.build_layout(parallel, seed=0)
        with platform.device:
            chunks = setup.build_model(config, family, hf_config, layout, platform)
            is_bf16 = config.trainer.dtype == "bf16"
            optimizer = setup.build_optimizer(config.trainer.optimizer, chunks, layout, is_bf16)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        groups = [group for part in optimizer.chained_optimizers for group in part.optimizer.param_groups]
        built[stage] = BuiltStage(
            parameters=sum(parameter.numel() for parameter in parameters),
            gradients=sum(parameter.main_grad.numel() for parameter in parameters if parameter.requires_grad),
            optimizer=sum(shard.numel() for group in groups for shard in group["params"]),
        )
        dist.destroy_process_group()
    return built


if __name__ == "__main__":
    for line in sys.stdin:
        stages = _build(Config.model_validate_json(line))
        print(json.dumps({stage: asdict(counts) for stage, counts in stages.items()}))
