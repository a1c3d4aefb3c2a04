"""Builds what a trainer rank needs from a config: process groups, Megatron model chunks, optimizer, schedule.

The only place where Megatron's global state is made. `platform.activate` runs first, so megatron is imported inside
the functions, after it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from drpo_megatron.config.sections import Config, OptimizerSection, ParallelSection
from drpo_megatron.models import Family
from drpo_megatron.precision.recipes import find_hardware, megatron_flags, resolve
from drpo_megatron.trainer import platform as platforms
from drpo_megatron.trainer.platform import Platform


@dataclass(frozen=True, slots=True)
class Layout:
    """This rank's process groups (megatron.core ProcessGroupCollection) and its coordinates."""

    groups: Any
    parallel: ParallelSection
    token_multiple: int = 1
    """What the rows of a rank's matrices must be a multiple of: `Engine.token_multiple` of a recipe that runs for real."""

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.groups.tp

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def length_multiple(self) -> int:
        """What the length of a packed micro-batch (before context parallel slicing) must be a multiple of."""
        tensor = self.parallel.tensor if self.parallel.sequence else 1
        rows = tensor * self.parallel.context * self.token_multiple
        return math.lcm(rows, tensor * self.sequence_multiple)

    @property
    def sequence_multiple(self) -> int:
        """What the length of every single sequence must be a multiple of: zig-zag context parallelism cuts 2 x CP."""
        return 2 * self.parallel.context if self.parallel.context > 1 else 1


def initialize_distributed(config: Config, rank: int, world_size: int, store: dist.Store, timeout_s: float) -> Platform:
    """Activate the platform and join the default process group. Call once a process, before `Trainer`."""
    platform = platforms.activate(config.trainer.backend, local_rank=rank % max(torch.cuda.device_count(), 1))
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    return platform


def build_layout(parallel: ParallelSection, seed: int, timeout_s: float = 3600.0, token_multiple: int = 1) -> Layout:
    """Megatron's parallel state for `parallel` over the default process group, and its seeded generators.

    A collective in any of its groups that waits longer than `timeout_s` raises.
    """
    _quiet_megatron()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    if dist.get_world_size() != parallel.num_ranks:
        raise ValueError(f"parallel.num_ranks={parallel.num_ranks}, but {dist.get_world_size()} ranks are running")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=_has_gloo(),
        distributed_timeout_minutes=timeout_s / 60,  # Its own default is 30 minutes, whatever the default group has.
    )
    if _has_gloo():
        _limit_every_group(timedelta(seconds=timeout_s))
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1000 * parallel_state.get_pipeline_model_parallel_rank())
    return Layout(ProcessGroupCollection.use_mpu_process_groups(), parallel, token_multiple)


def _limit_every_group(timeout: timedelta) -> None:
    """parallel_state.py:1278 (megatron-core 0.16.1) makes the experts' gloo groups without the time-out it was given."""
    for group in dist.distributed_c10d._world.pg_map:
        if group is not dist.group.WORLD:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def _has_gloo() -> bool:
    """Beside the fake process group, over which the planner builds ranks that don't exist, gloo would wait for them."""
    return dist.get_backend() != "fake"


def _quiet_megatron() -> None:
    """Megatron warns once a module that Transformer Engine and apex are missing: on a CPU that is the plan."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
    logging.getLogger("megatron").setLevel(logging.WARNING)


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """The vocabulary is padded to a multiple of TP, of 128 x TP where it is large enough for GEMM tiles to matter."""
    multiple = tensor_parallel * (128 if vocab_size >= 1024 else 1)
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: Config, family: Family, hf_config: Any, platform: Platform) -> Any:
    """Megatron's TransformerConfig of an HF model under this layout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel, on_gpu = config.parallel, platform.name == "gpu"
    dtype = torch.bfloat16 if config.trainer.dtype == "bf16" else torch.float32
    kwargs = dict(family.transformer_config_kwargs(hf_config))
    is_moe = kwargs.get("num_moe_experts") is not None
    recompute: dict[str, Any] = {}
    if config.model.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    elif config.model.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if is_moe:
        kwargs |= {
            "moe_token_dispatcher_type": config.model.moe_token_dispatcher,
            "moe_router_load_balancing_type": "aux_loss" if config.model.moe_aux_loss_coeff else "none",
            "moe_aux_loss_coeff": config.model.moe_aux_loss_coeff,
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": platform.transformer_engine,
            "moe_permute_fusion": platform.transformer_engine,
        }
    if platform.transformer_engine:
        precision = resolve(config.precision, find_hardware(config.trainer.backend))
        kwargs |= megatron_flags(precision, config.precision, kwargs.get("num_moe_experts"))
    # Send buffers must outlive their sends on gloo, which Megatron's early release forgets: VPP gradients go wrong.
    pipeline = {"deallocate_pipeline_outputs": on_gpu, "variable_seq_lengths": False}
    if parallel.virtual_pipeline:
        pipeline |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(
        **kwargs,
        **recompute,
        **pipeline,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Our weights already hold 1 / (global count), so that no rank has to divide by what it can't know.
        calculate_per_token_loss=True,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=platform.transformer_engine,
        persist_layer_norm=False,
        gradient_accumulation_fusion=on_gpu and _has_fused_weight_gradient(),
    )


def _has_fused_weight_gradient() -> bool:
    """NVIDIA's apex built with its CUDA extensions. (The package named apex in the public index is something else.)"""
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True


