"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from drpo_megatron.config import Config
from drpo_megatron.planner.loss import chunk_line
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.plan import Plan, StagePlan

_NUM_PROPOSALS = 10
_KINDS = {
    "tensor": "tensor (gather, scatter)",
    "expert": "expert (all-to-all)",
    "context": "context (keys, values)",
    "pipeline": "pipeline (send)",
    "data": "data (gradients, weights)",
    "expert_data": "data of experts",
}


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def print_plan(config: Config, model: Model, plan: Plan) -> None:
    console = Console()
    parallel, engine = plan.parallel, plan.rollout
    sizes = ("tensor", "pipeline", "context", "expert", "expert_tensor")
    layout = ", ".join(f"{size} {getattr(parallel, size)}" for size in sizes if getattr(parallel, size) > 1)
    console.print(
        f"{config.run.name}: {model.num_parameters / 1e9:.2f} B parameters, {model.num_active_parameters / 1e9:.2f} B "
        f"active; {plan.num_gpus} GPUs = {parallel.num_ranks} trainer ranks ({layout or 'no model parallelism'}, data "
        f"{parallel.data}) {'shared with' if plan.is_colocated else '+'} {engine.num_replicas} engine(s) of "
        f"{engine.gpus_per_replica}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory_table(config, plan))
    console.print(_recompute_line(plan), highlight=False, soft_wrap=True)
    console.print(_loss_line(config, model, plan), highlight=False, soft_wrap=True)
    console.print(_engine_line(plan), highlight=False, soft_wrap=True)
    console.print(_traffic_table(plan))
    console.print(_time_lines(plan), highlight=False, soft_wrap=True)


def print_proposals(proposals: Sequence[Plan], plan: Plan) -> None:
    """The fastest layouts of `search`, with the recipe's own estimate to compare."""
    if not proposals:
        print("no layout fits on so many GPUs; give more with --gpus, or a smaller trainer.max_tokens_per_micro_batch")
        return
    table = Table(title=f"layouts that fit, by estimated step time (the recipe's: {plan.time.total_s:.0f} s)")
    for heading in ("tensor", "pipeline", "context", "expert", "data", "recompute", "GiB a rank", "bubble", "s a step"):
        table.add_column(heading, justify="right")
    for proposal in proposals[:_NUM_PROPOSALS]:
        parallel = proposal.parallel
        sizes = (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert, parallel.data)
        time = proposal.time
        memory = f"{proposal.fullest.total / 2**30:.1f}"
        table.add_row(*map(str, sizes), proposal.recompute, memory, f"{time.bubble_share:.0%}", f"{time.total_s:.0f}")
    Console().print(table)
    if len(proposals) > _NUM_PROPOSALS:
        print(f"and {len(proposals) - _NUM_PROPOSALS} slower ones (--json has all)")


def _memory_table(config: Config, plan: Plan) -> Table:
    """One column a stage, equal neighbours once."""
    usable = gib(plan.usable_bytes)
    table = Table(title=f"one rank of a stage, GiB (usable: {usable} of {gib(plan.gpu_bytes)})")
    table.add_column("")
    groups: list[tuple[list[int], StagePlan]] = []
    for index, stage in enumerate(plan.stages):
        if groups and groups[-1][1].total == stage.total:
            groups[-1][0].append(index)
        else:
            groups.append(([index], stage))
    for indices, _ in groups:
        last = f" to {indices[-1]}" if len(indices) > 1 else ""
        table.add_column(f"stage {indices[0]}{last}", justify="right")
    stages = [stage for _, stage in groups]
    rows = {
        "parameters": [s.states.parameters for s in stages],
        "gradients": [s.states.gradients for s in stages],
        "optimizer states": [s.states.optimizer for s in stages],
        f"activations, recompute={config.model.recompute}": [s.activations for s in stages],
        "loss kernel": [s.loss for s in stages],
    }
    table.add_row("billion parameters", *(f"{s.counts.total / 1e9:.3f}" for s in stages))
    for name, counts in rows.items():
        table.add_row(name, *(f"{count / 2**30:.1f}" for count in counts))
    table.add_section()
    table.add_row("all", *(f"{s.total / 2**30:.1f}{'' if s.total <= plan.usable_bytes else ' !'}" for s in stages))
    return table


def _recompute_line(plan: Plan) -> str:
    kinds = ", ".join(f"{name} {gib(count)}" for name, count in plan.fullest.activations_by_recompute.items())
    return f"activations of the fullest stage by model.recompute: {kinds}"


def _loss_line(config: Config, model: Model, plan: Plan) -> str:
    last = plan.stages[-1]
    return (
        f"loss on the last stage: {gib(last.loss)}; over plain logits it would be {gib(last.plain_loss)}; "
        f"{chunk_line(model.vocab_size, config)}"
    )


def _engine_line(plan: Plan) -> str:
    rollout = plan.rollout
    return (
        f"engines, a GPU: weights {gib(rollout.weight_bytes)}, keys and values {gib(rollout.cache_bytes)} at "
        f"{rollout.cache_bytes_per_token / 1024:.0f} KiB a token: {rollout.concurrency} sequences of "
        f"{plan.work.longest_tokens} tokens at once in each of {rollout.num_replicas}{_sharing(plan)}"
    )


def _sharing(plan: Plan) -> str:
    """Ranks and engines take turns, so a GPU holds the larger of two things, not both."""
    if not plan.is_colocated:
        return ""
    states = max(stage.states.total for stage in plan.stages)
    return (
        f"\ncolocated: {gib(states)} of parameters, gradients and optimizer states stay on a GPU; beside them the larger of "
        f"the ranks' activations and loss and the engine's weights and cache, which it releases while the ranks train: "
        f"rollout.engine.flags.mem-fraction-static of at most {plan.engine_share:g}"
    )


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="a rank sends in a step")
    for heading in ("kind", "ranks", "over", "GiB"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, name in _KINDS.items():
        found = [stage.traffic[kind] for stage in plan.stages if kind in stage.traffic]
        if found:
            most = max(found, key=lambda traffic: traffic.bytes)
            link = "NVLink" if most.is_within_node else "network"
            table.add_row(name, str(most.group), link, f"{most.bytes / 2**30:.1f}")
    return table


def _time_lines(plan: Plan) -> str:
    time, work = plan.time, plan.work
    return (
        f"a step: {work.num_sequences} sequences, about {work.num_tokens / 1e6:.1f} M tokens, {work.num_updates} optimiser "
        f"step(s) of {work.num_micro_batches} micro-batch(es) a data-parallel rank; pipeline bubble {time.bubble_share:.0%}\n"
        f"estimate: {time.total_s:.0f} s a step = rollout {time.rollout_s:.0f} + training {time.train_s:.0f} (matmuls "
        f"{time.compute_s:.0f}, communication {time.communication_s:.0f}) + weights to engines {time.sync_s:.0f}; training "
        f"MFU {time.mfu:.0%}; {plan.tokens_per_s_per_gpu:.0f} tokens/s a GPU"
    )