def build_model(config: Config, family: Family, hf_config: Any, layout: Layout, platform: Platform) -> list[Any]:
    """This rank's model chunks (one, or `virtual_pipeline` many), wrapped in Megatron's DDP, weights not yet loaded."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    models = build_policy_models(config, family, hf_config, layout, platform)
    optimizer = config.trainer.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        use_distributed_optimizer=optimizer.distributed,
        fp8_param_gather=models[0].config.fp8_param,
    )
    chunks = [
        DistributedDataParallel(
            model.config,
            ddp_config,
            model.to(platform.device),
            disable_bucketing=chunk > 0,
            pg_collection=layout.groups,
        )
        for chunk, model in enumerate(models)
    ]
    _connect_schedule(models[0].config, chunks, optimizer.overlap_grad_reduce)
    return chunks


def build_policy_models(
    config: Config, family: Family, hf_config: Any, layout: Layout, platform: Platform
) -> list[Any]:
    """The bare PolicyModels of this rank's chunks. Under `torch.device("meta")` they take no memory."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from drpo_megatron.trainer.forward import PolicyModel
    from drpo_megatron.trainer.padding import hold_padding_row

    megatron_config = transformer_config(config, family, hf_config, platform)
    model_kwargs = dict(family.gpt_model_kwargs(hf_config))
    model_kwargs["vocab_size"] = padded_vocab_size(model_kwargs["vocab_size"], config.parallel.tensor)
    stages, stage = layout.groups.pp.size(), layout.groups.pp.rank()
    num_chunks = config.parallel.virtual_pipeline or 1
    models = []
    for chunk in range(num_chunks):
        vp_stage = chunk if config.parallel.virtual_pipeline else None
        with _attention_only(megatron_config):
            spec = get_gpt_decoder_block_spec(
                megatron_config,
                use_transformer_engine=platform.transformer_engine,
                normalization="RMSNorm",
                vp_stage=vp_stage,
                pp_rank=stage,
            )
        if not platform.transformer_engine:
            from drpo_megatron.trainer.layers import use_torch_layers

            spec = use_torch_layers(spec)
        if megatron_config.experimental_attention_variant == "gated_delta_net":
            from drpo_megatron.trainer.delta_net import use_delta_nets

            spec = use_delta_nets(spec, megatron_config, vp_stage, stage)
        model = PolicyModel(
            config=megatron_config,
            transformer_layer_spec=spec,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == stages - 1 and chunk == num_chunks - 1,
            pg_collection=layout.groups,
            vp_stage=vp_stage,
            **model_kwargs,
        )
        _mark_shards(model)
        if platform.transformer_engine:
            _fuse_weight_gradients(model)
        pad_token_id = hf_config.get_text_config().pad_token_id
        if model.pre_process and pad_token_id is not None:
            hold_padding_row(model.embedding, pad_token_id, layout.groups.tp, config.parallel.sequence)
        if config.model.freeze_router:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".router." not in name)
        models.append(model)
    return models


@contextlib.contextmanager
def _attention_only(megatron_config: Any) -> Iterator[None]:
    """A spec in which all layers are attention, whatever the config says: Megatron-Core 0.19 refuses to make one of a
    config with another variant (gpt_layer_specs.py:572); `use_delta_nets` then replaces those that are not."""
    variant = megatron_config.experimental_attention_variant
    megatron_config.experimental_attention_variant = None
    try:
        yield
    finally:
        megatron_config.experimental_attention_variant = variant


def _fuse_weight_gradients(model: Any) -> None:
    """Transformer Engine adds weight gradients to `main_grad` inside the GEMM that makes them.

    Not by the config's gradient_accumulation_fusion: Megatron's own head (layers.py:924), which is never called here,
    would then demand apex.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _mark_shards(model: Any) -> None:
    """Say of every weight how it is shared out, where Megatron forgets to.

    Tensor-parallel shards: without the mark the gradient norm counts the shard of rank 0 only. Megatron marks weights
    while it initialises them, which we leave to the checkpoint; the experts' weights of Transformer Engine it marks since
    0.19, before that Transformer Engine did, and from 2.15 on nobody. Experts: at EP = 1 Megatron takes them for dense
    weights (layers.py:829), whose gradients are not summed over tensor-parallel ranks, although with ETP < TP each of
    these saw tokens of its own. As experts they are always summed over the expert-data-parallel group; and their
    optimizer is always one of its own, so that its state can move between any two EP sizes.
    """
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_tensor_model_parallel_attributes,
    )

    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            weight, axis = module.weight, int(isinstance(module, RowParallelLinear))
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, axis, 1)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            # Without expert tensor parallelism, too: every rank of the dense group then has experts of its own.
            parameter.tensor_model_parallel = True


def _connect_schedule(megatron_config: Any, chunks: list[Any], overlap: bool) -> None:
    from megatron.core.distributed import finalize_model_grads

    def finalize(model: Any, num_tokens: Any = None, **groups: Any) -> None:
        # num_tokens is Megatron's divisor; ours is in the weights already.
        finalize_model_grads(model, None, **groups)

    megatron_config.finalize_model_grads_func = finalize
    if overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        grad_sync = [chunk.start_grad_sync for chunk in chunks]
        megatron_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            megatron_config.grad_sync_func = grad_sync


def build_optimizer(section: OptimizerSection, chunks: list[Any], layout: Layout, bf16: bool) -> Any:
    """Megatron's (chained: dense, expert) AdamW with FP32 masters under BF16, sharded over data parallel if asked."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=section.distributed,
    )
    with platforms.optimizer_scope():
        optimizer = get_megatron_optimizer(optimizer_config, chunks, use_gloo_process_groups=_has_gloo())
        for (
            part
        ) in optimizer.chained_optimizers:  # Else the moments are missing from a checkpoint before the first step.
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def build_schedule(section: OptimizerSection, optimizer: Any, total_steps: int) -> Any:
    """Megatron's learning-rate schedule: linear warm-up, then constant, cosine or linear decay over `total_steps`."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=min(section.min_lr, section.lr),
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=max(total_steps, section.warmup_steps + 1),
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
